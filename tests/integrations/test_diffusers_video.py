"""Check video pipelines of diffusers with schedules: plain bit for bit, stages with frames and rotations, what is put in stays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from tests.support.pipelines import cogvideox, hunyuan_video, sample, sd3, shapes, stable_diffusion, wan

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MAKE: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "cogvideox": cogvideox,
    "cogvideox-2b": lambda: cogvideox(rotary=False),
    "wan": wan,
    "hunyuan": hunyuan_video,
}
THREE = "bottleneck{steps=[2,3,3]}"


@pytest.mark.parametrize("name", MAKE)
def test_a_plain_schedule_is_the_pipeline_bit_for_bit(name: str) -> None:
    pipe, given = MAKE[name]()
    expected, own = sample(pipe, given), pipe.scheduler
    eff.diffusers(pipe)
    assert torch.equal(sample(pipe, given), expected)
    assert torch.equal(sample(pipe, given), expected), "a second run begins anew"
    pipe._eff_schedule.remove()
    assert pipe.scheduler is own
    assert torch.equal(sample(pipe, given), expected)


@pytest.mark.parametrize("name", MAKE)
def test_stages_have_their_sizes_and_all_frames(name: str) -> None:
    pipe, given = MAKE[name]()
    eff.diffusers(pipe, schedule=THREE.replace("]}", "],terminal=0.02}") if "cog" not in name else THREE, least=(8, 6))
    seen = shapes(pipe.transformer)
    whole = sample(pipe, given)
    if name.startswith("cogvideox"):
        high, low = (2, 3, 4, 16, 12), (2, 3, 4, 8, 6)
    else:
        high, low = (1, 4, 3, 16, 16), (1, 4, 3, 8, 8)
    calls = 2 if name == "wan" else 1
    assert seen == ([high] * 2 + [low] * 3 + [high] * 3 if calls == 1 else [high] * 4 + [low] * 6 + [high] * 6)
    assert torch.isfinite(whole).all()
    assert torch.equal(sample(pipe, given), whole)
    assert not torch.equal(sample(pipe, given, seed=1), whole)


def test_rotations_are_those_of_the_stage() -> None:
    pipe, given = cogvideox()
    eff.diffusers(pipe, schedule="bottleneck{steps=[1,1,1]}", least=(8, 6))
    seen: list[Any] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["image_rotary_emb"]), with_kwargs=True
    )
    inner = pipe.transformer.transformer_blocks[0]
    used: list[Tensor] = []
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: used.append(kwargs["image_rotary_emb"][0]), with_kwargs=True
    )
    sample(pipe, given)
    assert [len(cosines) for cosines in used] == [3 * 8 * 6, 3 * 4 * 3, 3 * 8 * 6]
    expected = pipe._prepare_rotary_positional_embeddings(64, 48, 3, torch.device("cpu"))
    assert torch.equal(used[1], expected[0])
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_a_cache_skips_steps(name: str) -> None:
    pipe, given = MAKE[name]()
    expected = sample(pipe, given, 8)
    eff.diffusers(pipe, cache="taylor{interval=1}")
    assert torch.equal(sample(pipe, given, 8), expected)
    eff.diffusers(pipe, cache="reuse{interval=2,warmup=1,last=1}")
    seen: list[int] = []
    pipe.transformer.proj_out.register_forward_hook(lambda *given: seen.append(1))
    got = sample(pipe, given, 8)
    held = pipe._eff_schedule
    assert held.computed == [True, False, True, False, True, False, True, True]
    assert len(seen) == (10 if name == "wan" else 5)
    assert len(held.memories) == (2 if name == "wan" else 1)
    assert not torch.equal(got, expected)


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuan"])
def test_callbacks_see_every_step(name: str) -> None:
    pipe, given = MAKE[name]()
    steps: list[int] = []

    def look(pipe: Any, number: int, t: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(number)
        return {"latents": kwargs["latents"] * (0.5 if number == 2 else 1.0)}

    eff.diffusers(pipe, schedule=THREE, least=(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = sample(pipe, given)
        changed = sample(pipe, given, callback_on_step_end=look)
    assert steps == list(range(8))
    assert not torch.equal(plain, changed), "what a callback returns is taken"


class Adapter(nn.Module):
    """Add a product of low rank to a linear layer, as LoRA does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.inner = inner
        self.down = nn.Parameter(torch.randn(2, inner.in_features, generator=draw))
        self.up = nn.Parameter(torch.randn(inner.out_features, 2, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("make", [wan, sd3, stable_diffusion], ids=["wan", "sd3", "unet"])
def test_layers_that_adapters_put_in_are_used(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    """Adapters take the place of linear layers, before or after the schedule; both give what the pipeline alone would."""
    results = []
    for when in ("alone", "before", "after"):
        pipe, given = make()
        if when == "before":
            adapt(pipe)
        if when != "alone":
            eff.diffusers(pipe)
        plain = sample(pipe, given)
        if when != "before":
            adapt(pipe)
        results.append(sample(pipe, given))
        assert torch.equal(plain, results[-1]) == (when == "before")
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def adapt(pipe: Any) -> None:
    inner = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    name, layer = next((n, m) for n, m in inner.named_modules() if n.endswith("to_q") and isinstance(m, nn.Linear))
    inner.get_submodule(name.rpartition(".")[0]).to_q = Adapter(layer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_caches_of_diffusers_stay_in_place(when: str) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe, given = wan()
    expected = sample(pipe, given, 8)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached = sample(pipe, given, 8)
    assert not torch.equal(cached, expected), "at this threshold it skips"
    other, _ = wan()
    if when == "before":
        other.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    eff.diffusers(other)
    if when == "after":
        other.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert torch.equal(sample(other, given, 8), cached)


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading_stays_in_place(when: str) -> None:
    """Offloading puts weights in around a module's forward: outside of it there are none, as with diffusers' hooks for it."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Offload(ModelHook):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.kept = {name: value.clone() for name, value in module.state_dict().items()}

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            module.load_state_dict(self.kept)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return self.leave(module, output)

        @torch.no_grad()
        def leave(self, module: nn.Module, output: Any = None) -> Any:
            for value in module.parameters():
                value.fill_(torch.nan)
            return output

    def offload(pipe: Any) -> None:
        inner = pipe.transformer
        hook = Offload(inner)
        HookRegistry.check_if_exists_or_initialize(inner).register_hook(hook, "offload")
        hook.leave(inner)

    pipe, given = wan()
    asked = {"schedule": "plain", "cache": "reuse{interval=2,warmup=1}"}
    expected = sample(eff.diffusers(pipe, **asked), given)
    other, _ = wan()
    if when == "before":
        offload(other)
    eff.diffusers(other, **asked)
    if when == "after":
        offload(other)
    assert torch.equal(sample(other, given), expected)
    assert next(other.transformer.parameters()).isnan().all()


def test_group_offloading_of_diffusers_stays_in_place() -> None:
    pytest.importorskip("accelerate")
    pipe, given = wan()
    expected, place = sample(pipe, given), torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=place, offload_device=place, offload_type="leaf_level")
    assert torch.equal(sample(eff.diffusers(pipe), given), expected)


def test_what_cannot_be_walked_names_the_scheduler_that_can() -> None:
    from diffusers import CogVideoXDPMScheduler, UniPCMultistepScheduler

    pipe, _ = wan()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    with pytest.raises(eff.EffError, match="EFF-D109") as caught:
        eff.diffusers(pipe)
    assert "FlowMatchEulerDiscreteScheduler(shift=3.0)" in str(caught.value.hint)
    video, _ = cogvideox()
    video.scheduler = CogVideoXDPMScheduler()
    with pytest.raises(eff.EffError, match="EFF-D109") as caught:
        eff.diffusers(video)
    assert "CogVideoXDDIMScheduler" in str(caught.value.hint)
    two, _ = wan()
    two.register_modules(transformer_2=two.transformer)
    with pytest.raises(eff.EffError, match="two transformers"):
        eff.diffusers(two)


@pytest.mark.slow
@pytest.mark.parametrize("make", [wan, stable_diffusion, sd3], ids=["wan", "unet", "sd3"])
def test_both_sizes_are_compiled_ahead(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    pipe, given = make()
    eff.diffusers(pipe, schedule=THREE, least=(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sample(pipe, given)
        eff.diffusers(pipe, schedule=THREE, least=(8, 8), options={"strict": True})
        torch._dynamo.reset()
        pipe._eff_schedule.compile_ahead(**given)
        graphs = len(eff.report()["graphs"])
        assert graphs >= 2
        got = sample(pipe, given)
    assert len(eff.report()["graphs"]) == graphs, "a run compiles nothing"
    assert torch.allclose(got, expected, atol=1e-3)
