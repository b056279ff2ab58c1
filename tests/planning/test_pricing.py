"""Check prices and crossovers against what they must be by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from effcompile.core.kernel import Answer, AttentionKernel, Supported
from effcompile.core.mask import CAUSAL
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.observe import observe
from effcompile.planning.pricing import crossovers, floor, once, products
from effcompile.skeleton import strip
from effcompile.targets import devices

H100 = Target.parse("h100", devices())
SITE = AttentionSite(
    "a", "attention", "forward", "m.py:1", batch=1, heads=8, kv_heads=8, q_len=4096, kv_len=4096, mask=CAUSAL
)


@dataclass(frozen=True)
class Linear(AttentionKernel):
    """Take a fixed and a per-token time."""

    name: ClassVar[str] = "padded"
    fixed: float = 10.0
    each: float = 0.001

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for at least 64 keys."""
        assert isinstance(site.kv_len, int)
        return Supported(self.fixed + self.each * site.kv_len) if site.kv_len > 64 else Refusal("EFF-A206", "short")

    def lower(self, node: Any, site: AttentionSite, edit: Any) -> Any:
        """Never called here."""
        raise AssertionError


@dataclass(frozen=True)
class Dense(Linear):
    """Take no fixed and ten times the per-token time."""

    name: ClassVar[str] = "dense"
    fixed: float = 0.0
    each: float = 0.01


def test_floor_is_the_roofline() -> None:
    found = floor(replace(SITE, dtype="bfloat16"), H100.device, 0.5)
    flops = 4 * 8 * 4096**2 * 64 * 0.5
    assert found.seconds >= flops / H100.device.peak("bfloat16")
    assert found.bound in ("compute", "exp")
    one = floor(replace(SITE, q_len=1, dtype="bfloat16"), H100.device, 1.0)
    assert one.bound == "memory"
    assert one.seconds >= 2 * 2 * 8 * 4096 * 64 / H100.device.memory_bandwidth


def test_half_the_blocks_are_cheaper() -> None:
    assert floor(SITE, H100.device, 0.5).seconds < floor(SITE, H100.device, 1.0).seconds


def test_crossover_is_where_the_times_meet() -> None:
    (pays,) = crossovers(SITE, [Linear(), Dense()], H100)
    assert (pays.kernel, pays.against, pays.where.direction) == ("padded", "dense", "above")
    assert pays.where.length == pytest.approx(
        10.0 / 0.009, rel=0.1
    )  # between the examined lengths the times are power laws
    assert pays.where.tag == "modelled"
    assert pays.decides
    assert str(pays).startswith("padded pays above S = ")


def test_no_crossover_without_something_to_beat() -> None:
    assert crossovers(SITE, [Linear()], H100) == ()
    (always,) = crossovers(SITE, [Linear(fixed=0.0), Dense()], H100)
    assert not always.decides


def test_equal_layers_are_priced_once() -> None:
    seen: list[AttentionSite] = []

    def note(site: AttentionSite) -> int:
        seen.append(site)
        return len(seen)

    price = once(note)
    assert [price(replace(SITE, id=name, source=name)) for name in "abc"] == [1, 1, 1]
    assert price(replace(SITE, heads=4)) == 2


def test_products_are_those_with_weights() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(64, 256, bias=False)
            self.down = torch.nn.Parameter(torch.ones(256, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.up(x) @ self.down) @ x.transpose(-1, -2)

    (graph,) = observe(strip(Two(), (torch.randn(4, 512, 64),), {})).graphs
    assert graph.program is not None
    seconds = products(graph.program.entries[0], H100.device)
    one = 2 * 4 * 512 * 64 * 256 / H100.device.peak("float32")
    moved = 4 * (4 * 512 * (64 + 256) + 64 * 256) / H100.device.memory_bandwidth
    assert 2 * max(one, moved) < seconds < 2 * (one + moved) / 0.7 + 2 * H100.device.call_overhead
