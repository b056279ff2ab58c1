"""Decide kernels where a length is symbolic: one for all its values, or one for each of two ranges where that gains enough.

Every kernel is asked at lengths over the whole range of the symbol. A split is planned only where on each side of it some length
gains at least `GAIN` of the time of attention and `WORTH` of the modelled time of the whole graph, because the second range
compiles the graph once more.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from effcompile.core.kernel import Supported
from effcompile.core.plan import Split
from effcompile.core.site import AttentionSite
from effcompile.core.sizes import Size, evaluate

GAIN, WORTH = 0.05, 0.01
LEAST, MOST = 16, 1 << 17  # the lengths that are priced, within the bounds of the symbol
NOMINAL = 1024  # what a length is priced at that no symbol of the graph gives


@dataclass(frozen=True)
class Kind:
    """Hold what decides the kernel of a site: the site as its policy leaves it, the op that kernels have to lower, the density.

    `own` names the kernel that runs it as its source spells it, or is empty where a policy changed it.
    """

    site: AttentionSite
    op: str
    density: float = 1.0
    own: str = ""


@dataclass(frozen=True)
class Priced:
    """Hold the answers of one kernel for one kind of site at the examined lengths.

    Where it declines (too short for it to pay), the price of the nearest length at which it does not stands in.
    """

    name: str
    lengths: tuple[int, ...]
    answers: tuple[Supported, ...]

    def at(self, length: int) -> float:
        """Return the seconds at a length: between examined ones a power law of the length."""
        if len(self.lengths) == 1:
            return self.answers[0].seconds
        right = min(max(1, bisect.bisect_left(self.lengths, length)), len(self.lengths) - 1)
        low, high = self.lengths[right - 1 : right + 1]
        a, b = (answer.seconds for answer in self.answers[right - 1 : right + 1])
        return a * (b / a) ** (math.log(length / low) / math.log(high / low))

    def answer(self, length: int) -> Supported:
        """Return the answer at a length; between examined ones it is modelled."""
        if len(self.lengths) == 1:
            return self.answers[0]
        if length in self.lengths:
            return self.answers[self.lengths.index(length)]
        return Supported(self.at(length))


@dataclass(frozen=True)
class Group:
    """Hold the prices of the kernels that can run a kind of site, how many sites are of it, and the symbol of its length."""

    kind: Kind
    curves: tuple[Priced, ...]
    count: int
    symbol: str | None = None

    def best(self, lengths: Sequence[int], margin: float) -> Priced:
        """Return the kernel that is nearest to the fastest over the lengths; the source's own if it is near enough."""

        def regret(curve: Priced) -> float:
            ratios = [curve.at(n) / min(other.at(n) for other in self.curves) for n in lengths]
            return sum(map(math.log, ratios)) / len(ratios)

        regrets = {curve.name: regret(curve) for curve in self.curves}
        least = min(self.curves, key=lambda curve: (regrets[curve.name], curve.name))
        own = next((curve for curve in self.curves if curve.name == self.kind.own), None)
        if own is not None and regrets[own.name] <= regrets[least.name] - math.log1p(-margin):
            return own
        return least


Ask = Callable[[Kind, AttentionSite], Mapping[str, Supported]]
"""Return the kernels that can run a kind of site, by name, where the site has the given sizes."""
Chosen = tuple[Priced, ...]  # of every group, in order


@dataclass(frozen=True)
class Decision:
    """Hold what was decided: the kernel of every group for all lengths, or below and above a split; and why not two."""

    groups: tuple[Group, ...]
    below: Chosen
    above: Chosen
    split: Split | None = None
    note: str = ""


def examined(size: Size) -> tuple[int, ...]:
    """Return the lengths at which kernels are asked: the bounds of a symbol and the powers of two between them.

    Not its known value: a plan should not depend on which length came first.
    """
    low = max(size.low, LEAST)
    high = max(low, min(size.high or MOST, MOST))
    powers = [1 << power for power in range(low.bit_length(), high.bit_length()) if low < 1 << power < high]
    return tuple(sorted({low, high, *powers}))


def length_symbol(sites: Sequence[AttentionSite], sizes: Mapping[str, Size]) -> tuple[str | None, str]:
    """Return the one symbol that the lengths of all sites depend on, or None and why there is no such one."""
    texts = dict.fromkeys(n for site in sites for n in (site.q_len, site.kv_len) if isinstance(n, str))
    if not texts:
        return None, ""
    if computed := [text for text in texts if text not in sizes]:
        return None, f"the length {computed[0]} is computed"
    if len(texts) > 1:
        return None, f"lengths depend on {' and '.join(sorted(texts))}"
    return next(iter(texts)), ""


def concrete(site: AttentionSite, values: Mapping[str, int]) -> AttentionSite:
    """Return the site with numbers for its symbolic sizes; `NOMINAL` for one that has no value."""

    def number(size: int | str) -> int:
        if isinstance(size, int):
            return size
        found = evaluate(size, values)
        return NOMINAL if found is None else found

    names = ("batch", "heads", "kv_heads", "q_len", "kv_len")
    return replace(site, **{name: number(getattr(site, name)) for name in names})  # type: ignore[arg-type]


def decide(
    kinds: Mapping[Kind, int],
    ask: Ask,
    margin: float,
    sizes: Mapping[str, Size],
    others: Callable[[Mapping[str, int]], float],
    *,
    two: bool = True,
) -> Decision:
    """Choose a kernel for every kind of site, of which there are so many.

    `margin` favors the kernel that runs a site as its source spells it; `others` prices the rest of the graph at given
    sizes; without `two`, one kernel serves all lengths.
    """
    known = {name: size.hint for name, size in sizes.items()}
    name, note = length_symbol([kind.site for kind in kinds], sizes)
    lengths = examined(sizes[name]) if name is not None else (NOMINAL,)
    groups = tuple(_group(kind, count, ask, name, lengths, known) for kind, count in kinds.items())

    def chosen(part: Sequence[int]) -> Chosen:
        return tuple(group.best(part, margin) for group in groups)

    always = chosen(lengths)
    everywhere = Decision(groups, always, always, note=note if any(len(g.curves) > 1 for g in groups) else "")
    if name is None or not two or len(lengths) < 2:
        return everywhere

    def total(kernels: Chosen, length: int) -> float:
        return sum(group.count * curve.at(length) for group, curve in zip(groups, kernels, strict=True))

    def cost(cut: int) -> float:
        below, above = chosen(lengths[:cut]), chosen(lengths[cut:])
        return sum(math.log(total(below if place < cut else above, n)) for place, n in enumerate(lengths))

    cut = min(range(1, len(lengths)), key=cost)
    below, above = chosen(lengths[:cut]), chosen(lengths[cut:])
    if below == above:
        return everywhere
    between = range(lengths[cut - 1] + 1, lengths[cut])
    at = between.start + bisect.bisect_left(between, True, key=lambda n: total(above, n) <= total(below, n))
    gains: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for n in lengths:
        worse, better = (total(above, n), total(below, n)) if n < at else (total(below, n), total(above, n))
        gains[n < at].append(((worse - better) / worse, (worse - better) / (worse + others({**known, name: n}))))
    if all(any(part >= GAIN and whole >= WORTH for part, whole in side) for side in gains.values()):
        return Decision(groups, below, above, Split(name, at, sizes[name].source))
    most = min(max(whole for _, whole in side) for side in gains.values())
    why = f"one kernel for every {name}: from {at} on another is faster, but one side would gain {max(most, 0.0):.1%} at most"
    return replace(everywhere, note=why)


def _group(
    kind: Kind, count: int, ask: Ask, name: str | None, lengths: tuple[int, ...], known: Mapping[str, int]
) -> Group:
    """Price every kernel that can run a kind of site at the examined lengths, or once where its length is no symbol."""
    moves = name is not None and name in (kind.site.q_len, kind.site.kv_len)
    places = lengths if moves else lengths[:1]
    values = [{**known, name: length} if moves and name is not None else known for length in places]
    answers = [ask(kind, concrete(kind.site, each)) for each in values]
    able = ask(kind, kind.site)
    assert able, f"no kernel runs {kind.site}"
    curves = []
    for kernel, symbolic in able.items():
        found = [(number, answer[kernel]) for number, answer in enumerate(answers) if kernel in answer]
        nearest = [
            min(found, key=lambda item, at=number: abs(item[0] - at), default=(0, symbolic))[1]  # type: ignore[misc]
            for number in range(len(answers))
        ]
        curves.append(Priced(kernel, places, tuple(nearest)))
    return Group(kind, tuple(curves), count, name if moves else None)
