"""Check that cutting heads is zeroing their results: equal to masked heads, nested from layer to layer, and really less work."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import effcompile as eff
from effcompile.core.plan import Plan
from effcompile.core.rewrite import fake_mode_of
from effcompile.models.vit import ViT, ViTConfig
from effcompile.passes.tokens.spatten import SpAtten
from tests.passes.tokens.test_drop import LENGTH, compiled, padding_of, summed, tokens_of, tower
from tests.support.tokens import masked_run

SLOW = pytest.mark.slow
HEADS = {"heads": 8, "width": 64}
FORMS = [
    pytest.param({"rope": True, "causal": True, "kv_heads": 4}, True, id="grouped-rope-causal-padded"),
    pytest.param({"rope": True, "causal": True, "kv_heads": 2}, False, id="grouped-rope-causal", marks=SLOW),
    pytest.param({"read": "first"}, False, id="first", marks=SLOW),
    pytest.param({"post": True}, True, id="post-padded", marks=SLOW),
]


def counted(policy, model):
    return policy.head_counts(model.layers[0].kv_heads, len(model.layers))


@torch.no_grad()
@pytest.mark.parametrize(("fields", "padded"), FORMS)
def test_cutting_equals_masking(fields, padded):
    model, ids = tower(**HEADS, **fields), tokens_of()
    padding = padding_of() if padded else None
    for policy in (SpAtten(keep=0.6, heads=0.5), SpAtten(keep=1.0, heads=0.5)):
        lefts, heads = policy.counts(LENGTH, 4), counted(policy, model)
        assert heads[-1] < heads[0]
        wanted = masked(model, ids, lefts, heads, padding)
        given = [ids, *([] if padding is None else [padding])]
        found = compiled(model, policy.spelled, require={"tokens": "all"})(*given)
        if padding is not None and fields.get("read") is None:
            found, wanted = (torch.where(padding[..., None].bool(), x, 0) for x in (found, wanted))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        plain = masked(model, ids, lefts, None, padding)
        assert (plain - wanted).abs().amax() > 1e-3


def masked(model, ids, lefts, heads, padding=None):
    return masked_run(model, ids, lefts, summed, padding, heads=heads)


@torch.no_grad()
def test_schedule_is_nested_and_leaves_a_head():
    for heads in (2, 6, 8, 12, 32):
        rows = [SpAtten(heads=share).head_counts(heads, 12) for share in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)]
        assert rows[0] == (heads,) * 12
        for row in rows:
            assert row[:4] == (heads,) * 4, "the first 30 % of the layers"
            assert list(row) == sorted(row, reverse=True)
            assert row[-1] >= 1
        totals = [sum(row) for row in rows]
        assert totals == sorted(totals, reverse=True)


@SLOW
@torch.no_grad()
def test_products_and_attention_get_smaller(monkeypatch):
    """Counted in the graph that runs: more heads cut, less work, in projections and in attention."""
    module = importlib.import_module("effcompile.backend")
    made, real = [], module.compile_program

    def noted(*args):
        result = real(*args)
        made.append(result)
        return result

    monkeypatch.setattr(module, "compile_program", noted)
    model, ids, counts = tower(**HEADS), tokens_of(), []
    for share in (1.0, 0.8, 0.5, 0.2):
        compiled(model, f"spatten{{keep=1.0,heads={share}}}", disable="outline-layers")(ids)
        graph = made[-1].program.entries[0].graph
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with fake_mode_of(graph.graph), FlopCounterMode(display=False) as counter:
            fx.Interpreter(graph).run(*values)
        counts.append(counter.get_total_flops())
        if share < 1:
            lefts = counted(SpAtten(keep=1.0, heads=share), model)
            assert [site.kv_heads for site in made[-1].sites] == [8, *lefts[:-1]]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4, counts


@SLOW
@torch.no_grad()
def test_all_heads_change_nothing_and_sequences_stand_apart():
    model, ids, order = tower(**HEADS), tokens_of(), torch.tensor([2, 0, 1])
    assert torch.equal(compiled(model, "spatten{keep=0.6,heads=1.0}")(ids), compiled(model, "spatten{keep=0.6}")(ids))
    fast = compiled(model, "spatten{keep=0.6,heads=0.5}")
    torch.testing.assert_close(fast(ids)[order], fast(ids[order]), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_plan_names_heads_and_replays():
    model, ids = tower(**HEADS), tokens_of()
    report = eff.explain(model, ids, options={"tokens": "spatten{keep=1.0,heads=0.5}"}, target="cpu")
    chosen = {c.site: c.policy for c in report.plan.choices if c.family == "tokens"}
    lefts = counted(SpAtten(heads=0.5), model)
    assert list(chosen) == ["layers.2", "layers.3"]
    assert all(f"heads_left={n}" in text for n, text in zip(lefts[2:], chosen.values(), strict=True))
    torch._dynamo.reset()
    replay = torch.compile(model, backend=eff.backend(plan=report.plan, strict=True, emit="interpreter"))
    assert torch.equal(replay(ids), compiled(model, "spatten{keep=1.0,heads=0.5}")(ids))
    text = report.plan.to_json().replace(f"heads_left={lefts[3]}", "heads_left=7").replace(report.plan.hash, "")
    torch._dynamo.reset()
    wrong = torch.compile(model, backend=eff.backend(plan=Plan.from_json(text), strict=True))
    with pytest.raises(Exception, match="EFF-P506"):
        wrong(ids)


@SLOW
@torch.no_grad()
def test_fused_projection_of_the_zoo():
    """Queries, keys and values are one product, viewed as 3 x heads x channels: the third layer runs without some heads."""
    torch.manual_seed(0)
    model, x = ViT(replace(ViTConfig.tiny(), layers=4)).double().eval(), torch.randn(2, 3, 32, 32).double()
    for block in model.blocks:
        block.scale1.gamma.fill_(0.0)  # what heads give changes nothing: which ones are cut does not either
    found = compiled(model, "spatten{keep=1.0,heads=0.4}", require={"tokens": "all"})(x)
    torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)
    assert [site["kv_heads"] for graph in eff.report()["graphs"] for site in graph["sites"]][-1] < 4
    for block in model.blocks[2:]:  # one head alone gives anything, and is not cut
        block.scale1.gamma.fill_(1.0)
    for block in model.blocks:
        block.qkv.weight.view(3, 4, 16, 64)[2, [0, 1, 3]] = 0.0
        block.qkv.bias.view(3, 4, 16)[2, [0, 1, 3]] = 0.0
    found = compiled(model, "spatten{keep=1.0,heads=0.4}")(x)
    torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)


class Normed(nn.Module):
    """Norm over all heads in front of the attention, which needs every head."""

    def __init__(self, inner, norms):
        super().__init__()
        self.inner, self.norms = inner, norms

    def forward(self, ids):
        inner = self.inner
        x = inner.start(ids)
        for layer in inner.layers:
            q, k, v = layer.heads_of(layer.norm1(x), None)
            if self.norms:
                q = q.transpose(1, 2).flatten(2)
                q = torch.nn.functional.layer_norm(q, q.shape[-1:])
                q = q.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + layer.joined(y)
            x = x + layer.mlp(layer.norm2(x))
        return inner.end(x)


@torch.no_grad()
def test_what_needs_every_head_stays_by_name():
    for norms, codes in ((False, {"EFF-R109"}), (True, {"EFF-R116"})):
        model = Normed(tower(**HEADS), norms)
        report = eff.explain(model, tokens_of(), options={"tokens": "spatten{heads=0.5}"}, target="cpu")
        assert {d.refusal.code for d in report.plan.declined if d.family == "tokens"} == codes
    with pytest.raises(Exception, match="EFF-R116"):
        compiled(model, "spatten{heads=0.5}", require={"tokens": "all"})(tokens_of())


@pytest.mark.parametrize(
    "text", ["spatten{heads=0}", "spatten{heads=1.2}", "spatten{heads=-1}", "spatten{heads_left=-1}"]
)
def test_shares_outside_0_and_1_are_refused(text):
    with pytest.raises(Exception, match="EFF-U004"), torch.no_grad():
        compiled(tower(), text)(tokens_of())
