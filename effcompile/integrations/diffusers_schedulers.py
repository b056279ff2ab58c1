"""Give a pipeline of diffusers a scheduler that walks along one of our schedules.

The pipeline's own loop stays: it asks the scheduler for timesteps once, and hands latents to `step` behind each answer of the
transformer. Behind the last step of a stage `step` returns latents of the next stage's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.schedule import Schedule, Size
from effcompile.runtime.processes import DiffusionProcess, FlowMatching, VariancePreserving
from effcompile.runtime.trajectory import Generators, Trajectory, WalkStep

Planned = Callable[[float, int], Schedule]
"""(the shift that the pipeline asks for, its number of steps) -> what to do."""
Begin = Callable[[Schedule], None]


class Walk:
    """Hold where a run of a pipeline is; its scheduler and the wrapper of its transformer share it.

    `unpack` turns latents of the pipeline into `[B, C, *size]`, given the size, and `pack` turns them back. Pipelines prepare
    latents and set timesteps in either order. Where timesteps come first the size is not known yet: `nominal` plans for the usual
    one, whose levels are the same, and the run begins anew with the stages of the real size. `generator` is the one that drew the
    first noise.
    """

    def __init__(self, unpack: Callable[[Tensor, Size], Tensor], pack: Callable[[Tensor], Tensor]) -> None:
        self.unpack, self.pack = unpack, pack
        self.nominal: Planned | None = None
        self.plan: Planned | None = None
        self.pending: tuple[float, int, Begin] | None = None
        self.generator: Generators = None
        self.trajectory: Trajectory | None = None
        self.number = 0
        self.calls = 0

    def prepare(self, plan: Planned, generator: Generators) -> None:
        """Take the plan for the real size."""
        self.generator, self.trajectory = generator, None
        if self.pending is None:
            self.plan = plan
            return
        shift, steps, begin = self.pending
        self.pending = None
        begin(plan(shift, steps))

    def planned(self, shift: float, steps: int, begin: Begin) -> Schedule:
        """Return the schedule for what the pipeline asks, and begin with it."""
        plan, self.plan = self.plan or self.nominal, None
        assert plan is not None, "eff.diffusers gives the plan"
        self.pending = (shift, steps, begin) if plan is self.nominal else None
        schedule = plan(shift, steps)
        begin(schedule)
        return schedule

    def begin(self, schedule: Schedule, process: DiffusionProcess) -> None:
        """Stand before the first step."""
        self.trajectory, self.number, self.calls = Trajectory(schedule, process), 0, 0

    @property
    def step(self) -> WalkStep:
        """Return the step that is next.

        Raises:
            EffError: EFF-D109 outside a run.
        """
        if self.trajectory is None:
            raise EffError(
                "EFF-D109",
                "a step behind the last one of the schedule",
                hint="call the pipeline, which sets the timesteps",
            )
        return self.trajectory.steps[self.number]

    @property
    def size(self) -> Size:
        """Return the size of the next step."""
        assert self.trajectory is not None, "no run"
        return self.trajectory.schedule.stages[self.step.stage].size

    def advance(self, latents: Tensor, out: Tensor) -> Tensor:
        """Return the latents, as the pipeline has them, one step later."""
        step, size = self.step, self.size
        assert self.trajectory is not None, "no run"
        x, answer = self.unpack(latents, size), self.unpack(out, size)
        found = self.pack(self.trajectory.advance(step, x, answer, self.generator))
        self.number, self.calls = self.number + 1, 0
        if self.number == len(self.trajectory.steps):
            self.trajectory = None
        return found


class ScheduledEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Flow matching by Euler along a schedule."""

    walk: Walk
    sigmas: Tensor
    timesteps: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the timesteps of all stages, one behind the other; the pipeline's own levels where the schedule is plain."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        own = tuple(float(level) for level in self.sigmas)

        def begin(schedule: Schedule) -> None:
            if schedule.policy.partition(" + ")[0] == "plain":
                stage = replace(schedule.stages[0], levels=own[:-1], end=own[-1])
                schedule = replace(schedule, stages=(stage,))
            self.walk.begin(schedule, FlowMatching())

        shift = float(self.shift) if mu is None else math.exp(mu)
        schedule = self.walk.planned(shift, len(own) - 1, begin)
        if schedule.policy.partition(" + ")[0] != "plain":
            flat = [level for stage in schedule.stages for level in stage.levels]
            self.sigmas = torch.tensor([*flat, 0.0], dtype=torch.float32, device=device)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """Go one step on, into the next stage behind the last step of one."""
        found = self.walk.advance(sample, model_output)
        self._step_index = self.walk.number
        return _Result(found) if return_dict else (found,)


class _Timesteps:
    """Walk along whole timesteps of a variance preserving process; mixed in before a scheduler of diffusers."""

    walk: Walk
    timesteps: Tensor
    mixed = False

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps of all stages, one behind the other."""
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]
        own: Any = self
        kind: Any = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}[own.config.prediction_type]
        process = VariancePreserving(own.alphas_cumprod, kind, self.mixed)
        schedule = self.walk.planned(1.0, num_inference_steps, lambda made: self.walk.begin(made, process))
        flat = [round(level) for stage in schedule.stages for level in stage.levels]
        self.timesteps = torch.tensor(flat, dtype=torch.int64, device=device)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """Go one step on, into the next stage behind the last step of one."""
        found = self.walk.advance(sample, model_output)
        return _Result(found) if return_dict else (found,)


class ScheduledDDIM(_Timesteps, DDIMScheduler):  # type: ignore[misc]
    """Walk by DDIM; a learnt variance in the answer is cut off by the pipeline."""


class ScheduledCogVideoX(_Timesteps, CogVideoXDDIMScheduler):  # type: ignore[misc]
    """Walk by CogVideoX's DDIM, whose signal over noise is shifted, and may be nothing at the first timestep."""

    mixed = True


class _Result(tuple[Tensor]):
    """Be what a scheduler returns: a tuple that names its first element."""

    def __new__(cls, value: Tensor) -> _Result:
        return super().__new__(cls, (value,))

    @property
    def prev_sample(self) -> Tensor:
        """Return the latents of the next step."""
        return self[0]


def scheduled(scheduler: Any, walk: Walk) -> Any:
    """Return a scheduler of ours with the configuration of a pipeline's own.

    Raises:
        EffError: EFF-D109 for a scheduler whose steps are neither Euler's nor DDIM's.
    """
    made: Any = None
    config: Any = scheduler.config if isinstance(scheduler, SchedulerMixin) else {}
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if not (config.get("invert_sigmas") or config.get("stochastic_sampling")):
            made = ScheduledEuler.from_config(config)
    elif isinstance(scheduler, CogVideoXDDIMScheduler):
        if config.timestep_spacing == "trailing" and config.set_alpha_to_one:
            made = ScheduledCogVideoX.from_config(config)
    elif isinstance(scheduler, DDIMScheduler):
        plain = not (config.clip_sample or config.thresholding or config.rescale_betas_zero_snr)
        if plain and config.timestep_spacing == "trailing" and config.set_alpha_to_one:
            made = ScheduledDDIM.from_config(config)
    if made is None:
        raise EffError(
            "EFF-D109",
            f"schedules walk by Euler (flow matching) or DDIM, and the pipeline has {type(scheduler).__name__}",
            hint=_other(config),
        )
    made.walk = walk
    return made


def _other(config: Any) -> str:
    """Return how to get a scheduler that can be walked."""
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        shift = config.get("flow_shift", 1.0)
        return f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})"
    kind = "CogVideoXDDIMScheduler" if "snr_shift_scale" in config else "DDIMScheduler"
    return f'{kind}.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)'
