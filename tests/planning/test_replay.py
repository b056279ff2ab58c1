"""Check that a plan file replays through torch.compile, and that another model's is refused before anything is applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.core.plan import Plan
from effcompile.models import zoo
from effcompile.planning.planner import KERNEL
from effcompile.report import count, log
from tests.cli import samples
from tests.cli.command import run as run_cli


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plan_file(path: Path, seq: int = 32, **options: object) -> Path:
    loaded = zoo.load("llama-tiny")
    args, kwargs = loaded.example_inputs(2, seq)
    path.write_text(eff.explain(loaded.model, *args, options=options, **kwargs).plan.to_json())
    return path


def cause(run: Callable[[], object]) -> EffError:
    """Return our error behind whatever torch raises for a backend that failed."""
    with pytest.raises((EffError, BackendCompilerFailed)) as caught:
        run()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, EffError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    assert isinstance(error, EffError)
    return error


def test_a_plan_replays(tmp_path: Path) -> None:
    path = plan_file(tmp_path / "plan.json", disable=["select-linear"])
    loaded = zoo.load("llama-tiny")
    args, _ = loaded.example_inputs(2)
    with torch.no_grad():
        expected = loaded.model(*args)
        found = torch.compile(loaded.model, backend="eff", options={"plan": str(path)})(*args)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (record,) = log().graphs
    assert (
        record.compiled.plan.hash == eff.explain(loaded.model, *args, options={"disable": ["select-linear"]}).plan.hash
    )
    assert "select-linear" not in record.compiled.ran


@pytest.mark.parametrize("way", ["options", "bound"])
def test_another_model_is_refused(way: str, tmp_path: Path) -> None:
    path = plan_file(tmp_path / "plan.json")
    loaded = zoo.load("llama-tiny")
    args, _ = loaded.example_inputs(2, 48)
    options = {"plan": str(path)}
    compiled = (
        torch.compile(loaded.model, backend="eff", options=options)
        if way == "options"
        else torch.compile(loaded.model, backend=eff.backend(**options))
    )
    with torch.no_grad():
        error = cause(lambda: compiled(*args))
    assert (error.code, error.exit_code) == ("EFF-P501", 2)
    assert "2 sites changed" in error.message
    assert "nothing was applied" in error.message
    assert count() == 0


# --- models in several graphs ---


def replay(path: Path, model: torch.nn.Module, args: tuple[torch.Tensor, ...], way: str = "options") -> torch.Tensor:
    options = {"plan": str(path), "strict": True, "emit": "interpreter"}
    run = (
        torch.compile(model, backend="eff", options=options)
        if way == "options"
        else torch.compile(model, backend=eff.backend(**options))
    )
    with torch.no_grad():
        found: torch.Tensor = run(*args)
    return found


@pytest.mark.parametrize("way", ["options", "bound"])
def test_every_graph_of_a_broken_model_finds_its_part(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert run_cli(capsys, "plan", "tests.cli.samples:broken_graph", "-o", path).code == 0
    plan = Plan.read(path)
    assert [graph.places for graph in plan.graphs] == [("layers.0", "layers.2"), ("layers.1", "layers.1.out")]
    model, args = samples.broken_graph()
    with torch.no_grad():
        expected = model(*args)
    torch.testing.assert_close(replay(path, model, args, way), expected, rtol=1e-4, atol=1e-4)
    plans = [record.compiled.plan for record in log().graphs]
    assert len(plans) == 3  # two of them hold no attention, and share a part
    assert [choice.policy for made in plans for choice in made.choices if choice.family == KERNEL] == ["sdpa-causal"]
    assert Plan.joined(plans).hash == plan.hash
    assert eff.explain(model, *args, options={"plan": str(path)}).plan.hash == plan.hash


def test_a_changed_choice_of_one_graph_is_followed(tmp_path: Path) -> None:
    model, args = samples.broken_graph()
    told = json.loads(eff.explain(model, *args).plan.to_json())
    (choice,) = (c for graph in told["graphs"] for c in graph["choices"] if c["family"] == KERNEL)
    choice["policy"] = "blocked"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**told, "hash": ""}))
    with torch.no_grad():
        expected = model(*args)
    torch.testing.assert_close(replay(path, model, args), expected, rtol=1e-4, atol=1e-4)
    assert [site["kernel"] for graph in eff.report()["graphs"] for site in graph["sites"]] == ["blocked"]


@pytest.mark.parametrize(("gone", "text"), [(0, "1 sites new (graph.0)"), (1, "no graph without sites")])
def test_a_graph_that_the_plan_does_not_know_is_refused(gone: int, text: str, tmp_path: Path) -> None:
    model, args = samples.broken_graph()
    plan = eff.explain(model, *args).plan
    known = tuple(graph for number, graph in enumerate(plan.graphs) if number != gone)
    path = tmp_path / "plan.json"
    path.write_text(replace(plan, graphs=known).to_json())
    error = cause(lambda: replay(path, model, args))
    assert error.code == "EFF-P501"
    assert text in error.message
    assert count() == gone  # graphs before it, which the plan knows, have run


def test_a_graph_without_sites_replays(tmp_path: Path) -> None:
    model, args = torch.nn.Sequential(torch.nn.Linear(8, 8)), (torch.ones(2, 8),)
    path = tmp_path / "plan.json"
    path.write_text(eff.explain(model, *args).plan.to_json())
    torch.testing.assert_close(replay(path, model, args), model(*args))
    assert count() == 1


def test_symbolic_sizes_have_equal_names_in_a_dry_run(tmp_path: Path) -> None:
    model, args = samples.plain()
    path = tmp_path / "plan.json"
    plan = eff.explain(model, *args, dynamic=True).plan
    path.write_text(plan.to_json())
    run = torch.compile(model, backend="eff", options={"plan": str(path), "emit": "interpreter"}, dynamic=True)
    with torch.no_grad():
        for seq in (32, 48):
            x = torch.randn(2, seq, 64)
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert [record.compiled.plan.hash for record in log().graphs] == [plan.hash]


# --- choices that cannot be followed ---


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    model, args = samples.plain()
    told = json.loads(eff.explain(model, *args).plan.to_json())
    change(told["graphs"][0])
    path.write_text(json.dumps({**told, "hash": ""}))
    return model, args


def rename(number: int, policy: str) -> Callable[[dict[str, Any]], None]:
    return lambda graph: graph["choices"][number].update(policy=policy)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (rename(0, "sdpa"), "cannot run it exactly here: EFF-A203"),  # it would drop the mask
        (rename(0, "blockd"), "did you mean blocked"),
        (rename(2, "unpda"), "did you mean unpad"),
        (lambda graph: graph["choices"].pop(0), "no kernel for it"),
        (lambda graph: graph["choices"].append(dict(graph["choices"][0], policy="blocked")), "two kernels"),
        (lambda graph: graph["choices"].append(dict(graph["choices"][0], site="layers.7")), "did you mean layers."),
    ],
)
def test_a_choice_that_cannot_be_followed_is_refused(
    change: Callable[[dict[str, Any]], None], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    model, args = edited(path, change)
    error = cause(lambda: replay(path, model, args))
    assert (error.code, error.exit_code) == ("EFF-P506", 2)
    assert text in str(error)
    assert count() == 0


def test_options_that_contradict_the_plan_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model, args = edited(path, lambda graph: None)
    for options, text in (
        ({"disable": ["select-linear"]}, "disabled by the user"),
        ({"passes": (samples.WrongActivation(),)}, "without the pass `wrong-activation`"),
    ):
        with pytest.raises(EffError, match=text) as caught:
            eff.explain(model, *args, options={"plan": str(path), **options})
        assert caught.value.code == "EFF-P506"


def test_a_plan_for_inference_is_not_for_training(tmp_path: Path) -> None:
    """Its kernels let no gradient through, so that following it would lose gradients without a word."""
    path = tmp_path / "plan.json"
    model, args = edited(path, lambda graph: None)
    run = torch.compile(model, backend="eff", options={"plan": str(path), "emit": "interpreter"})
    error = cause(lambda: run(*args))
    assert error.code == "EFF-P501"
    assert "inference" in error.message


def test_explain_checks_a_plan_too(tmp_path: Path) -> None:
    path = plan_file(tmp_path / "plan.json")
    model, args = samples.plain()
    with pytest.raises(EffError, match="sites gone") as caught:
        eff.explain(model, *args, options={"plan": str(path)})
    assert caught.value.code == "EFF-P501"


def test_a_broken_contract_names_the_missed_sites() -> None:
    q = torch.randn(1, 2, 32, 16)

    def attend(q: torch.Tensor) -> torch.Tensor:
        # Dropout that is on is attention that no exact rewrite may touch.
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    options = {"require": {"attention": "all"}}
    with torch.no_grad():
        error = cause(lambda: torch.compile(attend, backend="eff", options=options)(q))
    assert (error.code, error.exit_code) == ("EFF-P502", 3)
    assert "0 of 1 sites rewritten" in error.message
    assert "test_replay.py:" in error.message
    with pytest.raises(EffError, match="0 of 1 sites rewritten") as caught:
        eff.explain(attend, q, options=options)
    assert caught.value.code == "EFF-P502"
