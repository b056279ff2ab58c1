"""Check schedules as data: their levels, what they refuse, and what they cost against three baselines."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effcompile as eff
from effcompile.compiler import all_methods
from effcompile.core.grids import between, grid, shifted
from effcompile.core.policy import read_policy
from effcompile.core.schedule import Schedule, ScheduleWarning, Stage, StepCache, StepSchedule
from effcompile.integrations.sampler import plan_schedule
from effcompile.passes.diffusion.presets import PRESETS
from tests.support.denoisers import GaussianFlow, facts

FLUX = facts(128, patch=2, multiple=2, width=3072, text=512, shift=3.158)


def scheduled(policy: str, of: eff.Denoising = FLUX, cache: str | None = None) -> Schedule:
    return plan_schedule(of, policy, cache)


def test_levels_are_those_of_the_worked_example() -> None:
    made = scheduled("bottleneck{preset=flux-port}")
    first, second, third = made.stages
    assert made.sizes == ((128, 128),) * 4 + ((64, 64),) * 13 + ((128, 128),) * 8
    assert first.levels == pytest.approx([1, 0.9643, 0.9, 0.75], abs=1e-4)
    middle = [0.960, 0.944, 0.926, 0.906, 0.882, 0.853, 0.820, 0.778, 0.727, 0.662, 0.576, 0.457, 0.282]
    assert second.levels == pytest.approx([0.96, *middle][1:], abs=1e-3)
    assert third.levels == pytest.approx([0.931, 0.909, 0.880, 0.844, 0.794, 0.723, 0.614, 0.422], abs=1e-3)
    assert second.enter is not None
    assert second.enter.noise == 0.8, "the port mixes in the strength"
    assert "port" in made.origin
    ours = scheduled("bottleneck{preset=flux}")
    assert [stage.enter.noise for stage in ours.stages[1:] if stage.enter] == pytest.approx([0.883, 0.826], abs=1e-3)


def test_every_preset_says_where_it_comes_from_and_runs() -> None:
    for name, preset in PRESETS.items():
        assert preset.origin.split(":")[0] in ("paper", "port", "ours"), name
        assert scheduled(f"bottleneck{{preset={name}}}").steps == sum(preset.steps)
    with pytest.raises(eff.EffError, match="flux-port"):
        scheduled("bottleneck{preset=flux-prot}")


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 60),
    strength=st.floats(0.05, 1),
    shift=st.floats(0.2, 12),
    terminal=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_levels_fall_and_shifts_invert(steps: int, strength: float, shift: float, terminal: float) -> None:
    levels = grid(steps, strength, shift, terminal)
    assert len(levels) == steps
    assert levels[0] <= 1 + 2e-7  # float32, as diffusers computes it: a shift may end an ulp above
    # A stretch moves single levels up only where they lay below the terminal.
    assert all(later < level for level, later in zip(levels, (*levels[1:], 0.0)))
    u = np.linspace(0.01, 1, 50)
    assert np.abs(shifted(shifted(u, shift), 1 / shift) - u).max() < 1e-6
    assert np.array_equal(shifted(u, 1.0), u)
    assert np.abs(shifted(u, shift) - shifted(u, shift, "exponential")).max() < 1e-6
    walked, end = between(steps, 0.9, 0.2, shift)
    assert (walked[0], end) == (0.9, 0.2)
    assert all(later < level for level, later in zip(walked, (*walked[1:], end)))


def test_the_native_shift_grows_with_the_edge() -> None:
    made = scheduled("bottleneck{steps=[2,2,2],strength=[1,1,1]}", facts(64, shift=3.0))
    assert made.stages[1].levels[1] == pytest.approx(float(shifted(0.5, 1.5)))
    assert made.stages[2].levels[1] == pytest.approx(float(shifted(0.5, 3.0)))


def test_a_switch_keeps_the_number_of_steps() -> None:
    made = scheduled("predict-x0{steps=50,shift=[7,9]}")
    assert made.steps == 50
    assert made.sizes == ((96, 96),) * 25 + ((128, 128),) * 25
    low, high = made.stages
    assert low.levels == grid(50, shift=7.0)[:25]
    assert high.levels == grid(50, shift=9.0)[25:]
    assert high.enter is not None
    assert high.enter.noise == high.levels[0]


@pytest.mark.parametrize(
    ("policy", "of", "code"),
    [
        ("bottleneck{low=0.25}", facts(), "EFF-D101"),
        ("bottleneck", facts(least=None), "EFF-D102"),
        ("bottleneck", facts(18, multiple=2), "EFF-D103"),
        ("bottleneck{low=0.3}", facts(), "EFF-D103"),
        ("bottleneck{shift=[2,2,2]}", facts(process="vp"), "EFF-D105"),
        ("bottleneck{steps=[4,900,4]}", facts(process="vp"), "EFF-D105"),
        ("correlated", facts(process="vp"), "EFF-D106"),
        ("correlated{steps=[3,3,3],weight=[0.9,0.1]}", facts(64, least=(8, 8)), "EFF-D105"),
        ("predict-x0{steps=4,until=[0.01]}", facts(), "EFF-D105"),
        ("bottleneck{strength=[1,-0.5,0.6]}", facts(), "EFF-U004"),
        ("bottleneck{strength=[0.9,0.8,0.6]}", facts(), "EFF-U004"),
        ("bottleneck{strength=[1,0.8]}", facts(), "EFF-U004"),
        ("bottleneck{steps=[4,0,8]}", facts(), "EFF-U004"),
        ("bottleneck{shift=[1,0,1]}", facts(), "EFF-U004"),
        ("bottleneck{resize=lanczos}", facts(), "EFF-U004"),
        ("bottleneck{renoise=level}", facts(), "EFF-U004"),
        ("bottleneck{terminal=1.0}", facts(), "EFF-U004"),
        ("correlated{z=1.9}", facts(), "EFF-U004"),
        ("predict-x0{scales=[0.5,1.0],until=[0.5,0.7]}", facts(), "EFF-U004"),
        ("bottelneck", facts(), "EFF-U014"),
        ("plain{steps=-1}", facts(), "EFF-U004"),
    ],
)
def test_what_cannot_be_meant_is_an_error_before_sampling(policy: str, of: eff.Denoising, code: str) -> None:
    with pytest.raises(eff.EffError, match=code):
        scheduled(policy, of)


def test_a_list_that_does_not_end_at_the_result_is_an_error() -> None:
    with pytest.raises(eff.EffError, match="EFF-D104"):
        scheduled("predict-x0{scales=[0.5,0.75],until=[0.5]}", facts(16, least=(4, 4)))
    with pytest.raises(eff.EffError, match="EFF-D105"):
        Schedule((Stage((4, 4), (0.5, 0.7)),))
    with pytest.raises(eff.EffError, match="EFF-D105"):
        Schedule((Stage((4, 4), (0.5,), end=0.1),))
    with pytest.raises(eff.EffError, match="EFF-D105"):
        Schedule(())


def test_json_is_the_schedule() -> None:
    made = scheduled("bottleneck{steps=[2,3,2]}", cache="taylor{interval=2,warmup=1}")
    text = json.dumps(made.to_json())
    assert Schedule.from_json(json.loads(text)) == made
    for damage in ({"stages": []}, {"process": "sde"}, {"stages": [{"size": [4, 4]}]}):
        with pytest.raises(eff.EffError, match="EFF-D105"):
            Schedule.from_json({**made.to_json(), **damage})


def test_doubts_are_told() -> None:
    with pytest.warns(ScheduleWarning, match="EFF-D110"):
        eff.sampler(GaussianFlow(), facts(distilled=True), schedule="bottleneck{steps=[4,13,8],terminal=0.02}")
    with pytest.warns(ScheduleWarning, match="EFF-D111"):
        eff.sampler(GaussianFlow(), facts(), schedule="bottleneck{shift=[9,6,9]}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eff.sampler(GaussianFlow(), facts(), schedule="bottleneck{terminal=0.02,shift=[9,6,9]}")
        eff.sampler(GaussianFlow(), facts(distilled=True), schedule="plain{steps=4}")


def test_costs_are_those_of_the_arithmetic() -> None:
    made = eff.sampler(GaussianFlow(), FLUX, schedule="bottleneck{preset=flux,terminal=0.02}")
    cost = made.estimate()
    assert FLUX.cost((64, 64)) / FLUX.cost((128, 128)) == pytest.approx(0.289, abs=0.001)
    assert cost.full_steps == pytest.approx(15.8, abs=0.05)
    assert cost.against_50 == pytest.approx(3.17, abs=0.01)
    assert cost.against_default == pytest.approx(1.78, abs=0.01)
    assert cost.equal_steps == 15
    timed = made.estimate({(64, 64): 1.0, (128, 128): 4.0})
    assert timed.tag == "measured"
    assert timed.seconds == pytest.approx(12 * 4 + 13)
    assert "3.17" in str(cost)
    plain = eff.sampler(GaussianFlow(), FLUX)
    assert plain.estimate().full_steps == FLUX.steps


def test_every_policy_of_the_families_is_found_and_spelled() -> None:
    found = [cls for cls in all_methods() if issubclass(cls, StepSchedule | StepCache)]
    names = {cls.name for cls in found}
    assert {"plain", "bottleneck", "predict-x0", "correlated", "reuse", "taylor", "first-block"} <= names
    for cls in found:
        policy = cls()
        assert read_policy(cls.family, policy.spelled, all_methods()) == policy
