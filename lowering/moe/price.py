"""Price the dispatches of experts: arithmetic at a share of the chip's rate, against the bytes that have to move.

On a CPU whose family is in the package's table (`eff bench moe-table --install`) a time is what the roofline of a dispatch leaves
at the share of it that was measured, on the layer nearest in size. Elsewhere, and in a dtype of which only some dispatches were
measured, all shares are modelled. A decode step is bound by the weights of the distinct experts that its tokens hit: under even
routing E (1 - (1 - k/E)^T) of them, an upper estimate.
"""

from __future__ import annotations

from dataclasses import replace

from effcompile.core.density import NOMINAL
from effcompile.core.experts import MoESite
from effcompile.core.kernel import Supported
from effcompile.core.target import Device, Target, element_bytes
from effcompile.lowering.rates import power_law, rates_of

NEAR = 3.5
"""Distance of sizes (logarithms of four ratios) up to which a layer counts as measured: each size off by 2.4 times, for example."""
SHARES = {
    "fused": 0.75,
    "block-aligned": 0.5,
    "grouped": 0.5,
    "batched": 0.3,
    "dense": 0.6,
    "loop": 0.4,
    "by-expert": 0.4,
}
"""Of the chip's peak, by dispatch."""
_TRAFFIC = {
    "fused": 1.0,
    "block-aligned": 1.0,
    "grouped": 1.0,
    "batched": 3.0,
    "dense": 1.0,
    "loop": 1.0,
    "by-expert": 3.0,
}
"""How often a weight that is used crosses the memory bus: fetched ones are read, written and read again."""
_ROWS = {
    "fused": 2.0,
    "block-aligned": 3.0,
    "grouped": 8.0,
    "batched": 6.0,
    "dense": 6.0,
    "loop": 6.0,
    "by-expert": 8.0,
}
"""Reads and writes of a row of activations a slot."""
_CALLS = {"fused": 2.0, "block-aligned": 7.0, "grouped": 40.0, "batched": 8.0, "dense": 6.0}
"""Calls of the device. Those of grouped products are many: in a published decode run on a GPU they cost 0.9 ms a layer over fetched
weights, sort, counts and set-up together."""


def tokens(site: MoESite) -> int:
    """Return the number of tokens, the nominal one where it is a symbol."""
    return site.tokens if isinstance(site.tokens, int) else NOMINAL


def distinct(site: MoESite) -> float:
    """Return how many experts the tokens hit under even routing."""
    return site.experts * (1 - (1 - site.top_k / site.experts) ** tokens(site))


def weights(site: MoESite) -> int:
    """Return the numbers in the weights of one expert."""
    return (3 if site.gated else 2) * site.hidden * site.inner


def roofline(name: str, site: MoESite, device: Device) -> float:
    """Return the seconds that a dispatch's products, or reading the weights that it reads, take at the rates of a device."""
    slots = tokens(site) * site.top_k
    rows = tokens(site) * site.experts if name == "dense" else slots
    kinds = {"dense": float(site.experts), "batched": float(slots)}
    moved = kinds.get(name, distinct(site)) * weights(site) * element_bytes(site.dtype)
    return max(2.0 * rows * weights(site) / _peak(site, device), moved / device.memory_bandwidth)


def price(name: str, site: MoESite, target: Target) -> Supported:
    """Return the seconds of a dispatch, measured where the table has this CPU and the site's dtype.

    What was measured is torch's ways of running it, which say nothing about another runtime.
    """
    found = None if target.portable else _measured(name, site, target.device)
    return _modelled(name, site, target) if found is None else found


def _measured(name: str, site: MoESite, device: Device) -> Supported | None:
    """Return the seconds that the table gives; measured ones lie near a measured layer, between its numbers of tokens.

    Times of that layer are interpolated, since its roofline has a corner, and scaled by what the rooflines of both layers say.
    """
    rates, sizes = rates_of(device), (site.experts, site.top_k, site.hidden, site.inner)
    rate = None if rates is None else rates.expert_rate(name, site.dtype, sizes)
    if rate is None:
        return None
    count = tokens(site)
    inside = rate.tokens[0] <= count <= rate.tokens[-1]

    def layer(count: int) -> float:
        sized = {"experts": rate.experts, "top_k": rate.top_k, "hidden": rate.hidden, "inner": rate.inner}
        return roofline(name, replace(site, tokens=count, **sized), device)  # type: ignore[arg-type]

    seconds = layer(count) / rate.shares[0 if count < rate.tokens[0] else -1]
    if inside:
        seconds = power_law(rate.tokens, [layer(n) / share for n, share in zip(rate.tokens, rate.shares)], count)
    near = inside and rate.distance(*sizes) <= NEAR
    return Supported(seconds * roofline(name, site, device) / layer(count), "measured" if near else "modelled")


def _peak(site: MoESite, device: Device) -> float:
    return device.peak(site.dtype if device.supports(site.dtype) else "float32")


def _modelled(name: str, site: MoESite, target: Target) -> Supported:
    device, count = target.device, tokens(site)
    slots = count * site.top_k
    rows = count * site.experts if name == "dense" else slots
    wide = element_bytes(site.dtype)
    kinds = {"dense": float(site.experts), "batched": float(slots)}
    moved = kinds.get(name, distinct(site)) * weights(site) * wide * _TRAFFIC[name]
    moved += _ROWS[name] * rows * (site.hidden + site.inner) * wide
    compute = 2.0 * rows * weights(site) / (_peak(site, device) * SHARES[name])
    calls = 12.0 * distinct(site) if name in ("loop", "by-expert") else _CALLS[name]
    return Supported(max(compute, moved / device.memory_bandwidth) + calls * device.call_overhead)
