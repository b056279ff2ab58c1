"""Check which masks 8-bit products take, that they compose with static patterns, and the numbers of the rewritten graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.core.policy import Estimate, Policy
from effcompile.core.target import Target
from effcompile.passes.attention.block_topk import BlockTopk
from effcompile.passes.attention.sink_window import SinkWindow
from effcompile.passes.attention.sliding_window import SlidingWindow
from effcompile.passes.precision.sage_int8 import Band, SageInt8, band_of
from effcompile.targets import devices
from tests.support.check import all_catalog, check_refusal, flat, fresh, raise_attention, rewritten

HOPPER = Target.parse("sm_90", devices())
SAGE = SageInt8()


def qkv(rows: int = 200, keys: int | None = None, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    q = torch.randn(2, heads, rows, 32, generator=draw, dtype=torch.bfloat16)
    k, v = (torch.randn(2, kv_heads, keys or rows, 32, generator=draw, dtype=torch.bfloat16) for _ in range(2))
    return [q, k + 3.0, v]  # a mean that rounding alone would waste its range on


def sdpa(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def banded(left: int, right: int) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        kept = (j >= i - left) & (j <= i + right)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)

    return run


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i - j).abs() <= 20, enable_gqa=True)


FORMS: dict[str, tuple[Callable[..., Tensor], Band]] = {
    "full": (sdpa(), Band()),
    "causal": (sdpa(is_causal=True), Band(right=0)),
    "window": (banded(31, 0), Band(left=31, right=0)),
    "both": (both_ways, Band(left=20, right=20)),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_the_rewritten_graph_is_near_the_truth_and_is_the_op(name: str) -> None:
    function, band = FORMS[name]
    args = qkv()
    raised = raise_attention(function, fresh(args))
    assert band_of(raised.sites[0]) == band
    answer = SAGE.propose(raised.sites[0], HOPPER, all_catalog())
    assert isinstance(answer, Estimate), answer
    program, _ = apply(SAGE, raised)
    with torch.no_grad():
        (found,) = flat(program(*args))
        exact = function(*(x.double() for x in args))
    # Products of 8 bits: half a step of 1/127 of the largest entry of a block, against sums over 32 entries.
    assert float((found.double() - exact).norm() / exact.norm()) < 0.02
    rest = (band.left, band.right, band.offset, 32**-0.5)
    assert torch.equal(found, torch.ops.eff.int8_attention_v1(*args, None, None, *rest)[0])


def apply(policy: Policy, raised: Any) -> tuple[Any, Any]:
    from effcompile.passes.attention.rewrite import rewrite_attention

    program, sites = rewrite_attention(raised.program, raised.sites, {site.id: (policy,) for site in raised.sites})
    return program.entries[0].graph, sites


def _padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None, :], enable_gqa=True)


def _biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    bias = (j - i).to(q.dtype) * 0.1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def _capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = torch.tanh(q @ k.transpose(-1, -2) * 32**-0.5 / 30.0) * 30.0
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@pytest.mark.parametrize(
    ("function", "args", "code"),
    [
        (_padded, [*qkv(), torch.ones(2, 200, dtype=torch.bool)], "EFF-A203"),
        (_biased, qkv(), "EFF-A207"),
        (_capped, qkv(), "EFF-A201"),
        (sdpa(), qkv(64), "EFF-A502"),
        (sdpa(), [x.float() for x in qkv()], "EFF-A505"),
    ],
)
def test_other_sites_are_refused_by_name(function: Callable[..., Tensor], args: list[Tensor], code: str) -> None:
    check_refusal(SAGE, function, args, code, HOPPER)


def test_a_window_that_leaves_rows_empty_is_refused() -> None:
    """More queries than keys: late rows have no key, which SDPA answers with zeros or NaN, as it likes."""
    raised = raise_attention(banded(31, 0), fresh(qkv(300, 200)))
    found = band_of(raised.sites[0])
    assert isinstance(found, Band) == (raised.sites[0].mask.empty_row in ("zero", "never"))


def test_there_is_no_kernel_on_cpu() -> None:
    refusal = check_refusal(SAGE, sdpa(is_causal=True), qkv(), "EFF-A505")
    assert "EFF-A209" in refusal.reason


class Causal(nn.Module):
    """Project, attend, project."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def explain(**options: str) -> dict[str, Any]:
    model, x = Causal().bfloat16(), torch.randn(1, 256, 64, dtype=torch.bfloat16)
    found: dict[str, Any] = eff.explain(model, x, target="sm_90", options=options).to_json()
    return found


def test_it_composes_with_a_static_pattern() -> None:
    (site,) = explain(attention="sliding-window{window=64}", precision="sage-int8")["sites"]
    assert site["policy"] == "sliding-window{window=64}, sage-int8"
    assert site["kernel"] == "triton-int8"
    (alone,) = explain(precision="sage-int8")["sites"]
    assert (alone["policy"], alone["kernel"]) == ("sage-int8", "triton-int8")
    assert site["seconds"] <= alone["seconds"]


def test_a_pattern_that_leaves_no_band_keeps_its_precision() -> None:
    (site,) = explain(attention="sink-window{window=64}", precision="sage-int8")["sites"]
    assert site["policy"] == "sink-window{window=64}"
    assert [item["code"] for item in site["declined"] if item["policy"] == "sage-int8"] == ["EFF-A203"]


@pytest.mark.parametrize(
    "pattern",
    [
        "block-topk{density=0.4,block=64,dense_layers=0}",
        "xattention{threshold=0.5,block=64}",
        "pooled-cdf{cdf=0.5,similarity=0,block=64}",
        "vertical-slash{coverage=0.5,block=64}",
    ],
)
def test_it_composes_with_maps_of_blocks(pattern: str) -> None:
    (site,) = explain(attention=pattern, precision="sage-int8")["sites"]
    (alone,) = explain(attention=pattern)["sites"]
    assert site["policy"] == f"{alone['policy']}, sage-int8"
    assert (site["kernel"], alone["kernel"]) == ("triton-int8-blocks", "triton-blocks")
    assert site["seconds"] < alone["seconds"]


def test_dropped_tokens_keep_their_precision() -> None:
    (site,) = explain(attention="zipvl", precision="sage-int8")["sites"]
    assert "EFF-A509" in {item["code"] for item in site["declined"]} or site["policy"] == "sage-int8"


@torch.no_grad()
def test_products_over_a_map_are_rounded() -> None:
    from effcompile.passes.attention.rewrite import rewrite_attention

    args, pattern = qkv(), BlockTopk(density=0.4, block=64, dense_layers=0)
    raised = raise_attention(sdpa(is_causal=True), fresh(args))
    chain = {site.id: (pattern, SAGE) for site in raised.sites}
    program, _ = rewrite_attention(raised.program, raised.sites, chain)
    graph = program.entries[0].graph
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any("int8_blocks_v1" in name for name in names)
    assert not any("attention_blocks_v1" in name for name in names)
    (found,) = flat(graph(*args))
    exact = rewrite_attention(raised.program, raised.sites, {site.id: (pattern,) for site in raised.sites})[0]
    (plain,) = flat(exact.entries[0].graph(*args))
    assert 0 < float((found - plain).float().norm() / plain.float().norm()) < 0.03


@torch.no_grad()
def test_both_policies_act_on_the_numbers() -> None:
    args = qkv()
    raised = raise_attention(sdpa(is_causal=True), fresh(args))
    from effcompile.passes.attention.rewrite import rewrite_attention

    chain = {site.id: (SlidingWindow(window=50), SAGE) for site in raised.sites}
    program, _ = rewrite_attention(raised.program, raised.sites, chain)
    (found,) = flat(program.entries[0].graph(*args))
    assert torch.equal(found, torch.ops.eff.int8_attention_v1(*args, None, None, 49, 0, 0, 32**-0.5)[0])
    with pytest.raises(AssertionError, match="refuses"):
        rewritten(raised, SAGE)  # on CPU
    assert SinkWindow(window=50).family != SAGE.family


@torch.no_grad()
def test_require_counts_the_family() -> None:
    model, x = Causal().bfloat16(), torch.randn(1, 256, 64, dtype=torch.bfloat16)
    cheap = {"emit": "interpreter", "target": "sm_90"}
    run = torch.compile(model, backend=eff.backend(precision="sage-int8", require={"precision": "all"}, **cheap))
    assert float((run(x) - model(x)).norm() / model(x).norm()) < 0.02
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"EFF-P502.*precision=all: 0 of 1"):
        torch.compile(model, backend=eff.backend(require={"precision": "all"}, emit="interpreter"))(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?s)EFF-P502.*EFF-A505"):
        torch.compile(model, backend=eff.backend(precision="sage-int8", require={"precision": "all"}))(x)


def test_a_misspelled_policy_has_near_matches() -> None:
    with pytest.raises(EffError, match="sage-int8"):
        explain(precision="sage-int")
