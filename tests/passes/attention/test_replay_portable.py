"""Check replayed attention in standard operations against masks that are written down, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effcompile.passes.attention.re_ttention import ReTtention
from effcompile.passes.attention.replay_portable import banded, refresh, sparse
from effcompile.passes.attention.video import place_major

CASES = {
    "image": (ReTtention(keep=0.1), 300),
    "short": (ReTtention(keep=0.2), 50),
    "video": (ReTtention(keep=0.3, text=6, frames=4), 6 + 4 * 40),
    "no text": (ReTtention(keep=0.2, frames=3), 3 * 61),
    "wide": (ReTtention(keep=0.9), 200),
}


def qkv(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return [2 * torch.randn(2, 3, tokens, 8, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3)]


def band(policy: ReTtention, tokens: int) -> Tensor:
    """Return the kept pairs of tokens as the model has them."""
    half, places = policy.half(tokens), torch.arange(tokens)
    if not policy.frames:
        return (places[:, None] - places).abs() <= half
    inside = (places - policy.text) % ((tokens - policy.text) // policy.frames)
    text = places < policy.text
    return ((inside[:, None] - inside).abs() <= half) | text[:, None] | text


def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~kept, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_formulas(name: str) -> None:
    policy, tokens = CASES[name]
    kept, everything = band(policy, tokens), torch.ones(tokens, tokens, dtype=torch.bool)
    q, k, v = qkv(tokens)
    scale = 1 / math.sqrt(8)
    out, rho, residual = refresh(q, k, v, policy, scale)
    whole, of_all = attention(q, k, v, everything)
    inside, of_band = attention(q, k, v, kept)
    assert torch.allclose(out, whole, atol=1e-5), "a refresh is dense"
    # State lies in the order of the policy.
    order = place_major(tokens, policy.text, policy.frames, q.device) if policy.frames else torch.arange(tokens)
    mass = (of_band - of_all).exp()
    assert torch.allclose(rho.double(), mass[:, :, order], atol=1e-5)
    left = whole - mass[..., None] * inside
    assert torch.allclose(residual, left[:, :, order], atol=1e-5)
    q2, k2, v2 = (x.roll(1, 0) for x in (q, k, v))
    got, grown = sparse(q2, k2, v2, rho, residual, policy, scale)
    expected = (mass + policy.growth).clamp(max=1)
    assert torch.allclose(grown.double(), expected[:, :, order], atol=1e-5)
    near, _ = attention(q2, k2, v2, kept)
    assert torch.allclose(got, expected[..., None] * near + left, atol=1e-5)


def test_the_band_multiplies_with_what_is_near_alone() -> None:
    """Keys that are far away may be anything, also what a mask over all pairs would turn into NaN."""
    q, k, v = qkv(400, torch.float32)
    far = k.clone()
    far[:, :, 300:] = math.inf
    narrow, lse = banded(q, far, v, 0.3, 10, 0, 1)
    plain, of_plain = banded(q, k, v, 0.3, 10, 0, 1)
    assert torch.equal(narrow[:, :, :192], plain[:, :, :192])
    assert torch.equal(lse[:, :, :192], of_plain[:, :, :192])
