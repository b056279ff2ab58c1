"""Check pipelines of diffusers with schedules: plain is the pipeline bit for bit, stages have sizes and positions, hooks stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.integrations.diffusers import denoiser
from tests.support.pipelines import flux, pixart, sample, sd3, sdxl, shapes, stable_diffusion

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MAKE: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sd": stable_diffusion,
    "sdxl": sdxl,
}
LATENT_NOISE = ("pixart", "sd", "sdxl")
THREE = "bottleneck{steps=[2,3,3],terminal=0.02}"


@pytest.mark.parametrize("name", MAKE)
def test_a_plain_schedule_is_the_pipeline_bit_for_bit(name: str) -> None:
    pipe, given = MAKE[name]()
    expected = sample(pipe, given)
    own = pipe.scheduler
    assert eff.diffusers(pipe) is pipe
    assert torch.equal(sample(pipe, given), expected)
    assert torch.equal(sample(pipe, given), expected), "a second run begins anew"
    assert not torch.equal(sample(pipe, given, seed=1), expected)
    pipe._eff_schedule.remove()
    assert pipe.scheduler is own
    assert torch.equal(sample(pipe, given), expected)


@pytest.mark.parametrize(
    "config", [{"shift_terminal": 0.1}, {"use_karras_sigmas": True}, {"use_dynamic_shifting": True}]
)
def test_a_plain_schedule_keeps_levels_that_are_the_scheduler_s_own(config: dict[str, Any]) -> None:
    pipe, given = sd3(**config)
    expected = sample(pipe, given)
    assert torch.equal(sample(eff.diffusers(pipe), given), expected)


@pytest.mark.parametrize("name", MAKE)
def test_stages_have_their_sizes(name: str) -> None:
    pipe, given = MAKE[name]()
    policy = THREE if name not in LATENT_NOISE else "bottleneck{steps=[2,3,3]}"
    eff.diffusers(pipe, schedule=policy, least=(8, 6))
    seen = shapes(denoiser(pipe))
    whole = sample(pipe, given)
    rows = 1 if name == "flux" else 2
    if name == "flux":
        high, low = (rows, 48, 16), (rows, 12, 16)
    else:
        high, low = (rows, 4, 16, 16), (rows, 4, 8, 8)
    assert seen == [high] * 2 + [low] * 3 + [high] * 3
    assert torch.isfinite(whole).all()
    assert torch.equal(sample(pipe, given), whole)
    assert not torch.equal(sample(pipe, given, seed=1), whole)
    held = pipe._eff_schedule.plan.schedule
    assert [len(stage["levels"]) for stage in held["stages"]] == [2, 3, 3]
    pixels = pipe(**{**given, "output_type": "pt"}, generator=torch.Generator().manual_seed(0)).images
    assert tuple(pixels.shape[-2:]) == (given["height"], given["width"])


def test_flux_has_the_positions_of_the_stage() -> None:
    pipe, given = flux()
    eff.diffusers(pipe, schedule="bottleneck{steps=[2,2,2],terminal=0.02}", least=(8, 6))
    seen: list[Tensor] = []
    own = pipe.transformer.pos_embed.forward
    pipe.transformer.pos_embed.forward = lambda ids: (seen.append(ids), own(ids))[1]
    sample(pipe, given)
    text = 6
    image = [ids[text:] for ids in seen]
    assert [len(ids) for ids in image] == [48, 48, 12, 12, 48, 48]
    assert image[2][:, 1].max() == 3
    assert image[2][:, 2].max() == 2
    assert torch.equal(image[0], image[4])


def test_a_low_first_stage_is_drawn_low() -> None:
    pipe, given = sd3()
    eff.diffusers(pipe, schedule="predict-x0{scales=[0.5,1.0],until=[0.7],steps=10}", least=(8, 8))
    seen = shapes(pipe.transformer)
    assert sample(pipe, given).shape == (1, 4, 16, 16)
    assert seen == [(2, 4, 8, 8)] * 7 + [(2, 4, 16, 16)] * 3


@pytest.mark.parametrize("name", MAKE)
def test_a_cache_skips_calls_and_interval_one_skips_none(name: str) -> None:
    pipe, given = MAKE[name]()
    expected = sample(pipe, given, 8)
    eff.diffusers(pipe, cache="taylor{interval=1}")
    assert torch.equal(sample(pipe, given, 8), expected)
    eff.diffusers(pipe, cache="reuse{interval=2,warmup=1,last=1}")
    calls: list[int] = []
    block = next(module for path, module in denoiser(pipe).named_modules() if path.endswith("blocks.0"))
    block.register_forward_hook(lambda *given: calls.append(1))
    got = sample(pipe, given, 8)
    held = pipe._eff_schedule
    assert held.computed == [True, False, True, False, True, False, True, True]
    assert len(calls) == 5
    assert not torch.equal(got, expected)


def test_branches_that_are_called_apart_have_memories_apart() -> None:
    pipe, given = flux()
    more = {"negative_prompt_embeds": given["prompt_embeds"].flip(1), "true_cfg_scale": 2.0}
    more["negative_pooled_prompt_embeds"] = given["pooled_prompt_embeds"]
    expected = sample(pipe, given, 6, **more)
    eff.diffusers(pipe, cache="reuse{interval=1}")
    assert torch.equal(sample(pipe, given, 6, **more), expected)
    eff.diffusers(pipe, cache="reuse{interval=3,warmup=1,last=0}")
    sample(pipe, given, 6, **more)
    held = pipe._eff_schedule
    assert len(held.memories) == 2
    assert not torch.equal(held.memories[0].values[0][0], held.memories[1].values[0][0])


def test_callbacks_and_adapters_see_what_they_saw() -> None:
    pipe, given = sd3()
    steps: list[tuple[int, tuple[int, ...]]] = []

    def look(pipe: Any, number: int, t: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append((number, tuple(kwargs["latents"].shape)))
        return kwargs

    eff.diffusers(pipe, schedule=THREE, least=(8, 8))
    first = sample(pipe, given, callback_on_step_end=look)
    assert [number for number, _ in steps] == list(range(8))
    assert steps[1][1] == (1, 4, 8, 8), "behind the last step of a stage come latents of the next"
    # What an adapter does: other weights in the transformer that is there.
    pipe.transformer.proj_out.weight.data.mul_(0.5)
    assert not torch.equal(sample(pipe, given), first)


def test_what_cannot_be_done_is_said_before_sampling() -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe, given = sd3()
    with pytest.raises(eff.EffError, match="EFF-D108"):
        eff.diffusers(pipe, cache="first-block")
    with pytest.raises(eff.EffError, match="EFF-U014"):
        eff.diffusers(pipe, schedule="bottelneck")
    with pytest.raises(eff.EffError, match="EFF-D109"):
        eff.diffusers(object())
    eff.diffusers(pipe, schedule=THREE)
    with pytest.raises(eff.EffError, match="EFF-D102"):
        sample(pipe, given)
    eff.diffusers(pipe, schedule=THREE, least=(12, 12))
    with pytest.raises(eff.EffError, match="EFF-D101"):
        sample(pipe, given)
    pipe._eff_schedule.remove()
    assert sample(pipe, given).shape == (1, 4, 16, 16)
    other, _ = pixart()
    other.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(eff.EffError, match="EFF-D109"):
        eff.diffusers(other)


@pytest.mark.slow
def test_a_compiled_transformer_has_a_graph_for_each_size_and_none_for_each_step() -> None:
    pipe, given = sd3()
    eff.diffusers(pipe, schedule=THREE, least=(8, 8))
    expected = sample(pipe, given)
    eff.diffusers(pipe, schedule=THREE, least=(8, 8), options={"strict": True})
    torch._dynamo.reset()
    got = sample(pipe, given)
    assert torch.allclose(got, expected, atol=1e-3)
    assert len(eff.report()["graphs"]) == 2
    sample(pipe, given)
    assert len(eff.report()["graphs"]) == 2
