"""Hold the backend to its contracts: required sites, replayed plans, failing passes, buffers that change."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from effcompile.core.plan import Plan
from effcompile.report import log
from tests.support.small import CHEAP, AddOne, Decoder, Eager, Fail, close, compiled, heads, kernels, text


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- contracts and plans ---


@torch.no_grad()
def test_require() -> None:
    compiled(Decoder(), text(), require={"attention": "all"})
    torch._dynamo.reset()
    for wanted in ("all", 2):
        with pytest.raises(BackendCompilerFailed) as caught:
            torch.compile(Eager(), backend="eff", options={"require": {"attention": wanted}})(heads())
        assert "EFF-P502" in str(caught.value)
        assert "EFF-A101" in str(caught.value)
        assert "1 of 2 sites" in str(caught.value)
    compiled(Eager(), heads(), require={"attention": 1})


@torch.no_grad()
def test_a_plan_replays(tmp_path: Path) -> None:
    model = Decoder()
    compiled(model, text())
    plan = log().graphs[0].compiled.plan
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert Plan.read(file) == plan
    torch._dynamo.reset()
    compiled(model, text(), plan=str(file))
    again = log().graphs[0].compiled.plan
    assert again.hash == plan.hash


@torch.no_grad()
def test_an_edited_plan_is_followed(tmp_path: Path) -> None:
    model = Decoder()
    compiled(model, text())
    file = tmp_path / "plan.json"
    given = log().graphs[0].compiled.plan.to_json().replace('"sdpa-causal"', '"blocked"', 1)
    file.write_text(given)
    with pytest.raises(BackendCompilerFailed, match="EFF-P503"):
        torch.compile(model, backend="eff", options={**CHEAP, "plan": str(file)})(text())
    file.write_text(json.dumps({**json.loads(given), "hash": ""}))
    torch._dynamo.reset()
    compiled(model, text(), plan=str(file))
    assert sorted(kernels()) == ["blocked", "sdpa-causal"]


@torch.no_grad()
def test_a_plan_for_another_model_applies_nothing(tmp_path: Path) -> None:
    compiled(Decoder(3), text())
    file = tmp_path / "plan.json"
    file.write_text(log().graphs[0].compiled.plan.to_json())
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="EFF-P501"):
        torch.compile(Decoder(2), backend="eff", options={**CHEAP, "plan": str(file)})(text())


# --- passes, failures ---


@torch.no_grad()
def test_a_users_own_pass_runs_last_in_its_phase() -> None:
    model = Decoder()
    run = torch.compile(model, backend="eff", options={**CHEAP, "passes": (AddOne(),)})
    close(run(text()), model(text()) + 1)
    result = log().graphs[0].compiled
    assert result.ran[-1] == "add-one"
    assert "add-one: one added" in result.plan.notes


@pytest.mark.parametrize("way", ["raise", "outputs", "order", "shape"])
@torch.no_grad()
def test_a_pass_that_fails_costs_nothing_but_speed(way: str) -> None:
    model = Decoder()
    run = torch.compile(model, backend="eff", options={"emit": "interpreter", "passes": (Fail(way),)})
    with pytest.warns(eff.FallbackWarning) as caught:
        found = run(text())
    assert len(caught) == 1
    close(found, model(text()))
    assert eff.report()["counters"] == {"fallbacks": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(run(text()), model(text()))


@pytest.mark.parametrize("way", ["raise", "outputs", "order", "shape"])
def test_strict_raises(way: str) -> None:
    with pytest.raises(BackendCompilerFailed, match="on purpose" if way == "raise" else "EFF-X901"):
        torch.compile(Decoder(), backend="eff", options={**CHEAP, "passes": (Fail(way),)})(text())


def test_fuel_stops_after_so_many_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for fuel in (0, 1, 100):
        monkeypatch.setenv("EFF_FUEL", str(fuel))
        torch._dynamo.reset()
        model = Decoder()
        run = torch.compile(model, backend="eff", options={**CHEAP, "passes": (AddOne(),)})
        with torch.no_grad():
            found = run(text())
        names = log().graphs[0].compiled.ran
        close(found - float("add-one" in names), model(text()))
        ran.append(names)
    assert [len(names) for names in ran[:2]] == [0, 1]
    assert ran[2][:1] == ran[1]
    assert ran[2][-1] == "add-one"


def test_dump_writes_every_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFF_DUMP", str(tmp_path))
    compiled(Decoder(), text())
    names = [path.name for path in sorted((tmp_path / "graph00").iterdir())]
    assert [name.split("_", 1)[0] for name in names] == [f"{number:02d}" for number in range(len(names))]
    stages = [name.split("_", 1)[1] for name in names]
    assert {"captured.txt", "recognized.txt", "plan.json", "lowered.txt"} <= set(stages)
    assert "eff.attention_v1" in (tmp_path / "graph00" / next(n for n in names if "recognized" in n)).read_text()


def test_disable_keeps_a_pass_out() -> None:
    compiled(Decoder(), text(), disable=("remove-identities", "select-linear"))
    assert not {"remove-identities", "select-linear"} & set(log().graphs[0].compiled.ran)


# --- stale buffers ---


class Triangle(nn.Module):
    """Mask with a buffer, as GPT-2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(16, 16, dtype=torch.bool).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        scores = torch.where(self.bias[:, :, :n, :n], x @ x.transpose(-1, -2), torch.finfo(x.dtype).min)
        return scores.softmax(-1) @ x


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "load_state_dict", "assigned"])
def test_a_changed_mask_buffer_is_seen(change: str) -> None:
    """The proof relied on the buffer's content: after a change the graph runs as the model wrote it."""
    model = Triangle()
    run = compiled(model, heads())
    assert kernels() == ["sdpa-causal"]
    wrong = model.bias.clone()
    wrong[..., 3, 0] = False
    if change == "in place":
        model.bias[..., 3, 0] = False
    elif change == "load_state_dict":
        model.load_state_dict({"bias": wrong})
    else:
        model.bias = wrong
    close(run(heads()), model(heads()))
    assert change == "assigned" or eff.report()["counters"]["stale"] == 1


@torch.no_grad()
def test_a_changed_mask_buffer_is_seen_at_other_lengths() -> None:
    model = Triangle()
    run = torch.compile(model, backend="eff", options=CHEAP, dynamic=True)
    for length in (5, 6, 7):
        if length == 6:
            model.bias[..., 3, 0] = False
        x = torch.randn(2, 2, length, 8)
        close(run(x), model(x))
