"""Compare `zipvl` with its selection and its attention among tokens, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from effcompile.core.expr import BOOL, apply, load
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL, B, K
from effcompile.ops.attention_tokens import attention_tokens, kept_tokens, probes
from effcompile.passes.attention.zipvl import ZipVL
from tests.passes.attention.test_dynamic import STYLES, attend, causal, qkv, real_keys
from tests.support.check import check_policy, check_refusal, policy_graphs, raise_attention

LENGTH = 90
POLICY = ZipVL(mass=0.6, recent=8, spread=8)
PADDED = apply("and", CAUSAL.keep, load(0, (B, K), BOOL))


def allowed_of(real: Tensor) -> Tensor:
    return torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()[None, None] & real[:, None, None]


def picked(q: Tensor, k: Tensor, real: Tensor, policy: ZipVL) -> Tensor:
    operands = (q, k, [real], [], to_json(PADDED), q.shape[-1] ** -0.5)
    return kept_tokens(*operands, policy.mass, policy.recent, policy.spread, policy.floor)


def expected_of(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, allowed: Tensor) -> Tensor:
    """Return attention among kept tokens; the others get 0."""
    pairs = allowed & kept[:, None, None, :] & kept[:, None, :, None]
    return attend(q, k, v, pairs)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["none", *STYLES]), st.floats(0.1, 0.99), st.sampled_from([0.05, 0.5]), st.integers(0, 99))
def test_the_choice(style: str, mass: float, floor: float, seed: int) -> None:
    """The count is from the raw sums, the order from sums over the rows that see a token; ends stay, padding never does."""
    q, k, _ = qkv(2, (4, 2), (LENGTH, LENGTH), seed)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if style == "none" else real_keys(style, LENGTH, seed)
    policy = ZipVL(mass=mass, recent=8, spread=8, floor=floor)
    kept = picked(q, k, real, policy)
    rows, valid = probes(real, 8, 8)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.25
    probs = scores.masked_fill(~allowed_of(real), -math.inf).softmax(-1).nan_to_num().mean(1)
    assert not (kept & ~real).any()
    for b in range(2):
        mine = rows[b][valid[b]].tolist()
        if not real[b].any():
            assert not mine
            assert not kept[b].any()
            continue
        assert len(set(mine)) == len(mine)
        assert all(bool(real[b, row]) for row in mine)
        late = real[b].nonzero().flatten().tolist()[-8:]
        assert set(late) <= set(mine)
        raw = probs[b, mine].sum(0)
        seen = torch.tensor([sum(row >= j for row in mine) for j in range(LENGTH)]).clamp(min=1)
        order = (raw / seen).masked_fill(~real[b], -1)
        sums = raw.sort(descending=True).values.cumsum(0)
        count = max(int((sums < mass * sums[-1] - 1e-6).sum()) + 1, math.ceil(floor * int(real[b].sum()) - 1e-6))
        alive = real[b].nonzero().flatten()
        wanted = set(order.topk(min(count, len(alive))).indices.tolist()) | {int(alive[0]), int(alive[-1])}
        assert set(kept[b].nonzero().flatten().tolist()) == wanted & set(alive.tolist())


def test_all_rows_as_probes_see_every_sum_and_more_mass_keeps_more() -> None:
    q, k, _ = qkv(2, (4, 2), (LENGTH, LENGTH))
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    rows, valid = probes(real, 10, LENGTH)
    assert all(set(row[v].tolist()) == set(range(LENGTH)) for row, v in zip(rows, valid))
    counts = [picked(q, k, real, ZipVL(mass=mass, recent=8, spread=8)).sum() for mass in (0.2, 0.5, 0.8, 0.99)]
    assert counts == sorted(counts)
    turned = picked(q.flip(1), k.flip(1), real, POLICY)
    assert torch.equal(turned, picked(q, k, real, POLICY)), "the order of heads does not matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_dense(dtype: torch.dtype) -> None:
    check_policy(
        ZipVL(mass=1.0, recent=8, spread=8), causal, [x.to(dtype) for x in qkv(2, (4, 2), (LENGTH, LENGTH))], causal
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", ["none", *STYLES])
def test_what_is_computed(style: str, dtype: torch.dtype) -> None:
    """Every sequence keeps tokens of its own; what is kept attends to itself under the mask, what is dropped gets 0."""
    args = [x.to(dtype) for x in qkv(2, (4, 2), (LENGTH, LENGTH))]
    real = torch.ones(2, LENGTH, dtype=torch.bool) if style == "none" else real_keys(style, LENGTH, 5)

    def dense(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        kept = (torch.arange(LENGTH)[None] <= torch.arange(LENGTH)[:, None])[None, None] & real[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)

    kept = picked(args[0], args[1], real, POLICY)
    assert kept.sum() < real.sum()
    check_policy(POLICY, dense, [*args, real], lambda q, k, v, r: expected_of(q, k, v, kept, allowed_of(real)))


def test_documents_stay_apart() -> None:
    """A predicate that is neither order nor padding is read at the tokens' own places."""
    args, places = qkv(2, (4, 2), (LENGTH, LENGTH)), torch.arange(LENGTH)
    document = (places // 33)[None, None]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(LENGTH)
        kept = (at[None] <= at[:, None]) & (at[None] // 33 == at[:, None] // 33)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)

    allowed = (places[None] <= places[:, None]) & (document[0] == document[0].T)
    graph = policy_graphs(raise_attention(dense, args), POLICY)["cpu-tokens"]
    node = next(n for n in graph.graph.nodes if n.target is torch.ops.eff.attention_tokens_v1.default)
    keep, scale = str(node.args[5]), float(node.args[7])
    kept = kept_tokens(args[0], args[1], [], [], keep, scale, 0.6, 8, 8, 0.1)
    check_policy(POLICY, dense, args, lambda q, k, v: expected_of(q, k, v, kept, allowed))


def test_a_symbolic_length_needs_no_new_graph() -> None:
    raised = raise_attention(causal, qkv(1, (4, 2), (LENGTH, LENGTH)), symbolic=True)
    for name, graph in policy_graphs(raised, POLICY).items():
        for length in (1, 5, 90, 150):
            args = qkv(1, (4, 2), (length, length), seed=length)
            real = torch.ones(1, length, dtype=torch.bool)
            wanted = expected_of(*args, picked(args[0], args[1], real, POLICY), allowed_of(real))
            torch.testing.assert_close(graph(*args), wanted, msg=lambda text, n=name: f"{n}: {text}")


def test_refusals() -> None:
    check_refusal(POLICY, causal, qkv(1, (4, 2), (16, 16)), "EFF-A502")

    def chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])[:, None] + 20
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(k.shape[2]) <= at, enable_gqa=True)

    check_refusal(POLICY, chunk, qkv(1, (4, 2), (70, 90)), "EFF-A504")
    full = lambda q: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
    check_refusal(POLICY, full, qkv(1, (2, 2), (90, 90))[:1], "EFF-A504")


def test_the_op_has_a_fake() -> None:
    from effcompile import ops

    ops.register()
    operands = (*qkv(1, (2, 2), (40, 40)), [], [], to_json(CAUSAL.keep), "zero", 0.2, 0.5, 8, 8, 0.1)
    opcheck(torch.ops.eff.attention_tokens_v1.default, operands, test_utils=("test_schema", "test_faketensor"))
    assert torch.ops.eff.attention_tokens_v1(*operands).is_contiguous()


def test_no_token_at_all() -> None:
    q, k, v = qkv(1, (2, 2), (0, 0))
    out = attention_tokens(q, k, v, [], [], to_json(CAUSAL.keep), "zero", 0.2, 1.0, 8, 8, 0.1)
    assert out.shape == v.shape
