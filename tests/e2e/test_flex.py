"""Compile models that call flex_attention themselves: raised calls, pinned block lists, contracts, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from tests.support.flex import create_block_mask, debugging, flex_attention
from tests.support.hf_zoo import cases, run_call, trace_call
from tests.support.small import CHEAP, close

S = 256


def qkv(length: int = S) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(length)
    return tuple(torch.randn(2, 4, length, 16, generator=draw) for _ in range(3))  # type: ignore[return-value]


def sites() -> list[tuple[str, str, str]]:
    return [(s["idiom"], s["mask"], s["kernel"]) for graph in eff.report()["graphs"] for s in graph["sites"]]


def banded(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, slopes: Tensor) -> Tensor:
    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 100) & (ids[b, i] == ids[b, j])

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + slopes[h] * (j - i)

    blocks = create_block_mask(keep, 2, None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, score, blocks).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_call_through_inductor() -> None:
    ids = torch.arange(S).ge(90).long().expand(2, S).contiguous()
    args = (*qkv(), ids, torch.rand(4))
    with debugging():
        expected = banded(*args)
    options = {"strict": True, "require": {"attention": "all"}}
    result = torch.compile(banded, backend="eff", options=options)(*args)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert [(idiom, mask) for idiom, mask, _ in sites()] == [("flex", "causal & window(99) & document & bias(alibi)")]


@torch.no_grad()
def test_one_graph_serves_other_lengths() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=blocks)

    fast = torch.compile(causal, backend="eff", options=CHEAP, dynamic=True)
    for length in (200, 300, 131):
        q, k, v = qkv(length)
        expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(fast(q, k, v), expected, rtol=1e-5, atol=1e-5)
    assert [site[:2] for site in sites()] == [("flex", "causal")]


@torch.no_grad()
def test_autocast_around_the_model_keeps_the_call() -> None:
    ids = torch.arange(S).ge(90).long().expand(2, S).contiguous()
    args = (*qkv(), ids, torch.rand(4))
    with debugging(), torch.autocast("cpu", torch.bfloat16):
        expected = banded(*args)
        result = torch.compile(banded, backend="eff", options=CHEAP)(*args)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)
    assert [m["refusal"][:8] for graph in eff.report()["graphs"] for m in graph["missed"]] == ["EFF-A107"]


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cpu")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=self.blocks)


@torch.no_grad()
def test_block_lists_that_change_later_are_seen() -> None:
    """The proof read the lists; when they change, the call is compiled as it was written, and skips what they leave out."""
    model, (q, k, v) = Held(), qkv()
    fast = torch.compile(model, backend="eff", options={"strict": True})
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(fast(q, k, v), expected, rtol=1e-5, atol=1e-5)
    assert [site[:2] for site in sites()] == [("flex", "causal")]
    model.blocks.full_kv_num_blocks.zero_()  # the second half no longer reads the first
    half = S // 2
    parts = [tuple(x[:, :, part] for x in (q, k, v)) for part in (slice(0, half), slice(half, S))]
    local = [nn.functional.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
    torch.testing.assert_close(fast(q, k, v), torch.cat(local, 2), rtol=1e-5, atol=1e-5)
    assert eff.report()["counters"]["stale"] == 1


@torch.no_grad()
def test_a_call_that_stays_breaks_the_contract_and_is_explained() -> None:
    with debugging():
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cpu")

    def call(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks)

    with pytest.raises(BackendCompilerFailed, match="EFF-P502") as caught:
        torch.compile(call, backend="eff", options={**CHEAP, "require": {"attention": "all"}})(*qkv(), blocks)
    assert "EFF-A108" in str(caught.value)
    torch._dynamo.reset()
    text = str(eff.explain(call, *qkv(), blocks))
    assert "EFF-A108" in text
    assert "create_block_mask" in text
    torch._dynamo.reset()
    kept = torch.compile(call, backend="eff", options={"strict": True})(
        *qkv(), blocks
    )  # through TorchInductor, as written
    expected = nn.functional.scaled_dot_product_attention(*qkv(), is_causal=True)
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_explain_shows_a_raised_call() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))

    text = str(eff.explain(call, *qkv()))
    assert "causal" in text
    assert "flex" in text


def test_training_is_left_to_torch() -> None:
    """On CPU there is no backward of FlexAttention: what torch does with the call, or says about it, stays as it is."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))

    args = [x.requires_grad_() for x in qkv(16)]
    outcomes = []
    for backend in ("inductor", "eff"):
        torch._dynamo.reset()
        try:
            torch.compile(call, backend=backend)(*args).sum().backward()
            outcomes.append("ran")
        except Exception as error:
            outcomes.append(type(getattr(error, "inner_exception", error)).__name__)
    assert outcomes[0] == outcomes[1]
    assert not sites()


# --- Hugging Face ---


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep transformers' masks in the graph: its `_compile=True` only warns, and Dynamo breaks the graph at a warning."""
    masking = pytest.importorskip("transformers.masking_utils")

    def made(*args: Any, _compile: bool = False, **fields: Any) -> Any:
        return create_block_mask(*args, **fields)

    monkeypatch.setattr(masking, "create_block_mask", made)


def through_eff(name: str, call: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from effcompile.backend import compile_dynamo
    from effcompile.core.options import Options

    case = next(case for case in cases() if case.name == name)
    model, options = case.build(), Options.parse(CHEAP)
    expected = run_call(model, case, case.call(call))
    model.set_attn_implementation("flex_attention")  # type: ignore[operator]
    run: Callable[..., Any] = lambda graph, inputs: compile_dynamo(graph, inputs, options)  # noqa: E731
    return trace_call(model, case, case.call(call), backend=run).outputs, expected


@pytest.mark.parametrize(
    ("name", "call", "masks"),
    [
        pytest.param("llama", "nocache", {"causal"}, marks=pytest.mark.slow),
        pytest.param("mistral", "nocache", {"window(7) & causal"}, marks=pytest.mark.slow),
        ("gemma2", "nocache", {"causal", "window(7) & causal"}),  # softcap in the score function
        pytest.param("modernbert", "plain", {"full", "window(+-4)"}, marks=pytest.mark.slow),
        pytest.param(
            "t5", "nocache", {"full", "full & bias(relative)", "causal & bias(relative)"}, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.usefixtures("whole")
def test_hugging_face_models(name: str, call: str, masks: set[str]) -> None:
    found, expected = through_eff(name, call)
    close(found, expected)
    assert {mask for _, mask, _ in sites()} == masks
    assert all(idiom.startswith("flex") for idiom, _, _ in sites())
    assert not [m for graph in eff.report()["graphs"] for m in graph["missed"]]


def test_hugging_face_as_it_is_keeps_its_calls() -> None:
    """A mask that is made in front of a graph break is an input of the next graph: nothing about it is proved."""
    found, expected = through_eff("llama", "nocache")
    close(found, expected)
    refusals = {m["refusal"][:8] for graph in eff.report()["graphs"] for m in graph["missed"]}
    assert not sites()
    assert refusals == {"EFF-A108"}
