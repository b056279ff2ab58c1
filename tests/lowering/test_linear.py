"""Check where linear layers go to oneDNN: only where this family of CPUs was measured to gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from effcompile import ops
from effcompile.capture.export import capture_export
from effcompile.core.plan import Plan
from effcompile.core.target import Device
from effcompile.lowering import linear, rates
from effcompile.lowering.rates import nearest_rates, rates_of
from effcompile.targets import cpu

AMD = cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="amd")
UNKNOWN = cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="another")


def replaced(device: Device, rows: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many of two layers, one narrow and one wide, run on oneDNN."""
    ops.register()
    monkeypatch.setattr(linear, "detect_cpu", lambda: device)
    layers = torch.nn.Sequential(torch.nn.Linear(576, 1536), torch.nn.Linear(1536, 576))
    program = capture_export(torch.export.export(layers, (torch.zeros(rows, 576),)))
    result = linear.SelectLinear().run(program, Plan.single("cpu"))
    nodes = [node for entry in result.program.entries for node in entry.graph.graph.nodes]
    return sum(node.target is torch.ops.eff.linear_v1.default for node in nodes)


def test_a_measured_gain_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    known = rates_of(AMD)
    assert known is not None
    gain = known.linear_gain(4096, 576, 1536, "float32")
    assert gain is not None
    assert gain >= linear.GAIN
    assert replaced(AMD, 4096, monkeypatch) == 2


def test_a_cpu_that_was_not_measured_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL behind torch's linear is the fastest on some CPUs: what was not measured is not changed."""
    assert rates_of(UNKNOWN) is None
    assert nearest_rates(UNKNOWN) is not None
    assert replaced(UNKNOWN, 4096, monkeypatch) == 0


def test_few_rows_go_to_their_kernel_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.register()
    gains = (rates.LinearGain(576, 1536, (1, 8), (2.0, 1.0)),)
    known = replace(rates_of(AMD), few={"float32": gains})  # type: ignore[type-var]
    monkeypatch.setattr(linear, "detect_cpu", lambda: AMD)
    monkeypatch.setattr(linear, "rates_of", lambda device: known)
    layers = torch.nn.Sequential(torch.nn.Linear(576, 1536), torch.nn.Linear(1536, 576))
    found = {}
    for rows in (1, 8, 16):
        program = capture_export(torch.export.export(layers, (torch.zeros(rows, 576),)))
        result = linear.SelectLinear().run(program, Plan.single("cpu"))
        nodes = [node for entry in result.program.entries for node in entry.graph.graph.nodes]
        found[rows] = sum(node.target is torch.ops.eff.linear_rows_v1.default for node in nodes)
    assert found == {1: 2, 8: 0, 16: 0}
