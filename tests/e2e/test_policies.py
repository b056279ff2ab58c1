"""Ask for attention policies through every door: options, a bound backend, explain, plans that a person edits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.passes.attention.sink_window import SinkWindow
from effcompile.report import log
from tests.support.small import CHEAP, Eager, close, heads, kernels, text

WINDOW = "sink-window{window=4,sinks=1}"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Windowed(nn.Module):
    """Run causal layers, each of them with a window or none."""

    def __init__(self, windows: tuple[int | None, ...] = (None, None, None)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(window) for window in windows)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.qkv, self.out, self.window = nn.Linear(32, 96), nn.Linear(32, 32), window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.window is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            at = torch.arange(x.shape[1])
            distance = at[:, None] - at[None]
            kept = (distance >= 0) & ((distance < self.window) | (at[None] < 1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        return x + self.out(y.transpose(1, 2).flatten(2))


def expected(model: nn.Module, windows: tuple[int | None, ...], x: Tensor) -> Tensor:
    other = Windowed(windows)
    other.load_state_dict(model.state_dict())
    found: Tensor = other(x)
    return found


def policies() -> list[str]:
    return [site["policy"] for graph in eff.report()["graphs"] for site in graph["sites"]]


@torch.no_grad()
@pytest.mark.parametrize("way", ["options", "object", "bound"])
def test_a_policy_is_applied_where_it_is_asked_for(way: str) -> None:
    model, x = Windowed(), text(12)
    given = {**CHEAP, "require": {"attention": "all"}}
    if way == "bound":
        run = torch.compile(model, backend=eff.backend(attention=WINDOW, **given))
    else:
        asked = SinkWindow(window=4, sinks=1) if way == "object" else WINDOW
        run = torch.compile(model, backend="eff", options={**given, "attention": asked})
    close(run(x), expected(model, (4, 4, 4), x))
    assert policies() == [WINDOW] * 3


@torch.no_grad()
def test_nothing_happens_without_being_asked() -> None:
    model, x = Windowed(), text(12)
    close(torch.compile(model, backend="eff", options=CHEAP)(x), model(x))
    assert policies() == [""] * 3


@torch.no_grad()
def test_first_layers_stay_dense() -> None:
    model, x = Windowed(), text(12)
    asked = "sink-window{window=4,sinks=1,dense_layers=2}"
    run = torch.compile(model, backend="eff", options={**CHEAP, "attention": asked, "require": {"attention": "all"}})
    close(run(x), expected(model, (None, None, 4), x))
    assert policies() == ["", "", WINDOW]
    declined = [item for item in log().graphs[0].compiled.plan.declined if item.family == "attention"]
    assert [item.refusal.code for item in declined] == ["EFF-A501", "EFF-A501"]


@torch.no_grad()
def test_require_counts_what_the_policy_rewrites() -> None:
    model, x = Windowed(), text(3)
    options = {**CHEAP, "attention": WINDOW, "require": {"attention": "all"}}
    with pytest.raises(BackendCompilerFailed, match="0 of 3 sites rewritten") as caught:
        torch.compile(model, backend="eff", options=options)(x)
    assert str(caught.value).count("EFF-A502 too short") == 3
    with pytest.raises(EffError, match="0 of 3 sites rewritten"):
        eff.explain(model, x, options=options)
    torch._dynamo.reset()
    close(torch.compile(model, backend="eff", options={**CHEAP, "attention": WINDOW})(x), model(x))
    assert policies() == [""] * 3


@torch.no_grad()
def test_one_graph_serves_all_lengths() -> None:
    model = Windowed()
    run = torch.compile(model, backend="eff", options={**CHEAP, "attention": WINDOW}, dynamic=True)
    for length in (12, 7, 19, 33):
        x = text(length)
        close(run(x), expected(model, (4, 4, 4), x))
    assert len(log().graphs) == 1


def test_gradients_are_those_of_the_window() -> None:
    model, x = Windowed(), text(12)
    run = torch.compile(model, backend="eff", options={**CHEAP, "attention": WINDOW, "require": {"attention": "all"}})
    run(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    other = Windowed((4, 4, 4))
    other.load_state_dict(model.state_dict())
    other(x).square().sum().backward()
    for mine, theirs in zip(found, (p.grad for p in other.parameters())):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_plan_gives_each_layer_its_own(tmp_path: Path) -> None:
    """A person edits one policy, removes one and leaves one; kernels are chosen anew where they no longer fit."""
    model, x, file = Windowed(), text(12), tmp_path / "plan.json"
    plan = eff.explain(model, x, options={"attention": WINDOW}).plan
    file.write_text(plan.to_json())
    close(torch.compile(model, backend="eff", options={**CHEAP, "plan": str(file)})(x), expected(model, (4, 4, 4), x))
    raw = json.loads(plan.to_json())
    (graph,) = raw["graphs"]
    chosen = {c["site"]: c for c in graph["choices"] if c["family"] == "attention"}
    first, second, _ = sorted(chosen)
    chosen[first]["policy"] = "sink-window{window=2,sinks=1}"
    graph["choices"].remove(chosen[second])
    for choice in graph["choices"]:
        if choice["site"] in (first, second) and choice["family"] == "attention-kernel":
            choice["policy"] = "sdpa-causal" if choice["site"] == first else choice["policy"]
    file.write_text(json.dumps({**raw, "hash": ""}))
    torch._dynamo.reset()
    close(
        torch.compile(model, backend="eff", options={**CHEAP, "plan": str(file)})(x), expected(model, (2, None, 4), x)
    )
    assert any("not sdpa-causal" in note for note in log().graphs[0].compiled.plan.notes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "words"),
    [("sink-window{window=64}", "EFF-A502"), ("sink-windo", "EFF-U014"), ("sink-window{window=0}", "EFF-U004")],
)
def test_a_plan_with_a_policy_that_cannot_be_applied_is_refused(policy: str, words: str, tmp_path: Path) -> None:
    model, x, file = Windowed(), text(12), tmp_path / "plan.json"
    text_ = eff.explain(model, x, options={"attention": WINDOW}).plan.to_json().replace(WINDOW, policy, 1)
    file.write_text(json.dumps({**json.loads(text_), "hash": ""}))
    with pytest.raises((EffError, BackendCompilerFailed), match=words):
        torch.compile(model, backend="eff", options={**CHEAP, "plan": str(file)})(x)


def test_a_policy_beside_a_plan_is_refused(tmp_path: Path) -> None:
    model, x, file = Windowed(), text(12), tmp_path / "plan.json"
    file.write_text(eff.explain(model, x).plan.to_json())
    with pytest.raises(EffError, match="together with `plan`") as caught:
        eff.explain(model, x, options={"attention": WINDOW, "plan": str(file)})
    assert caught.value.code == "EFF-U015"


@torch.no_grad()
@pytest.mark.parametrize("asked", ["sink-windw", "sink-window{windw=3}", "sink-window{sinks=0}", 7])
def test_bad_words_raise_and_never_fall_back(asked: object) -> None:
    with pytest.raises((EffError, BackendCompilerFailed), match="EFF-U0"):
        torch.compile(Windowed(), backend="eff", options={"attention": asked})(text(12))
    assert not eff.report()["counters"]


@torch.no_grad()
def test_explain_says_what_became_of_each_site() -> None:
    found = eff.explain(
        Windowed(), text(12), options={"attention": "sink-window{window=4,dense_layers=1}"}, target="cpu"
    )
    assert "2 rewritten, 0 not, 1 dense as asked" in str(found)
    assert "sink-window{window=4}: density" in str(found)
    rows = found.to_json()["sites"]
    assert [row["policy"] for row in rows] == ["", "sink-window{window=4}", "sink-window{window=4}"]
    assert rows[0]["declined"][0]["code"] == "EFF-A501"
    assert all(word in found.to_html() for word in ("sink-window{window=4}", "EFF-A501"))


@torch.no_grad()
def test_what_cannot_be_raised_is_not_rewritten() -> None:
    found = eff.explain(Eager(), heads(), options={"attention": WINDOW})
    reasons = [reason for _, _, reason in found.not_rewritten]
    assert len(reasons) == 2
    assert any("EFF-A101" in reason for reason in reasons)
    assert kernels() == []
