"""Hold a sampling schedule as data: stages of a size with their noise levels, how each begins, and which steps are computed.

The loop of a diffusion model is host code and in no graph. What happens in it is decided by policies of the families `schedule` and
`cache` (one a file in `passes/diffusion/`), written down in a `Schedule` (JSON in `Plan.schedule`), and executed by
`runtime/sampler.py`, or inside a pipeline by `integrations/diffusers.py`.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

from effcompile.core.errors import EffError
from effcompile.core.policy import Exactness, Method

SCHEDULE, CACHE = "schedule", "cache"
Size = tuple[int, ...]
Process = Literal["flow", "vp"]
Resampling = Literal["nearest", "bilinear", "bicubic", "lanczos3"]
Axis = Literal["step", "level"]


@dataclass(frozen=True)
class Denoising:
    """Say what a schedule must know of a denoiser. Sizes are edges of the latent, time (frames) first where there is one.

    `steps` and `shift` are what its own pipeline uses at `size`; `least` are the smallest edges that it was trained at, None
    where nobody said. `multiple` is what each spatial edge must be a multiple of, `patch` the edge of a token. `width` and `text`
    (tokens) tell what a step costs, `form` how the own scheduler rounds its shift, `distilled` that it was trained for a few
    steps.
    """

    size: Size
    steps: int = 28
    shift: float = 1.0
    process: Process = "flow"
    least: Size | None = None
    multiple: int = 1
    patch: int = 1
    width: int = 0
    text: int = 0
    form: Literal["rational", "exponential"] = "rational"
    distilled: bool = False

    def tokens(self, size: Size) -> int:
        """Return how many image tokens a latent has."""
        *frames, height, width = size
        return math.prod(frames) * (height // self.patch) * (width // self.patch)

    def scaled(self, share: float) -> Size:
        """Return the size with each spatial edge times `share`, frames as they are.

        Raises:
            EffError: EFF-D103 where an edge is no multiple of what it must be.
        """
        *frames, height, width = self.size
        edges = [edge * share for edge in (height, width)]
        for edge in edges:
            if abs(edge - round(edge)) > 1e-6 or round(edge) % self.multiple or edge < 1:
                raise EffError(
                    "EFF-D103",
                    f"{share:g} of the latent {_by(self.size)} has an edge of {edge:g}; it must be a multiple of {self.multiple}",
                    hint="another share, or another size of the result",
                )
        return (*frames, *(round(edge) for edge in edges))

    def cost(self, size: Size) -> float:
        """Return the work of one step, in no unit: T (24 d^2 + 4 T d) for T tokens, T where the width d is not known."""
        tokens = self.tokens(size) + self.text
        return float(tokens * (6 * self.width + tokens) if self.width else tokens)


@dataclass(frozen=True)
class Entry:
    """Say how a stage begins where another one ended.

    `renoise` mixes noise with the resized data, at share `noise` of level. `correlated` enlarges what is still noisy to twice the
    edges, and adds noise of covariance I - 11^T / z^2 in each 2 x 2 cell (arXiv:2507.08422), which brings it to level `noise`.
    """

    kind: Literal["renoise", "correlated"]
    noise: float
    resize: Resampling = "lanczos3"
    z: float = 2.0


@dataclass(frozen=True)
class Stage:
    """Hold one stage: the levels at which the denoiser is asked, and the level behind the last one.

    Flow matching: shares of noise, falling from 1; `end` 0 is data. Variance preserving: whole timesteps, and `end` -1 is data.
    """

    size: Size
    levels: tuple[float, ...]
    end: float = 0.0
    enter: Entry | None = None


@dataclass(frozen=True)
class Caching:
    """Say which steps compute the cached region and what the others take in its place.

    `computed` has one entry for each step of the schedule. A step that does not compute takes the polynomial of degree `order`
    through what the last computed steps of its stage gave (0: the last value as it was), in Newton's form over the step's number
    or its level. With a `threshold` a computed step that the mask leaves open (`False`) runs where the change of the first block,
    relative to the step computed last, reaches it. `region` is what is kept: `output`, or the residual of the `body` alone.
    """

    computed: tuple[bool, ...]
    order: int = 0
    axis: Axis = "step"
    region: Literal["output", "body"] = "output"
    threshold: float | None = None
    most: int = 0


@dataclass(frozen=True)
class Schedule:
    """Hold what a sampler does. `policy` and `origin` are for readers."""

    stages: tuple[Stage, ...]
    process: Process = "flow"
    caching: Caching | None = None
    policy: str = ""
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.stages or any(not stage.levels for stage in self.stages):
            raise EffError("EFF-D105", "a schedule needs a stage, and a stage a step", hint="give each stage a step")
        for number, stage in enumerate(self.stages):
            if any(later >= level for level, later in pairwise((*stage.levels, stage.end))):
                raise EffError("EFF-D105", f"levels of stage {number} do not fall: {list(stage.levels)}, {stage.end}")
            if (stage.enter is None) != (number == 0):
                raise EffError("EFF-D105", f"stage {number}: every stage but the first says how it begins")
            top, bottom = (1.0, 0.0) if self.process == "flow" else (math.inf, -1.0)
            if stage.levels[0] > top or stage.end < bottom:
                raise EffError("EFF-D105", f"levels of stage {number} leave the range from {top:g} to {bottom:g}")
        if self.stages[-1].end > (0.0 if self.process == "flow" else -1.0):
            raise EffError("EFF-D105", "the last stage ends before the noise is gone")
        if self.caching is not None and len(self.caching.computed) != self.steps:
            raise EffError("EFF-D105", f"a mask of {len(self.caching.computed)} steps for a schedule of {self.steps}")

    @property
    def steps(self) -> int:
        """Count the steps."""
        return sum(len(stage.levels) for stage in self.stages)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Return the size of each step."""
        return tuple(stage.size for stage in self.stages for _ in stage.levels)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Return how many steps each stage has."""
        return tuple(len(stage.levels) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the schedule as JSON values; floats are exact."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Schedule:
        """Read what `to_json` gave.

        Raises:
            EffError: EFF-D105 for anything that is not a schedule.
        """
        try:
            stages = tuple(
                Stage(
                    tuple(int(edge) for edge in stage["size"]),
                    tuple(float(level) for level in stage["levels"]),
                    float(stage["end"]),
                    None if stage["enter"] is None else _entry(stage["enter"]),
                )
                for stage in raw["stages"]
            )
            caching = raw["caching"] and Caching(**{**raw["caching"], "computed": tuple(raw["caching"]["computed"])})
            if raw["process"] not in get_args(Process):
                raise ValueError(f"process {raw['process']}")
            return cls(stages, raw["process"], caching or None, str(raw["policy"]), str(raw["origin"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EffError("EFF-D105", f"not a schedule: {error!r}", hint="write one with Schedule.to_json") from error


def _entry(raw: Mapping[str, Any]) -> Entry:
    found = Entry(**raw)
    if found.kind not in ("renoise", "correlated") or found.resize not in get_args(Resampling):
        raise ValueError(f"a stage that begins by {found.kind} and {found.resize}")
    return found


class StepSchedule(Method):
    """Answer in which sizes and at which noise levels a result is sampled. Frozen dataclasses, one a file."""

    family: ClassVar[str] = SCHEDULE
    exactness: ClassVar[Exactness] = "lossy"

    @abstractmethod
    def stages(self, of: Denoising) -> tuple[Stage, ...]:
        """Return the stages for a denoiser; sizes were not yet held against what it was trained at."""

    @property
    def origin(self) -> str:
        """Say where the numbers come from, where not from the user."""
        return ""

    def schedule(self, of: Denoising) -> Schedule:
        """Return the schedule.

        Raises:
            EffError: EFF-D101 or EFF-D102 for a stage below the trained size, EFF-D103 for a size that the denoiser cannot take,
                EFF-D104 where the last stage is not of the result's size, EFF-D105 for levels that do not fall.
        """
        found = Schedule(self.stages(of), of.process, None, self.spelled, self.origin)
        check_sizes(found, of)
        return found


class StepCache(Method):
    """Answer which steps of a schedule compute, and what the others take. Frozen dataclasses, one a file."""

    family: ClassVar[str] = CACHE
    exactness: ClassVar[Exactness] = "lossy"

    @abstractmethod
    def caching(self, numbers: Sequence[int]) -> Caching:
        """Return what to keep, for stages of so many steps each; nothing is carried from one stage to the next."""

    def onto(self, schedule: Schedule) -> Schedule:
        """Return the schedule with this cache."""
        named = f"{schedule.policy} + {self.spelled}" if schedule.policy else self.spelled
        return replace(schedule, caching=self.caching(schedule.numbers), policy=named)


def check_sizes(schedule: Schedule, of: Denoising) -> None:
    """Raise EFF-D101 to EFF-D104 where a stage has a size that it must not have."""
    if schedule.stages[-1].size != of.size:
        raise EffError(
            "EFF-D104",
            f"the last stage is {_by(schedule.stages[-1].size)}, and the result {_by(of.size)}",
            hint="end with a stage of the whole size",
        )
    for number, stage in enumerate(schedule.stages):
        if len(stage.size) != len(of.size) or stage.size[:-2] != of.size[:-2]:
            raise EffError("EFF-D103", f"stage {number} is {_by(stage.size)}: only height and width may differ")
        if any(edge < 1 or edge % of.multiple for edge in stage.size[-2:]):
            raise EffError("EFF-D103", f"stage {number} is {_by(stage.size)}: edges are multiples of {of.multiple}")
        if stage.size == of.size:
            continue
        if of.least is None:
            raise EffError(
                "EFF-D102",
                f"stage {number} is {_by(stage.size)}, and nobody said at which sizes the denoiser was trained",
                hint="give `least`, the smallest latent that it was trained at; below that pictures fall apart",
            )
        if any(edge < least for edge, least in zip(stage.size[-2:], of.least[-2:])):
            raise EffError(
                "EFF-D101",
                f"stage {number} is {_by(stage.size)}, below {_by(of.least)}, the smallest that the denoiser was trained at",
                hint="a larger share, or a schedule of one size",
            )


def _by(size: Size) -> str:
    return " x ".join(map(str, size))


class ScheduleWarning(UserWarning):
    """Tell that a schedule will hardly do what it is for."""


def doubts(schedule: Schedule, of: Denoising) -> tuple[str, ...]:
    """Return what speaks against a schedule that can run, each with its code."""
    found = []
    if of.distilled and (len(schedule.stages) > 1 or schedule.caching is not None):
        found.append("EFF-D110: the denoiser was distilled for a few steps, which leave little to save")
    if schedule.process == "flow":
        for number, stage in enumerate(schedule.stages):
            # What an earlier stage predicts gets noise again, and may be rough.
            most = 0.4 if number + 1 == len(schedule.stages) else 0.7
            if len(schedule.stages) > 1 and stage.end == 0 and stage.levels[-1] > most:
                found.append(
                    f"EFF-D111: stage {number} goes from level {stage.levels[-1]:.2f} to data in one step, which blurs; "
                    "give it more steps, a smaller shift, or a terminal level"
                )
    return tuple(found)
