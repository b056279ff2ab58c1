"""Estimate how long an attention kernel takes on a target.

Work comes from the symbolic cost model, efficiency from the table measured by `eff bench attention-table` where it covers the
target, else from the model's assumption. Symbolic sizes are priced at `NOMINAL`.
"""

from __future__ import annotations

import functools

from effcompile.core.expr import FALSE, KEY, QUERY, TRUE, Expr, axes_of
from effcompile.core.intervals import block_bounds
from effcompile.core.mask import Mask
from effcompile.core.site import AttentionSite
from effcompile.core.target import Target

NOMINAL = 1024
# Fraction of the machine's GEMM rate that each kernel reaches on its visited blocks, measured on CPU (fp32, bf16) at head
# dimension 64 and 1k to 4k tokens: bench/results/attention-table.json.
_RATE = {
    "sdpa": (0.62, 0.34),
    "sdpa-causal": (0.60, 0.30),
    "dense": (0.54, 0.33),
    "padded": (0.60, 0.30),
    "blocked": (0.50, 0.28),
    "flex": (0.44, 0.15),
    "sinks": (0.50, 0.28),
    "math": (0.20, 0.10),
}
_CALL = {"padded": 4e-5, "blocked": 6e-5, "flex": 3e-5, "math": 6e-5}  # seconds a call costs apart from its work


def extent(value: int | str) -> int:
    """Return a size, or the nominal one for a symbolic size."""
    return value if isinstance(value, int) else NOMINAL


def density(site: AttentionSite, block: tuple[int, int] = (256, 64)) -> float:
    """Return the share of blocks that a block-skipping kernel visits; tensors of data are taken to keep everything."""
    if not isinstance(site.mask, Mask):
        return 1.0
    return _density(site.mask.keep, extent(site.q_len), extent(site.kv_len), block)


@functools.lru_cache(maxsize=256)
def _density(keep: Expr, rows: int, columns: int, block: tuple[int, int]) -> float:
    import torch

    static = _without_data(keep)
    if static in (TRUE, FALSE):
        return 1.0
    _, some = block_bounds(static, (1, 1, rows, columns), block, [], [], torch.device("cpu"))
    return float(some.float().mean())


def _without_data(expr: Expr) -> Expr:
    """Drop the conditions that read tensors or symbolic sizes."""
    from effcompile.core.expr import apply, walk

    if expr.op == "and":
        total = TRUE
        for part in expr.args:
            total = apply("and", total, _without_data(part))
        return total
    reads = any(node.op in ("load", "size") for node in walk(expr)) or not axes_of(expr) & {QUERY, KEY}
    return TRUE if reads else expr


def seconds(kind: str, site: AttentionSite, target: Target, visited: float) -> float:
    """Return the modelled time of one call that visits `visited` of all pairs."""
    pairs = extent(site.batch) * extent(site.heads) * extent(site.q_len) * extent(site.kv_len)
    flops = 2.0 * pairs * (site.head_dim + site.value_dim) * visited
    half = site.dtype in ("bfloat16", "float16")
    peak = target.device.peak(site.dtype if target.device.supports(site.dtype) else "float32")
    return flops / (peak * _RATE[kind][half]) + _CALL.get(kind, 1e-5)
