"""Check the attention that each token gets: the kernel and the written-out form against whole probabilities."""

import math

import pytest
import torch

from effcompile import ops
from effcompile.core.expr import BATCH, BOOL, KEY, TRUE, apply, axis, load
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL
from effcompile.ops.tokens.mass import written

PADDED = load(0, (axis(BATCH), axis(KEY)), BOOL)


@pytest.mark.parametrize("length", [1, 70, 300])
@pytest.mark.parametrize(
    "keep", [TRUE, CAUSAL.keep, apply("and", CAUSAL.keep, PADDED)], ids=["full", "causal", "padded"]
)
@pytest.mark.parametrize("some", [False, True])
def test_mass(length, keep, some):
    ops.register()
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, length, 16), torch.randn(2, 2, length, 16)
    real = torch.rand(2, length) < 0.7
    real[:, 0] = True
    rows = torch.tensor([[length - 1, 0], [length // 2, length - 1]]) if some else None
    kept = torch.ones(2, 1, length, length, dtype=torch.bool)
    if keep != TRUE:
        kept = kept.tril()
        if keep.op == "and":
            kept = kept & real[:, None, None]
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(~kept, -math.inf)
    probs = scores.softmax(-1)
    if rows is not None:
        probs = torch.stack([probs[b, :, rows[b]] for b in range(2)])
    wanted = probs.sum(2).mean(1)
    operands = (rows, [real], [], to_json(keep), 0.3)
    torch.testing.assert_close(torch.ops.eff.token_mass_v1(q, k, *operands).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(written(q.double(), k.double(), *operands), wanted, rtol=1e-12, atol=1e-12)
    assert math.isclose(float(wanted.sum()), 2 * (length if rows is None else 2), rel_tol=1e-9)
