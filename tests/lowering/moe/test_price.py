"""Check the prices of dispatches: read from a table where there is one, modelled elsewhere, and what the table is made from."""

from __future__ import annotations

from typing import Any

import pytest

from bench.case import Settings
from bench.cases.moe_table import DISPATCHES, MoETable, site_of
from bench.condense import condense_experts
from effcompile.core.kernel import Supported
from effcompile.core.target import Target
from effcompile.lowering import rates
from effcompile.lowering.moe import price
from effcompile.targets import cpu

TARGET = Target(cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="amd"))
ROWS = MoETable().rows(Settings())


def seconds_of(name: str, at: Any) -> float:
    """Make up what a dispatch takes: each differs, and no share of the roofline is the same."""
    place = list(DISPATCHES).index(name)
    return 1e-4 * (place + 1) * int(at["length"]) ** (0.5 + 0.1 * place) * (2 if at["dtype"] == "bfloat16" else 1)


def document(broken: str = "") -> dict[str, Any]:
    rows = []
    for row in ROWS:
        arms: dict[str, Any] = {}
        for name, item in DISPATCHES.items():
            if isinstance(item.supports(site_of(row), TARGET), Supported):
                share = {"roofline": price.roofline(name, site_of(row), TARGET.device)}
                arms[name] = {"seconds": {"median": seconds_of(name, row.parameters)}, **share}
            else:
                arms[name] = {"skipped": "declined"}
        if broken and row.parameters["dtype"] == broken:
            arms["batched"] = {"error": "out of memory"}
        rows.append({"id": row.id, "parameters": dict(row.parameters), "arms": arms})
    return {"case": "moe-table", "rows": rows}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rates.read("made up", {"experts": condense_experts(document("bfloat16"))})
    monkeypatch.setattr(price, "rates_of", lambda device: made if device.kind == "cpu" else None)


@pytest.mark.parametrize("row", [row for row in ROWS if row.parameters["dtype"] == "float32"], ids=lambda row: row.id)
def test_a_measured_row_has_the_time_that_was_measured(row: Any, installed: None) -> None:
    for name, item in DISPATCHES.items():
        answer = item.supports(site_of(row), TARGET)
        if isinstance(answer, Supported):
            assert answer.tag == "measured"
            assert answer.seconds == pytest.approx(seconds_of(name, row.parameters), rel=0.01)


def test_between_and_beyond_what_was_measured(installed: None) -> None:
    from dataclasses import replace

    row = next(row for row in ROWS if row.id == "64-narrow-float32")
    site, fused = site_of(row), DISPATCHES["fused"]
    near = fused.supports(replace(site, tokens=128), TARGET)
    far = fused.supports(replace(site, tokens=100_000), TARGET)
    large = fused.supports(replace(site, hidden=8192, inner=8192), TARGET)
    half = fused.supports(replace(site, dtype="float16"), TARGET)
    assert [answer.tag for answer in (near, far, large, half)] == ["measured", *["modelled"] * 3]  # type: ignore[union-attr]
    assert near.seconds == pytest.approx(1e-4 * 128**0.5, rel=0.01)  # type: ignore[union-attr]


def test_a_dtype_with_a_failed_arm_stays_modelled(installed: None) -> None:
    row = next(row for row in ROWS if row.id == "64-narrow-bfloat16")
    answers = [item.supports(site_of(row), TARGET) for item in DISPATCHES.values()]
    assert {answer.tag for answer in answers if isinstance(answer, Supported)} == {"modelled"}


def test_without_a_table_prices_are_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price, "rates_of", lambda device: None)
    answer = DISPATCHES["fused"].supports(site_of(ROWS[0]), TARGET)
    assert isinstance(answer, Supported)
    assert answer.tag == "modelled"


def test_what_torch_measured_says_nothing_about_another_runtime(installed: None) -> None:
    row = next(row for row in ROWS if row.id == "64-wide-float32")
    here, there = (
        DISPATCHES["dense"].supports(site_of(row), Target(TARGET.device, word)) for word in ("inductor", "onnx")
    )
    assert isinstance(here, Supported)
    assert isinstance(there, Supported)
    assert (here.tag, there.tag) == ("measured", "modelled")
