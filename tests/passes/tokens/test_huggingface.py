"""Check that unmodified transformers models get shorter: vision transformers, BERT with padding, Llama without a cache."""

import pytest
import torch
import torch.nn.functional as F

import effcompile as eff
from effcompile.models.pooling import MeanPooledEncoder
from tests.passes.tokens.test_drop import compiled

transformers = pytest.importorskip("transformers")
_VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
MODELS = {
    "ViT": ({"intermediate_size": 48}, 17),
    "Dinov2": ({"mlp_ratio": 2}, 17),
    "DeiT": ({"intermediate_size": 48}, 18),
}
POLICIES = ("tome{ratio=0.5}", "spatten{keep=0.7}", "evit{keep=0.5,every=1}", "spatten{keep=0.7,heads=0.6}")
VISION = [
    pytest.param(name, policy, marks=() if n == m else pytest.mark.slow)
    for n, name in enumerate(MODELS)
    for m, policy in enumerate(POLICIES)
]


def vision(name, **fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_VISION, **fields)
    return getattr(transformers, f"{name}Model")(config).eval()


def sizes():
    return [site["q_len"] for graph in eff.report()["graphs"] for site in graph["sites"]]


@torch.no_grad()
@pytest.mark.parametrize(("name", "policy"), VISION)
def test_vision(name, policy):
    fields, tokens = MODELS[name]
    model, pixels = vision(name, **fields), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = model(pixels).last_hidden_state
    found = compiled(model, policy)(pixels).last_hidden_state
    assert found.shape == wanted.shape
    assert F.cosine_similarity(found[:, 0], wanted[:, 0]).min() > 0.9
    lengths = sizes()
    assert lengths[0] == tokens
    assert lengths[-1] < tokens


@torch.no_grad()
def test_hidden_states_have_all_tokens():
    model, pixels = vision("Dinov2", mlp_ratio=2), torch.randn(2, 3, 32, 32)
    found = compiled(model, "spatten{keep=0.7}")(pixels, output_hidden_states=True)
    assert {tuple(x.shape) for x in found.hidden_states} == {(2, 17, 32)}


@torch.no_grad()
def test_bert_with_padding():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=48
    )
    model = MeanPooledEncoder(transformers.BertModel(config)).eval()
    ids = torch.randint(0, 50, (3, 20))
    padding = (torch.arange(20)[None] < torch.tensor([20, 11, 15])[:, None]).long()
    fast = compiled(model, "spatten{keep=0.7}")
    found = fast(ids, padding)
    assert sizes()[-1] < 20
    assert F.cosine_similarity(found, model(ids, padding)).min() > 0.9
    other = torch.where(padding.bool(), ids, (ids + 7) % 50)
    # Padding as a query adds to the mass of tokens, as it does in the source's attention; as a key it counts for nothing.
    assert F.cosine_similarity(fast(other, padding), found).min() > 0.98


@torch.no_grad()
def test_llama_without_a_cache():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        intermediate_size=48,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 60, (2, 24))
    for policy in ("pyramid-drop", "spatten{keep=0.7,fair=True,heads=0.5}"):
        found = compiled(model, policy)(ids, use_cache=False, logits_to_keep=1).logits
        assert found.shape == (2, 1, 60)
        assert sizes()[-1] < 24
        heads = [site["kv_heads"] for graph in eff.report()["graphs"] for site in graph["sites"]]
        assert heads == ([2, 2, 2, 1] if "heads" in policy else [2] * 4)
    cached = eff.explain(model, ids, options={"tokens": "pyramid-drop"}, target="cpu", use_cache=True)
    assert [d.refusal.code for d in cached.plan.declined if d.family == "tokens"] == ["EFF-R105"] * 4
    assert not [c for c in cached.plan.choices if c.family == "tokens"]
