"""Check step caches: off is exact, Newton's form is exact up to its degree, stages begin anew, calls are those of the plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.core.schedule import Caching
from effcompile.runtime.sampler import Regions
from effcompile.runtime.step_memory import StepMemory
from effcompile.runtime.trajectory import WalkStep
from tests.support.denoisers import SmallDenoiser, facts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(number: int, level: float = 0.5) -> WalkStep:
    return WalkStep(number, 0, level, 0.0, number == 0, False)


def regions(denoiser: SmallDenoiser) -> Regions:
    return Regions(denoiser.head, denoiser.body, denoiser.tail)


@pytest.mark.parametrize("cache", ["reuse{interval=1}", "taylor{interval=1}", "taylor{interval=1,order=2}"])
@pytest.mark.parametrize("region", ["output", "body"])
def test_off_is_bit_for_bit(cache: str, region: str) -> None:
    denoiser = SmallDenoiser()
    given = regions(denoiser)
    policy = "bottleneck{steps=[3,4,3]}"
    expected = eff.sampler(denoiser, facts(), schedule=policy)((2, 2), generator=seeded())
    spelled = cache.replace("}", f",region={region}}}")
    sampler = eff.sampler(given, facts(), schedule=policy, cache=spelled)
    got = sampler((2, 2), generator=seeded())
    assert all(sampler.computed)
    # A body that runs gives its own values; only steps that do not compute add a residual.
    assert torch.equal(got, expected)
    tiny = eff.sampler(given, facts(), schedule=policy, cache="first-block{threshold=1e-12}")
    assert torch.equal(tiny((2, 2), generator=seeded()), expected)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("axis", ["step", "level"])
def test_the_polynomial_is_exact_up_to_its_degree_at_any_distances(order: int, axis: str) -> None:
    powers = torch.randn(order + 1, 3, generator=seeded(order), dtype=torch.float64)

    def feature(place: float) -> Tensor:
        return sum(powers[n] * place**n for n in range(order + 1))  # type: ignore[return-value]

    memory = StepMemory(Caching((True,) * 20, order, axis))  # type: ignore[arg-type]
    walked = [step(number, 1 - number / 20) for number in range(20)]
    for number in (0, 1, 3, 4, 7, 9)[-(order + 2) :]:
        memory.note(walked[number], (feature(memory.place(walked[number])),))
    for number in (10, 13):
        at = memory.place(walked[number])
        assert torch.allclose(memory.recall(walked[number])[0], feature(at), atol=1e-9), (order, axis)
        more = feature(at) + at ** (order + 1)  # one degree more is not exact
        assert not torch.allclose(memory.recall(walked[number])[0], more, atol=1e-3)


def test_a_backward_difference_is_no_derivative() -> None:
    memory = StepMemory(Caching((True,) * 4, 2))
    for number in range(3):
        memory.note(step(number), (torch.tensor(float(number**2)),))
    assert memory.recall(step(3))[0] == 9, "the published series says 8"


@pytest.mark.parametrize(
    ("cache", "calls"),
    [
        ("reuse{interval=3,warmup=2}", 2 + 2 + 1),
        ("taylor{interval=4,warmup=1,last=0}", 1 + 2),
        ("reuse{interval=99,warmup=1,last=0}", 1),
    ],
)
@pytest.mark.parametrize("region", ["output", "body"])
def test_what_is_computed_is_what_the_plan_says(cache: str, calls: int, region: str) -> None:
    denoiser = SmallDenoiser()
    spelled = cache.replace("}", f",region={region}}}")
    sampler = eff.sampler(regions(denoiser), facts(), schedule="plain{steps=10}", cache=spelled)
    assert sampler.schedule.caching is not None
    assert sum(sampler.schedule.caching.computed) == calls
    sampler((1, 2), generator=seeded())
    assert denoiser.calls == calls
    assert sampler.computed == sampler.schedule.caching.computed
    assert sampler.estimate(skipped=0.0).full_steps == pytest.approx(calls)


def test_a_longer_interval_never_computes_more() -> None:
    counts = []
    for interval in range(1, 12):
        made = eff.sampler(SmallDenoiser(), facts(), schedule="plain{steps=28}", cache=f"reuse{{interval={interval}}}")
        assert made.schedule.caching is not None
        counts.append(sum(made.schedule.caching.computed))
    assert counts == sorted(counts, reverse=True)


def test_every_stage_begins_anew() -> None:
    denoiser = SmallDenoiser()
    cache = "reuse{interval=99,warmup=1,last=0}"
    sampler = eff.sampler(denoiser, facts(), schedule="bottleneck{steps=[3,4,3]}", cache=cache)
    sampler((1, 2), generator=seeded())
    assert sampler.computed == (True, False, False, True, False, False, False, True, False, False)
    mask = "reuse{mask=[0,0,0,0,1,0,0,0,0,1]}"
    asked = eff.sampler(denoiser, facts(), schedule="bottleneck{steps=[3,4,3]}", cache=mask).schedule.caching
    assert asked is not None
    assert asked.computed == (True, False, False, True, True, False, False, True, False, True)
    with pytest.raises(eff.EffError, match="EFF-U004"):
        eff.sampler(denoiser, facts(), schedule="plain{steps=9}", cache=mask)


def test_two_runs_do_not_see_each_other() -> None:
    sampler = eff.sampler(SmallDenoiser(), facts(), schedule="plain{steps=8}", cache="taylor{interval=2,warmup=1}")
    first = sampler((1, 2), generator=seeded(1))
    sampler((3, 2), generator=seeded(2))
    assert torch.equal(sampler((1, 2), generator=seeded(1)), first)


def test_a_threshold_computes_more_the_lower_it_is() -> None:
    counts = []
    for threshold in (1e-9, 0.05, 0.2, 1.0):
        sampler = eff.sampler(
            regions(SmallDenoiser()),
            facts(),
            schedule="plain{steps=20}",
            cache=f"first-block{{threshold={threshold},warmup=2,most=6}}",
        )
        sampler((1, 2), generator=seeded())
        counts.append(sum(sampler.computed))
    assert counts[0] == 20
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 2 + 2 + 1, "two, then one behind each six that did not, and the last"


def test_a_residual_of_zeros_computes() -> None:
    memory = StepMemory(Caching((False,) * 3, region="body", threshold=0.1, most=5))
    memory.note(step(0), (torch.ones(2),), torch.zeros(2))
    assert memory.computes(step(1), torch.zeros(2))
    memory.note(step(1), (torch.ones(2),), torch.ones(2))
    assert not memory.computes(step(2), 1.05 * torch.ones(2))
    assert memory.computes(step(2), 1.2 * torch.ones(2))


def test_residuals_of_the_body_hit_what_reusing_its_input_would_miss() -> None:
    """A step whose body is skipped is head, cached residual and tail; the head is that of the step."""
    denoiser = SmallDenoiser()
    sampler = eff.sampler(
        regions(denoiser), facts(), schedule="plain{steps=2}", cache="reuse{interval=99,warmup=1,last=0,region=body}"
    )
    seen: list[Tensor] = []
    sampler((1, 2), generator=seeded(), on_step=lambda step, x: seen.append(x))
    noise = torch.randn(1, 2, 16, 16, generator=seeded())
    with torch.no_grad():
        one, half = torch.ones(1), torch.full((1,), 0.5)
        hidden, context, _ = denoiser.head(noise, one)
        residual = denoiser.body(hidden, context)[0] - hidden[0]
        assert torch.equal(seen[0], noise - 0.5 * denoiser(noise, one))
        later, context, _ = denoiser.head(seen[0], half)
        expected = seen[0] - 0.5 * denoiser.tail((later[0] + residual,), context)
    assert torch.allclose(seen[1], expected, atol=1e-6)


def test_a_body_needs_regions() -> None:
    with pytest.raises(eff.EffError, match="EFF-D108"):
        eff.sampler(SmallDenoiser(), facts(), cache="reuse{region=body}")
