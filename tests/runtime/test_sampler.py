"""Check sampling by schedules: diffusers' bits with one stage, merged stages, exact marginals, noise of the user's generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.runtime.processes import FlowMatching, VariancePreserving
from effcompile.runtime.resize import resize
from effcompile.runtime.sampler import Sampler
from effcompile.runtime.trajectory import Trajectory
from tests.support.denoisers import GaussianFlow, SmallDenoiser, facts

diffusers = pytest.importorskip("diffusers")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock_euler(denoiser: SmallDenoiser, noise: Tensor, steps: int, **config: object) -> Tensor:
    """Sample as a pipeline of diffusers does."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = denoiser(x, t.expand(x.shape[0]) / 1000)
            x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


def thousandth(denoiser: SmallDenoiser):  # type: ignore[no-untyped-def]
    return lambda x, t: denoiser(x, t / 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "shift", "terminal"), [(7, 1.0, 0.0), (28, 3.0, 0.0), (20, 1.7, 0.02)])
def test_one_stage_is_the_stock_scheduler_bit_for_bit(
    steps: int, shift: float, terminal: float, dtype: torch.dtype
) -> None:
    denoiser = SmallDenoiser().to(dtype)
    noise = torch.randn(2, 2, 16, 16, generator=seeded()).to(dtype)
    expected = stock_euler(denoiser, noise, steps, shift=shift, shift_terminal=terminal or None)
    policy = f"bottleneck{{steps=[{steps}],strength=[1],shift=[{shift}],terminal={terminal}}}"
    sampler = eff.sampler(thousandth(denoiser), facts(), schedule=policy, time_scale=1000)
    assert torch.equal(sampler((2, 2), generator=seeded(), dtype=dtype), expected)
    assert torch.equal(sampler(noise), expected)
    if not terminal:
        plain = eff.sampler(
            thousandth(denoiser), facts(shift=shift), schedule=f"plain{{steps={steps}}}", time_scale=1000
        )
        assert torch.equal(plain(noise), expected)
        assert not torch.equal(plain(noise.flip(0)), expected)


def test_dynamic_shifting_has_its_bits_too() -> None:
    denoiser, mu, steps = SmallDenoiser(), 0.93, 12
    noise = torch.randn(1, 2, 16, 16, generator=seeded())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    of = facts(shift=float(np.exp(mu)), form="exponential")
    sampler = eff.sampler(denoiser, of, schedule=f"plain{{steps={steps}}}")
    assert [*sampler.schedule.stages[0].levels, 0.0] == scheduler.sigmas.tolist()
    assert sampler(noise).shape == noise.shape


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_variance_preserving_process_is_ddim_bit_for_bit(prediction: str) -> None:
    denoiser, steps = SmallDenoiser(), 20
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
    scheduler.set_timesteps(steps)
    x = noise = torch.randn(2, 2, 16, 16, generator=seeded())
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t.float().expand(2) / 1000), t, x).prev_sample
    kind = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}[prediction]
    process = VariancePreserving.scaled_linear(prediction=kind)  # type: ignore[arg-type]
    of = facts(process="vp")
    sampler = eff.sampler(thousandth(denoiser), of, schedule=f"plain{{steps={steps}}}", process=process)
    assert torch.equal(sampler(noise), x)
    three = eff.sampler(thousandth(denoiser), of, schedule="bottleneck{steps=[3,6,4]}", process=process)
    assert three((2, 2), generator=seeded()).shape == (2, 2, 16, 16)
    shifted = process.shifted(3.0)
    ratio = (process.alphas / (1 - process.alphas)) / (shifted.alphas / (1 - shifted.alphas))
    assert torch.allclose(ratio, torch.full_like(ratio, 3.0), rtol=1e-3)


def test_stages_of_one_size_are_one_stage() -> None:
    denoiser = SmallDenoiser()
    plain = eff.sampler(denoiser, facts(shift=2.0), schedule="plain{steps=25}")
    high = eff.sampler(denoiser, facts(shift=2.0), schedule="bottleneck{low=1.0}")
    one = eff.sampler(denoiser, facts(shift=2.0), schedule="predict-x0{steps=25,scales=[1.0,1.0]}")
    expected = plain((2, 2), generator=seeded())
    for sampler in (high, one):
        drawn = seeded()
        assert torch.equal(sampler((2, 2), generator=drawn), expected)
        after = seeded()
        torch.randn(2, 2, 16, 16, generator=after)
        assert torch.equal(drawn.get_state(), after.get_state()), "noise was drawn that nobody needs"
    again = eff.sampler(denoiser, facts(shift=2.0), schedule="bottleneck{low=1.0,force_renoise=True}")
    assert len(again.schedule.stages) == 3
    assert not torch.equal(again((2, 2), generator=seeded()), expected)


@pytest.mark.parametrize(
    "policy", ["bottleneck", "predict-x0{steps=12,scales=[0.5,1.0]}", "correlated{steps=[5,7]}", "plain{steps=9}"]
)
def test_calls_sizes_and_noise_are_those_of_the_schedule(policy: str) -> None:
    flow = GaussianFlow()
    sampler = eff.sampler(flow, facts(), schedule=policy)
    stages, drawn = sampler.schedule.stages, seeded(3)
    first = sampler((2, 3), generator=drawn)
    assert first.shape == (2, 3, 16, 16)
    assert tuple(flow.sizes) == sampler.schedule.sizes
    assert sampler.computed == (True,) * sampler.schedule.steps
    expected = seeded(3)
    for stage in stages:  # all noise is the user's generator's: once a stage, of the stage's size
        torch.randn(2, 3, *stage.size, generator=expected)
    assert torch.equal(drawn.get_state(), expected.get_state())
    assert torch.equal(sampler((2, 3), generator=seeded(3)), first)
    assert not torch.equal(sampler((2, 3), generator=seeded(4)), first)


def moments(policy: str, **more: object) -> tuple[float, float]:
    sampler = eff.sampler(GaussianFlow(0.7, 0.4), facts(32, **more), schedule=policy)
    x = sampler((64, 2), generator=seeded(5)).double()
    return float(x.mean()), float(x.std())


def test_noise_at_the_level_that_is_told_keeps_the_law_of_gaussian_data() -> None:
    steps = "steps=[90,90,90],force_renoise=True,low=1.0"
    mean, deviation = moments(f"bottleneck{{{steps},shift=[2,2,2]}}")
    assert abs(mean - 0.7) < 0.01
    assert abs(deviation - 0.4) < 0.01
    # With noise at the strength, less than the denoiser is told, the law is another.
    _, wrong = moments(f"bottleneck{{{steps},shift=[6,6,6],renoise=strength}}")
    assert abs(wrong - 0.4) > 0.05
    _, right = moments(f"bottleneck{{{steps},shift=[6,6,6]}}")
    assert abs(right - 0.4) < 0.02


@pytest.mark.parametrize("z", [2.0, 4.0])
def test_a_correlated_transition_leaves_white_noise_at_the_level_that_is_told(z: float) -> None:
    sampler = eff.sampler(GaussianFlow(), facts(), schedule=f"correlated{{steps=[4,6],weight=[0.4],z={z}}}")
    before, stage = sampler.schedule.stages
    assert before.end == pytest.approx(0.6)
    level = stage.levels[0]
    assert level == pytest.approx(z * 0.6 / (z * 0.6 + 0.4))
    walk = Trajectory(sampler.schedule, FlowMatching())
    data = torch.randn(1, 1, 8, 8, generator=seeded(8))
    noise = torch.randn(20_000, 1, 8, 8, generator=seeded(9))
    x = walk.enter(0.4 * data + 0.6 * noise, before, stage, seeded(10))
    apart = (x - (1 - level) * resize(data, 16, 16, "nearest")).reshape(len(x), 8, 2, 8, 2).transpose(2, 3)
    cells = apart.reshape(-1, 4).double()
    covariance = cells.T @ cells / len(cells)
    assert (covariance - level**2 * torch.eye(4)).abs().max() < 4 * level**2 * (2 / len(cells)) ** 0.5


def test_a_prediction_of_the_data_takes_the_level_of_its_own_answer() -> None:
    data = torch.randn(1, 2, 8, 8, generator=seeded(1))
    noise = torch.randn(1, 2, 8, 8, generator=seeded(2))
    sampler = eff.sampler(lambda x, t: noise - data, facts(), schedule="predict-x0{steps=8,scales=[0.5,1.0]}")
    seen: list[Tensor] = []

    class Watch(Trajectory):
        def enter(self, x: Tensor, *rest: object) -> Tensor:  # type: ignore[override]
            seen.append(x)
            return super().enter(x, *rest)  # type: ignore[arg-type]

    walk = Watch(sampler.schedule, FlowMatching())
    x = noise
    for step in walk.steps[:4]:
        x = walk.advance(step, x, noise - data, seeded())
    assert (seen[0] - data).abs().max() < 1e-6


def test_guidance_runs_both_branches_in_one_call() -> None:
    def denoiser(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return x * label[:, None, None, None]

    rows: list[int] = []
    sampler = eff.sampler(denoiser, facts(), schedule="plain{steps=1}")
    x = torch.ones(2, 1, 16, 16)
    got = sampler(x, torch.tensor([1.0, 2.0]), guidance=3.0, without=(torch.tensor([0.5, 0.5]),))
    assert rows == [4]
    with pytest.raises(eff.EffError, match="EFF-D114"):
        sampler(x, torch.tensor([1.0, 2.0]), guidance=3.0)
    wanted = torch.tensor([0.5 + 3 * 0.5, 0.5 + 3 * 1.5])
    assert torch.allclose(got[:, 0, 0, 0], 1 - wanted)


def test_nothing_half_denoised_is_returned() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)

    with pytest.raises(eff.EffError, match="EFF-D107"):
        eff.sampler(broken, facts())((1, 1), generator=seeded())
    with pytest.raises(eff.EffError, match="EFF-D107"):
        eff.sampler(lambda x, t: x[:, :1], facts())((1, 2), generator=seeded())
    with pytest.raises(eff.EffError, match="EFF-D107"):
        eff.sampler(GaussianFlow(), facts())(torch.zeros(1, 1, 8, 8))


def test_a_plan_replays_the_schedule() -> None:
    denoiser = SmallDenoiser()
    sampler = eff.sampler(
        denoiser, facts(), schedule="bottleneck{steps=[2,3,3],terminal=0.02}", cache="taylor{interval=2,warmup=1}"
    )
    text = sampler.plan.to_json()
    from effcompile.core.plan import Plan

    again = eff.sampler(denoiser, facts(), plan=Plan.from_json(text))
    assert again.schedule == sampler.schedule
    assert torch.equal(again((1, 2), generator=seeded()), sampler((1, 2), generator=seeded()))
    with pytest.raises(eff.EffError, match="EFF-U015"):
        eff.sampler(denoiser, facts(), plan=Plan.from_json(text), cache="reuse")
    with pytest.raises(eff.EffError, match="EFF-D104"):
        eff.sampler(denoiser, facts(32), plan=Plan.from_json(text))


def test_a_compiled_denoiser_compiles_once_for_each_size() -> None:
    conv = torch.nn.Conv2d(2, 2, 3, padding=1)
    graphs: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(conv(x)) * t[:, None, None, None]

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(1)
        return gm.forward

    policy = "bottleneck{steps=[3,4,3],terminal=0.02}"
    expected = eff.sampler(denoiser, facts(), schedule=policy)((1, 2), generator=seeded())
    sampler = eff.sampler(torch.compile(denoiser, backend=backend, dynamic=False), facts(), schedule=policy)
    for _ in range(2):
        assert torch.equal(sampler((1, 2), generator=seeded()), expected)
        assert len(graphs) == 2, "a graph for each size, not one for each step"


def test_a_sampler_alone_needs_no_policy() -> None:
    from effcompile.core.schedule import Schedule, Stage

    made = Schedule((Stage((4, 4), (1.0, 0.5)),))
    flow = GaussianFlow()
    assert Sampler(flow, made)((1, 1), generator=seeded()).shape == (1, 1, 4, 4)
