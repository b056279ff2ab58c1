"""Prepare the classes of transformers that its registry of experts does not reach, one small block of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from effcompile.integrations.experts import catalog
from effcompile.integrations.experts.attach import ExpertsWarning
from effcompile.integrations.transformers_experts import prepare_experts
from tests.support import experts as support

HIDDEN, INNER = 32, 24


def llama4() -> nn.Module:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "intermediate_size_mlp": INNER}
    return Llama4TextMoe(Llama4TextConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))


def switch() -> nn.Module:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    return SwitchTransformersSparseMLP(
        SwitchTransformersConfig(d_model=HIDDEN, d_ff=INNER, num_experts=3, expert_capacity=3)
    )


def dbrx() -> nn.Module:
    from transformers import DbrxConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    fields = {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2}
    return DbrxFFN(DbrxConfig(d_model=HIDDEN, ffn_config=fields))


def jetmoe() -> nn.Module:
    from transformers import JetMoeConfig
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE

    fields = {"hidden_size": HIDDEN, "intermediate_size": INNER}
    return JetMoeMoE(JetMoeConfig(**fields, num_local_experts=4, num_experts_per_tok=2))


def longcat() -> nn.Module:
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    fields = {"hidden_size": HIDDEN, "expert_ffn_hidden_size": INNER, "n_routed_experts": 4, "zero_expert_num": 2}
    config = LongcatFlashConfig(**fields, num_experts_per_tok=3)
    config.num_local_experts = 4
    return LongcatFlashMoE(config)


def step3p7(limit: float | None = None) -> nn.Module:
    from types import SimpleNamespace

    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    sizes = {"num_local_experts": 4, "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "hidden_act": "silu"}
    experts = Step3p7Experts(SimpleNamespace(**sizes), limit)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(HIDDEN, 4), experts

        def forward(self, x: Tensor) -> Tensor:
            rows = x.view(-1, HIDDEN)
            weights, ids = self.gate(rows).sigmoid().topk(2, dim=-1, sorted=False)
            return self.experts(rows, ids, weights).view(*x.shape)

    return Routed()


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "llama4": llama4,
    "switch": switch,
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "longcat": longcat,
    "step3p7": step3p7,
}
X = torch.randn(2, 11, HIDDEN, generator=torch.Generator().manual_seed(1))


def filled(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    block = make().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1)
    return block


def run(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = block(x)
    found = found[0] if isinstance(found, tuple) else found
    return found.reshape(-1, HIDDEN)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_prepared_block_computes_the_same_in_one_graph(name: str) -> None:
    if name == "switch" and torch.__version__.startswith("2.11."):
        pytest.skip("Dynamo of torch 2.11 does not trace the `.to` in transformers' own router")
    block = filled(BLOCKS[name])
    exact = run(copy.deepcopy(block).double(), X.double())
    plain = {key: value.clone() for key, value in block.state_dict().items()}
    assert eff.prepare(block) is block
    assert support.error(run(block, X), exact) < 1e-5
    state = block.state_dict()
    assert list(state) == list(plain)
    assert all(torch.equal(value, plain[key]) and value.is_contiguous() for key, value in state.items())
    torch._dynamo.reset()
    options = {"strict": True, "require": {"moe": "all"}, "emit": "interpreter"}
    fast = torch.compile(block, backend="eff", fullgraph=True, options=options)
    before = len(eff.report()["graphs"])
    assert support.error(run(fast, X), exact) < 1e-5
    (site,) = [site for graph in eff.report()["graphs"][before:] for site in graph["experts"]]
    assert site["idiom"] == "eff.prepare"
    assert site["side"] == ("in" if name == "llama4" else "out")
    for value in block.parameters():
        value.data.mul_(0.9)  # in place: the next call has to see it
    exact = run(copy.deepcopy(block).double(), X.double())
    assert support.error(run(fast, X), exact) < 1e-5
    assert support.error(run(block, X), exact) < 1e-5


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_the_source_s(name: str) -> None:
    block, plain = filled(BLOCKS[name]), filled(BLOCKS[name])
    prepare_experts(block)
    for each in (block, plain):
        found = each(X)
        (found[0] if isinstance(found, tuple) else found).square().sum().backward()
    for (key, a), (_, b) in zip(block.named_parameters(), plain.named_parameters()):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=key)


def test_what_a_full_expert_drops_stays_dropped() -> None:
    """A sequence of one token repeated wants one expert only, whose capacity is 3: all but three tokens get 0, bit for bit."""
    block = filled(switch)
    same = X[:1, :1].expand(2, 11, HIDDEN).contiguous()
    wanted = run(block, same)
    prepare_experts(block)
    found = run(block, same)
    dropped = (wanted == 0).all(1)
    assert dropped.sum() == 2 * (11 - 3)
    assert torch.equal((found == 0).all(1), dropped)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_limit_behind_the_activation_is_refused() -> None:
    block = filled(lambda: step3p7(0.5))
    wanted = run(block, X)
    with pytest.warns(ExpertsWarning, match="EFF-M302 Step3p7Experts limits the gate"):
        prepare_experts(block)
    assert torch.equal(run(block, X), wanted)


def test_code_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.longcat_flash import modeling_longcat_flash as module

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states

    monkeypatch.setattr(module.LongcatFlashExperts, "forward", forward)
    block = filled(longcat)
    with pytest.warns(ExpertsWarning, match=r"LongcatFlashExperts\.forward` is not the code"):
        prepare_experts(block)
    assert torch.equal(run(block, X), X.reshape(-1, HIDDEN))


def test_the_table_of_the_documentation_is_the_catalog() -> None:
    text = (Path(__file__).parents[3] / "docs" / "experts.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (replaced|refused|left)", text, re.MULTILINE))
    assert {name for name, state in rows.items() if state == "replaced"} == set(catalog.REPLACED)
    assert {name for name, state in rows.items() if state == "refused"} == set(catalog.REFUSED)


def test_no_class_with_experts_is_missing_in_the_table() -> None:
    """Every class of transformers that holds experts or routes to them is on its interface, or in docs/experts.md."""
    import transformers

    text = (Path(__file__).parents[3] / "docs" / "experts.md").read_text(encoding="utf-8")
    found = set()
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in source:
            names = re.findall(r"^class (\w+)\(", source, re.MULTILINE)
            found |= {
                name for name in names if re.search(r"(Experts?|ExpertGLU|MoE|Moe|MoA|Router|Gating|SparseMLP)$", name)
            }
    found -= {"GraniteDoclingDensityRouter"}  # routes pages of documents, not tokens
    assert len(found) > 15
    assert not {name for name in found if f"`{name}`" not in text}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama4ForCausalLM": ("Llama4TextConfig", {"num_local_experts": 4, "intermediate_size_mlp": INNER, "head_dim": 8}),
    "DbrxForCausalLM": (
        "DbrxConfig",
        {
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0, "attn_pdrop": 0.0},
            "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "JetMoeForCausalLM": ("JetMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}),
    "SwitchTransformersEncoderModel": (
        "SwitchTransformersConfig",
        {"d_model": HIDDEN, "d_ff": INNER, "d_kv": 8, "num_heads": 4, "num_experts": 4, "encoder_sparse_step": 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_model_is_one_graph(name: str, tmp_path: Path) -> None:
    import transformers

    config, fields = MODELS[name]
    base = {
        "vocab_size": 97,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_layers": 2,
    }
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    if name.startswith("Dbrx"):
        base = {"vocab_size": 97, "max_seq_len": 64}
    if name.startswith("JetMoe"):
        base.pop("num_attention_heads")
    model = filled(lambda: getattr(transformers, name)(getattr(transformers, config)(**base, **fields)))
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    # Compiled, Switch makes no mask of its own.
    kind = {"attention_mask": torch.ones_like(ids)} if name.startswith("Switch") else {"use_cache": False}
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, **kind)[0]
        prepare_experts(model)
        torch._dynamo.reset()
        options = {"strict": True, "emit": "interpreter"}
        fast = torch.compile(model, backend="eff", fullgraph=True, options=options)
        before = len(eff.report()["graphs"])
        assert support.error(fast(ids, **kind)[0], exact) < 1e-5
        assert support.error(model(ids, **kind)[0], exact) < 1e-5
    sites = [site for graph in eff.report()["graphs"][before:] for site in graph["experts"]]
    assert len(sites) == 2
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for (key, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(a, b), key
