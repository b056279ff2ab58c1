"""Check prefills on fewer tokens whose keys are returned: each layer's cache holds its own tokens, and decoding goes on from it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effcompile as eff
from effcompile.passes.tokens.fastv import FastV
from effcompile.passes.tokens.pyramid_drop import PyramidDrop
from effcompile.passes.tokens.spatten import SpAtten
from tests.passes.tokens.test_drop import DEPTH, LENGTH, compiled, last, padding_of, summed, tokens_of, tower
from tests.support.tokens import masked_run


class Prefill(nn.Module):
    """Return the logits of a causal tower with rotations, and each layer's keys and values."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids, padding=None):
        inner, caches = self.inner, []
        x, turn = inner.start(ids), inner.turn(ids.shape[1])
        mask = None
        if padding is not None:
            order = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            mask = padding[:, None, None, :].bool() & order
        for layer in inner.layers:
            q, k, v = layer.heads_of(layer.norm1(x), turn)
            k, v = (torch.cat([torch.tensor([], dtype=k.dtype), part], -2) for part in (k, v))  # an empty cache
            caches += [k, v]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            x = x + layer.joined(y)
            x = x + layer.mlp(layer.norm2(x))
        return inner.end(x), *caches


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "rank"),
    [
        (PyramidDrop(cache=True), last),
        pytest.param(SpAtten(keep=0.6, cache=True), summed, marks=pytest.mark.slow),
        pytest.param(FastV(cache=True), last, marks=pytest.mark.slow),
    ],
)
def test_caches_hold_the_tokens_that_reach_each_layer(policy, rank):
    """The keys that a mask would leave, at their positions and in their order."""
    model, ids = Prefill(tower(rope=True, causal=True)), tokens_of()
    lefts, wanted = policy.counts(LENGTH, DEPTH), []
    logits = masked_run(model.inner, ids, lefts, rank, caches=wanted)
    found, *caches = compiled(model, policy.spelled, require={"tokens": "all"})(ids)
    torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-9)
    assert [k.shape[2] for k in caches[::2]] == [LENGTH, *lefts[:-1]]
    for (keys, values, alive), k, v in zip(wanted, caches[::2], caches[1::2], strict=True):
        for row in range(len(ids)):
            torch.testing.assert_close(k[row], keys[row][:, alive[row]], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(v[row], values[row][:, alive[row]], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_it_has_to_be_asked_for_and_padding_is_refused():
    model, ids = Prefill(tower(rope=True, causal=True)), tokens_of()
    for text, inputs in (("fastv", (ids,)), ("fastv{cache=true}", (ids, padding_of()))):
        report = eff.explain(model, *inputs, options={"tokens": text}, target="cpu")
        assert {d.refusal.code for d in report.plan.declined if d.family == "tokens"} == {"EFF-R105"}
    with pytest.raises(Exception, match="EFF-U004"):
        compiled(model, "fastv{cache=2}")(ids)
    with pytest.raises(Exception, match="EFF-U003"):
        compiled(model, "tome{cache=true}")(ids)


@torch.no_grad()
@pytest.mark.slow
def test_transformers_decode_behind_a_pruned_prefill():
    """A DynamicCache takes a length for each layer; positions go by the first one, which has all tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), tokens_of(2)
    policy = PyramidDrop(cache=True)
    fast = compiled(model, policy.spelled, require={"tokens": "all"})(ids, use_cache=True)
    cache = fast.past_key_values
    lengths = [LENGTH, *policy.counts(LENGTH, 4)[:-1]]
    assert [layer.keys.shape[2] for layer in cache.layers] == lengths
    assert cache.get_seq_length() == LENGTH
    other, token = copy.deepcopy(cache), ids[:, :1]
    step = model(token, past_key_values=cache).logits
    named = model(token, past_key_values=other, position_ids=torch.full((2, 1), LENGTH)).logits
    torch.testing.assert_close(step, named)
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + 1 for n in lengths]
    whole = model(ids, use_cache=True).past_key_values
    exact = model(token, past_key_values=whole).logits
    assert F.cosine_similarity(step[:, 0], exact[:, 0]).min() > 0.9
    nothing = compiled(model, "pyramid-drop{keep=[1.0],cache=true}")(ids, use_cache=True).past_key_values
    torch.testing.assert_close(model(token, past_key_values=nothing).logits, exact)
