"""Check where a symbolic length is split, against what follows from the kernels' own times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcompile.core.kernel import Answer, AttentionKernel, Supported
from effcompile.core.mask import CAUSAL
from effcompile.core.policy import Kernels
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.sizes import Size
from effcompile.core.target import Target
from effcompile.planning.planner import KERNEL, Circumstances, PassChoice, make_plan
from effcompile.planning.ranges import LEAST, MOST, examined
from effcompile.targets import devices

H100 = Target.parse("h100", devices())
SITE = AttentionSite(
    "a", "attention", "forward", "m.py:1", "sdpa", batch="b", heads=8, kv_heads=8, q_len="s", kv_len="s", mask=CAUSAL
)
SIZES = {"s": Size("s", 300, 2, None, "x.size()[1]"), "b": Size("b", 2)}


@dataclass(frozen=True)
class Law(AttentionKernel):
    """Take `fixed + each * length` seconds; from `least` keys on."""

    name: ClassVar[str] = "padded"
    fixed: float = 1.0
    each: float = 0.001
    least: int = 0

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer with the law."""
        if isinstance(site.kv_len, int) and site.kv_len < self.least:
            return Refusal("EFF-A206", "short")
        return Supported(self.fixed + self.each * (site.kv_len if isinstance(site.kv_len, int) else 1024))

    def lower(self, node: Any, site: AttentionSite, edit: Any) -> Any:
        """Never called here."""
        raise AssertionError


@dataclass(frozen=True)
class Dense(Law):
    """Take no fixed and ten times the time for each token: the source's own kernel."""

    name: ClassVar[str] = "dense"
    fixed: float = 0.0
    each: float = 0.01


def plan(*sites: AttentionSite, kernels: tuple[AttentionKernel, ...] = (Law(), Dense()), **fields: Any) -> Any:
    given = Circumstances(H100, Kernels(kernels), **{"sizes": SIZES, **fields})
    return make_plan(sites or (SITE,), (), given, [PassChoice("unpad")]).graphs[0]


def kernels(graph: Any) -> list[tuple[str, str]]:
    return [(c.policy, c.range) for c in graph.choices if c.family == KERNEL]


def test_a_crossover_splits_the_length() -> None:
    graph = plan()
    assert graph.split is not None
    assert (graph.split.size, graph.split.source) == ("s", "x.size()[1]")
    assert graph.split.at == pytest.approx(1.0 / 0.009, rel=0.1)
    assert kernels(graph) == [("dense", "below"), ("padded", "above")]
    assert [c.range for c in graph.choices if c.family == "pass"] == ["any"]
    below, above = graph.choices[:2]
    assert above.seconds == pytest.approx(1.0 + 0.001 * 300, rel=0.05)  # priced at the traced length, which lies above
    assert below.seconds == pytest.approx(0.01 * (graph.split.at - 1), rel=0.1)
    assert "at s = 300" in above.reason


@given(st.floats(1e-3, 1e3), st.floats(0.05, 0.9))
def test_the_border_is_where_the_times_meet(fixed: float, share: float) -> None:
    graph = plan(kernels=(Law(fixed, 0.01 * share), Dense()))
    meet = fixed / (0.01 * (1 - share))
    if graph.split is not None:
        assert graph.split.at == pytest.approx(meet, rel=0.25)  # a power law between lengths that are a factor 2 apart
        assert LEAST < graph.split.at <= MOST
    else:
        # One kernel is near enough everywhere: neither side gains 5 %.
        gains = [abs(math.log((fixed + 0.01 * share * n) / (0.01 * n))) for n in (LEAST, MOST)]
        assert min(gains) < 0.06 or not LEAST < meet < MOST


def test_a_gain_that_is_nothing_beside_the_rest_of_the_graph_does_not_split() -> None:
    seen: list[Mapping[str, int]] = []

    def rest(values: Mapping[str, int]) -> float:
        seen.append(values)
        return 1000.0

    graph = plan(others=rest)
    assert graph.split is None
    assert kernels(graph) == [("padded", "any")]
    assert any("one kernel for every s" in note for note in graph.notes)
    assert all(values["b"] == 2 for values in seen)


def test_bounds_of_the_symbol_bound_the_search() -> None:
    for low, high, kernel in ((2, 64, "dense"), (512, 4096, "padded")):
        graph = plan(sizes={**SIZES, "s": Size("s", low, low, high)})
        assert (graph.split, kernels(graph)) == (None, [(kernel, "any")])


def test_sites_must_agree_on_one_symbol() -> None:
    cross = replace(SITE, id="b", kv_len="t")
    graph = plan(SITE, cross, sizes={**SIZES, "t": Size("t", 77)})
    assert graph.split is None
    assert len(kernels(graph)) == 2
    assert any("lengths depend on s and t" in note for note in graph.notes)
    computed = plan(replace(SITE, q_len="s + 1"))
    assert computed.split is None
    assert any("s + 1 is computed" in note for note in computed.notes)


def test_sites_share_one_border() -> None:
    graph = plan(SITE, replace(SITE, id="b", heads=4), replace(SITE, id="c", q_len=64, kv_len=64))
    assert graph.split is not None
    ranges = {c.site: {d.range for d in graph.choices if d.site == c.site} for c in graph.choices if c.family == KERNEL}
    assert ranges == {"a": {"below", "above"}, "b": {"below", "above"}, "c": {"any"}}


def test_the_plan_does_not_depend_on_the_length_that_came_first() -> None:
    plans = [plan(sizes={**SIZES, "s": Size("s", hint, 2)}) for hint in (3, 77, 111, 5000)]
    assert len({graph.decisions for graph in plans}) == 1


def test_a_kernel_that_declines_short_lengths_serves_long_ones() -> None:
    graph = plan(kernels=(Law(fixed=0.0, least=128), Dense()))
    assert kernels(graph) in ([("dense", "below"), ("padded", "above")], [("padded", "any")])


def test_training_keeps_one_range() -> None:
    @dataclass(frozen=True)
    class Through(Law):
        differentiable: ClassVar[bool] = True

    @dataclass(frozen=True)
    class DenseThrough(Dense):
        differentiable: ClassVar[bool] = True

    graph = plan(kernels=(Through(), DenseThrough()), training=True)
    assert graph.split is None


@given(st.integers(0, 300), st.one_of(st.none(), st.integers(0, 1 << 20)))
def test_examined_lengths_lie_within_the_bounds(low: int, high: int | None) -> None:
    found = examined(Size("s", low, low, high))
    assert list(found) == sorted(set(found))
    assert all(max(low, LEAST) <= n for n in found)
    assert high is None or high < max(low, LEAST) or all(n <= high for n in found)
    assert len(found) <= 20
