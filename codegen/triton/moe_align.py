"""Put the slots of a mixture of experts into blocks of rows of which each has one expert: histogram, offsets, permutation.

Slot s is the choice s % k of token s // k. `order` gives the slot of every row, the number of slots where a row only fills up a
block; `owner` the expert of every block; `total` the number of rows in use. A slot whose expert is outside [0, E) is in no row.

Slots of one expert keep their order, so that two runs put the same slot into the same row: nothing depends on which program comes
first. Up to `FEW` slots need one program and no memory in between; more are counted in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel

FEW = 128
CHUNK = 128
"""Slots that one program looks at. It compares all of them with each other: a tile of 128 x 128."""


@triton.jit
def align_few(
    ids, order, owner, total, slots, experts,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Place all slots in one program."""
    slot, expert, inside = chosen(ids, 0, slots, experts, SLOTS)
    same = (expert[:, None] == expert[None, :]) & inside[None, :]
    rank = tl.sum((same & (slot[None, :] < slot[:, None])).to(tl.int32), 1)
    count = tl.sum(same.to(tl.int32), 1)
    first = inside & (rank == 0)
    room = tl.where(first, tl.cdiv(count, BLOCK_M) * BLOCK_M, 0)
    start = tl.sum(tl.where(expert[None, :] < expert[:, None], room[None, :], 0), 1)
    row = start + rank
    tl.store(order + row, slot, mask=inside)
    tl.store(owner + row // BLOCK_M, expert, mask=inside & (rank % BLOCK_M == 0))
    end = start + room
    for fill in tl.range(0, BLOCK_M, 16):
        beyond = (start + count)[:, None] + (fill + tl.arange(0, 16))[None, :]
        tl.store(
            order + beyond, tl.full([SLOTS, 16], 0, tl.int32) + slots, mask=first[:, None] & (beyond < end[:, None])
        )
    tl.store(total, tl.sum(room, 0))


@triton.jit
def tally(
    ids, counts, slots, experts,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the slots of every expert in one chunk: `counts` int32 `[chunks, E]`, zero before."""
    chunk = tl.program_id(0)
    _, expert, inside = chosen(ids, chunk * CHUNK, slots, experts, CHUNK)
    tl.atomic_add(counts + chunk * experts + expert, tl.full([CHUNK], 1, tl.int32), mask=inside, sem="relaxed")


@triton.jit
def offsets(
    counts, starts, order, total, chunks, slots, experts,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Give every chunk its first row for each expert, and fill up the last block of every expert; one program."""
    expert = tl.arange(0, EXPERTS)
    known = expert < experts
    count = tl.zeros([EXPERTS], tl.int32)
    for first in tl.range(0, chunks, TILE):
        chunk = first + tl.arange(0, TILE)
        places = chunk[:, None] * experts + expert[None, :]
        count += tl.sum(tl.load(counts + places, mask=(chunk < chunks)[:, None] & known[None, :], other=0), 0)
    room = tl.cdiv(count, BLOCK_M) * BLOCK_M
    end = tl.cumsum(room, 0)
    start = end - room
    tl.store(total, tl.sum(room, 0))
    for fill in tl.range(0, BLOCK_M, 16):
        beyond = (start + count)[:, None] + (fill + tl.arange(0, 16))[None, :]
        tl.store(order + beyond, tl.full([EXPERTS, 16], 0, tl.int32) + slots, mask=beyond < end[:, None])
    for first in tl.range(0, chunks, TILE):
        chunk = first + tl.arange(0, TILE)
        places = chunk[:, None] * experts + expert[None, :]
        there = (chunk < chunks)[:, None] & known[None, :]
        found = tl.load(counts + places, mask=there, other=0)
        tl.store(starts + places, start[None, :] + tl.cumsum(found, 0) - found, mask=there)
        start += tl.sum(found, 0)


@triton.jit
def place(
    ids, starts, order, owner, slots, experts,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Put the slots of one chunk into their rows; the slot in the first row of a block names the block's expert."""
    chunk = tl.program_id(0)
    slot, expert, inside = chosen(ids, chunk * CHUNK, slots, experts, CHUNK)
    before = (expert[:, None] == expert[None, :]) & (slot[None, :] < slot[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    row = tl.load(starts + chunk * experts + expert, mask=inside, other=0) + rank
    tl.store(order + row, slot, mask=inside)
    tl.store(owner + row // BLOCK_M, expert, mask=inside & (row % BLOCK_M == 0))


@triton.jit
def chosen(ids, start, slots, experts, COUNT: tl.constexpr):
    """Return COUNT slots from `start` on, their experts (`experts` where there is none) and which have one."""
    slot = start + tl.arange(0, COUNT)
    found = tl.load(ids + slot, mask=slot < slots, other=-1)
    inside = (found >= 0) & (found < experts)
    return slot, tl.where(inside, found, experts).to(tl.int32), inside


@dataclass(frozen=True)
class Rows:
    """Hold the blocks of a call: the tensors of the module's docstring, int32, and how many blocks there can be."""

    order: Tensor
    owner: Tensor
    total: Tensor
    block: int
    blocks: int


def capacity(slots: int, experts: int, block: int) -> int:
    """Return how many rows blocks of `block` rows take at most: each expert that is hit may leave all but one row of one empty."""
    return launch.cdiv(slots + min(experts, slots) * (block - 1), block) * block


def align(ids: Tensor, experts: int, block: int, *, few: int = FEW) -> Rows:
    """Put the slots of ids `[T, k]` into blocks of `block` rows (a multiple of 16); no host reads what the device counts.

    Up to `few` slots (at most `FEW`) are placed by one program.
    """
    slots = ids.numel()
    rows = capacity(slots, experts, block)
    new = {"dtype": torch.int32, "device": ids.device}
    order, owner, total = (torch.empty(n, **new) for n in (rows, rows // block, 1))  # type: ignore[call-overload]
    flat = ids.reshape(-1)
    arch = launch.architecture_of(ids)
    word = f"*i{8 * ids.element_size()}"
    if slots <= few:
        shape = few_form(word, max(16, launch.power(slots)), block)
        launch.run(KERNELS[0], (1,), (flat, order, owner, total, slots, experts), shape, few_configs(shape, arch)[0])
        return Rows(order, owner, total, block, rows // block)
    chunks = launch.cdiv(slots, CHUNK)
    counts = torch.zeros((chunks, experts), **new)  # type: ignore[call-overload]
    starts = torch.empty_like(counts)
    shape = tally_form(word)
    launch.run(KERNELS[1], (chunks,), (flat, counts, slots, experts), shape, tally_configs(shape, arch)[0])
    shape = offsets_form(max(16, launch.power(experts)), block)
    sizes = (counts, starts, order, total, chunks, slots, experts)
    launch.run(KERNELS[2], (1,), sizes, shape, offsets_configs(shape, arch)[0])
    shape = place_form(word, block)
    launch.run(
        KERNELS[3], (chunks,), (flat, starts, order, owner, slots, experts), shape, place_configs(shape, arch)[0]
    )
    return Rows(order, owner, total, block, rows // block)


def few_form(word: str, slots: int, block: int) -> Form:
    """Return the form for at most `slots` slots, a power of two; `word` is Triton's for the ids."""
    types = (("ids", word), ("order owner total", "*i32"), ("slots experts", "i32"))
    constants = {"SLOTS": slots, "BLOCK_M": block}
    return Form(f"{word[1:]}-s{slots}-m{block}", launch.typed(types), launch.fixed(constants), ("ids", "order"))


def few_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms for a few slots that are compiled in tests."""
    return few_form("*i64", 128, 16), few_form("*i64", 16, 64)


def few_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config for a few slots."""
    return (Config((), 1 if arch == launch.SMALL else 8, 1),)


def tally_form(word: str) -> Form:
    """Return the form of the histogram."""
    types = (("ids", word), ("counts", "*i32"), ("slots experts", "i32"))
    return Form(word[1:], launch.typed(types), launch.fixed({"CHUNK": CHUNK}), ("ids", "counts"))


def tally_forms(arch: str) -> tuple[Form, ...]:
    """Return the form of the histogram that is compiled in tests."""
    return (tally_form("*i64"),)


def tally_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the histogram: a slot a thread."""
    return (Config((), 1 if arch == launch.SMALL else 4, 1),)


def offsets_form(experts: int, block: int) -> Form:
    """Return the form of the offsets; `experts` is a power of two."""
    types = (("counts starts order total", "*i32"), ("chunks slots experts", "i32"))
    constants = {"EXPERTS": experts, "BLOCK_M": block}
    return Form(f"e{experts}-m{block}", launch.typed(types), launch.fixed(constants), ("counts", "starts", "order"))


def offsets_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the offsets that are compiled in tests."""
    return offsets_form(128, 128), offsets_form(256, 64)


def offsets_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the offsets."""
    tile = 16 if int(dict(shape.constants)["EXPERTS"] or 0) <= 256 else 4
    return (Config((("TILE", tile),), 1 if arch == launch.SMALL else 8, 1),)


def place_form(word: str, block: int) -> Form:
    """Return the form of the permutation."""
    types = (("ids", word), ("starts order owner", "*i32"), ("slots experts", "i32"))
    constants = {"CHUNK": CHUNK, "BLOCK_M": block}
    return Form(f"{word[1:]}-m{block}", launch.typed(types), launch.fixed(constants), ("ids", "starts", "order"))


def place_forms(arch: str) -> tuple[Form, ...]:
    """Return the form of the permutation that is compiled in tests."""
    return (place_form("*i64", 128),)


def place_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the permutation."""
    return (Config((), 1 if arch == launch.SMALL else 8, 1),)


KERNELS = (
    Kernel("moe_align_few", align_few, few_forms, few_configs),
    Kernel("moe_tally", tally, tally_forms, tally_configs),
    Kernel("moe_offsets", offsets, offsets_forms, offsets_configs),
    Kernel("moe_place", place, place_forms, place_configs),
)
