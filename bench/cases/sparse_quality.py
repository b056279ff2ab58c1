"""Measure what attention policies cost in quality and give in speed, on a trained model and real text."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.case import Case as BaseCase
from bench.case import Row, Settings, Watch, grid
from bench.clocks import Timer, timer_for
from bench.model_case import DTYPES
from bench.peers import release
from bench.quality import Found, Score, hunts
from bench.rounds import SETTLE
from bench.sparse_profile import profile
from bench.stats import Spread, ratios
from bench.workload import primary
from effcompile.models import zoo
from effcompile.models.entry import ZooModel
from effcompile.models.text import austen_text, pydoc_text, token_windows

DENSE = "dense"
FORMS = ("text", "pass-key")
TRIES = 20
SETTINGS: Mapping[str, str] = {
    "sliding-1024": "sliding-window{window=1024}",
    "sink-1024": "sink-window{window=1024}",
    "topk-0.1": "block-topk{density=0.1,block=64}",
    "topk-0.3": "block-topk{density=0.3,block=64}",
    "xattention-0.8": "xattention{threshold=0.8}",
    "xattention-0.9": "xattention{threshold=0.9}",
    "pooled-0.9": "pooled-cdf{cdf=0.9}",
    "pooled-0.98": "pooled-cdf{cdf=0.98}",
    "slash-0.9": "vertical-slash{coverage=0.9}",
    "zipvl-0.97": "zipvl{mass=0.97}",
}
"""What is swept, by the name of its arm."""


@dataclass(frozen=True)
class SparseQuality(BaseCase):
    """Compile a model once for each policy and let all of them read the same windows, a window a round."""

    name: ClassVar[str] = "sparse-quality"
    title: ClassVar[str] = "Attention policies on SmolLM2-135M"
    about: ClassVar[str] = (
        "text: each round is one window, of Python's documentation and of Jane Austen in turn; every arm reads it and is timed, "
        "and its logits are compared with those of the dense arm (eff, exact). tail_perplexity is that of the last 1,024 "
        "positions. pass-key: 5 digits hidden in Austen at evenly spread depths; found when greedy decoding prints them. "
        "density and selector shares come from an eager run of the rewritten graph on the first window."
    )
    headline: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = FORMS
    model: str = "smollm2-135m"
    lengths: tuple[int, ...] = (4096,)
    dtypes: tuple[str, ...] = ("float32",)
    tries: int = TRIES
    policies: Mapping[str, str] = field(default_factory=lambda: SETTINGS)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the dense arm and every policy."""
        return (DENSE, *self.policies)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return length x form x dtype."""
        return grid(settings, (256,) if settings.quick else self.lengths, FORMS, self.dtypes)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one row in this process."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        loaded = zoo.load(self.model, dtype=DTYPES[str(row.parameters["dtype"])])
        names = self.chosen_arms(settings)
        names = (DENSE, *(name for name in names if name != DENSE))
        length = int(row.parameters["length"])
        with torch.no_grad(), _many_graphs(len(names)):
            calls = {name: _call(loaded, self.policies.get(name, "")) for name in names}
            if row.parameters["form"] == "text":
                arms, spreads = self._text(loaded, calls, length, settings, watch)
            else:
                tries = 3 if settings.quick else self.tries
                arms, spreads = _pass_keys(loaded, calls, length, tries, watch)
        release()
        load.append(os.getloadavg()[0])
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": settings.rounds,
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                "arms": {name: {"policy": self.policies.get(name, ""), **arms[name]} for name in names},
                "ratios": ratios(spreads, (DENSE,), ()),
            }
        ]

    def _text(
        self, loaded: ZooModel, calls: Mapping[str, _Call], length: int, settings: Settings, watch: Watch
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Spread]]:
        windows = list(_windows(loaded, length, settings.rounds))
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
        with _no_collection():
            for text, ids in windows:
                dense: Tensor | None = None
                for name, call in calls.items():
                    logits = _timed(timer, call, ids, samples[name])[0]
                    dense = logits if dense is None else dense
                    scores[name].setdefault(text, Score()).add(logits, dense, ids[0])
                    del logits
                    watch.tick(name)
        spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
        for name in calls:
            quality = {text: score.to_json() for text, score in scores[name].items()}
            arms[name] = {"seconds": spreads[name].to_json(), **arms[name], "quality": quality}
        return arms, spreads


_Call = Callable[[Tensor], Tensor]


def _call(loaded: ZooModel, policy: str) -> _Call:
    options: dict[str, Any] = {"strict": True} | ({"attention": policy} if policy else {})
    compiled = torch.compile(loaded.model, backend="eff", options=options, dynamic=False)
    return lambda ids: primary(compiled(ids, use_cache=False))


def _windows(loaded: ZooModel, length: int, rounds: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name of the text, token ids `[1, length]`), the texts in turn."""
    assert loaded.tokenizer is not None
    texts = {"pydoc": pydoc_text(), "austen": austen_text()}
    half = -(-rounds // len(texts))
    cut = {name: token_windows(loaded.tokenizer, text, length, half) for name, text in texts.items()}
    for number in range(rounds):
        name = tuple(texts)[number % len(texts)]
        yield name, cut[name][number // len(texts)][None]


def _pass_keys(
    loaded: ZooModel, calls: Mapping[str, _Call], length: int, tries: int, watch: Watch
) -> tuple[dict[str, dict[str, Any]], dict[str, Spread]]:
    counts = {name: Found() for name in calls}
    timer = timer_for("cpu")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    prompts = list(hunts(loaded.tokenizer, austen_text(), length, tries))
    for name, call in calls.items():
        watch.say(f"compiling {name}")
        call(prompts[0].ids)
    for hunt in prompts:
        for name, call in calls.items():
            counts[name].add(hunt, _timed(timer, call, hunt.ids, samples[name]))
            watch.tick(name)
    spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
    arms = {name: {"seconds": spreads[name].to_json(), "pass_key": counts[name].to_json()} for name in calls}
    return arms, spreads


def _timed(timer: Timer, call: _Call, ids: Tensor, into: list[float]) -> Tensor:
    time.sleep(SETTLE)
    seconds, logits = timer.time(lambda: call(ids))
    into.append(seconds)
    result: Tensor = logits
    return result


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _many_graphs(count: int) -> Iterator[None]:
    """Let Dynamo keep a graph for each arm of the same code."""
    from torch._dynamo import config

    # A second entry a policy is the profile's. Past the limit Dynamo runs eagerly, which would be timed as the policy.
    limit = max(2 * count + 2, config.recompile_limit)
    with config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield
