"""Measure prefill on fewer tokens layer by layer: speed, what the next tokens become, and pass keys."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import pass_keys
from bench.case import Case, Row, Settings, Watch, grid
from bench.clocks import timer_for
from bench.model_case import DTYPES
from bench.pass_keys import Call
from bench.peers import release
from bench.quality import Score
from bench.stats import Spread, ratios
from bench.token_arms import chosen, token_options
from bench.windows import many_graphs, no_collection, timed, windows_of
from bench.workload import primary
from effcompile.models import zoo
from effcompile.models.entry import ZooModel

DENSE = "dense"
FORMS = ("text", "pass-key")
LAST = 64
"""Tokens at the end that are pinned: the question of a prompt. What follows them is what a prefill is for."""
_PINS = f"pinned=[0,[-{LAST},0]]"
POLICIES: Mapping[str, str] = {
    "pyramid-0.75": f"pyramid-drop{{keep=[0.75,0.5,0.25],{_PINS}}}",
    "pyramid-0.5": f"pyramid-drop{{keep=[0.5,0.25,0.125],{_PINS}}}",
    "pyramid-late": f"pyramid-drop{{keep=[1.0,0.5,0.25],{_PINS}}}",
    "fastv-half": f"fastv{{ratio=0.5,layer=15,{_PINS}}}",
}
"""What is swept, by the name of its arm."""


@dataclass(frozen=True)
class TokensSmolLM2(Case):
    """Compile a model once for each policy and let all of them read the same windows, a window a round."""

    name: ClassVar[str] = "tokens-smollm2"
    title: ClassVar[str] = "Token policies on SmolLM2-135M, prefill"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "Unmodified transformers LlamaForCausalLM, trained weights, no cache; logits of the last 64 positions, whose tokens are "
        "pinned. text: each round is one window, of Python's documentation and of Jane Austen in turn; what the last 64 positions "
        "predict is compared with the dense arm (eff, exact). pass-key: 5 digits hidden in Austen at evenly spread depths; found "
        "when greedy decoding prints them; a round is a batch of prompts, seconds are of one prompt."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = FORMS
    adds_arms: ClassVar[bool] = True
    model: str = "smollm2-135m"
    lengths: Mapping[str, int] = field(default_factory=lambda: {"text": 4096, "pass-key": 1024})
    dtypes: tuple[str, ...] = ("float32",)
    tries: int = 20
    policies: Mapping[str, str] = field(default_factory=lambda: POLICIES)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the dense arm and every policy."""
        return (DENSE, *self.policies)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return form x dtype, each form with a length of its own."""
        rows: list[Row] = []
        for form, length in self.lengths.items():
            if form in settings.forms or not settings.forms:
                rows += grid(settings, (256,) if settings.quick else (length,), (form,), self.dtypes)
        return rows

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one row in this process."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        loaded = zoo.load(self.model, dtype=DTYPES[str(row.parameters["dtype"])])
        length = int(row.parameters["length"])
        names = chosen(self.chosen_arms(settings), (DENSE,), list(self.policies)[:1] if settings.quick else None)
        policies = {name: self.policies.get(name, "") for name in names}
        with torch.no_grad(), many_graphs(3 * len(names)):
            calls = {name: _call(loaded, policy) for name, policy in policies.items()}
            if row.parameters["form"] == "text":
                arms, spreads = _text(loaded, calls, length, settings.rounds, watch)
            else:
                arms, spreads = pass_keys.measure(loaded, calls, length, 4 if settings.quick else self.tries, watch)
        release()
        load.append(os.getloadavg()[0])
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": len(spreads[DENSE].samples),
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                "arms": {name: {"policy": policies[name], **arms[name]} for name in names},
                "ratios": ratios(spreads, (DENSE,), ()),
            }
        ]


def _call(loaded: ZooModel, policy: str) -> Call:
    options = {"strict": True, **token_options(policy)}
    run = torch.compile(loaded.model, backend="eff", options=options, dynamic=False)
    return lambda ids, **given: primary(run(ids, use_cache=False, **given))


def _text(
    loaded: ZooModel, calls: Mapping[str, Call], length: int, rounds: int, watch: Watch
) -> tuple[dict[str, dict[str, Any]], dict[str, Spread]]:
    windows = list(windows_of(loaded, length, rounds))
    scores: dict[str, dict[str, Score]] = {name: {} for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    compiling: dict[str, float] = {}
    last = min(LAST, length // 2)
    heads = {name: lambda ids, call=call: call(ids, logits_to_keep=last) for name, call in calls.items()}
    for name, head in heads.items():
        watch.say(f"compiling {name}")
        begun = time.perf_counter()
        head(windows[0][1])
        compiling[name] = float(f"{time.perf_counter() - begun:.4g}")
    timer = timer_for("cpu")
    with no_collection():
        for text, ids in windows:
            dense: Tensor | None = None
            for name, head in heads.items():
                logits = timed(timer, head, ids, samples[name])[0]
                dense = logits if dense is None else dense
                scores[name].setdefault(text, Score()).add(logits, dense, ids[0, -last:])
                watch.tick(name)
    spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
    arms = {
        name: {
            "seconds": spreads[name].to_json(),
            "compile_seconds": compiling[name],
            "quality": {text: score.to_json() for text, score in scores[name].items()},
        }
        for name in calls
    }
    return arms, spreads
