"""Check on a CUDA device that every mask kind compiles, picks a device kernel, and agrees with eager in float64.

Run with `make gpu`. Nothing here runs without a device; the same cases run on CPU in tests/lowering.
"""

import pytest
import torch
import torch.nn.functional as F

import effcompile as eff

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BATCH, HEADS, GROUPS, LENGTH, WIDTH = 2, 8, 2, 700, 64


def causal(q, k, v, padding):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def materialized_causal(q, k, v, padding):
    rows = torch.arange(q.shape[2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=rows[None] <= rows[:, None], enable_gqa=True)


def window(q, k, v, padding):
    rows = torch.arange(q.shape[2], device=q.device)
    mask = (rows[None] <= rows[:, None]) & (rows[None] > rows[:, None] - 128)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def padded_causal(q, k, v, padding):
    rows = torch.arange(q.shape[2], device=q.device)
    mask = (rows[None] <= rows[:, None]) & padding[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def softcap(q, k, v, padding):
    k, v = k.repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)
    rows = torch.arange(q.shape[2], device=q.device)
    mask = torch.where(rows[None] <= rows[:, None], 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    scores = torch.tanh(q @ k.transpose(2, 3) * 0.125 / 30) * 30 + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


@pytest.mark.parametrize("function", [causal, materialized_causal, window, padded_causal, softcap])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sites_agree_with_float64(function, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(BATCH, HEADS, LENGTH, WIDTH, device="cuda", generator=generator).to(dtype)
    k, v = (torch.randn(BATCH, GROUPS, LENGTH, WIDTH, device="cuda", generator=generator).to(dtype) for _ in range(2))
    padding = torch.arange(LENGTH, device="cuda")[None] >= torch.tensor([[0], [233]], device="cuda")
    torch._dynamo.reset()
    fast = torch.compile(function, backend="eff", options={"strict": True, "require": {"attention": "all"}})
    with torch.no_grad():
        result = fast(q, k, v, padding)
        plain = function(q, k, v, padding)
        exact = function(q.double(), k.double(), v.double(), padding)
    error, allowed = (result - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * allowed + 1e-3
    (site,) = eff.report()["graphs"][-1]["sites"]
    assert site["kernel"] in ("sdpa", "sdpa-causal", "flex", "dense")


def test_gradients_agree_with_eager():
    q = torch.randn(BATCH, HEADS, 256, WIDTH, device="cuda", requires_grad=True)
    k, v = (torch.randn(BATCH, GROUPS, 256, WIDTH, device="cuda", requires_grad=True) for _ in range(2))
    torch._dynamo.reset()
    fast = torch.compile(materialized_causal, backend="eff", options={"strict": True})
    fast(q, k, v, None).square().sum().backward()
    mine = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    materialized_causal(q, k, v, None).square().sum().backward()
    for got, x in zip(mine, (q, k, v)):
        torch.testing.assert_close(got, x.grad, rtol=1e-3, atol=1e-3)
