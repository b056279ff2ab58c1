"""Choose pairs of clusters of queries and keys by the attention of their means (Sparse VideoGen 2, arXiv:2505.18875).

Tokens that are alike need not be neighbors. k-means brings them together, so that one mean stands well for each, and what a map of
blocks keeps is what clusters of queries read.
"""

from __future__ import annotations

import torch

from effcompile.ops.attention import define
from effcompile.ops.block_choice import bisected, top_k

NAME = "eff::cluster_blocks_v1"
_GOLDEN = 0.6180339887498949
_CHUNK = 1 << 24  # distances that exist at a time


def cluster_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    mass: float,
    floor: float,
    q_clusters: int,
    k_clusters: int,
    rounds: int,
    text: int,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (order of the queries int64 `[B, H, N]`, order of the keys, map bool `[B, H, Nb, Nb]` over blocks of places).

    q and k `[B, H, N, D]`. Tokens go cluster by cluster, the `text` first ones behind all others. A cluster of queries reads the
    fewest clusters of keys that hold `mass` of the softmax over their means, where a cluster counts as often as it has tokens, and
    at least a share of `floor` of them; text reads everything and is read by everything. A block is in the map where any of its
    pairs of clusters is.
    """
    of_queries, means, counts = clusters(q[:, :, text:], q_clusters, rounds)
    of_keys, centers, sizes = clusters(k[:, :, text:], k_clusters, rounds)
    read = cluster_pairs(means, centers, counts, sizes, scale, mass, floor)
    grown = torch.ones((*read.shape[:2], q_clusters + 1, k_clusters + 1), dtype=torch.bool, device=q.device)
    grown[:, :, :-1, :-1] = read
    q_order, q_ids = _sorted(of_queries, text, q_clusters)
    k_order, k_ids = _sorted(of_keys, text, k_clusters)
    return q_order, k_order, _blocks(grown, q_ids, k_ids, block)


def clusters(x: torch.Tensor, count: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (cluster of each token int64 `[B, H, N]`, means `[B, H, C, D]`, sizes `[B, H, C]`) of k-means with `rounds` updates.

    It begins with tokens at multiples of the golden ratio: the same at every call, spread over all, and in step with no frame. A
    cluster that loses all of its tokens keeps its mean.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    batch, heads, tokens, width = wide.shape
    turns = (torch.arange(1, count + 1, device=x.device, dtype=torch.float64) * _GOLDEN) % 1
    places = (turns * tokens).long()
    means = wide[:, :, places]
    flat = wide.reshape(batch * heads, tokens, width)
    for number in range(rounds + 1):
        ids = _nearest(flat, means.reshape(batch * heads, count, width))
        sizes = torch.zeros((batch * heads, count), dtype=wide.dtype, device=x.device)
        sizes.scatter_add_(1, ids, torch.ones_like(ids, dtype=wide.dtype))
        if number == rounds:
            break
        sums = torch.zeros((batch * heads, count, width), dtype=wide.dtype, device=x.device)
        sums.scatter_add_(1, ids[..., None].expand_as(flat), flat)
        fresh = sums / sizes.clamp(min=1)[..., None]
        old = means.reshape(batch * heads, count, width)
        means = torch.where(sizes[..., None] > 0, fresh, old).reshape(batch, heads, count, width)
    return ids.view(batch, heads, tokens), means, sizes.view(batch, heads, count)


def _nearest(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Return the nearest mean of each token, the first among equals: of `[G, N, D]` and `[G, C, D]`, `[G, N]`."""
    # |x - c|^2 less |x|^2, which is the same for all c.
    squares = means.square().sum(-1)[:, None]
    step = max(1, _CHUNK // max(1, means.shape[0] * means.shape[1]))
    parts = [
        torch.baddbmm(squares, part, means.transpose(1, 2), alpha=-2.0).argmin(-1) for part in x.split(step, dim=1)
    ]
    return torch.cat(parts, 1)


def cluster_pairs(
    queries: torch.Tensor,
    keys: torch.Tensor,
    counts: torch.Tensor,
    sizes: torch.Tensor,
    scale: float,
    mass: float,
    floor: float,
) -> torch.Tensor:
    """Return which clusters of keys a cluster of queries reads, `[B, H, Cq, Ck]`; one without tokens reads and is read by none."""
    some = ((counts > 0)[..., None] & (sizes > 0)[:, :, None]).contiguous()
    if mass >= 1:
        return some
    scores = torch.matmul(queries, keys.transpose(-1, -2)) * scale + sizes.log()[:, :, None]
    probs = scores.softmax(-1)
    most = torch.full(scores.shape[:-1], max(1, int(floor * keys.shape[2])), device=scores.device)
    return bisected(probs, mass, some, top_k(scores, most, some))


def _sorted(ids: torch.Tensor, text: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (order of all tokens, cluster at each place), text as the cluster `last` behind the others."""
    head = ids.new_full((*ids.shape[:2], text), last)
    found = torch.cat((head, ids), 2).sort(dim=-1, stable=True)
    return found.indices, found.values


def _blocks(read: torch.Tensor, q_ids: torch.Tensor, k_ids: torch.Tensor, block: int) -> torch.Tensor:
    """Return the blocks of places `[B, H, Qb, Kb]` in which any pair of clusters is read, by sums over rectangles."""
    sums = torch.zeros((*read.shape[:2], read.shape[2] + 1, read.shape[3] + 1), dtype=torch.int64, device=read.device)
    sums[:, :, 1:, 1:] = read.long().cumsum(2).cumsum(3)
    (top, bottom), (left, right) = (_spans(ids, block) for ids in (q_ids, k_ids))

    def between(x: torch.Tensor, first: torch.Tensor, behind: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = first.shape[2]
        view = (slice(None), slice(None), slice(None), None) if dim == 2 else (slice(None), slice(None), None)
        return x.gather(dim, behind[view].expand(shape)) - x.gather(dim, first[view].expand(shape))

    return between(between(sums, top, bottom, 2), left, right, 3) > 0


def _spans(ids: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first cluster of each block, and the one behind its last."""
    first = ids[:, :, ::block]
    ends = torch.arange(block, ids.shape[2] + block, block, device=ids.device).clamp(max=ids.shape[2]) - 1
    return first, ids[:, :, ends[: first.shape[2]]] + 1


def _fake(q: torch.Tensor, k: torch.Tensor, *rest: float | int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = -(-q.shape[2] // int(rest[-1]))
    order = q.new_empty(q.shape[:3], dtype=torch.int64)
    return order, torch.empty_like(order), q.new_empty((*q.shape[:2], count, count), dtype=torch.bool)


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, float scale, float mass, float floor, int q_clusters, int k_clusters, int rounds, int text, "
        "int block) -> (Tensor, Tensor, Tensor)",
        cluster_blocks,
        _fake,
    )
