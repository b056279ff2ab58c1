"""Calibrate a small model, run what was chosen, and refuse a record that is not the model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import effcompile as eff
from effcompile.calibration import Calibration, Measured, calibrate, fingerprint
from effcompile.core.errors import EffError
from tests.e2e.test_policies import Windowed
from tests.support.small import CHEAP, text

CANDIDATES = (
    "block-topk{density=0.3,block=16,dense_layers=0}",
    "block-topk{density=0.7,block=16,dense_layers=0}",
    "sliding-window{window=16}",
    "quest",
)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def record() -> tuple[Windowed, Calibration]:
    model = Windowed((None, None))
    with torch.no_grad():
        made = calibrate(model, [(text(150),), (text(150) * 0.5,)], CANDIDATES, tolerance=0.2)
    return model, made


def test_every_candidate_is_measured_at_every_site(record: tuple[Windowed, Calibration]) -> None:
    _, made = record
    sites = {row.site for row in made.rows}
    assert len(sites) == 2
    assert len(made.rows) == 2 * 3, "quest is for decode"
    for row in made.rows:
        assert row.samples == 2
        assert 0 < row.least_mass <= row.mass <= 1
        assert row.error > 0
    for site in sites:
        few, many = (next(r for r in made.rows if r.site == site and f"={d}" in r.policy) for d in ("0.3", "0.7"))
        assert few.density < many.density
        assert few.mass < many.mass
        assert few.error > many.error
    assert made.bucket == ((256, 256),)


def test_the_smallest_density_within_the_tolerance_is_chosen() -> None:
    def row(policy: str, density: float, error: float) -> Measured:
        return Measured("a", policy, density, 0.9, 0.5, 1.0, error, 2)

    made = Calibration(
        "x", (), 0.05, (row("p", 0.1, 0.09), row("q", 0.3, 0.04), row("r", 0.5, 0.01), row("s", 1.0, 0.0))
    )
    chosen = made.choice("a")
    assert chosen is not None
    assert chosen.policy == "q"
    assert made.choice("b") is None
    assert Calibration("x", (), 0.001, made.rows).choice("a") is None


@torch.no_grad()
def test_what_was_chosen_runs_and_a_stale_record_is_refused(
    record: tuple[Windowed, Calibration], tmp_path: Path
) -> None:
    model, made = record
    file = tmp_path / "calibration.json"
    file.write_text(made.to_json())
    again = Calibration.read(file)
    assert again == made
    x = text(150)
    loose = Calibration(made.model, made.bucket, 10.0, made.rows)
    found = torch.compile(model, backend="eff", options={**CHEAP, **loose.options(model, x)})(x)
    assert found.isfinite().all()
    assert not torch.allclose(found, model(x), atol=1e-5), "nothing was left out"
    ran = [site["policy"] for graph in eff.report()["graphs"] for site in graph["sites"]]
    assert ran == [row.policy for site in dict.fromkeys(r.site for r in made.rows) if (row := loose.choice(site))]
    strict = Calibration(made.model, made.bucket, 0.0, made.rows)
    torch._dynamo.reset()
    dense = torch.compile(model, backend="eff", options={**CHEAP, **strict.options(model, x)})(x)
    torch.testing.assert_close(dense, model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(EffError, match="EFF-P508"):
        made.options(model, text(300))
    other = Windowed((None, None))
    next(other.parameters()).data.add_(1)
    assert fingerprint(other) != made.model
    with pytest.raises(EffError, match="EFF-P508"):
        made.options(other, x)
    assert made.options(other, x, force=True)["plan"]
    file.write_text("{}")
    with pytest.raises(EffError, match="EFF-P508"):
        Calibration.read(file)
