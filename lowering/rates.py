"""Look up how fast kernels were on a CPU: tables of `eff bench attention-table linear-table step-table moe-table`, condensed.

`rates.json` holds, for each family of CPUs, kernel, dtype and form of the mask, the share of the machine's GEMM rate that an
attention kernel reaches on the pairs that it visits, at some lengths; between them the share is a power law of the length. The head
dimension enters as a factor, measured at one length. A call takes `call + work / (share x GEMM rate)` seconds. Of linear layers it
holds how many times as fast as torch's own the one on oneDNN is, at some numbers of rows; of dispatches of experts the share of
their roofline (`moe/price.py`) that they reach, at some numbers of tokens.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from effcompile.core.target import Device

SCHEMA = 1
FILE = "rates.json"


@dataclass(frozen=True)
class Curve:
    """Hold one kernel, dtype and form of the mask: shares of the GEMM rate at lengths, factors at head dimensions.

    `call` is seconds that a call costs apart from its work; `error` the relative RMS error of times read from the curve
    at lengths left out of it.
    """

    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    head_dims: tuple[int, ...]
    factors: tuple[float, ...]
    call: float
    error: float

    def covers(self, length: float, head_dim: int) -> bool:
        """Tell whether a length and a head dimension lie between measured ones."""
        return self.lengths[0] <= length <= self.lengths[-1] and self.head_dims[0] <= head_dim <= self.head_dims[-1]

    def share(self, length: float, head_dim: int) -> float:
        """Return the share of the GEMM rate; beyond the measured lengths and dimensions that of the nearest."""
        return power_law(self.lengths, self.shares, length) * power_law(self.head_dims, self.factors, head_dim)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, rounded to what a measurement means."""
        return {
            "lengths": list(self.lengths),
            "shares": [float(f"{share:.3g}") for share in self.shares],
            "head_dims": list(self.head_dims),
            "factors": [float(f"{factor:.3g}") for factor in self.factors],
            "call": float(f"{self.call:.2g}"),
            "error": float(f"{self.error:.2g}"),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """Build a curve from `to_json`'s value."""
        lists = {name: tuple(data[name]) for name in ("lengths", "shares", "head_dims", "factors")}
        return cls(**lists, call=float(data["call"]), error=float(data["error"]))


@dataclass(frozen=True)
class LinearGain:
    """Hold how many times as fast a linear layer is as torch's own, at numbers of rows, for one layer's widths."""

    inputs: int
    outputs: int
    rows: tuple[int, ...]
    gains: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Return the gain at a number of rows; beyond the measured ones that of the nearest."""
        return power_law(self.rows, self.gains, rows)


@dataclass(frozen=True)
class ExpertRate:
    """Hold the share of its roofline that a dispatch of experts reached, at numbers of tokens, for one layer's sizes."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    tokens: tuple[int, ...]
    shares: tuple[float, ...]

    def distance(self, experts: int, top_k: int, hidden: int, inner: int) -> float:
        """Return how far a layer's sizes are from the measured ones: the sum of the logarithms of their ratios."""
        pairs = ((experts, self.experts), (top_k, self.top_k), (hidden, self.hidden), (inner, self.inner))
        return sum(abs(math.log(one / other)) for one, other in pairs)


@dataclass(frozen=True)
class Rates:
    """Hold the curves of one family of CPUs, by (kernel, dtype, form), its GEMM rates, and gains of linear layers by dtype.

    `experts` are the layers that a dispatch was measured on, by (dispatch, dtype). `linear` is of oneDNN, `few` of
    `eff::linear_rows_v1` with weights that come from memory.

    `gemm` is, by dtype, the share of the modelled peak that the machine's own GEMM reached; `about` says when, on what
    and with which torch it was measured.
    """

    family: str
    gemm: Mapping[str, float]
    curves: Mapping[tuple[str, str, str], Curve]
    linear: Mapping[str, tuple[LinearGain, ...]]
    about: str
    experts: Mapping[tuple[str, str], tuple[ExpertRate, ...]] = field(default_factory=dict)
    few: Mapping[str, tuple[LinearGain, ...]] = field(default_factory=dict)

    def expert_rate(self, dispatch: str, dtype: str, sizes: tuple[int, int, int, int]) -> ExpertRate | None:
        """Return the rate of the measured layer nearest to (experts, top_k, hidden, inner), or None where none was measured."""
        layers = self.experts.get((dispatch, dtype))
        return min(layers, key=lambda layer: layer.distance(*sizes)) if layers else None

    def linear_gain(self, rows: int, inputs: int, outputs: int, dtype: str) -> float | None:
        """Return oneDNN's gain at the measured layer whose widths are nearest by ratio, or None where none was measured."""
        return _gain(self.linear.get(dtype, ()), rows, inputs, outputs)

    def few_gain(self, rows: int, inputs: int, outputs: int, dtype: str) -> float | None:
        """Return the gain of the kernel for a few rows likewise, or None where it was not measured."""
        return _gain(self.few.get(dtype, ()), rows, inputs, outputs)

    def curve(self, kernel: str, dtype: str, form: str) -> Curve | None:
        """Return the curve of a kernel, or None where it was not measured."""
        return self.curves.get((kernel, dtype, form))


def _gain(layers: Sequence[LinearGain], rows: int, inputs: int, outputs: int) -> float | None:
    def distance(layer: LinearGain) -> float:
        return abs(math.log(inputs / layer.inputs)) + abs(math.log(outputs / layer.outputs))

    return min(layers, key=distance).at(rows) if layers and inputs and outputs else None


def power_law(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """Interpolate linearly between the logarithms of both; outside take the nearest value."""
    if at <= places[0] or len(places) == 1:
        return values[0]
    if at >= places[-1]:
        return values[-1]
    right = bisect.bisect_left(places, at)
    low, high = places[right - 1], places[right]
    weight = math.log(at / low) / math.log(high / low)
    return math.exp((1 - weight) * math.log(values[right - 1]) + weight * math.log(values[right]))


def family(device: Device) -> str:
    """Return the key of a CPU in the table: its maker, its instruction set, and whether it has units for bfloat16.

    The maker counts: MKL, behind torch's matrix products, picks its code by it.
    """
    units = device.supports("bfloat16") and device.peak("bfloat16") > device.peak("float32")
    return f"{device.vendor}{'-' if device.vendor else ''}{device.compute}{'+bf16' if units else ''}"


@functools.cache
def table() -> Mapping[str, Rates]:
    """Return the rates of every family in the package's table."""
    raw = json.loads(resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    assert raw["schema"] == SCHEMA, raw["schema"]
    return {name: read(name, data) for name, data in raw["families"].items()}


def read(name: str, data: Mapping[str, Any]) -> Rates:
    """Build the rates of one family from its JSON value."""
    curves = {tuple(key.split()): Curve.from_json(value) for key, value in data.get("curves", {}).items()}
    linear, few = (_gains(data.get(key, {})) for key in ("linear", "few"))
    experts: dict[tuple[str, str], tuple[ExpertRate, ...]] = {}
    for key, value in data.get("experts", {}).items():
        dispatch, dtype, *sizes = key.split()
        rate = ExpertRate(*map(int, sizes), tuple(value["tokens"]), tuple(value["shares"]))  # type: ignore[call-arg, arg-type]
        experts[dispatch, dtype] = (*experts.get((dispatch, dtype), ()), rate)
    about = str(data.get("about", ""))
    return Rates(name, dict(data.get("gemm", {})), curves, linear, about, experts, few)  # type: ignore[arg-type]


def _gains(data: Mapping[str, Any]) -> dict[str, tuple[LinearGain, ...]]:
    found: dict[str, tuple[LinearGain, ...]] = {}
    for key, value in data.items():
        dtype, inputs, outputs = key.split()
        made = LinearGain(int(inputs), int(outputs), tuple(value["rows"]), tuple(value["gains"]))
        found[dtype] = (*found.get(dtype, ()), made)
    return found


def attained(device: Device) -> Device:
    """Return the device with the peaks that its family's GEMM reached, where those are above the modelled ones."""
    rates = rates_of(device)
    if rates is None:
        return device
    return replace(
        device, peak_flops=tuple((name, peak * max(1.0, rates.gemm.get(name, 1.0))) for name, peak in device.peak_flops)
    )


def rates_of(device: Device) -> Rates | None:
    """Return the rates that were measured on CPUs of this family, or None."""
    return table().get(family(device)) if device.kind == "cpu" else None


def nearest_rates(device: Device) -> Rates | None:
    """Return the rates of this family, else those of the family that shares most of its name; None for what is no CPU."""
    if device.kind != "cpu":
        return None
    words = set(re.split(r"[-+]", family(device)))
    near = sorted(table(), key=lambda name: (-len(words & set(re.split(r"[-+]", name))), name))
    return rates_of(device) or (table()[near[0]] if near else None)
