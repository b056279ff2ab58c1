"""Measure what attention policies cost in quality and give in speed, on a trained model and real text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import decode_quality, pass_keys
from bench.case import Case as BaseCase
from bench.case import Row, Settings, Watch, grid
from bench.clocks import timer_for
from bench.decode_quality import STEPS
from bench.model_case import DTYPES
from bench.peers import release
from bench.quality import Score
from bench.sparse_profile import profile
from bench.stats import Spread, ratios
from bench.windows import many_graphs, no_collection, timed, windows_of
from bench.workload import Function, primary
from effcompile.models import zoo
from effcompile.models.entry import ZooModel

DENSE = "dense"
FORMS = ("text", "pass-key", "decode")
TRIES = 20
SETTINGS: Mapping[str, str] = {
    "sliding-1024": "sliding-window{window=1024}",
    "sink-1024": "sink-window{window=1024}",
    "topk-0.1": "block-topk{density=0.1,block=64}",
    "topk-0.3": "block-topk{density=0.3,block=64}",
    "topk-0.3-tail": "block-topk{density=0.3,block=64,tail=64}",
    "xattention-0.8": "xattention{threshold=0.8}",
    "xattention-0.9": "xattention{threshold=0.9}",
    "xattention-0.9-tail": "xattention{threshold=0.9,tail=64}",
    "xattention-0.95-tail": "xattention{threshold=0.95,tail=64}",
    "pooled-0.9": "pooled-cdf{cdf=0.9}",
    "pooled-0.9-tail": "pooled-cdf{cdf=0.9,tail=64}",
    "pooled-0.98": "pooled-cdf{cdf=0.98}",
    "pooled-0.98-tail": "pooled-cdf{cdf=0.98,tail=64}",
    "slash-0.9": "vertical-slash{coverage=0.9}",
    "zipvl-0.97": "zipvl{mass=0.97}",
}
"""What is swept, by the name of its arm."""
DECODE: Mapping[str, str] = {
    "quest-512": "quest{budget=512}",
    "quest-1024": "quest{budget=1024}",
    "step-topk-512": "block-topk{budget=512}",
    "step-topk-1024": "block-topk{budget=1024}",
}
"""What is swept in the form `decode`."""


@dataclass(frozen=True)
class SparseQuality(BaseCase):
    """Compile a model once for each policy and let all of them read the same windows, a window a round."""

    name: ClassVar[str] = "sparse-quality"
    title: ClassVar[str] = "Attention policies on SmolLM2-135M"
    about: ClassVar[str] = (
        "text: each round is one window, of Python's documentation and of Jane Austen in turn; every arm reads it and is timed, "
        "and its logits are compared with those of the dense arm (eff, exact). tail_perplexity is that of the last 1,024 "
        "positions. pass-key: 5 digits hidden in Austen at evenly spread depths; found when greedy decoding prints them; the "
        "length is the longest at which the dense arm finds 80 %, unless --lengths gives one. decode: the 64 tokens after a prompt "
        "that the dense model read, fed one by one; a round is one window, seconds are those of a step. "
        "density and selector shares come from an eager run of the rewritten graph on the first window."
    )
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = (
        True  # arms of a later run stand beside those of an earlier one; ratios are to their own
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = FORMS
    model: str = "smollm2-135m"
    lengths: tuple[int, ...] = (4096,)
    dtypes: tuple[str, ...] = ("float32",)
    tries: int = TRIES
    key_lengths: tuple[int, ...] = (512, 1024, 1536, 2048, 3072, 4096, 8192)
    """Lengths among which the longest one is looked for at which the dense model finds pass keys."""
    steps: int = STEPS
    policies: Mapping[str, str] = field(default_factory=lambda: SETTINGS)
    decoding: Mapping[str, str] = field(default_factory=lambda: DECODE)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the dense arm and every policy; those for decode take part in the form `decode` alone."""
        return (DENSE, *self.policies, *self.decoding)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return length x form x dtype; the length of a pass key is looked for where none is asked for."""
        rows = grid(settings, (256,) if settings.quick else self.lengths, FORMS, self.dtypes)
        if settings.lengths or settings.quick:
            return rows
        return [
            Row(f"pass-key-{row.parameters['dtype']}", {**row.parameters, "length": 0})
            if row.parameters["form"] == "pass-key"
            else row
            for row in rows
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one row in this process."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        loaded = zoo.load(self.model, dtype=DTYPES[str(row.parameters["dtype"])])
        form, length = str(row.parameters["form"]), int(row.parameters["length"])
        policies = self.decoding if form == "decode" else self.policies
        names = (DENSE, *(name for name in self.chosen_arms(settings) if name in policies))
        more: dict[str, Any] = {}
        with torch.no_grad(), many_graphs(2 * len(names) + len(self.key_lengths)):
            # In decode a policy that is refused at every site, as under a mask that is not proved, must not pass for measured.
            least = int(form == "decode")
            functions = {name: _function(loaded, policies.get(name, ""), least) for name in names}
            if form == "text":
                arms, spreads = self._text(loaded, {n: _call(f) for n, f in functions.items()}, length, settings, watch)
            elif form == "decode":
                steps = 4 if settings.quick else self.steps
                windows = windows_of(loaded, length + steps, settings.rounds)
                arms, spreads = decode_quality.measure(loaded, functions, windows, length, watch)
            else:
                tries = 3 if settings.quick else self.tries
                calls = {name: _call(function) for name, function in functions.items()}
                if not length:
                    found = pass_keys.longest(loaded, calls[DENSE], self.key_lengths, tries, watch)
                    length, more = found.length, {"dense_found": {str(n): list(x) for n, x in found.tried.items()}}
                arms, spreads = pass_keys.measure(loaded, calls, length, tries, watch)
        release()
        load.append(os.getloadavg()[0])
        return [
            {
                "id": row.id,
                "parameters": {**row.parameters, "length": length},
                **more,
                "rounds": settings.rounds,
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                "arms": {name: {"policy": policies.get(name, ""), **arms[name]} for name in names},
                "ratios": ratios(spreads, (DENSE,), ()),
            }
        ]

    def _text(
        self, loaded: ZooModel, calls: Mapping[str, _Call], length: int, settings: Settings, watch: Watch
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Spread]]:
        windows = list(windows_of(loaded, length, settings.rounds))
        scores: dict[str, dict[str, Score]] = {name: {} for name in calls}
        arms: dict[str, dict[str, Any]] = {}
        for name, call in calls.items():
            watch.say(f"compiling {name}")
            begun = time.perf_counter()
            call(windows[0][1])
            arms[name] = {"compile_seconds": float(f"{time.perf_counter() - begun:.4g}")}
            if policy := self.policies.get(name):
                watch.say(f"profile of {name}")
                arms[name] |= profile(loaded.model, (windows[0][1],), {"use_cache": False}, policy).to_json()
        timer = timer_for("cpu")
        samples: dict[str, list[float]] = {name: [] for name in calls}
        with no_collection():
            for text, ids in windows:
                dense: Tensor | None = None
                for name, call in calls.items():
                    logits = timed(timer, call, ids, samples[name])[0]
                    dense = logits if dense is None else dense
                    scores[name].setdefault(text, Score()).add(logits, dense, ids[0])
                    del logits
                    watch.tick(name)
        spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
        for name in calls:
            quality = {text: score.to_json() for text, score in scores[name].items()}
            arms[name] = {"seconds": spreads[name].to_json(), **arms[name], "quality": quality}
        return arms, spreads


_Call = Callable[..., Tensor]


def _function(loaded: ZooModel, policy: str, least: int) -> Function:
    # Quality is measured also at lengths at which a policy does not pay.
    asked = {"attention": policy, "require": {"attention": least}} if policy else {}
    options: dict[str, Any] = {"strict": True, **asked}
    compiled: Function = torch.compile(loaded.model, backend="eff", options=options, dynamic=False)
    return compiled


def _call(function: Function) -> _Call:
    return lambda ids, **options: primary(function(ids, use_cache=False, **options))
