"""Check what int8 products over a map mean: near exact attention on the same pairs, and the dense int8 op where all is kept."""

from __future__ import annotations

import torch
from torch.library import opcheck

from effcompile import ops
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL
from effcompile.ops.attention_blocks import attention_blocks
from effcompile.ops.int8_attention import int8_attention
from effcompile.ops.int8_blocks import int8_blocks
from tests.ops.test_attention_blocks import qkv

REST = ([], [], to_json(CAUSAL.keep), "never", 0.125, 64, 64)


def test_all_blocks_are_dense_int8_attention() -> None:
    q, k, v = qkv(1, (4, 2), (200, 200), (64, 64), torch.float32)
    k = k + 3.0
    found = int8_blocks(q, k, v, torch.ones(1, 1, 4, 4, dtype=torch.bool), *REST)
    dense, _ = int8_attention(q, k, v, None, None, -1, 0, 0, 0.125)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


def test_it_is_near_exact_attention_on_the_same_pairs() -> None:
    q, k, v = qkv(2, (4, 2), (200, 200), (64, 32), torch.bfloat16)
    k = k + 3.0
    chosen = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen |= torch.eye(4, dtype=torch.bool)
    found = int8_blocks(q, k, v, chosen, *REST)
    exact = attention_blocks(q.double(), k.double(), v.double(), chosen, *REST)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.03
    other = attention_blocks(q.double(), k.double(), v.double(), torch.ones_like(chosen), *REST)
    assert float((found.double() - other).norm() / other.norm()) > 0.1, "the map leaves nothing out"


def test_op_is_registered_with_a_fake() -> None:
    ops.register()
    q, k, v = qkv(1, (2, 1), (20, 20), (16, 8), torch.float32)
    arguments = (q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), *REST)
    opcheck(torch.ops.eff.int8_blocks_v1.default, arguments, test_utils=("test_schema", "test_faketensor"))
