"""Score keys by the exact attention of a few probe rows, usually the last ones (MInference, SnapKV).

The probe rows of a head fit into one tile. One kernel runs them against all keys, cut into `splits` parts, for their LSE alone; the
column sums of these rows then come from the kernel of `column_sums.py`. Both read the keys once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import column_sums, launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel
from effcompile.codegen.triton.parts import capped, kept, load_queries, load_rows
from effcompile.core.errors import EffError

MOST = 128


@triton.jit
def probe_lse(
    q, k, out, begin, end, q_batch, q_head, k_batch, k_head, heads, kv_heads, rows, keys, splits,
    left, right, offset, scale, softcap,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the LSE (natural) of all probe rows of one (batch row, head) over one part of the keys, `[B, Hq, splits, R]`."""
    part = tl.program_id(0) % splits
    owner = tl.program_id(0) // splits
    batch = owner // heads
    head = owner % heads
    kv_head = head // (heads // kv_heads)
    first, last = 0, keys
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), keys)
    each = tl.cdiv(tl.cdiv(keys, BLOCK_N), splits) * BLOCK_N
    lo = part * each
    hi = tl.minimum(lo + each, keys)
    row = tl.arange(0, BLOCK_M)
    live = row < rows
    q = q + (batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head) * STEP
    k = k + (batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head) * STEP
    q0 = load_queries(q, row.to(tl.int64) * Q_ROW, live, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = load_queries(q, row.to(tl.int64) * Q_ROW, live, D, D0, D1)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low, top = row + (offset - left), row + (offset + right)
    places = tl.arange(0, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_N):
        key = start + places
        valid = (key >= first) & (key < last)
        tile = k + tl.cast(start, tl.int64) * K_ROW
        scores = tl.dot(
            q0, tl.trans(load_rows(tile, K_ROW, places, valid, tl.arange(0, D0), D, 0, True)), input_precision=PRECISION
        )
        if D1 > 0:
            more = load_rows(tile, K_ROW, places, valid, tl.arange(0, D1), D, D0, True)
            scores = tl.dot(q1, tl.trans(more), scores, input_precision=PRECISION)
        factor = 1.4426950408889634
        if HAS_SOFTCAP:
            scores = capped(scores, scale, softcap)
        else:
            factor = scale * 1.4426950408889634
        keep = kept(low, top, key, valid, HAS_LEFT, HAS_RIGHT)
        scores = tl.where(keep, scores, float("-inf"))
        new = tl.maximum(high, tl.max(scores, 1) * factor)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(high - safe) + tl.sum(tl.exp2(scores * factor - safe[:, None]), 1)
        high = new
    logs = tl.where(
        total == 0.0, float("-inf"), (high + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    )
    tl.store(out + (owner.to(tl.int64) * splits + part) * rows + row, logs, mask=live)


def form(dtype: str, arch: str, width: int, rows: int, **more: object) -> Form:
    """Return the form for up to `rows` probe rows; the other arguments are as in `column_sums.form`."""
    base = column_sums.form(dtype, arch, width, **more)  # type: ignore[arg-type]
    tall = max(16, launch.power(rows))
    types = tuple(pair for pair in base.types if pair[0] != "lse") + (("splits", "i32"),)
    return Form(f"{base.name}-r{tall}", types, (*base.constants, ("BLOCK_M", tall)), ("q", "k", "out"))


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    return (
        form("bf16", arch, 128, 64, right=True),
        form("fp16", arch, 72, 128, left=True, right=True, ranged=True, capped=True),
        form("fp32", arch, 128, 64, right=True),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config for a form."""
    if arch == launch.SMALL:
        return (Config((("BLOCK_N", 16),), 1, 1),)
    at = dict(shape.constants)
    wide = dict(shape.types)["q"] == "*fp32"
    many = int(at["BLOCK_M"] or 0) > 64
    tight = arch == "sm_100"  # where the tiles that fit elsewhere spill
    columns = 16 if wide else 32 if many and tight else 64
    return (Config((("BLOCK_N", columns),), 8 if many or (wide and tight) else 4, 1 if arch.startswith("gfx") else 2),)


KERNELS = (Kernel("probe_lse", probe_lse, forms, configs),)


def score(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scale: float,
    softcap: float,
    *,
    splits: int = 0,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `eff::probe_scores_v1` (effcompile/ops/column_scores.py says what it means) with the kernels.

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes: at most 128 probe rows.
    """
    launch.check(q, k)
    if q.shape[2] > MOST:
        raise EffError(
            "EFF-K104",
            f"{q.shape[2]} probe rows; the kernel takes {MOST}",
            hint="eff::flash_v1 and eff::column_sums_v1",
        )
    q, scale = launch.positive(q, scale)
    q, k = launch.dense_rows(q), launch.dense_rows(k)
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    first, last = launch.ranges(begin, end, batch, keys, q)
    strides, step = launch.strides(q, k)
    arch = launch.architecture_of(q)
    shape = form(
        launch.word(q),
        arch,
        width,
        rows,
        strides=(int(q.stride(2)), int(k.stride(2))),
        step=step,
        left=left >= 0,
        right=right >= 0,
        ranged=begin is not None or end is not None,
        capped=softcap != 0.0,
    )
    config = configs(shape, arch)[0]
    splits = splits or launch.splits(batch * heads, launch.cdiv(keys, config.constants["BLOCK_N"]), q)
    parts = torch.empty((batch, heads, splits, rows), dtype=torch.float32, device=q.device)
    if parts.numel():
        sizes = (heads, k.shape[1], rows, keys, splits, left, right, offset, scale, softcap)
        launch.run(
            KERNELS[0], (splits * batch * heads,), (q, k, parts, first, last, *strides, *sizes), shape, config, traced
        )
    lse = torch.logsumexp(parts, 2)
    return column_sums.add_up(q, k, lse, begin, end, left, right, offset, scale, softcap, traced=traced), lse
