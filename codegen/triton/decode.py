"""Compute attention of one or a few new queries over the pages that were kept, split among programs along the keys.

One query per sequence leaves a GPU idle: the keys of a (sequence, KV head) are cut into `splits` parts, each program runs the
online softmax over its part (Flash-Decoding), and a second kernel merges the parts by their LSE. The rows of a program are
the (query, head) pairs of one KV head, so a page is read once per group. Pages are gathered token by token: a tile may span
several pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel, pieces
from effcompile.codegen.triton.parts import capped, load_queries, online_softmax, store_rows
from effcompile.core.errors import EffError


@triton.jit
def decode(
    q, k, v, out, lse, lengths, table, pages, counts,
    q_batch, q_head, k_batch, k_head, k_page, v_batch, v_head, v_page,
    kv_heads, rows, entries, width, splits, scale, softcap,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_PAGES: tl.constexpr, HAS_COUNTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run one part of the keys of one (sequence, KV head); `out` and `lse` (of base 2) are `[B, Hkv, Q * G, splits, ...]`."""
    part = tl.program_id(0) % splits
    owner = tl.program_id(0) // splits
    batch = owner // kv_heads
    head = owner % kv_heads
    place = tl.arange(0, BLOCK_M)
    row = place // GROUP
    live = place < rows * GROUP
    base = q + (batch.to(tl.int64) * q_batch + head.to(tl.int64) * GROUP * q_head) * STEP
    addresses = row * Q_ROW + (place % GROUP).to(tl.int64) * q_head * STEP
    q0 = load_queries(base, addresses, live, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = load_queries(base, addresses, live, D, D0, D1)
    k = k + (batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head) * STEP
    v = v + (batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head) * STEP

    length = tl.load(lengths + batch)
    tokens = length
    if HAS_PAGES:
        listed = entries
        if HAS_COUNTS:
            listed = tl.minimum(tl.load(counts + owner), entries)
        tokens = listed * SIZE
    each = tl.cdiv(tl.cdiv(tokens, BLOCK_N), splits) * BLOCK_N
    lo = part * each
    hi = tl.minimum(lo + each, tokens)

    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = total
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        valid = slot < hi
        page = slot // SIZE
        if HAS_PAGES:
            page = tl.load(pages + owner.to(tl.int64) * entries + page, mask=valid, other=0)
        token = page * SIZE + slot % SIZE
        valid = valid & (token < length)
        if HAS_TABLE:
            page = tl.load(table + batch.to(tl.int64) * width + page, mask=valid, other=0)
        k_rows = page.to(tl.int64) * k_page * STEP + (slot % SIZE) * K_ROW
        v_rows = page.to(tl.int64) * v_page * STEP + (slot % SIZE) * V_ROW
        scores = tl.dot(q0, tl.trans(load_queries(k, k_rows, valid, D, 0, D0)), input_precision=PRECISION)
        if D1 > 0:
            scores = tl.dot(q1, tl.trans(load_queries(k, k_rows, valid, D, D0, D1)), scores, input_precision=PRECISION)
        factor = 1.4426950408889634
        if HAS_SOFTCAP:
            scores = capped(scores, scale, softcap)
        else:
            factor = scale * 1.4426950408889634
        seen = valid[None, :] & (token[None, :] <= (length - rows + row)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        weights, high, total, shrink = online_softmax(scores, factor, high, total)
        values = load_queries(v, v_rows, valid, DV, 0, V0)
        weights = weights.to(values.dtype)
        acc0 = tl.dot(weights, values, acc0 * shrink[:, None], input_precision=PRECISION)
        if V1 > 0:
            more = load_queries(v, v_rows, valid, DV, V0, V1)
            acc1 = tl.dot(weights, more, acc1 * shrink[:, None], input_precision=PRECISION)

    divisor = tl.where(total == 0.0, 1.0, total)
    where = (owner.to(tl.int64) * rows * GROUP + place) * splits + part
    tl.store(lse + where, tl.where(total == 0.0, float("-inf"), high + tl.log2(divisor)), mask=live)
    store_rows(out, where, live, acc0 / divisor[:, None], DV, 0)
    if V1 > 0:
        store_rows(out, where, live, acc1 / divisor[:, None], DV, V0)


@triton.jit
def merge(
    parts, part_lse, out, lse, kv_heads, rows, splits,
    DV: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row by their LSE, and put (sequence, KV head, query, head of the group) to (sequence, head, query)."""
    line = tl.program_id(0)
    part = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, WIDTH)
    there = part < splits
    found = line.to(tl.int64) * splits + part
    logs = tl.load(part_lse + found, mask=there, other=float("-inf"))
    high = tl.max(logs, 0)
    share = tl.exp2(logs - tl.where(high == float("-inf"), 0.0, high))
    total = tl.sum(share, 0)
    values = tl.load(
        parts + found[:, None] * DV + columns[None, :], mask=there[:, None] & (columns < DV)[None, :], other=0.0
    )
    divisor = tl.where(total == 0.0, 1.0, total)
    result = tl.sum(values * share[:, None], 0) / divisor
    place = line % (rows * GROUP)
    head = (line // (rows * GROUP)) * GROUP + place % GROUP
    target = head.to(tl.int64) * rows + place // GROUP
    tl.store(out + target * DV + columns, result.to(out.dtype.element_ty), mask=columns < DV)
    tl.store(lse + target, tl.where(total == 0.0, float("-inf"), (high + tl.log2(divisor)) * 0.6931471805599453))


def form(
    dtype: str,
    arch: str,
    width: int,
    value_width: int,
    *,
    strides: tuple[int, ...] | None = None,
    step: int = 8,
    group: int = 4,
    size: int = 16,
    rows: int = 1,
    table: bool = False,
    pages: bool = True,
    counts: bool = True,
    capped: bool = False,
) -> Form:
    """Return the form for `group` query heads a KV head, pages of `size` tokens and `rows` queries a sequence."""
    types = (
        ("q k v", f"*{dtype}"),
        ("out lse", "*fp32"),
        ("lengths table pages counts", "*i32"),
        ("q_batch q_head k_batch k_head k_page v_batch v_head v_page kv_heads rows entries width splits", "i32"),
        ("scale softcap", "fp32"),
    )
    (d0, d1), (v0, v1) = pieces(width), pieces(value_width)
    q_row, k_row, v_row = strides or (width, width, value_width)
    tall = 1 << max(4, (group * rows - 1).bit_length())
    sizes = {"Q_ROW": q_row, "K_ROW": k_row, "V_ROW": v_row, "STEP": step}
    sizes |= {"D": width, "DV": value_width, "D0": d0, "D1": d1, "V0": v0, "V1": v1}
    sizes |= {"GROUP": group, "SIZE": size, "BLOCK_M": tall}
    flags = {"HAS_TABLE": table, "HAS_PAGES": pages, "HAS_COUNTS": counts, "HAS_SOFTCAP": capped}
    told = [word for word, said in zip(("table", "list", "count", "cap"), flags.values()) if said]
    shape = f"d{width}" if width == value_width else f"d{width}.{value_width}"
    return Form(
        "-".join((dtype, shape, f"g{group}", f"page{size}", *((f"q{rows}",) if rows > 1 else ()), *told)),
        launch.typed(types),
        launch.fixed(sizes, flags, PRECISION=launch.precision(dtype, arch)),
        ("q", "k", "v", "out", "lse"),
    )


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    return (
        form("bf16", arch, 128, 128),
        form("bf16", arch, 128, 128, table=True, counts=False),
        form("fp16", arch, 64, 64, group=8, size=64, rows=4, pages=False, counts=False),
        form("bf16", arch, 192, 128, group=1, size=64, table=True),
        form("bf16", arch, 256, 256, group=2, capped=True),
        form("fp32", arch, 128, 128),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs for a form, the default first. The work is reading: many loads in flight matter, tiles hardly."""
    if arch == launch.SMALL:
        return (Config((("BLOCK_N", 16),), 1, 1),)
    at = dict(shape.constants)
    width = max(int(at["D0"] or 0) + int(at["D1"] or 0), int(at["V0"] or 0) + int(at["V1"] or 0))
    wide = dict(shape.types)["q"] == "*fp32"
    n = 64 if width <= 128 and not wide else 32
    stages = (3, 2, 4) if not arch.startswith("gfx") else (1, 2)
    return tuple(Config((("BLOCK_N", n),), 4, count) for count in stages)


def merge_form(width: int, group: int, splits: int) -> Form:
    """Return the form of the merge."""
    types = (("parts part_lse lse out", "*fp32"), ("kv_heads rows splits", "i32"))
    sizes = {"DV": width, "WIDTH": 1 << (width - 1).bit_length(), "GROUP": group}
    many = 1 << (splits - 1).bit_length()
    return Form(
        f"d{width}-g{group}-s{many}",
        launch.typed(types),
        launch.fixed(sizes, BLOCK_S=many),
        ("parts", "part_lse", "out", "lse"),
    )


def merge_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the merge that are compiled in tests."""
    return (merge_form(128, 4, 16), merge_form(256, 1, 64))


def merge_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the one config of the merge."""
    return (Config((), 1 if arch == launch.SMALL else 4, 1),)


KERNELS = (Kernel("decode", decode, forms, configs), Kernel("decode_merge", merge, merge_forms, merge_configs))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    pages: Tensor | None,
    counts: Tensor | None,
    scale: float,
    softcap: float,
    splits: int,
    *,
    config: Config | None = None,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `eff::paged_decode_v1` (effcompile/ops/paged_decode.py says what it means) with the kernels.

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes: at most 128 (query, head) rows a KV head.
    """
    launch.check(q, k, v)
    q, scale = launch.positive(q, scale)
    q, k, v = (launch.dense_rows(x) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    kv_heads, places, size = k.shape[1], k.shape[2], k.shape[3]
    group, value_width = heads // kv_heads, v.shape[4]
    if group * rows > 128:
        raise EffError(
            "EFF-K104",
            f"{rows} queries of {group} heads a KV head: the decode kernel takes 128 rows",
            hint="eff::flash_v1",
        )
    strides, step = launch.page_strides(q, k, v)
    arch = launch.architecture_of(q)
    shape = form(
        launch.word(q),
        arch,
        width,
        value_width,
        strides=(int(q.stride(2)), int(k.stride(3)), int(v.stride(3))),
        step=step,
        group=group,
        size=size,
        rows=rows,
        table=table is not None,
        pages=pages is not None,
        counts=counts is not None,
        capped=softcap != 0.0,
    )
    config = config or configs(shape, arch)[0]
    out = v.new_empty((batch, heads, rows, value_width))
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    most = (places if table is None else table.shape[1]) if pages is None else pages.shape[2]
    splits = splits or launch.splits(batch * kv_heads, launch.cdiv(most * size, config.constants["BLOCK_N"]), q)
    parts = q.new_empty((batch, kv_heads, rows * group, splits, value_width), dtype=torch.float32)
    part_lse = q.new_empty(parts.shape[:4], dtype=torch.float32)
    lists = [q if x is None else x.to(torch.int32).contiguous() for x in (lengths, table, pages, counts)]
    runtime = (
        *(q, k, v, parts, part_lse, *lists, *strides),
        *(kv_heads, rows, most, 0 if table is None else table.shape[1], splits, scale, softcap),
    )
    launch.run(KERNELS[0], (batch * kv_heads * splits,), runtime, shape, config, traced)
    last = merge_form(value_width, group, splits)
    merged = (parts, part_lse, out, lse, kv_heads, rows, splits)
    launch.run(KERNELS[1], (batch * heads * rows,), merged, last, merge_configs(last, arch)[0], traced)
    return out, lse
