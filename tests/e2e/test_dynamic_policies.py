"""Ask for policies over run-time maps through `torch.compile` and the command line: lengths, steps, layers, plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

import effcompile as eff
from effcompile.report import log
from tests.cli.test_main import run
from tests.e2e.test_policies import Windowed, policies
from tests.support.small import CHEAP, close, text

ALL = {"require": {"attention": "all"}, "strict": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    ("some", "everything"),
    [
        ("block-topk{density=0.4,block=16,dense_layers=0}", "block-topk{density=1,block=16,dense_layers=0}"),
        ("xattention{threshold=0.4,stride=4,block=16}", "xattention{threshold=1,stride=4,block=16}"),
        ("pooled-cdf{cdf=0.4,similarity=0,block=32}", "pooled-cdf{cdf=1,similarity=0,block=32}"),
        ("vertical-slash{coverage=0.4,block=16,column=16}", "vertical-slash{coverage=1,block=16,column=16}"),
        ("zipvl{mass=0.4,recent=8,spread=8}", "zipvl{mass=1,recent=8,spread=8}"),
    ],
)
def test_one_graph_serves_all_lengths(some: str, everything: str) -> None:
    """Dense at the keep-everything end, also where TorchInductor compiles it; something else before it; never a second graph."""
    model = Windowed((None, None))
    for asked, exact in ((everything, True), (some, False)):
        torch._dynamo.reset()
        log().graphs.clear()
        step = torch.compile(model, backend="eff", options={**ALL, "attention": asked}, dynamic=True)
        for length in (150, 97, 40, 211):
            x = text(length)
            found = step(x)
            assert found.isfinite().all()
            same = torch.allclose(found, model(x), rtol=1e-4, atol=1e-4)
            assert same == exact or length < 50
        assert len(log().graphs) == 1


class Cached(nn.Module):
    """Attend with one token over a cache of fixed size, at a place that is data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("keys", torch.zeros(1, 4, 256, 8))
        self.register_buffer("values", torch.zeros(1, 4, 256, 8))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        keys, values = self.keys.index_copy(2, at, k), self.values.index_copy(2, at, v)
        kept = (torch.arange(256)[None] <= at[:, None])[None, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=kept)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["block-topk{budget=64,dense_layers=0}", "quest{budget=64,dense_layers=0}"])
def test_steps_of_decode_share_a_graph(policy: str) -> None:
    model = Cached()
    model.keys.normal_()
    model.values.normal_()
    counter = CompileCounterWithBackend(eff.backend(attention=policy, **{**CHEAP, **ALL}))
    step = torch.compile(model, backend=counter)
    for at in (3, 40, 63, 64, 150, 255):
        x, place = text(1, 1), torch.tensor([at])
        found, exact = step(x, place), model(x, place)
        assert found.isfinite().all()
        assert torch.allclose(found, exact, atol=1e-5) == (at < 64), at
    assert counter.frame_count == 1


@torch.no_grad()
def test_the_plan_holds_the_parameters_of_each_layer(tmp_path: Path) -> None:
    model, x, file = Windowed(), text(150), tmp_path / "plan.json"
    plan = eff.explain(
        model, x, options={"attention": "block-topk{density=0.3,block=16}", "require": {"attention": 0}}
    ).plan
    raw = json.loads(plan.to_json())
    chosen = [c for c in raw["graphs"][0]["choices"] if c["family"] == "attention"]
    assert [c["policy"] for c in chosen] == ["block-topk{dense_layers=0,density=0.3,block=16}"] * 2, "layer 0 is dense"
    chosen[0]["policy"], chosen[1]["policy"] = "xattention{block=32}", "block-topk{dense_layers=0,density=1,block=16}"
    raw["hash"] = ""
    file.write_text(json.dumps(raw))
    found = torch.compile(model, backend="eff", options={**CHEAP, "plan": str(file)})(x)
    assert found.isfinite().all()
    assert policies() == ["", "xattention{block=32}", "block-topk{dense_layers=0,density=1,block=16}"]


def test_gradients_are_refused_with_a_reason() -> None:
    model, x = Windowed(), text(150)
    asked = {**CHEAP, "attention": "xattention{block=32}"}
    close(torch.compile(model, backend="eff", options=asked)(x), model(x))
    assert policies() == [""] * 3
    torch._dynamo.reset()
    strict = torch.compile(model, backend="eff", options={**asked, **ALL})
    with pytest.raises(BackendCompilerFailed, match="EFF-A301"):
        strict(x)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--shape", "b=1,s=128", "--target", "cpu")
    done = run(
        capsys,
        "explain",
        "zoo:llama-tiny",
        "--attention",
        "block-topk{density=0.2,block=16}",
        *shape,
        "--require",
        "attention=all",
    )
    assert done.code == 0
    for part in (
        "1 rewritten, 0 not, 1 dense as asked",
        "block-topk{dense_layers=0,density=0.2,block=16}",
        "cpu-blocks",
        "EFF-A501",
    ):
        assert part in done.out
    assert (
        run(
            capsys,
            "explain",
            "zoo:llama-tiny",
            "--attention",
            "quest{dense_layers=0}",
            *shape,
            "--require",
            "attention=all",
        ).code
        == 3
    )
    assert run(capsys, "explain", "zoo:llama-tiny", "--attention", "block-topk{density=2}", *shape).code == 2
    listed = run(capsys, "passes").out
    for name in ("block-topk", "quest", "xattention", "pooled-cdf", "vertical-slash", "zipvl"):
        assert name in listed
