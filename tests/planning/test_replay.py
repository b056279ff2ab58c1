"""Check that a plan file replays through torch.compile, and that another model's is refused before anything is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.models import zoo
from effcompile.report import count, log
from tests.cli import samples


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
