"""Time whole runs of diffusion transformers on a GPU: dense, with each sparse policy, with schedules and caches."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.case import Case, Row, Settings, Watch
from bench.cases.gpu_attention import skipped
from bench.clocks import timer_for
from bench.gpu_transformers import SHAPES, Shape, ShapedTransformer, Way, sampler, ways
from bench.manifest import scrub
from bench.peers import release
from bench.rounds import interleave
from bench.stats import Spread, ratios
from effcompile.core.schedule import ScheduleWarning

ARMS = tuple(dict.fromkeys(name for shape in SHAPES.values() for name in ways(shape)))
CLOSE = 0.02
"""How far one dense step may be from eager in float32, RMS over RMS: bfloat16 rounds to 1 part in 256, layer after layer."""


@dataclass(frozen=True)
class GpuDit(Case):
    """Sample a whole run with every arm from the same noise, so that steps which stay dense count."""

    name: ClassVar[str] = "gpu-dit"
    title: ClassVar[str] = "Runs of diffusion transformers on a GPU"
    headline: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    about: ClassVar[str] = (
        "Denoisers with the shapes of CogVideoX-2B, FLUX and PixArt at 1,024 pixels, fewer layers (a step of each is as in the "
        "model) and random weights, bfloat16, all compiled by eff. A call is a run, from noise to result; ratios are of runs, not "
        "of steps. dense: every step and pair. One dense step is compared with eager in float32 first; apart is the RMS "
        "difference to the dense run over its RMS, which on random weights says only that a policy is there."
    )
    form_words: ClassVar[tuple[str, ...]] = tuple(SHAPES)
    dtype_words: ClassVar[tuple[str, ...]] = ("bfloat16",)
    shapes: Mapping[str, Shape] = field(default_factory=lambda: SHAPES)
    compiled: bool = True
    seconds: float = 300.0
    begun: list[float] = field(default_factory=list, compare=False)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the arms of all shapes; videos have two more."""
        return ARMS

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return a row for each shape, the most telling first."""
        forms = settings.forms or (tuple(self.shapes)[:1] if settings.quick else tuple(self.shapes))
        return [Row(form, {"form": form, "dtype": "bfloat16"}) for form in forms if form in self.shapes]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Compile every arm, check the dense one, and let all take turns."""
        torch._dynamo.reset()
        names = self.chosen_arms(settings)
        if not self.begun:
            self.begun.append(time.monotonic())
        if self._over():
            return [skipped(row, settings, names, self.seconds)]
        release()
        shape = self.shapes[str(row.parameters["form"])]
        torch.manual_seed(0)
        model = ShapedTransformer(shape).to(settings.device, torch.bfloat16).eval()
        wanted = {name: way for name, way in ways(shape).items() if name in names or name == "dense"}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ScheduleWarning)
            return [self._turns(row, shape, model, wanted, settings, watch)]

    def _over(self) -> bool:
        return bool(self.seconds) and time.monotonic() - self.begun[0] > self.seconds

    def _turns(
        self,
        row: Row,
        shape: Shape,
        model: ShapedTransformer,
        wanted: Mapping[str, Way],
        settings: Settings,
        watch: Watch,
    ) -> dict[str, Any]:
        device = settings.device
        text = torch.randn(shape.batch, shape.text, shape.width, device=device, dtype=torch.bfloat16)
        known: dict[str, dict[str, Any]] = {}
        calls: dict[str, Any] = {}
        dense: Tensor | None = None
        for name, way in wanted.items():
            if self._over():
                known[name] = {"skipped": f"the {self.seconds:.0f} s of the case were over"}
                continue
            watch.say(f"compiling {name}")
            begun = time.perf_counter()
            try:
                made = sampler(model, shape, way, self.compiled)
                found = _run(made, shape, text, device)
            except Exception as error:
                known[name] = {"error": scrub(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")}
                continue
            dense = found if dense is None else dense
            told = {"policy": " + ".join(filter(None, (way.schedule, way.cache, way.attention, way.replay)))}
            known[name] = {
                **told,
                **_facts(made, found, dense),
                "compile_seconds": round(time.perf_counter() - begun, 1),
            }
            if name == "dense":
                known[name]["numerics"] = _numerics(made.denoiser, model, shape, text)
            if known[name]["finite"] and known[name].get("numerics", {"within": True})["within"]:
                calls[name] = partial(_run, made, shape, text, device)
        timer = timer_for(device)
        spreads: dict[str, Spread] = {}
        if calls:
            spreads = interleave(calls, timer, settings.rounds, warmup=settings.warmup, settle=0.0, tick=watch.tick)
        arms = {name: {**known[name], **_timed(spreads.get(name))} for name in known}
        return {
            "id": row.id,
            "parameters": {**row.parameters, "tokens": shape.tokens, "layers": shape.layers, "of": shape.own_layers},
            "rounds": settings.rounds,
            "warmup": settings.warmup,
            "load": [round(os.getloadavg()[0], 2)],
            "arms": arms,
            "ratios": ratios(spreads, [name for name in ("dense",) if name in spreads], ()),
        }


def _run(made: Any, shape: Shape, text: Tensor, device: str) -> Tensor:
    draw = torch.Generator(device).manual_seed(0)
    out: Tensor = made((shape.batch, shape.channels), text, generator=draw, dtype=torch.bfloat16, device=device)
    return out


def _timed(spread: Spread | None) -> dict[str, Any]:
    return {} if spread is None else {"seconds": spread.to_json()}


def _facts(made: Any, found: Tensor, dense: Tensor) -> dict[str, Any]:
    apart = (found.float() - dense.float()).square().mean().sqrt() / dense.float().square().mean().sqrt()
    cost = made.estimate()
    state = {"state_bytes": made.denoiser.nbytes} if hasattr(made.denoiser, "nbytes") else {}
    return {
        "finite": bool(found.isfinite().all()),
        "apart": round(float(apart), 4),
        "steps": len(made.computed),
        "computed": sum(made.computed),
        "full_steps": round(cost.full_steps, 3),
        **state,
    }


def _numerics(compiled: Any, model: ShapedTransformer, shape: Shape, text: Tensor) -> dict[str, Any]:
    """Compare one step of one row with eager in float32 on the same device."""
    draw = torch.Generator(text.device).manual_seed(1)
    size = (shape.batch, shape.channels, *shape.size)
    latent = torch.randn(size, generator=draw, device=text.device, dtype=torch.bfloat16)
    time_of = torch.full((shape.batch,), 0.5, device=text.device)
    got = compiled(latent, time_of, text)[:1].float()
    exact = ShapedTransformer(shape).to(text.device).eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    meant = exact(latent[:1].float(), time_of[:1], text[:1].float())
    error = float((got - meant).square().mean().sqrt() / meant.square().mean().sqrt())
    return {"error": float(f"{error:.3g}"), "allowed": CLOSE, "within": error <= CLOSE}
