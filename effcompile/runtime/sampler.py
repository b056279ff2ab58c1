"""Execute a schedule around a denoiser: the loop of a diffusion model, with its stages and with steps that are not computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.schedule import Caching, Schedule, Size
from effcompile.runtime.processes import DiffusionProcess, FlowMatching
from effcompile.runtime.replayed import ReplayedDenoiser
from effcompile.runtime.step_memory import StepMemory, Values
from effcompile.runtime.trajectory import Generators, Trajectory, WalkStep, draw


@dataclass(frozen=True)
class Regions:
    """Hold a denoiser in three parts that are compiled apart, since a cached step runs the first and the last one only.

    head(latent, time, *args, **kwargs) -> (hidden, context, probe); body(hidden, context) -> hidden; tail(hidden, context) ->
    answer. `hidden` is a tuple of tensors, `context` a tuple of anything that body and tail need, `probe` the residual that
    thresholds look at, or None. tail(body(head(...))) is the denoiser.
    """

    head: Callable[..., tuple[Values, tuple[Any, ...], Tensor | None]]
    body: Callable[..., Values]
    tail: Callable[..., Tensor]

    def __call__(self, latent: Tensor, time: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all three."""
        hidden, context, _ = self.head(latent, time, *args, **kwargs)
        return self.tail(self.body(hidden, context), context)


Denoiser = Callable[..., Tensor]
OnStep = Callable[[WalkStep, Tensor], Tensor | None]


class Sampler:
    """Sample latents by a schedule.

    `denoiser(latent, time, *args, **kwargs)` gets latents `[B, C, *size]` and times `[B]`: levels times `time_scale` (1000 for
    models that take timesteps). `conditions(size)` gives keyword arguments that depend on the size, such as rotations. `computed`
    tells of the last run which steps computed the cached region.
    """

    def __init__(
        self,
        denoiser: Denoiser | Regions,
        schedule: Schedule,
        process: DiffusionProcess | None = None,
        *,
        time_scale: float = 1.0,
        conditions: Callable[[Size], Mapping[str, Any]] | None = None,
    ) -> None:
        caching = schedule.caching
        if caching is not None and caching.region == "body" and not isinstance(denoiser, Regions):
            raise EffError(
                "EFF-D108",
                "the cache keeps the body of the denoiser, which was given whole",
                hint="give eff.Regions(head, body, tail), or a cache with region=output",
            )
        self.denoiser, self.schedule, self.time_scale = denoiser, schedule, time_scale
        self.conditions = conditions
        self.trajectory = Trajectory(schedule, process or FlowMatching())
        self.computed: tuple[bool, ...] = ()

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor | Sequence[int],
        *args: Any,
        generator: Generators = None,
        guidance: float = 1.0,
        without: Sequence[Any] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        on_step: OnStep | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return latents `[B, C, *size]` at the end of the last stage.

        Args:
            noise: of the first stage's size, or (B, C): then it is drawn from `generator`, as is the noise of every later stage.
            args: passed on to the denoiser, as are `kwargs`.
            guidance: above 1 the answer is u + guidance (c - u), of c under `args` and u under `without`, in one call of 2 B rows.
            without: the positional arguments of u.
            dtype: what the denoiser computes in, where the noise is drawn here.
            device: where the noise is brought to.
            on_step: called behind each step with what the next one begins with; a tensor that it returns takes its place.

        Raises:
            EffError: EFF-D107 where noise or answers have another shape than the stage, or a stage ends with numbers that are not
                finite. Nothing half denoised is returned. EFF-D114 for guidance without the arguments of u.
        """
        first = self.schedule.stages[0].size
        if isinstance(noise, Tensor):
            x = noise
            if tuple(x.shape[2:]) != first:
                raise EffError("EFF-D107", f"noise {list(x.shape)} for a first stage of {list(first)}")
        else:
            like = torch.empty((), device=device)
            x = draw((*noise, *first), generator, like).to(dtype)
        if guidance != 1.0 and len(without) != len(args):
            raise EffError(
                "EFF-D114",
                f"guidance asks twice: {len(args)} arguments for the one answer, {len(without)} for the other",
                hint="without=(...), as many as the positional arguments behind the noise",
            )
        memory = StepMemory(self.schedule.caching or _everything(self.schedule))
        computed = []
        for step in self.trajectory.steps:
            if step.first:
                memory.reset()
                if isinstance(self.denoiser, ReplayedDenoiser):
                    self.denoiser.reset()
            given = (args, self._more(kwargs, step))
            out, ran = self._ask(memory, step, x, given, guidance, tuple(without))
            computed.append(ran)
            x = self.trajectory.advance(step, x, out, generator)
            if on_step is not None:
                x = _or(on_step(step, x), x)
        self.computed = tuple(computed)
        return x

    def _more(self, kwargs: dict[str, Any], step: WalkStep) -> dict[str, Any]:
        if self.conditions is None:
            return kwargs
        return {**kwargs, **self.conditions(self.schedule.stages[step.stage].size)}

    def _ask(
        self, memory: StepMemory, step: WalkStep, x: Tensor, given: Any, guidance: float, without: tuple[Any, ...]
    ) -> tuple[Tensor, bool]:
        """Return the denoiser's answer at a step, and whether the cached region was computed."""
        (args, kwargs), rows, guided = given, x.shape[0], guidance != 1.0
        if memory.caching.region == "output" and not memory.computes(step):
            return memory.recall(step)[0], False
        latent = torch.cat((x, x)) if guided else x
        if guided:
            args = tuple(_both(one, other) for one, other in zip(args, without, strict=True))
            kwargs = {name: _twice(value, rows) for name, value in kwargs.items()}
        level = torch.tensor(step.level, dtype=torch.float32, device=x.device)
        time = (level if self.time_scale == 1 else level * self.time_scale).expand(latent.shape[0])
        out, ran = self._answer(memory, step, latent, time, args, kwargs)
        if guided:
            with_it, without_it = out[:rows], out[rows:]
            out = without_it + guidance * (with_it - without_it)
        if memory.caching.region == "output":
            memory.note(step, (out,))
        return out, ran

    def _answer(
        self, memory: StepMemory, step: WalkStep, latent: Tensor, time: Tensor, args: Any, kwargs: Any
    ) -> tuple[Tensor, bool]:
        parts = self.denoiser
        if memory.caching.region == "output" or not isinstance(parts, Regions):
            return parts(latent, time, *args, **kwargs), True
        hidden, context, probe = parts.head(latent, time, *args, **kwargs)
        ran = memory.computes(step, probe)
        if ran:
            after = parts.body(hidden, context)
            memory.note(step, tuple(new - old for new, old in zip(after, hidden)), probe)
        else:
            after = tuple(old + more for old, more in zip(hidden, memory.recall(step)))
        return parts.tail(after, context), ran


def _everything(schedule: Schedule) -> Caching:
    return Caching((True,) * schedule.steps)


def _or(value: Tensor | None, other: Tensor) -> Tensor:
    return other if value is None else value


def _both(one: Any, other: Any) -> Any:
    return torch.cat((one, other)) if isinstance(one, Tensor) else one


def _twice(value: Any, rows: int) -> Any:
    return torch.cat((value, value)) if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
