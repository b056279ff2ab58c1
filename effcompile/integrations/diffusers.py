"""Give pipelines of diffusers schedules, step caches and compiled transformers: `eff.diffusers(pipe, schedule=..., cache=...)`.

The pipeline stays what it is, with its loop, its callbacks, adapters, hooks and offloading. Three things are put into it: a
scheduler that walks along the schedule, a `prepare_latents` that asks for the first stage's size, and around the transformer's
forward a wrapper that gives it what depends on the size, and answers in its place where a step is not computed.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effcompile.backend import backend
from effcompile.compiler import all_methods
from effcompile.core.errors import EffError
from effcompile.core.plan import Plan
from effcompile.core.policy import read_policy
from effcompile.core.schedule import CACHE, SCHEDULE, Caching, Denoising, Schedule, ScheduleWarning, Size, doubts
from effcompile.integrations.diffusers_sizes import latent_size, layout, sized, sizes_of
from effcompile.integrations.sampler import plan_schedule
from effcompile.runtime.step_memory import StepMemory

if TYPE_CHECKING:
    from effcompile.integrations.diffusers_schedulers import Walk

HELD = "_eff_schedule"


@dataclass
class Prepared:
    """Hold what was put into a pipeline; `remove` takes it out again. `plan` is that of the last run."""

    pipe: Any
    of: Mapping[str, Any]
    schedule: str
    cache: str | None
    walk: Walk
    scheduler: Any
    forward: Callable[..., Any]
    memories: list[StepMemory] = field(default_factory=list)
    computed: list[bool] = field(default_factory=list)
    made: Schedule | None = None
    brief: bool = False

    def compile_ahead(self, **given: Any) -> None:
        """Call the pipeline with what a run will be given, for one step in each size, so that a run compiles nothing.

        The noise is of a generator of its own; callbacks are not called.
        """
        asked = {"callback_on_step_end": None, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        known = inspect.signature(self.pipe.__call__).parameters
        more = {name: value for name, value in asked.items() if name in known}
        self.brief = True
        try:
            self.pipe(**{**given, **more})
        finally:
            self.brief = False

    @property
    def plan(self) -> Plan:
        """Return the schedule of the last run as a plan.

        Raises:
            EffError: EFF-D109 before the first run, when no size is known yet.
        """
        if self.made is None:
            raise EffError("EFF-D109", "the pipeline has not run, and its sizes are not known", hint="call it once")
        return Plan(target="any", schedule=self.made.to_json())

    def remove(self) -> Any:
        """Give the pipeline its own parts back, and return it."""
        self.pipe.scheduler = self.scheduler
        del self.pipe.prepare_latents
        denoiser(self.pipe).forward = self.forward
        delattr(self.pipe, HELD)
        return self.pipe


def diffusers(
    pipe: Any,
    *,
    schedule: str = "plain",
    cache: str | None = None,
    least: tuple[int, int] | None = None,
    distilled: bool = False,
    options: Mapping[str, Any] | None = None,
    **families: str,
) -> Any:
    """Return the pipeline, which samples by a schedule from now on.

    Args:
        pipe: a text-to-image or text-to-video pipeline of diffusers whose denoiser is `pipe.transformer` or `pipe.unet`, with an
            Euler flow-matching or a trailing DDIM scheduler.
        schedule: a policy of family `schedule`. `plain` without a number of steps, and `predict-x0`, take `num_inference_steps`.
        cache: a policy of family `cache` that keeps the transformer's output.
        least: (height, width) of the smallest latent that the model was trained at; without it a smaller stage is refused.
        distilled: whether it was trained for a few steps.
        options: compile the transformer with backend `eff` and these options, once for each size.
        families: further families of that backend, `attention="..."`.

    Raises:
        EffError: EFF-D109 for a pipeline that cannot be driven, EFF-D108 for a cache of another region, EFF-U014, EFF-U003 or
            EFF-U004 for a policy that cannot be meant. A size that the schedule cannot take is an error of the call.
    """
    from effcompile.integrations.diffusers_schedulers import Walk, scheduled

    if hasattr(pipe, HELD):
        getattr(pipe, HELD).remove()
    read_policy(SCHEDULE, schedule, all_methods())
    if cache is not None and read_policy(CACHE, cache, all_methods()).caching((4,)).region != "output":  # type: ignore[attr-defined]
        raise EffError(
            "EFF-D108",
            f"`{cache}` keeps the body of the transformer, which a pipeline calls as one",
            hint="region=output, or diffusers' own pipe.transformer.enable_cache(...), which stays in place",
        )
    inner = denoiser(pipe)
    packed = hasattr(pipe, "_pack_latents")
    walk = Walk(*layout(pipe, packed))
    facts = {"least": least, "distilled": distilled, **sizes_of(inner, packed)}
    made = scheduled(pipe.scheduler, walk)
    held = Prepared(pipe, facts, schedule, cache, walk, pipe.scheduler, inner.forward)
    edge = int(getattr(getattr(inner, "config", None), "sample_size", 0) or 64)
    walk.nominal = partial(_nominal, held, (edge, edge))
    pipe.scheduler = made
    pipe.prepare_latents = _preparing(held, pipe.prepare_latents, packed)
    run = inner.forward
    if options is not None or families:
        # What decides for the step stays outside of the graph.
        run = torch.compile(run, backend=backend(**{**dict(options or {}), **families}), dynamic=False)
    inner.forward = _answering(held, run, packed)
    setattr(pipe, HELD, held)
    return pipe


def denoiser(pipe: Any) -> nn.Module:
    """Return the transformer or UNet of a pipeline.

    Raises:
        EffError: EFF-D109 where it has none, or none that we know how to give sizes to.
    """
    found = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if not isinstance(found, nn.Module) or not hasattr(pipe, "prepare_latents") or not hasattr(pipe, "scheduler"):
        raise EffError(
            "EFF-D109",
            f"{type(pipe).__name__} has no `transformer` or `unet`, `scheduler` and `prepare_latents` to work with",
            hint="eff.sampler drives a denoiser of any kind in your own loop",
        )
    config = getattr(pipe, "config", {})
    if getattr(pipe, "transformer_2", None) is not None or config.get("expand_timesteps"):
        raise EffError(
            "EFF-D109",
            f"{type(pipe).__name__} has two transformers, or a time for each token",
            hint="eff.sampler drives a denoiser of any kind in your own loop",
        )
    return found


def _preparing(held: Prepared, own: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    """Return a `prepare_latents` that draws the noise of the first stage and takes note of the generator."""
    names = inspect.signature(own).parameters

    @functools.wraps(own)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(*args, **kwargs)
        height, width = given.arguments["height"], given.arguments["width"]
        size = latent_size(held.pipe, height, width, given.arguments.get("num_frames"), packed)

        # Sizes do not depend on shift and steps, which the pipeline tells apart.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScheduleWarning)
            first = _plan(held, size, 1.0, 50, None).stages[0].size
        held.walk.prepare(partial(_plan, held, size, cache=held.cache), given.arguments.get("generator"))
        given.arguments["height"] = height * first[-2] // size[-2]
        given.arguments["width"] = width * first[-1] // size[-1]
        return own(*given.args, **given.kwargs)

    assert {"height", "width", "generator"} <= set(names), "prepare_latents of another kind"
    return prepare


def _nominal(held: Prepared, size: Size, shift: float, steps: int) -> Schedule:
    """Return a plan for the model's own size, as long as no other is known; what is wrong with sizes is told when they are."""
    usual = {**held.of, "least": (1, 1), "multiple": 1}
    of = Denoising(size, steps=steps, shift=shift, process=_process(held), **usual)
    return _brief(held, plan_schedule(of, held.schedule, held.cache))


def _brief(held: Prepared, schedule: Schedule) -> Schedule:
    """Return the schedule, or one step in each of its stages where graphs are to be compiled ahead."""
    if not held.brief:
        return schedule
    stages = tuple(replace(stage, levels=stage.levels[:1]) for stage in schedule.stages)
    return replace(schedule, stages=stages, caching=None, policy="")


def _plan(held: Prepared, size: Size, shift: float, steps: int, cache: str | None) -> Schedule:
    """Return what a run of so many steps does; warn of what speaks against it."""
    of = Denoising(size, steps=steps, shift=shift, process=_process(held), **held.of)
    if getattr(held.scheduler.config, "use_dynamic_shifting", False):
        of = replace(of, form="exponential")
    schedule = _brief(held, plan_schedule(of, held.schedule, cache))
    for doubt in doubts(schedule, of) if not held.brief else ():
        warnings.warn(doubt, ScheduleWarning, stacklevel=3)
    held.made, held.memories, held.computed = schedule, [], []
    return schedule


def _process(held: Prepared) -> Any:
    return "flow" if hasattr(held.scheduler, "sigma_max") else "vp"


def _answering(held: Prepared, own: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    """Return a forward that has what depends on the size, and that skips steps which the cache answers."""

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        walk = held.walk
        if walk.trajectory is None:
            return own(*args, **kwargs)
        step, size = walk.step, walk.size
        kwargs = sized(held.pipe, kwargs, size, walk.trajectory.schedule.stages[-1].size, packed)
        caching = walk.trajectory.schedule.caching
        if caching is None:
            return own(*args, **kwargs)
        memory = _memory(held, caching)
        if step.first:
            memory.reset()
        if not memory.computes(step):
            answer = memory.recall(step)
            if walk.calls == 1:
                held.computed.append(False)
            return answer
        answer = own(*args, **{**kwargs, "return_dict": False})
        memory.note(step, tuple(answer))
        if walk.calls == 1:
            held.computed.append(True)
        return answer

    return forward


def _memory(held: Prepared, caching: Caching) -> StepMemory:
    """Return the memory of this call: branches of guidance that are called apart have one each."""
    number = held.walk.calls
    held.walk.calls += 1
    while len(held.memories) <= number:
        held.memories.append(StepMemory(caching))
    return held.memories[number]
