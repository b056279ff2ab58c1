"""Check the dry run: it sees what torch.compile would do, reads no weights, and accounts for every attention module."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import effcompile as eff
from effcompile.core.errors import ContractError, EffError
from effcompile.models import llama, zoo
from effcompile.observe import observe
from effcompile.planning.folding import fold
from effcompile.skeleton import real, strip
from tests.cli import samples


def test_a_realistic_model_at_32k_tokens_takes_seconds() -> None:
    config = replace(llama.LlamaConfig.base(), max_seq=65536)
    with torch.device("meta"):
        model = llama.Llama(config).to(torch.bfloat16).eval()
    began = time.perf_counter()
    found = eff.explain(model, torch.zeros(1, 32768, dtype=torch.int64), target="h100")
    assert time.perf_counter() - began < 60  # about 5 s alone; the limit leaves room for a loaded machine
    assert (found.rewritten, found.not_rewritten, len(found.graphs)) == (16, (), 1)
    first = found.sites[0]
    assert (first.site.q_len, str(first.site.mask), first.kernel) == (32768, "causal", "sdpa-causal")
    assert (first.site.heads, first.site.kv_heads, first.site.dtype) == (32, 8, "bfloat16")
    # 4 B H S^2 D / 2 FLOP at 989 TFLOP/s is the least that causal attention takes, and no floor may lie below it.
    least = 2 * 32 * 32768**2 * 64 / 989.4e12
    assert least < first.floor.seconds < 2 * least
    assert first.seconds > first.floor.seconds
    products = 2 * 32768 * sum(p.numel() for p in model.parameters()) / 989.4e12
    assert 0.9 * products < found.products_seconds < 2 * products


@pytest.mark.parametrize(
    "name", ["llama-tiny", "nanogpt-tiny", "mixtral-tiny", "dit-tiny", "encoder-tiny", "seq2seq-tiny"]
)
def test_a_dry_run_decides_like_a_real_one(name: str) -> None:
    loaded = zoo.load(name)
    args, kwargs = loaded.example_inputs(2)
    dry = eff.explain(loaded.model, *args, target="cpu", **kwargs)
    wet = eff.explain(loaded.model, *args, target="cpu", real=True, **kwargs)
    assert (dry.weights, wet.weights) == ("not read", "real")
    assert dry.rewritten > 0
    assert dry.stop == wet.stop == ""
    assert [g.plan.hash for g in dry.graphs if g.plan] == [g.plan.hash for g in wet.graphs if g.plan]
    assert [row.to_json() for row in dry.sites] == [row.to_json() for row in wet.sites]


def test_weights_and_caches_are_left_alone() -> None:
    loaded = zoo.load("llama-tiny")
    assert isinstance(loaded.model, llama.Llama)
    decoder = llama.LlamaDecoder(loaded.model, 1, 16)
    before = {name: value.clone() for name, value in [*decoder.named_parameters(), *decoder.named_buffers()]}
    eff.explain(decoder, torch.zeros(1, 4, dtype=torch.int64), torch.arange(4), target="sm_90")
    for name, value in [*decoder.named_parameters(), *decoder.named_buffers()]:
        assert torch.equal(value, before[name]), name
        assert not value.is_meta


def test_a_dry_run_leaves_no_mark_in_dynamo() -> None:
    model, args = samples.broken_graph()
    eff.explain(model, *args, target="cpu")
    sizes: list[int] = []

    def count(gm: torch.fx.GraphModule, inputs: object) -> object:
        sizes.append(len(gm.graph.nodes))
        return gm.forward

    whole, args = samples.plain()
    with torch.no_grad():
        torch.compile(whole, backend=count)(*args)
    assert len(sizes) == 1
    assert len(eff.explain(whole, *args, target="cpu").graphs) == 1


def test_a_break_hides_a_module() -> None:
    model, args = samples.broken_graph()
    found = eff.explain(model, *args, target="sm_90")
    assert len(found.graphs) > 1
    assert {place for row in found.sites for place in row.places} == {"layers.0", "layers.2"}
    assert found.rewritten == 2
    (broken,) = found.breaks
    assert broken.module == "layers.1"
    assert "samples.py:" in broken.source
    states = {item.module: item for item in found.unseen}
    assert set(states) == {"layers.1", "spare"}
    assert "EFF-G301" in states["layers.1"].reason
    assert not states["spare"].called
    with pytest.raises(ContractError, match=r"2 of 3 sites rewritten\n  layers.1 .*samples.py") as caught:
        eff.explain(model, *args, target="sm_90", options={"require": {"attention": "all"}})
    assert caught.value.code == "EFF-P502"
    assert [graph.places for graph in found.plan.graphs] == [("layers.0", "layers.2"), ("layers.1", "layers.1.out")]


def test_a_value_that_a_dry_run_lacks_stops_it() -> None:
    model, args = samples.asks_for_values()
    dry = eff.explain(model, *args, target="cpu")
    assert "layers.1" in dry.stop
    assert "real=True" in dry.stop
    wet = eff.explain(model, *args, target="cpu", real=True)
    assert wet.stop == ""
    assert wet.rewritten == 2


def test_an_attention_in_no_known_spelling_is_not_lost() -> None:
    class OddAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * torch.sigmoid(self.k(x)).cumsum(1) + self.v(x)

    found = eff.explain(nn.Sequential(OddAttention()), torch.randn(1, 4, 8), target="cpu")
    assert [(item.module, item.called) for item in found.unseen] == [("0", True)]
    assert "EFF-A199" in found.not_rewritten[0][2]


def test_functions_and_exported_programs() -> None:
    q = torch.randn(1, 2, 64, 16)
    found = eff.explain(samples.inside, q, q, q, target="cpu")
    assert (found.weights, found.rewritten) == ("real", 1)
    model, args = samples.plain()
    with torch.no_grad():
        exported = torch.export.export(model, args)
    dry = eff.explain(exported, target="cpu")
    assert [row.id for row in dry.sites] == ["layers.0", "layers.1"]


def test_repeated_explaining_does_not_wear_out() -> None:
    model, args = samples.plain()
    found = [eff.explain(model, *args, target="cpu").rewritten for _ in range(10)]  # Dynamo's own limit is 8
    assert found == [2] * 10


def test_text_and_json_say_the_same() -> None:
    model, args = samples.broken_graph()
    found = eff.explain(model, *args, target="sm_90", name="Stack of three")
    told = json.loads(json.dumps(found.to_json()))
    text = str(found)
    assert text.startswith("Stack of three on sm_90")
    assert "3 attention sites: 2 rewritten, 1 not" in text
    for site in told["sites"]:
        assert site["kernel"] in text
    for item in told["unseen"]:
        assert item["module"] in text


@pytest.mark.parametrize(
    ("options", "code"),
    [({"strickt": True}, "EFF-U001"), ({"kv": "kivi"}, "EFF-U013"), ({"disable": ["nothing"]}, "EFF-U011")],
)
def test_options_are_checked(options: dict[str, object], code: str) -> None:
    model, args = samples.plain()
    with pytest.raises(EffError) as caught:
        eff.explain(model, *args, options=options)
    assert caught.value.code == code


def test_owners_of_shared_graphs() -> None:
    model, args = samples.broken_graph()
    seen = observe(strip(model, args, {}))
    owners = [graph.owners for graph in seen.graphs]
    assert ["layers.0", "layers.2"] in owners
    assert seen.called >= {"layers.0", "layers.1", "layers.2"}
    assert "spare" not in seen.called
    assert observe(real(model, args, {})).called == seen.called


def test_models_that_cannot_be_copied() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.file = open(__file__)  # noqa: SIM115

    model = Locked()
    with pytest.raises(EffError, match="--real") as caught:
        strip(model, (), {})
    model.file.close()
    assert caught.value.code == "EFF-G310"


def test_folding() -> None:
    assert fold(["layers.0.attn", "layers.1.attn", "layers.3.attn"]) == "layers.{0-1,3}.attn"
    assert fold(["a", "b"]) == "a, b"
    assert fold(["layers.7.attn"]) == "layers.7.attn"


@given(st.sets(st.integers(0, 60), min_size=1))
def test_folding_loses_nothing(numbers: set[int]) -> None:
    text = fold([f"m.{number}.x" for number in numbers])
    inner = text.removeprefix("m.").removesuffix(".x").strip("{}")
    found: set[int] = set()
    for span in inner.split(","):
        low, _, high = span.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    assert found == numbers
