"""Trust the block lists of a BlockMask just where they are proved to say what its mask function says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from effcompile.passes.recognize.block_lists import BlockLists, Unproved, prove
from effcompile.passes.recognize.mods import read_mask_mod
from tests.support.flex import (
    MASKS,
    Mod,
    S,
    causal,
    check_kept_call,
    check_raised,
    create_block_mask,
    debugging,
    documents,
    flex_attention,
    lists,
    masked,
    mods,
    qkv,
    traced,
)


@pytest.mark.parametrize(("block", "separate"), [(16, False), ((32, 128), True), (1024, True)])
def test_any_block_size(block: Any, separate: bool) -> None:
    known = "separate_full_blocks" in inspect.signature(create_block_mask).parameters  # not in torch 2.11
    fields = {"separate_full_blocks": separate} if known else {}
    call = masked(MASKS["window(19) & causal"], BLOCK_SIZE=block, **fields)
    check_raised(call, qkv(256, 200), "window(19) & causal")


def test_blocks_that_were_made_for_another_predicate() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = create_block_mask(MASKS["window(+-7)"], None, None, S, S, device="cpu")
        return flex_attention(q, k, v, block_mask=BlockMask.from_kv_blocks(**lists(blocks), mask_mod=causal))

    check_kept_call(call, qkv(), "EFF-A108", "the blocks were made for (abs(")

    def batches(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ids[b, i] == ids[b, j]

        blocks = create_block_mask(keep, None, None, S, S, device="cpu")  # of the first sequence, for all
        return flex_attention(q, k, v, block_mask=blocks)

    check_kept_call(batches, (*qkv(), documents()), "EFF-A108", "the blocks were made for")

    def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = (create_block_mask(MASKS[name], None, None, S, S, device="cpu") for name in ("causal", "prefix"))
        given = lists(a) | {name: getattr(b, name) for name in ("full_kv_num_blocks", "full_kv_indices")}
        return flex_attention(q, k, v, block_mask=BlockMask.from_kv_blocks(**given, mask_mod=causal))

    check_kept_call(halves, qkv(), "EFF-A108", "different masks")


def test_blocks_that_are_made_by_hand() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count, index = torch.ones(1, 1, 2, dtype=torch.int32), torch.arange(2, dtype=torch.int32).reshape(1, 1, 2, 1)
        blocks = BlockMask.from_kv_blocks(count, index.expand(1, 1, 2, 2).contiguous(), seq_lengths=(S, S))
        return flex_attention(q, k, v, block_mask=blocks)

    check_kept_call(call, qkv(), "EFF-A108", "its block lists come from")


def made_of(mask: Tensor, keep: Mod, cut: int = 0) -> BlockMask:
    """Make block lists of a mask tensor in the calling graph, as torch does for a mask function."""
    rows, columns = (-(-n // 128) for n in mask.shape[2:])
    widths = (0, columns * 128 - mask.shape[3] - cut, 0, rows * 128 - mask.shape[2])
    whole = nn.functional.pad(mask, widths)
    columns = whole.shape[3] // 128
    sums = whole.view(*mask.shape[:2], rows, 128, columns, 128).permute(0, 1, 2, 4, 3, 5).sum([-2, -1])
    dense = (sums > 0).to(torch.int32)
    order = torch.argsort(dense, dim=-1, descending=True, stable=True)
    counts, indices = dense.sum(-1).to(torch.int32), order.to(torch.int32)
    return BlockMask.from_kv_blocks(counts, indices, mask_mod=keep, seq_lengths=(S, S))


def triangle() -> Tensor:
    return torch.arange(S)[:, None] >= torch.arange(S)[None, :]


def test_blocks_of_a_mask_tensor_in_the_same_graph() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=made_of(triangle()[None, None], causal))

    check_raised(call, qkv(), "causal")


@pytest.mark.parametrize("what", ["integers", "cut", "lists written", "mask written"])
def test_blocks_of_something_like_a_mask_tensor(what: str) -> None:
    """Each differs from the call above in one step, and in what it attends to."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, keep = triangle()[None, None], causal
        if what == "integers":
            mask = torch.where(torch.arange(S) % 2 == 0, mask.int(), -mask.int())  # sums of 0 where pairs are kept
        if what == "mask written":
            keep = MASKS["full"]
        blocks = made_of(mask, keep, 128 if what == "cut" else 0)
        if what == "lists written":
            blocks.kv_num_blocks[..., 1:].fill_(1)
        if what == "mask written":
            mask.fill_(True)
        return flex_attention(q, k, v, block_mask=blocks)

    reasons = {
        "integers": "no boolean tensor",
        "cut": "is cut",
        "lists written": "is written in place",
        "mask written": "the blocks were made for",
    }
    check_kept_call(call, qkv(), "EFF-A108", reasons[what])


def test_a_block_mask_that_is_an_argument() -> None:
    with debugging():
        blocks = create_block_mask(causal, None, None, S, S, device="cpu")
    check_kept_call(
        lambda q, k, v, blocks: flex_attention(q, k, v, block_mask=blocks),
        (*qkv(), blocks),
        "EFF-A108",
        "made elsewhere",
    )


class Held(nn.Module):
    """Hold a BlockMask, and change its lists or its mask function where asked."""

    def __init__(self, mod: Mod = causal, shown: Mod | None = None, change: Callable[..., Any] | None = None) -> None:
        super().__init__()
        made = create_block_mask(mod, None, None, S, S, device="cpu", BLOCK_SIZE=32)
        given = lists(made)
        if change is not None:
            change(given)
        self.blocks = BlockMask.from_kv_blocks(**given, mask_mod=shown or mod)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=self.blocks)


@pytest.mark.parametrize("name", ["window(+-7)", "prefix"])
def test_a_block_mask_on_the_module_is_compared_and_pinned(name: str) -> None:
    raised = check_raised(Held(MASKS[name]), qkv(), name)
    inputs = {item.node: item.name for item in raised.before.entries[0].inputs}
    assert {inputs[node].rpartition(".")[2] for node in raised.found.pinned} == {
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
    }


def _fewer(given: dict[str, Any]) -> None:
    given["kv_num_blocks"] = given["kv_num_blocks"].clone().clamp(max=0)


def _twice(given: dict[str, Any]) -> None:
    given["full_kv_num_blocks"] = given["full_kv_num_blocks"] + 1
    given["full_kv_indices"] = torch.zeros_like(given["full_kv_indices"])


def _full(given: dict[str, Any]) -> None:
    for what in ("num_blocks", "indices"):
        given[f"full_kv_{what}"], given[f"kv_{what}"] = given[f"kv_{what}"], torch.zeros_like(given[f"kv_{what}"])


def _both(given: dict[str, Any]) -> None:
    given["full_kv_num_blocks"], given["full_kv_indices"] = given["kv_num_blocks"], given["kv_indices"]


@pytest.mark.parametrize(
    ("shown", "change", "reason"),
    [
        (lambda b, h, i, j: (j <= i) | (j < 40), None, "leaves out a block"),
        (MASKS["window(19) & causal"], None, "as full that its mask function does not keep whole"),
        (None, _fewer, "leaves out a block"),
        (None, _twice, "lists a block twice"),
        (None, _full, "as full that its mask function does not keep whole"),
        (None, _both, "both as full and as partial"),
    ],
)
def test_a_block_mask_on_the_module_that_says_something_else(shown: Mod | None, change: Any, reason: str) -> None:
    check_kept_call(Held(causal, shown, change), qkv(), "EFF-A108", reason)


def test_a_block_mask_on_the_module_may_list_more_than_it_needs() -> None:
    """Blocks without kept pairs that are listed as partial change nothing: the mask function drops their pairs."""
    check_raised(Held(MASKS["prefix"], causal, _full_as_partial), qkv(), "causal")


def _full_as_partial(given: dict[str, Any]) -> None:
    given["kv_num_blocks"] = torch.full_like(given["kv_num_blocks"], 5)
    given["kv_indices"] = torch.arange(5, dtype=torch.int32).expand(1, 1, 5, 5).contiguous()
    given["full_kv_num_blocks"] = given["full_kv_indices"] = None


@given(mods(), st.integers(0, 999), st.sampled_from([(4, 4), (3, 5), (16, 8)]))
def test_lists_are_accepted_just_where_they_say_what_the_function_says(mod: Mod, seed: int, block: Any) -> None:
    """What a call keeps is the function on the blocks listed as partial, and everything on those listed as full."""
    rows, columns, draw = 10, 13, torch.Generator().manual_seed(seed)
    table = torch.randint(0, 3, (2, columns), generator=draw)
    keep = create_mask(lambda b, h, i, j: mod(table, b, h, i, j), 2, 1, rows, columns, device="cpu")
    with debugging():
        made = create_block_mask(
            lambda b, h, i, j: mod(table, b, h, i, j), 2, 1, rows, columns, device="cpu", BLOCK_SIZE=block
        )
    given_lists = lists(made)
    if seed % 3:
        for name in ("kv_num_blocks", "full_kv_num_blocks"):  # drop a block of some line, or one more
            change = torch.randint(-1, 2, given_lists[name].shape, generator=draw) * (seed % 2)
            given_lists[name] = (given_lists[name] + change).clamp(0, given_lists["kv_indices"].shape[-1]).int()
    partial, full = (
        _listed(given_lists[f"{kind}num_blocks"], given_lists[f"{kind}indices"]) for kind in ("kv_", "full_kv_")
    )
    wide = lambda x: x.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :rows, :columns]  # noqa: E731
    meant = (wide(partial) & keep) | wide(full)
    reason = proved(mod, table, given_lists, (2, 1, rows, columns), block)
    twice = bool((partial & full).any())  # the kernel visits such a block twice
    assert (reason == "") == (torch.equal(meant, keep) and not twice), reason


def proved(mod: Mod, table: Tensor, given_lists: dict[str, Any], shape: Any, block: tuple[int, int]) -> str:
    """Return why lists that buffers hold, and a function of a table that a buffer holds, do not agree; '' where they do."""
    graph, reader, captured = traced(mod, table)
    buffers = {captured[0]: table}
    reader.buffers = buffers.get
    expression = read_mask_mod(graph, captured, reader, 1)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    nodes = [reader.graph.placeholder(name) for name in names]
    buffers.update(zip(nodes, (given_lists[name] for name in names)))
    try:
        prove(BlockLists(*nodes, block), expression, shape, reader, 1)
    except Unproved as why:
        return str(why)
    return ""


def test_lists_that_do_not_fit_the_lengths() -> None:
    with debugging():
        made = create_block_mask(causal, None, None, 32, 32, device="cpu", BLOCK_SIZE=16)
    given_lists, table = lists(made), torch.zeros(2, 32, dtype=torch.int64)
    mod = lambda t, *at: causal(*at)  # noqa: E731
    assert proved(mod, table, given_lists, (2, 4, 32, 32), (16, 16)) == ""
    assert "another shape" in proved(mod, table, given_lists, (2, 4, 64, 32), (16, 16))
    behind = given_lists | {"kv_indices": given_lists["kv_indices"] + 1}
    assert "behind the last key" in proved(mod, table, behind, (2, 4, 32, 32), (16, 16))
    assert "fixed sizes" in proved(mod, table, given_lists, (2, 4, 16384, 16384), (16, 16))
    wide = {
        name: value.expand(3, *value.shape[1:]) if isinstance(value, Tensor) else value
        for name, value in given_lists.items()
    }
    assert proved(mod, table, wide, (2, 4, 32, 32), (16, 16)) == ""  # every sequence masks alike
    apart = lambda t, b, h, i, j: (i >= j) | (b > 5)  # noqa: E731
    assert "another batch" in proved(apart, table, wide, (2, 4, 32, 32), (16, 16))


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    found = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        found[tuple(place)][indices[tuple(place)][: counts[tuple(place)]].long()] = True
    return found
