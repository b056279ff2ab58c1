"""Bound the memory traffic of exact attention (Saha and Ye, ICML 2024, arXiv 2402.07443).

One head, queries and keys `N x d`, a fast memory of `M` elements; every result counts elements moved between fast and
slow memory. With the standard matrix product the least is `Theta(min(N^2 d / sqrt(M), N^2 d^2 / M))`: tiling the scores
in squares is best below `M = d^2`, FlashAttention at and above it, and there both move about `N^2`. For `M >= d^2` the
bound holds for every matrix algorithm.
"""

from __future__ import annotations

from typing import Any, Literal

import sympy

from effcompile.core.target import Device, element_bytes


def optimal(n: Any, d: Any, m: Any) -> Any:
    """Return the optimal order of growth, without constant."""
    return sympy.Min(square_order(n, d, m), flash_order(n, d, m), evaluate=_numeric(n, d, m))


def square_order(n: Any, d: Any, m: Any) -> Any:
    """Return `N^2 d / sqrt(M)`, the order of square tiling."""
    return sympy.sympify(n) ** 2 * d / sympy.sqrt(m)


def flash_order(n: Any, d: Any, m: Any) -> Any:
    """Return `N^2 d^2 / M`, the order of FlashAttention."""
    return sympy.sympify(n) ** 2 * sympy.sympify(d) ** 2 / m


def square_tiling(n: Any, d: Any, m: Any) -> Any:
    """Return the traffic of square tiling with `B = floor(sqrt(M / 4))`: scores by `B x B x B` tiles, then times V."""
    tile = sympy.floor(sympy.sqrt(sympy.sympify(m) / 4))
    return 4 * sympy.sympify(n) ** 2 * d / tile + sympy.sympify(n) ** 2 + 2 * sympy.sympify(n) * d


def flash1(n: Any, d: Any, m: Any) -> Any:
    """Return the traffic of FlashAttention's first order, keys in the outer loop with tiles of `M / 4d` keys."""
    return 2 * sympy.sympify(n) * d + 12 * flash_order(n, d, m)


def flash2(n: Any, d: Any, m: Any) -> Any:
    """Return the traffic of FlashAttention-2, queries in the outer loop with `Br = max(1, floor(M / 4d))` rows.

    The k and v streams are read once per tile of queries: `2Nd + 2Nd ceil(N / Br)`, near `2Nd + 8 N^2 d^2 / M`.
    """
    rows = sympy.Max(1, sympy.floor(sympy.sympify(m) / (4 * sympy.sympify(d))))
    return 2 * sympy.sympify(n) * d * (1 + sympy.ceiling(sympy.sympify(n) / rows))


def regime(d: int, device: Device, dtype: object) -> Literal["flash", "square-tiling"]:
    """Say which order is optimal for head width `d` in one core's fast memory.

    A Hopper SM holds 116,000 16-bit elements, so FlashAttention up to `d = 340`; wider heads (latent attention at 512)
    should be split over cores.
    """
    return "flash" if device.cache_bytes / element_bytes(dtype) >= d * d else "square-tiling"


def _numeric(*values: Any) -> bool:
    # sympy's Min compares its arguments pairwise, which is slow and pointless while symbols are free.
    return all(sympy.sympify(value).is_number for value in values)
