"""Check the kept mass against probabilities in float64, and that the bound holds for every row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile.core.expr import apply, const
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL, K, Q
from effcompile.ops.kept_mass import diameter, kept_mass
from tests.ops.test_attention_blocks import pairs, qkv, reference


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 120), st.sampled_from([16, 33]), st.booleans(), st.integers(0, 999))
def test_mass_and_bound(length: int, width: int, static: bool, seed: int) -> None:
    q, k, v = qkv(2, (4, 2), (length, length), (width, width), torch.float32, seed)
    count = -(-length // 16)
    chosen = torch.rand(2, 4, count, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    narrowed = CAUSAL.keep
    if static:
        chosen = torch.ones_like(chosen)
        narrowed = apply("and", CAUSAL.keep, apply("lt", apply("sub", Q, K), const(9)))
    chosen |= torch.eye(count, dtype=torch.bool)  # each row keeps its own key
    found = kept_mass(q, k, v, chosen, to_json(narrowed), [], [], to_json(CAUSAL.keep), "zero", 0.5, (16, 16))
    kept, _ = pairs(chosen, narrowed, (2, 4, length, length), [], (16, 16))
    _, allowed = pairs(chosen, CAUSAL.keep, (2, 4, length, length), [], (16, 16))
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(found.mass.double(), (probs * kept).sum(-1), rtol=1e-4, atol=1e-5)
    out, _ = reference(q.double(), k.double(), v.double(), kept, 0.5)
    whole, _ = reference(q.double(), k.double(), v.double(), allowed, 0.5)
    assert ((out - whole).norm(dim=-1) <= found.bound + 1e-5).all()
    assert abs(found.error - float((out - whole).norm() / whole.norm())) < 1e-4
    assert 0 < found.density <= 1


def test_the_diameter_is_not_below_the_true_one() -> None:
    v = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    true = torch.cdist(v, v).flatten(2).amax(-1)
    assert (diameter(v) >= true - 1e-5).all()
    assert (diameter(v) <= 2 * true + 1e-5).all()
