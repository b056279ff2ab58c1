"""Compare `radial` with a mask that is written down pair by pair, and hold its density against the count."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.policy import Estimate
from effcompile.passes.attention.radial import Radial
from tests.support.check import CPU, all_catalog, check_policy, check_refusal, raise_attention


def written(policy: Radial, tokens: int) -> Tensor:
    """Return the kept pairs `[N, N]`, a pair at a time."""
    span = (tokens - policy.text) // policy.frames
    kept = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        for k in range(tokens):
            if q < policy.text or k < policy.text:
                kept[q, k] = True
                continue
            (fq, pq), (fk, pk) = (divmod(token - policy.text, span) for token in (q, k))
            distance = abs(fq - fk)
            if distance <= 1 or (policy.first and fk == 0):
                kept[q, k] = True
                continue
            width = policy.decay * span / 2 ** int(math.log2(distance))
            floor = min(policy.least, span)
            every = 1 if width >= floor else 2 ** math.ceil(math.log2(floor / width))
            kept[q, k] = distance % every == 0 and abs(pq - pk) <= int(max(width, floor)) // 2
    return kept


CASES = (
    (Radial(frames=6, least=2, decay=1.0), 6 * 8),
    (Radial(frames=9, text=5, least=6, decay=0.9, first=False), 5 + 9 * 10),
    (Radial(frames=13, text=3, least=4, decay=0.4), 3 + 13 * 7),
)


def qkv(tokens: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, 2, tokens, 16, generator=draw) for _ in range(3)]


@pytest.mark.parametrize(("policy", "tokens"), CASES)
def test_it_is_the_mask_that_is_written_down(policy: Radial, tokens: int) -> None:
    kept = written(policy, tokens)
    assert 0.2 < float(kept.float().mean()) < 0.9

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept)

    check_policy(policy, attend, qkv(tokens), oracle)
    (site,) = raise_attention(attend, qkv(tokens)).sites
    answer = policy.propose(site, CPU, all_catalog())
    assert isinstance(answer, Estimate)
    assert answer.density == pytest.approx(float(kept.double().mean()), abs=0.02)


def test_twice_the_frames_keep_less_than_twice_as_much_each() -> None:
    shares = []
    for frames in (8, 16, 32):
        policy = Radial(frames=frames, least=1, decay=1.0, first=False)
        rings = sum((2 * half + 1) * len(range(near, far + 1, every)) for near, far, every, half in policy.bands(64))
        shares.append(rings)
    assert shares[1] - shares[0] < 1.3 * 64 * 2
    assert shares[2] - shares[1] < 1.3 * 64 * 2, "each doubling adds as much: N log N in all"


def test_what_is_no_video_is_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    check_refusal(Radial(frames=7), attend, qkv(48), "EFF-A504")
    check_refusal(Radial(), attend, qkv(48), "EFF-A504")
    check_refusal(Radial(frames=2, first=False), attend, qkv(48), "EFF-A502")
