"""Show that a counter which is written after the mask read it is loaded as it was, and that nothing else is copied.

A static cache counts its tokens in a tensor: the mask reads it before the layers add to it. A load that saw another value than the
graph read would be a wrong mask without a word, so each way in which a tensor can be written around a read has a case here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.recognize.test_near_misses import B, D, H
from tests.support.check import check_idiom, check_opaque, check_sites, flat, fresh, near, raise_attention
from tests.support.check import doubled as wide

KEYS = 16
Step = Callable[[Tensor], Tensor]


def operands(count: int | list[int] = 5, queries: int = 1) -> tuple[Tensor, ...]:
    """Return q `[B, H, queries, D]`, k and v `[B, H, KEYS, D]`, and a counter."""
    generator = torch.Generator().manual_seed(0)
    make = lambda rows: torch.randn(B, H, rows, D, generator=generator)  # noqa: E731
    return make(queries), make(KEYS), make(KEYS), torch.tensor(count)


def mask_of(counter: Tensor, queries: int = 1) -> Tensor:
    """Return `[1, 1, Q, K]`: keys up to the counter, and one more for each further query."""
    places = torch.arange(queries) + counter
    return (torch.arange(KEYS)[None] <= places[:, None])[None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def copies(graph: torch.fx.GraphModule) -> int:
    return sum(1 for node in graph.graph.nodes if node.target is torch.ops.aten.clone.default)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_counter_written_after_the_read_is_copied_once(queries: int) -> None:
    """As transformers' StaticCache does: one mask for all layers, a counter for each, only the first of which is read."""

    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor) -> tuple[Tensor, ...]:
        mask = mask_of(counter, queries)
        counter.add_(queries)
        out = attend(q, k, v, mask)
        return attend(out, k, v, mask), counter + 0

    more = [operands(count, queries) for count in (0, KEYS - queries, KEYS + 3, -2)]
    raised = check_idiom(attention, operands(5, queries), mask="causal(offset=t0)", more=more, sites=2)
    assert copies(raised.program.entries[0].graph) == 1
    for call in raised.calls(*fresh(operands(7, queries))):
        assert call.loads[0].item() == 7


def test_the_value_of_each_read_is_known_whatever_is_written_around_it() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor) -> tuple[Tensor, ...]:
        first = mask_of(counter)
        counter.add_(2)
        second = mask_of(counter)
        position = torch.arange(1) + counter  # a copy: the writes below do not reach it
        counter.mul_(2)
        third = (torch.arange(KEYS)[None] <= position[:, None])[None, None]
        found = [attend(q, k, v, mask) for mask in (first, second, third, mask_of(counter))]
        counter.zero_()
        return (*found, counter + 0)

    more = [operands(count) for count in (0, 3, 20)]
    raised = check_idiom(attention, operands(), more=more, sites=4)
    names = ["t0", "(t0 + 2)", "(t0 + 2)", "((2 * t0) + 4)"]
    shown = [str(site.mask).replace("(t0 * 2)", "(2 * t0)") for site in raised.sites]
    assert shown == [f"causal(offset={name})" for name in names]


def test_layers_that_share_a_counter_read_it_one_further_each() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor) -> Tensor:
        for _ in range(3):
            q = attend(q, k, v, mask_of(counter))
            counter.add_(1)
        return q

    raised = check_idiom(attention, operands(), more=[operands(0)], sites=3)
    assert [str(site.mask) for site in raised.sites] == [
        "causal(offset=t0)",
        "causal(offset=(t0 + 1))",
        "causal(offset=(t0 + 2))",
    ]


def test_a_counter_for_each_sequence_is_copied_too() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor) -> tuple[Tensor, ...]:
        mask = (torch.arange(KEYS)[None] <= counter[:, None])[:, None, None]
        counter[:1] += 4
        return attend(q, k, v, mask), counter + 0

    check_idiom(attention, operands([3, 9]), mask="causal(offset=t0[b])", more=[operands([0, KEYS - 1])])


@pytest.mark.parametrize("name", ["view_later", "view_before", "alias_read", "detached"])
def test_a_write_through_another_name_is_a_write(name: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor) -> tuple[Tensor, ...]:
        other = counter.detach() if name == "detached" else counter.view(1)
        if name == "view_before":
            other.add_(3)
        mask = mask_of(other if name == "alias_read" else counter)
        if name == "alias_read":
            counter.add_(3)
            mask = mask & mask_of(other)
        elif name != "view_before":
            other.add_(3)
        return attend(q, k, v, mask), counter + 0

    raised = raise_attention(attention, operands())
    if name in ("view_later", "detached"):
        assert str(raised.sites[0].mask) == "causal(offset=t0)"
    for count in (0, 5, KEYS):
        check_sites(attention, raised, operands(count))


@pytest.mark.parametrize("name", ["large", "float", "set_by_place", "looked_up_later"])
def test_what_is_no_small_counter_keeps_its_tensor(name: str) -> None:
    """A padding row is no trifle to copy; a look-up after a write would need what the write left."""

    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        if name == "large":
            mask = (table[None, None, None, :KEYS] > 0).expand(1, 1, 1, KEYS)
            table.zero_()
        elif name == "float":
            mask = mask_of(table[0].long())
            table[0] = 3.0
        elif name == "set_by_place":
            table[counter[None]] = 2
            mask = mask_of(table[:1])
            table.zero_()
        else:
            row = table.view(2, 4)[0]
            table.add_(1)
            mask = mask_of(row[counter[None].clamp(max=3)])
            table.zero_()
        return attend(q, k, v, mask), table + 0

    length = 128 if name == "large" else 8
    table = torch.arange(length).float() if name == "float" else torch.arange(length) % 5
    check_opaque(attention, (*operands(), table))


@pytest.mark.parametrize("before", [0, 1])
def test_a_look_up_reads_the_copy_made_after_what_was_written_before_it(before: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        if before:
            table.add_(before)
        mask = mask_of(table[counter[None]])
        table.zero_()
        return attend(q, k, v, mask), table + 0

    more = [(*operands(-1), torch.arange(8))]
    raised = check_idiom(attention, (*operands(), torch.arange(8) * 2), mask="causal(offset=t1[t0])", more=more)
    assert copies(raised.program.entries[0].graph) == 1


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_reads_and_writes(seed: int) -> None:
    """Programs drawn at random over two counters and their views: every proved mask is what the program read."""
    draw = random.Random(seed)
    program = [(draw.choice("rrrafmvpsc"), draw.randrange(2), draw.randrange(1, 4)) for _ in range(14)]

    def attention(q: Tensor, k: Tensor, v: Tensor, *counters: Tensor) -> tuple[Tensor, ...]:
        found, views, held = [], [counter.view(1) for counter in counters], list[Tensor]()
        for what, which, number in program:
            counter, other = counters[which], counters[1 - which]
            if what == "r":
                held.append(mask_of(views[which] if number == 1 else counter))
            elif what == "a":
                counter.add_(number)
            elif what == "f":
                counter.fill_(number)
            elif what == "m":
                counter.mul_(number)
            elif what == "v":
                views[which].add_(number)
            elif what == "p":
                held.append(mask_of(counter + other))
            elif what == "s":
                views[which][0] = number
            else:
                counter.copy_(other)
            found.extend(attend(q, k, v, mask) for mask in held[-1:])
        return (*found, *(counter + 0 for counter in counters))

    given = (*operands(2), torch.tensor(3))
    raised = raise_attention(attention, fresh(given))
    assert raised.sites
    for first, second in ((2, 3), (0, 0), (9, 1)):
        args = (*operands(first), torch.tensor(second))
        expected, exact = flat(attention(*fresh(args))), flat(attention(*wide(args)))
        near(flat(raised.run(*fresh(args))), expected, exact, f"seed {seed}")
