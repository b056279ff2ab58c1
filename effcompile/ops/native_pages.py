"""Call the C++ kernels of pages of keys (`cpp/pages.cpp`): the choice of pages for one query, and attention over them.

They take the predicate as a range and a set of keys (`row_limits.Limits`), so that a step of decode evaluates nothing else.
"""

from __future__ import annotations

import torch

from effcompile.ops import native
from effcompile.ops.row_limits import Limits


def choose_pages(
    q: torch.Tensor, k: torch.Tensor, limits: Limits, budget: int, local: int, page: int, bound: bool
) -> torch.Tensor:
    """Return the map `[B, Hq, 1, P]` of `budget` pages for q `[B, Hq, 1, D]` and k `[B, Hkv, K, D]`, in one pass over the keys.

    The first page that a query may read, the `local` last ones and one that its last key cuts stay; the others go by score: with
    `bound` Quest's upper bound for each query head, else the mean query of a group of heads times the mean key of a page. Keys that
    the limits cut are not read, and none is where the budget covers all.
    """
    q, k = (native.dense_rows(x) for x in (q, k))
    out = torch.empty((*q.shape[:3], -(-k.shape[2] // page)), dtype=torch.bool)
    first, last, cuts = _ends(limits)
    operands = [q, k, None, None, limits.keys, first, last, out]
    sizes = _sizes(q, k, k, (1, 1), page, limits, cuts, (budget, local))
    native.call(native.PAGES, "eff_choose_pages", q.dtype, sizes, operands, bound)
    return out


def attend_pages(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, limits: Limits, scale: float, page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention of q `[B, Hq, 1, D]` over the keys that limits keep in the chosen pages, and its LSE `[B, Hq, 1]`.

    chosen is bool `[B|1, H', 1, P]`, H' dividing the heads; a query without keys gives 0 and -inf.
    """
    q, k, v = (native.dense_rows(x) for x in (q, k, v))
    first, last, cuts = _ends(limits)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    operands = [q, k, v, chosen.contiguous(), limits.keys, first, last, out, lse]
    sizes = _sizes(q, k, v, (chosen.shape[0], chosen.shape[1]), page, limits, cuts, (0, 0))
    native.call(native.PAGES, "eff_page_attention", q.dtype, sizes, operands, scale)
    return out, lse


def _ends(limits: Limits) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    found = (limits.first, limits.last)
    cuts = max((x.shape[0] for x in found if x is not None), default=1)
    first, last = (None if x is None else x.expand(cuts, 1).contiguous() for x in found)
    return first, last, cuts


def _sizes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lead: tuple[int, int],
    page: int,
    limits: Limits,
    cuts: int,
    budget: tuple[int, int],
) -> list[int]:
    shape = [q.shape[0], q.shape[1], k.shape[1], k.shape[2], k.shape[3], v.shape[3], page, *q.stride()[:2]]
    shape += [*k.stride()[:3], *v.stride()[:3], *lead]
    shape += [1 if limits.keys is None else limits.keys.shape[0], cuts, *budget]
    return [*shape, torch.get_num_threads()]
