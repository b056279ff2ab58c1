"""Prepare mixtures of experts of transformers: the same numbers, one graph, the same weights, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import effcompile as eff
from effcompile.integrations.experts.attach import ExpertsWarning
from effcompile.lowering.moe import price

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2)).eval()


def qwen3() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    fields = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**BASE, **fields)).eval()


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    fields = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    model = GptOssForCausalLM(GptOssConfig(**BASE, **fields)).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def nllb() -> Any:
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    torch.manual_seed(0)
    return NllbMoeSparseMLP(NllbMoeConfig(d_model=32, num_experts=4, expert_capacity=4), ffn_dim=24).eval()


@pytest.mark.parametrize("make", [mixtral, qwen3, gpt_oss])
def test_a_prepared_model_says_what_its_own_loop_says(make: Any) -> None:
    model = make()
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.set_experts_implementation("eager")
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        assert eff.prepare(model) is model
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == names


@pytest.mark.parametrize(("make", "prepared"), [(qwen3, True), (qwen3, False), (mixtral, True)])
def test_prefill_and_decode_stay_one_graph(make: Any, prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import StaticCache

    monkeypatch.setattr(price, "rates_of", lambda device: None)  # the same choice on every CPU
    model = make()
    options = {"strict": True, "require": {"moe": "all"}, "emit": "interpreter"}
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        if prepared:
            eff.prepare(model)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="eff", fullgraph=True, dynamic=False, options=options)
        cache = StaticCache(config=model.config, max_cache_len=16)
        first = fast(IDS[:, :8], past_key_values=cache, use_cache=True, cache_position=torch.arange(8)).logits
        last = fast(IDS[:, 8:], past_key_values=cache, use_cache=True, cache_position=torch.tensor([8])).logits
    torch.testing.assert_close(torch.cat([first, last], 1), wanted, rtol=1e-4, atol=1e-5)
    sites = [site for graph in eff.report()["graphs"] for site in graph["experts"]]
    assert [site["tokens"] for site in sites] == [16, 16, 2, 2]
    assert {site["idiom"] for site in sites} == {"eff.prepare" if prepared else "grouped"}
    assert {site["dispatch"] for site in sites} == {"fused"}


def test_gradients_flow_as_before() -> None:
    model, plain = eff.prepare(qwen3()), qwen3()
    for each in (model, plain):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-4, atol=1e-6)


def test_experts_that_cannot_be_replaced_are_named() -> None:
    model = torch.nn.ModuleDict({"ffn": nllb()})
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        wanted = model["ffn"](x)
        with pytest.warns(ExpertsWarning, match=r"`ffn`: EFF-M302 NllbMoeSparseMLP: its loop takes a 0/1 mask"):
            eff.prepare(model)
        assert torch.equal(model["ffn"](x), wanted)


def test_a_dry_run_names_an_unprepared_loop_and_what_mends_it() -> None:
    model = mixtral()
    model.set_experts_implementation("eager")
    found = eff.explain(model, IDS, use_cache=False, target="cpu")
    assert [place for place, _, _ in found.experts_kept] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert all("EFF-M301" in why and "eff.prepare(model)" in why for _, _, why in found.experts_kept)
    with pytest.raises(eff.EffError, match="moe=all: 0 of 2"):
        found.keep_contract((("moe", "all"),))
    eff.prepare(model)
    found = eff.explain(model, IDS, use_cache=False, target="sm_90", options={"require": {"moe": "all"}})
    assert not found.experts_kept
    assert {row.dispatch for row in found.experts} <= {"batched", "grouped", "dense", "loop"}
    assert "E=4 H=32 I=24" in str(found)
    assert found.to_json()["experts"][0]["router"] == "softmax, top 2, renormalized"


@pytest.mark.slow
def test_the_block_of_the_readme_runs() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if '"moe": "all"' in part]
    model, plain = mixtral(), mixtral()
    names = list(model.state_dict())
    space = {"torch": torch, "eff": eff, "model": model}
    torch._dynamo.reset()
    exec(compile(block, "README.md", "exec"), space)
    with torch.no_grad():
        found = space["fast"](IDS, use_cache=False).logits
        wanted = plain(IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    assert len(eff.report()["graphs"][-1]["experts"]) == 2


def test_an_unknown_dispatch_is_an_error_with_the_near_match() -> None:
    with pytest.raises(eff.EffError, match=r"EFF-U014.*batched"):
        eff.explain(mixtral(), IDS, use_cache=False, target="cpu", options={"moe": "batch"})


@pytest.mark.slow
def test_a_compiled_loop_over_experts_is_reported_with_what_mends_it() -> None:
    model = qwen3()
    model.set_experts_implementation("eager")
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        found = torch.compile(model, backend="eff", options={"emit": "interpreter"})(IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    notices = [notice for notice in eff.report()["notices"] if "EFF-M301" in notice]
    assert notices
    assert "`model.layers.0.mlp" in notices[0]
    assert "modeling_qwen3_moe.py" in notices[0]
    assert "model = eff.prepare(model), before torch.compile" in notices[0]
