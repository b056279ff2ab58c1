"""Run models whose plan splits a symbolic length: right on both sides of the border, at it, and with one Dynamo graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import effcompile as eff
from effcompile.core.plan import Split
from effcompile.planning import ranges
from effcompile.report import log
from tests.cli.command import run as run_cli
from tests.support.small import CHEAP

LENGTHS = [9, 120, 7, 300, 33, 64, 513, 80, 2, 257, 128, 100, 41, 1024, 17, 200, 5, 96, 400, 50]


class Padded(nn.Module):
    """Attend with causal order and key padding: the mask tensor pays for short inputs, one call a sequence for long ones."""

    def __init__(self, layers: int = 2, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        mask = (places[None] <= places[:, None]) & keep[:, None, None, :]
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x


def inputs(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    keep = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        keep[row, : (row * length) // 3] = False
    return torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(length)), keep


def check(run: Any, model: nn.Module, length: int) -> None:
    found, expected = run(*inputs(length)), model(*inputs(length))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=f"length {length}")


@pytest.fixture
def cheap_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split for any gain: whether it pays on this machine is not what these tests are about."""
    monkeypatch.setattr(ranges, "GAIN", 0.0)
    monkeypatch.setattr(ranges, "WORTH", 0.0)


def split() -> Split:
    found = log().graphs[-1].compiled.plan.split
    assert found is not None
    return found


@torch.no_grad()
@pytest.mark.usefixtures("cheap_split")
@pytest.mark.parametrize("way", ["automatic", "marked", "dynamic"])
def test_twenty_lengths_on_both_sides_of_the_border(way: str) -> None:
    model = Padded()
    run = torch.compile(model, backend="eff", options=CHEAP, dynamic=True if way == "dynamic" else None)
    counters.clear()
    for number, length in enumerate(LENGTHS):
        x, keep = inputs(length)
        if way == "marked":
            for value in (x, keep):
                torch._dynamo.mark_dynamic(value, 1)
        torch.testing.assert_close(run(x, keep), model(x, keep), rtol=1e-4, atol=1e-5, msg=f"{number}: {length}")
    for length in (split().at - 1, split().at, split().at + 1):
        check(run, model, length)
    assert counters["stats"]["unique_graphs"] == len(log().graphs) <= 2
    assert eff.report()["counters"]["second ranges"] == 1
    kernels = {site["kernel"] for site in eff.report()["graphs"][-1]["sites"]}
    assert kernels == {f"dense ({split().size} < {split().at}), padded ({split().size} >= {split().at})"}


@torch.no_grad()
@pytest.mark.usefixtures("cheap_split")
@pytest.mark.parametrize("first", [8, 600])
def test_through_inductor(first: int) -> None:
    model = Padded()
    run = torch.compile(model, backend="eff", options={"strict": True}, dynamic=True)
    check(run, model, first)
    at = split().at
    for length in (at, at - 1, 16, 700, at + 1):
        check(run, model, length)
    assert (len(log().graphs), eff.report()["counters"]["second ranges"]) == (1, 1)


@torch.no_grad()
@pytest.mark.usefixtures("cheap_split")
def test_a_second_range_that_fails_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Padded()
    run = torch.compile(model, backend="eff", options={"emit": "interpreter"}, dynamic=True)
    check(run, model, 8)

    def broken(*args: object, **kwargs: object) -> Any:
        raise ZeroDivisionError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("effcompile.codegen.by_size.emit_graph", broken)
        check(run, model, 600)
    check(run, model, 700)
    assert eff.report()["counters"]["fallbacks"] == 1
    assert any("on purpose" in note for note in eff.report()["notices"])


@torch.no_grad()
@pytest.mark.usefixtures("cheap_split")
def test_a_split_survives_the_file_and_an_edit_moves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Padded()
    plan = eff.explain(model, *inputs(48), dynamic=True).plan
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    shown = run_cli(capsys, "show", path).out
    at = plan.graphs[0].split.at  # type: ignore[union-attr]
    assert f"dense where s27 < {at}" in shown
    assert f"padded where s27 >= {at}" in shown
    run = torch.compile(model, backend="eff", options={**CHEAP, "plan": str(path)}, dynamic=True)
    check(run, model, 48)
    check(run, model, 900)
    assert log().graphs[0].compiled.plan.hash == plan.hash
    told = json.loads(path.read_text())
    told["graphs"][0]["split"]["at"] = 33
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps({**told, "hash": ""}))
    changes = run_cli(capsys, "diff", path, moved, "--json").value["changes"]
    assert {change["new"] for change in changes} == {"dense (s27 < 33), padded (s27 >= 33)"}
    torch._dynamo.reset()
    run = torch.compile(model, backend="eff", options={**CHEAP, "plan": str(moved)}, dynamic=True)
    for length in (48, 32, 33):
        check(run, model, length)
    assert eff.report()["counters"]["second ranges"] == 1


@torch.no_grad()
@pytest.mark.usefixtures("cheap_split")
def test_bisecting_keeps_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFF_FUEL", "100")
    model = Padded()
    run = torch.compile(model, backend="eff", options=CHEAP, dynamic=True)
    for length in (8, 600):
        check(run, model, length)
    assert "second ranges" not in eff.report()["counters"]


@pytest.mark.usefixtures("cheap_split")
def test_training_keeps_one_range() -> None:
    model = Padded()
    run = torch.compile(model, backend="eff", options=CHEAP, dynamic=True)
    for length in (8, 600):
        check(run, model, length)
    assert log().graphs[0].compiled.plan.split is None
