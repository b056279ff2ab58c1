"""Measure what schedules, step caches and replayed attention give in time and cost in quality."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from bench import schedule_replay, schedule_rows
from bench.case import Case, Row, Settings, Watch
from bench.peers import release
from bench.schedule_arms import ARMS
from bench.schedule_shapes import SHAPED, SHAPES, estimates

SEEDS = (1, 2, 3, 4, 5)
MODELS = {"8": 8, "32": 32}


@dataclass(frozen=True)
class Schedules(Case):
    """Time all arms in turns, sample with each from several seeds, and hold walls against estimates."""

    name: ClassVar[str] = "schedules"
    title: ClassVar[str] = "Schedules and step caches on trained denoisers of digits"
    about: ClassVar[str] = (
        "times: every arm draws a batch of digits, all classes alike, once a round, through the compiled denoiser; seconds are "
        "those of an image. quality: a row is a seed, by which every arm draws as many digits; frechet is the distance to the "
        "digits of training in the features of a small judge, `real` that of digits that were held out. apart is the RMS "
        "difference to 28 steps from the same noise, over the RMS of those; with new noise in between it says little. estimate: "
        "runs on denoisers with the shape of known ones and random weights, over what `estimate()` says. replay: attention of a "
        "video over a run."
    )
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = (
        *(f"{kind}-{model}" for kind in ("times", "quality") for model in MODELS),
        *(f"estimate-{shape}" for shape in SHAPES),
        "replay",
    )
    samples: int = 2000
    batch: int = 50
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What the shapes of estimates are built with, where not with their own sizes; `replay` has an entry as well."""

    def arms(self, device: str) -> tuple[str, ...]:
        """Return 28 Euler steps and every other arm, then those of the estimates."""
        return (*ARMS, *SHAPED, schedule_replay.DENSE, schedule_replay.OURS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return the rows of the chosen forms; a quality row is a seed, and `--lengths` names seeds."""
        found = []
        for form in settings.forms or self.form_words:
            if form not in self.form_words:
                continue
            seeds = (settings.lengths or (SEEDS[:1] if settings.quick else SEEDS)) if form.startswith("quality") else ()
            found += [Row(f"{form}-seed-{seed}", {"form": form, "seed": seed}) for seed in seeds]
            if not seeds:
                found.append(Row(form, {"form": form}))
        return found

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one row in this process."""
        torch.set_num_threads(settings.threads)
        torch._dynamo.reset()
        release()
        load = [os.getloadavg()[0]]
        kind, _, what = str(row.parameters["form"]).partition("-")
        count = self.batch if settings.quick else self.samples
        names = self.chosen_arms(settings)
        ours = [name for name in names if name in ARMS]
        if kind == "times":
            found = schedule_rows.times(
                MODELS[what], ours or tuple(ARMS), self.batch, settings.rounds, settings.warmup, watch
            )
        elif kind == "quality":
            seed = int(row.parameters["seed"])
            found = schedule_rows.quality(MODELS[what], ours or tuple(ARMS), seed, count, self.batch, watch)
        elif kind == "estimate":
            shape = SHAPES[what](**self.sizes.get(what, {}))
            shaped = [name for name in names if name in SHAPED] or list(SHAPED)
            found = estimates(shape, shaped, settings.rounds, watch)
        else:
            video = schedule_replay.Video(**self.sizes.get("replay", {}))
            found = schedule_replay.share(video, settings.rounds, watch)
        load.append(os.getloadavg()[0])
        parameters = {**row.parameters, **({"samples": count} if kind == "quality" else {}), "dtype": "float32"}
        return [
            {
                "id": row.id,
                "parameters": parameters,
                "rounds": 1 if kind == "quality" else settings.rounds,
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                **found,
            }
        ]
