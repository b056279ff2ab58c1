"""Name the ways to sample that are compared on the trained denoisers of digits, and make a sampler of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import effcompile as eff
from effcompile.integrations.sampler import PlannedSampler
from effcompile.models import zoo
from effcompile.models.dit import DiT, regions
from effcompile.models.trained_digits_dit import NONE
from effcompile.runtime.sampler import Denoiser


@dataclass(frozen=True)
class Arm:
    """Hold the policies of one way to sample; "" is none."""

    schedule: str
    cache: str = ""
    replay: str = ""

    @property
    def plain(self) -> bool:
        """Tell whether it is the plain sampler, with nothing beside it."""
        return self.schedule.startswith("plain") and not self.cache and not self.replay

    @property
    def halves(self) -> bool:
        """Tell whether a stage has half of the edges, which a model has to know."""
        return not self.schedule.startswith("plain")

    @property
    def spelled(self) -> str:
        """Return the policies as the options spell them."""
        return " + ".join(part for part in (self.schedule, self.cache, self.replay) if part)


BASELINE = "euler-28"
_TAYLOR = "taylor{interval=3,warmup=2,axis=level}"
_REPLAY = "re-ttention{keep=0.125,warmup=5,period=5}"
ARMS: Mapping[str, Arm] = {
    **{f"euler-{n}": Arm(f"plain{{steps={n}}}") for n in (28, 20, 14, 11, 9, 7, 5, 4, 3)},
    "bottleneck": Arm("bottleneck{steps=[3,10,6]}"),
    "bottleneck-short": Arm("bottleneck{steps=[2,6,4],terminal=0.05}"),
    "predict-x0": Arm("predict-x0{steps=14,scales=[0.5,1.0],until=[0.5]}"),
    "correlated": Arm("correlated{steps=[10,8],weight=[0.4]}"),
    "reuse-2": Arm("plain{steps=28}", "reuse{interval=2,warmup=2}"),
    "reuse-body-3": Arm("plain{steps=28}", "reuse{interval=3,warmup=2,region=body}"),
    "first-block": Arm("plain{steps=28}", "first-block{threshold=0.1}"),
    "taylor-3": Arm("plain{steps=28}", _TAYLOR),
    "taylor-4": Arm("plain{steps=28}", "taylor{interval=4,warmup=2,axis=level}"),
    "taylor-6": Arm("plain{steps=28}", "taylor{interval=6,warmup=2,axis=level}"),
    "taylor2-4": Arm("plain{steps=28}", "taylor{interval=4,warmup=2,order=2,axis=level}"),
    "re-ttention": Arm("plain{steps=28}", replay=_REPLAY),
    "bottleneck-taylor-3": Arm("bottleneck{steps=[6,10,12],terminal=0.02}", _TAYLOR),
    "x0-taylor-3": Arm("predict-x0{steps=28,scales=[0.5,1.0],until=[0.4]}", _TAYLOR),
    "correlated-taylor-3": Arm("correlated{steps=[12,16],weight=[0.4]}", _TAYLOR),
    "x0-re-ttention": Arm("predict-x0{steps=28,scales=[0.5,1.0],until=[0.4]}", replay=_REPLAY),
    "x0-taylor-3-re-ttention": Arm(
        "predict-x0{steps=28,scales=[0.5,1.0],until=[0.4]}", _TAYLOR, "re-ttention{keep=0.125,warmup=3,period=3}"
    ),
}
"""Those with a stage of half the edges need a model that knows two sizes."""


def fitting(names: Sequence[str], edge: int) -> list[str]:
    """Return the arms that the model of an edge can run: halves of 8 pixels it never saw, and 16 tokens have no band."""
    return [name for name in names if edge == 32 or not (ARMS[name].halves or ARMS[name].replay)]


def denoising(edge: int) -> eff.Denoising:
    """Return what is known of the model of an edge."""
    least = (16, 16) if edge == 32 else None
    return eff.Denoising((edge, edge), shift=max(1.0, edge / 16), least=least, patch=2, multiple=2, width=96)


@dataclass
class Samplers:
    """Make samplers around one model. They share its graphs, since Dynamo keeps a few of one function only."""

    edge: int
    model: DiT = field(init=False)
    whole: Denoiser = field(init=False)
    parts: eff.Regions = field(init=False)

    def __post_init__(self) -> None:
        model = zoo.load(f"digits-dit-{self.edge}").model
        assert isinstance(model, DiT)
        compiled = (torch.compile(part, backend="eff", dynamic=False) for part in (model, *regions(model)))
        self.model, (self.whole, *parts) = model, compiled
        self.parts = eff.Regions(*parts)

    def make(self, name: str) -> PlannedSampler:
        """Return the sampler of an arm."""
        arm = ARMS[name]
        body = "region=body" in arm.cache or arm.cache.startswith("first-block")
        denoiser: Denoiser | eff.Regions | nn.Module = self.parts if body else self.model if arm.replay else self.whole
        more = {"replay": arm.replay, "compiled": True} if arm.replay else {}
        return eff.sampler(denoiser, denoising(self.edge), schedule=arm.schedule, cache=arm.cache or None, **more)


def draw(sampler: PlannedSampler, batch: int, generator: torch.Generator) -> Tensor:
    """Return a batch of digits, all classes alike."""
    return sampler((batch, 1), torch.arange(batch) % NONE, generator=generator)
