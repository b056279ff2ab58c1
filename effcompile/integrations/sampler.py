"""Give self-written sampling loops the families `schedule` and `cache`: `eff.sampler(denoiser, of, schedule=..., cache=...)`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.backend import backend
from effcompile.compiler import all_methods
from effcompile.core.artifact import Manifest
from effcompile.core.errors import EffError
from effcompile.core.plan import Plan
from effcompile.core.policy import read_policy
from effcompile.core.schedule import (
    CACHE,
    SCHEDULE,
    Denoising,
    Schedule,
    ScheduleWarning,
    Size,
    StepCache,
    StepSchedule,
    check_sizes,
    doubts,
)
from effcompile.cost.steps import ScheduleCost, estimate_schedule
from effcompile.integrations.replay import replayed
from effcompile.integrations.sampler_export import export_sampler
from effcompile.runtime.editing import edit_latents
from effcompile.runtime.processes import DiffusionProcess
from effcompile.runtime.sampler import Denoiser, Regions, Sampler


class PlannedSampler(Sampler):
    """Sample by a schedule that a policy made; `plan` holds it, and `estimate` says what it costs."""

    def __init__(
        self,
        of: Denoising,
        denoiser: Denoiser | Regions,
        schedule: Schedule,
        *,
        source: Any = None,
        replay: str = "",
        **more: Any,
    ) -> None:
        super().__init__(denoiser, schedule, **more)
        self.of, self._source, self._replay = of, source, replay

    def export(self, out: str | Path, batch: int, channels: int, *args: Tensor, **more: Any) -> tuple[Manifest, ...]:
        """Write the denoiser, for all sizes of the schedule, and the schedule to a folder: `eff.load_sampler`, `eff run`.

        `args` are what the denoiser takes beside latent and time. More arguments and errors as in `sampler_export.export_sampler`.
        """
        source = getattr(self._source, "_orig_mod", self._source)  # what torch.compile was given
        return export_sampler(self, source, out, batch, channels, args, replay=self._replay, **more)

    @property
    def plan(self) -> Plan:
        """Return the plan: JSON that replays the schedule (`eff.sampler(..., plan=...)`)."""
        return Plan(target="any", schedule=self.schedule.to_json())

    def estimate(self, seconds: Mapping[Size, float] | None = None, skipped: float = 0.0) -> ScheduleCost:
        """Return the cost against 50 steps, the default number of steps, and plain steps of equal time.

        Args and tags as in `cost.steps.estimate_schedule`; `measure` gives `seconds`.
        """
        return estimate_schedule(self.schedule, self.of, seconds, skipped)

    def measure(self, batch: int, channels: int, *args: Any, runs: int = 3, **kwargs: Any) -> dict[Size, float]:
        """Return the seconds of one call of the denoiser in each size: the least of some, behind one that compiles."""
        found = {}
        for size in dict.fromkeys((*self.schedule.sizes, self.of.size)):
            latent, now = torch.zeros(batch, channels, *size), torch.full((batch,), 0.5)
            more = {**kwargs, **(self.conditions(size) if self.conditions else {})}
            taken = []
            with torch.no_grad():
                for _ in range(runs + 1):
                    begun = time.perf_counter()
                    self.denoiser(latent, now, *args, **more)
                    taken.append(time.perf_counter() - begun)
            found[size] = min(taken[1:])
        return found

    def edit(self, data: Tensor, source: Sequence[Any], target: Sequence[Any], **more: Any) -> Tensor:
        """Return data changed from what `source` says of it to what `target` says, as `runtime.editing.edit_latents` describes."""
        process = self.trajectory.process
        asked = {"time_scale": self.time_scale, **more}
        return edit_latents(self.denoiser, self.schedule, process, data, source, target, **asked)


def sampler(
    denoiser: Denoiser | Regions,
    of: Denoising,
    *,
    schedule: str | StepSchedule = "plain",
    cache: str | StepCache | None = None,
    plan: Plan | str | None = None,
    process: DiffusionProcess | None = None,
    time_scale: float = 1.0,
    conditions: Callable[[Size], Mapping[str, Any]] | None = None,
    compiled: bool = False,
    options: Mapping[str, Any] | None = None,
    replay: str | None = None,
) -> PlannedSampler:
    """Return a sampler: call it with (batch, channels) or noise, and with what the denoiser takes beside latent and time.

    Args:
        denoiser: called as (latent `[B, C, *size]`, time `[B]`, ...) -> answer of the latent's shape, or its three `Regions`.
        of: what is known of it: size of the result, default steps, shift, smallest trained size.
        schedule: a policy of family `schedule`, in the latent's sizes; `plain` is the denoiser's own sampler.
        cache: a policy of family `cache`.
        plan: a plan whose schedule is replayed; takes the place of both.
        process: what the answers mean where it is not flow matching.
        time_scale: what levels are multiplied by for the denoiser; 1000 for timesteps. Timesteps of `vp` are passed as they are.
        conditions: keyword arguments that depend on the size of a stage.
        compiled: compile the denoiser, or each region, with backend `eff`, once for each size.
        options: of that backend (`{"attention": ...}`).
        replay: an attention policy that carries state over steps, `re-ttention{...}`; the denoiser is a module, called with
            tensors alone, and `compiled` says whether TorchInductor or the operations one by one run its graphs.

    Raises:
        EffError: EFF-D101 to EFF-D108, EFF-U014, EFF-U003 or EFF-U004 for a policy that cannot be meant; EFF-U015 for a policy
            beside a plan.
    """
    if plan is not None:
        if cache is not None or schedule != "plain":
            raise EffError("EFF-U015", "`schedule` or `cache` together with a `plan`, which holds both")
        held = plan if isinstance(plan, Plan) else Plan.read(plan)
        if held.schedule is None:
            raise EffError("EFF-D105", "the plan has no schedule", hint="sampler.plan.to_json() writes one that has")
        made = Schedule.from_json(held.schedule)
        check_sizes(made, of)
    else:
        made = plan_schedule(of, schedule, cache)
    if made.process != of.process or (made.process == "vp") != (process is not None and _is_vp(process)):
        raise EffError(
            "EFF-D106",
            f"a schedule for the process `{made.process}` and a sampler of another",
            hint="Denoising(process=...) and process=VariancePreserving(...) go together",
        )
    for doubt in doubts(made, of):
        warnings.warn(doubt, ScheduleWarning, stacklevel=2)
    if replay is not None:
        parts: Denoiser | Regions = replayed(denoiser, replay, emit="inductor" if compiled else "interpreter")
    else:
        parts = _compiled(denoiser, options) if compiled else denoiser
    loop = {"process": process, "time_scale": time_scale, "conditions": conditions}
    return PlannedSampler(of, parts, made, source=denoiser, replay=replay or "", **loop)


def plan_schedule(of: Denoising, schedule: str | StepSchedule, cache: str | StepCache | None) -> Schedule:
    """Return what policies decide for a denoiser."""
    known = all_methods()
    policy = read_policy(SCHEDULE, schedule, known) if isinstance(schedule, str) else schedule
    assert isinstance(policy, StepSchedule), f"{policy} is no schedule"
    made = policy.schedule(of)
    if cache is None:
        return made
    keeps = read_policy(CACHE, cache, known) if isinstance(cache, str) else cache
    assert isinstance(keeps, StepCache), f"{keeps} is no cache"
    return keeps.onto(made)


def _is_vp(process: DiffusionProcess) -> bool:
    return hasattr(process, "alphas")


def _compiled(denoiser: Denoiser | Regions, options: Mapping[str, Any] | None) -> Denoiser | Regions:
    def one(part: Callable[..., Any]) -> Callable[..., Any]:
        # A graph for each size: one of symbolic sizes serves none of them well.
        made: Callable[..., Any] = torch.compile(part, backend=backend(**dict(options or {})), dynamic=False)
        return made

    if isinstance(denoiser, Regions):
        return replace(denoiser, head=one(denoiser.head), body=one(denoiser.body), tail=one(denoiser.tail))
    whole: Callable[..., Tensor] = one(denoiser)
    return whole
