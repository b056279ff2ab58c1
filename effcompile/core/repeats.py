"""Find the run of nodes that a graph repeats, by structure: class names play no part.

A transformer's layers trace to the same run of nodes again and again, at equal distances. Capture uses it to trace a layer once,
`outline-layers` to compile it once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

MIN_REPEATS = 3
MIN_NODES = 8


@dataclass(frozen=True)
class Block:
    """Hold a repetition: `count` runs of `period` nodes, from `start` on, in the list of computing nodes."""

    start: int
    period: int
    count: int

    def runs(self, nodes: Sequence[fx.Node]) -> list[Sequence[fx.Node]]:
        """Return the nodes of each repetition."""
        return [nodes[self.start + i * self.period :][: self.period] for i in range(self.count)]


def find_block(nodes: Sequence[fx.Node], signature: Callable[[fx.Node], str]) -> Block | None:
    """Return the repetition that covers most nodes; among equals the shortest period.

    `signature` gives what must agree between repetitions of a node.
    """
    numbers: dict[str, int] = {}
    keys = [numbers.setdefault(signature(node), len(numbers)) for node in nodes]
    last: dict[int, int] = {}
    gaps: Counter[int] = Counter()
    for place, key in enumerate(keys):
        if key in last:
            gaps[place - last[key]] += 1
        last[key] = place
    best: tuple[int, int, Block] | None = None
    for period, _ in gaps.most_common(12):
        if period < MIN_NODES:
            continue
        for start, stop in _equal_runs(keys, period):
            count = (stop - start) // period + 1
            if count < MIN_REPEATS:
                continue
            slack = stop - start + period - count * period
            start = _best_cut(nodes, start, slack, period)
            found = (count * period, -period, Block(start, period, count))
            if best is None or found[:2] > best[:2]:
                best = found
    return None if best is None else best[2]


def _equal_runs(keys: Sequence[int], period: int) -> list[tuple[int, int]]:
    """Return the maximal ranges [start, stop) in which each key equals the one a period later."""
    runs: list[tuple[int, int]] = []
    start: int | None = None
    for place in range(len(keys) - period + 1):
        same = place < len(keys) - period and keys[place] == keys[place + period]
        if same and start is None:
            start = place
        elif not same and start is not None:
            runs.append((start, place))
            start = None
    return [run for run in runs if run[1] - run[0] >= period]


def _best_cut(nodes: Sequence[fx.Node], start: int, slack: int, period: int) -> int:
    """Return the start within the slack at which fewest values cross from one repetition to the next."""
    place = {node: number for number, node in enumerate(nodes)}
    far = len(nodes)
    reach = [max((place.get(user, far) for user in node.users), default=-1) for node in nodes]

    def crossing(cut: int) -> int:
        return sum(1 for number in range(max(start, cut - period), cut) if reach[number] >= cut)

    candidates = range(start, start + min(slack, period - 1) + 1)
    return min(candidates, key=lambda first: (crossing(first + period), first))


def between_writes(nodes: Sequence[fx.Node], block: Block, writes: Callable[[fx.Node], bool]) -> Block:
    """Return the block turned so that its in-place writes stand as near to the end of each repetition as they can.

    A layer that writes its keys into a cache and attends to them then begins behind the writes: attention and feed-forward of one
    layer, and the projections of the next. Turning costs one repetition, the one that is cut.
    """
    places = [place for place, node in enumerate(nodes[block.start : block.start + block.period]) if writes(node)]
    if not places:
        return block
    following = [*places[1:], places[0] + block.period]
    _, last = max((after - place, place) for place, after in zip(places, following))
    if last == block.period - 1:
        return block
    return Block(block.start + last + 1, block.period, block.count - 1)


Columns = list[tuple[fx.Node, ...]]
"""One tuple a value from outside: the node that each repetition reads in the same role."""


@dataclass(frozen=True)
class Wiring:
    """Say what the repetitions read from outside, and which of their nodes are read outside."""

    inputs: Columns
    outputs: list[int]


def wire(runs: Sequence[Sequence[fx.Node]]) -> Wiring | str:
    """Return the wiring that the repetitions share, or why they are not one function."""
    place = [{node: number for number, node in enumerate(run)} for run in runs]
    inputs: dict[tuple[fx.Node, ...], None] = {}
    outputs: set[int] = set()
    for number in range(len(runs[0])):
        operands = [run[number].all_input_nodes for run in runs]
        if len({len(found) for found in operands}) != 1:
            return "the repetitions share operands differently"
        for column in zip(*operands):
            inside = {place[r].get(node) for r, node in enumerate(column)}
            if inside == {None}:
                inputs.setdefault(tuple(column))
            elif len(inside) != 1:
                return "the repetitions are wired differently"
        if any(user not in place[r] for r, run in enumerate(runs) for user in run[number].users):
            outputs.add(number)
    for run in runs[1:]:
        if any(not _same_order(a, b) for a, b in zip(runs[0], run)):
            return "the repetitions order their operands differently"
    if len({column[0] for column in inputs}) != len(inputs):
        return "the repetitions read their inputs in different roles"
    return Wiring(list(inputs), sorted(outputs))


def _same_order(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether equal operands of one node are equal operands of the other."""
    first, second = operands_of(a), operands_of(b)
    if len(first) != len(second):
        return False
    renamed: dict[fx.Node, fx.Node] = {}
    return all(renamed.setdefault(x, y) is y for x, y in zip(first, second))


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node reads, in order and with repetition."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda arg: found.append(arg) or arg)  # type: ignore[func-returns-value]
    return found
