"""Check which tokens each eviction keeps, against references in float64 of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.core.eviction import Rotation
from effcompile.ops.kv import scores
from effcompile.passes.kv.expected_attention import ExpectedAttention
from effcompile.passes.kv.keyformer import Keyformer
from effcompile.passes.kv.sink_window import SinkWindow
from effcompile.passes.kv.snapkv import SnapKV
from tests.support.evictions import SCALE, cache_of, feed, kept, padded_mask, parts, tokens

ops.register()


@pytest.mark.parametrize("pad", [[0, 0], [0, 21]])
def test_snapkv_keeps_what_a_reference_keeps(pad: list[int]) -> None:
    """Sums over the window's queries, a mean over five neighbors, the largest of each head: by loops in float64."""
    policy, total = SnapKV(budget=30, window=7, pool=5), 90
    q, k, v = tokens(total, 3)
    cache = cache_of(policy)
    feed(cache, q, k, v, padded_mask(pad, 0, total, total))
    for b in range(2):
        for g in range(2):
            read = torch.zeros(total, dtype=torch.float64)
            for head in (2 * g, 2 * g + 1):
                for i in range(total - 7, total):
                    row = (k[b, g].double() @ q[b, head, i].double() * SCALE)[pad[b] : i + 1]
                    read[pad[b] : i + 1] += torch.softmax(row, 0)
            before = read[: total - 7]
            mean = torch.stack([before[max(0, j - 2) : j + 3].sum() / 5 for j in range(len(before))])
            mean[: pad[b]] = -1
            best = sorted(sorted(range(len(mean)), key=lambda j: -float(mean[j]))[:23])
            assert kept(cache)[b, g].tolist() == [*best, *range(total - 7, total)]


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("pad", [[0, 0], [0, 13]])
def test_keyformer_keeps_what_a_reference_keeps(noise: bool, pad: list[int]) -> None:
    """Sums of softmax((score + noise) / temperature), one token less for each that comes, by loops in float64."""
    policy = Keyformer(keep=0.5, recent=0.25, least=10, noise=noise, hot=3.0, horizon=20, seed=5)
    prompt, total = 60, 85
    given = tokens(total, 4)
    cache = cache_of(policy)
    sums, held = torch.zeros(2, 2, total, dtype=torch.float64), [[list(range(prompt))] * 2 for _ in range(2)]
    place = torch.arange(total)
    gumbel = torch.stack(
        [scores.gumbel(5, 3, 4, (place - n)[None], (place - n)[None, None].expand(1, 4, -1))[0].double() for n in pad]
    )

    def gather(b: int, g: int, i: int, warm: float) -> None:
        own = [j for j in held[b][g] if pad[b] <= j < i] + [i]
        for head in (2 * g, 2 * g + 1):
            row = given[1][b, g, own].double() @ given[0][b, head, i].double() * SCALE
            sums[b, g, own] += torch.softmax((row + (gumbel[b, head, i, own] if noise else 0)) / warm, 0)

    for start, part in zip([0, *range(prompt, total)], parts(given, [prompt, *[1] * (total - prompt)])):
        count = part[0].shape[2]
        feed(cache, *part, padded_mask(pad, start, count, total))  # type: ignore[arg-type]
        for b in range(2):
            for g in range(2):
                for i in range(max(start, pad[b]), start + count):
                    gather(b, g, i, 1.0 if start == 0 else 1.0 + 2.0 * min(1.0, (start + 1 - prompt) / 20))
                now = held[b][g] if start == 0 else [*held[b][g], start]
                free = [j for j in now if j < start + count - 7]
                free.sort(key=lambda j: (j >= pad[b], float(sums[b, g, j])))
                gone = set(free[: len(now) - 30])
                held[b][g] = [j for j in now if j not in gone]
        assert kept(cache).tolist() == held, start


def test_sink_window_keeps_the_first_and_the_last() -> None:
    cache = cache_of(SinkWindow(window=10, sinks=3))
    for number, part in enumerate(parts(tokens(70, 5), [30, *[1] * 20, 5, 15])):
        mask = None
        if cache.seen and part[0].shape[2] > 1:
            mask = padded_mask([0, 0], cache.seen, part[0].shape[2], cache.seen + part[0].shape[2])
        feed(cache, *part, mask)  # type: ignore[arg-type]
        seen = cache.seen
        assert kept(cache)[1, 0].tolist() == [0, 1, 2, *range(seen - 10, seen)], number
    assert cache.capacity < 20


def test_expected_attention_ranks_by_the_closed_form() -> None:
    """Mean and covariance of queries turned back, turned by the mean of the next rotations: by explicit matrices in float64."""
    total, depth, future, sinks = 60, 64, 20, 2
    frequency = 1 / 100.0 ** (torch.arange(0, depth, 2).double() / depth)

    def angles(places: Tensor) -> tuple[Tensor, Tensor]:
        angle = (places[:, None] * torch.cat([frequency, frequency])).float()
        return 1.5 * angle.cos(), 1.5 * angle.sin()

    def turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        half = torch.cat([-x[..., depth // 2 :], x[..., : depth // 2]], -1)
        return x * cosines + half * sines

    def matrix(place: int) -> Tensor:
        made = torch.zeros(depth, depth, dtype=torch.float64)
        for n, f in enumerate(frequency.tolist()):
            c, s, m = math.cos(place * f), math.sin(place * f), n + depth // 2
            made[n, n], made[n, m], made[m, n], made[m, m] = c, -s, s, c
        return 1.5 * made

    q, k, v = tokens(total, 7)
    q = turn(q, *angles(torch.arange(total)))
    policy = ExpectedAttention(keep=0.4, least=5, sinks=sinks, future=future)
    cache = cache_of(policy, rotation=Rotation(angles, turn))
    feed(cache, q, k, v)
    ahead = torch.stack([matrix(t) for t in range(total, total + future)]).mean(0)
    inverse = torch.stack([torch.linalg.inv(matrix(t)) for t in range(total)])
    for b in range(2):
        for g in range(2):
            weight = torch.zeros(total, dtype=torch.float64)
            keys = k[b, g].double()
            for head in (2 * g, 2 * g + 1):
                asked = torch.einsum("nij,nj->ni", inverse, q[b, head].double())[sinks:]
                mean, spread = ahead @ asked.mean(0), ahead @ torch.cov(asked.T, correction=0) @ ahead.T
                share = keys @ mean * SCALE + (keys @ spread * keys).sum(1) * SCALE**2 / 2
                weight[sinks:] += torch.softmax(share[sinks:], 0)
            weight *= v[b, g].double().norm(dim=1)
            weight[:sinks] = math.inf
            wanted = sorted(weight.argsort(descending=True)[:24].tolist())
            assert kept(cache)[b, g].tolist() == wanted
