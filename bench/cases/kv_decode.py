"""Measure decoding with compressed KV caches: seconds a token, bytes, and what the model says, against its own cache."""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import effcompile as eff
from bench import kvpress_arms, pass_keys
from bench.arms_onnx_cache import EXPORTS
from bench.cache_arms import (
    EVICTIONS,
    FORMATS,
    PEERS,
    CacheArm,
    evicting_arm,
    key_reader,
    make_arm,
    policy,
    prefill,
    shorten,
    spelled,
    twin,
)
from bench.case import Case as BaseCase
from bench.case import Row, Settings, Watch, grid
from bench.clocks import timer_for
from bench.manifest import scrub
from bench.model_case import DTYPES
from bench.peers import release
from bench.quality import Score, hunts
from bench.rounds import interleave
from bench.stats import Spread, ratios
from bench.windows import many_graphs, no_collection
from effcompile.models import zoo
from effcompile.models.entry import ZooModel
from effcompile.models.text import austen_text, pydoc_text, token_windows

FORMS = ("speed", "quality", "evict", "generate")
BASE = "static-inductor"
MOST_GRAPHS = 64  # of the same code: one an arm, and again for each window where an arm is made anew
QUICK_LAYERS = 1
OTHER = "caches that drop tokens are compared in the form evict"


@dataclass(frozen=True)
class KVDecode(BaseCase):
    """Let all caches hold the same prompt, and continue from it."""

    name: ClassVar[str] = "kv-decode"
    title: ClassVar[str] = "SmolLM2-135M decode with compressed KV caches"
    about: ClassVar[str] = (
        "One prefill of real text by the unmodified model fills every cache. speed: the arms take turns at one-token steps up to "
        "`length` tokens; seconds are per token; caches that evict hold half of the prompt. quality: each arm continues a prompt "
        "of a quarter of `length` with the true text, token by token, and its logits are compared with those of the model's own "
        "cache (dynamic, eager). evict: the same for caches that hold half of a prompt of three quarters of `length`, eager, and "
        "how many pass keys they find in prompts of that length. "
        "generate: greedy tokens of prompts of `length` tokens beside those of StaticCache, eager. bytes are those of the cache's "
        "tensors at the end; "
        "bytes_ratio is against bfloat16 keys and values of as many tokens. quantized-*: transformers' QuantizedCache, 4 bits, "
        "groups of 32, residual 128, eager. onnx-*: exports in ONNX Runtime, their cache as inputs and outputs. "
        "kvpress-*: that library, half of the "
        "same prompts, under an interpreter of its own. With --quick the "
        "model has one layer, and its numbers mean nothing."
    )
    unit: ClassVar[str] = "token"
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = True  # a row of all arms takes longer than one wants to keep a machine quiet
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = FORMS
    model: str = "smollm2-135m"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    steps: int = 16
    prompts: int = 10
    tokens: int = 128
    keys: int = 20

    def arms(self, device: str) -> tuple[str, ...]:
        """Return StaticCache under both compilers, transformers' quantized cache, every format and every eviction."""
        return (BASE, "static-eff", "quantized-quanto", *FORMATS, *EVICTIONS)

    def known_arms(self, device: str) -> tuple[str, ...]:
        """Return the above, transformers' other caches, exports to ONNX, and what kvpress drops."""
        return (*PEERS, *FORMATS, *EVICTIONS, *EXPORTS, *kvpress_arms.ARMS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return length x form x dtype; a form has a length of its own unless lengths are asked for."""
        own = {"speed": 8192, "quality": 1024, "evict": 1024, "generate": 64}
        found = []
        for form in FORMS:
            length = 160 if settings.quick else own[form]
            found += grid(settings, (length,), (form,), self.dtypes if form == "speed" else self.dtypes[:1])
        return found

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one row in this process."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        dtype, form = DTYPES[str(row.parameters["dtype"])], str(row.parameters["form"])
        watch.say("loading the model")
        plain = zoo.load(self.model, dtype=dtype)
        if settings.quick:
            shorten(plain.model, QUICK_LAYERS)
        prepared = eff.prepare(twin(plain.model), kv="int8-per-token")
        names = self.chosen_arms(settings)
        with torch.no_grad(), many_graphs(MOST_GRAPHS):
            run = {"speed": self._speed, "quality": self._quality, "evict": self._evict, "generate": self._generate}[
                form
            ]
            arms, spreads = run(plain, prepared, names, int(row.parameters["length"]), settings, watch)
        release()
        load.append(os.getloadavg()[0])
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": settings.rounds,
                "warmup": settings.warmup,
                "load": [round(value, 2) for value in load],
                "arms": {name: arms[name] for name in names},
                "ratios": ratios(spreads, names[:1], tuple(name for name in (*FORMATS, *EVICTIONS) if name in spreads))
                if form == "speed"
                else [],
            }
        ]

    def _ranges(self, name: str, plain: ZooModel) -> str:
        """Return a file of ranges where an arm needs one, measured once on another text than what is decoded."""
        if "static-channel" not in policy(name):
            return ""
        path = Path(tempfile.gettempdir()) / f"eff-kv-ranges-{os.getpid()}-{id(plain):x}.json"
        if not path.is_file():
            eff.calibrate_kv(plain.model, token_windows(plain.tokenizer, austen_text(), 512, 2)[:, None], path)
            atexit.register(path.unlink, missing_ok=True)
        return str(path)

    def _speed(
        self, plain: ZooModel, prepared: Any, names: Sequence[str], length: int, settings: Settings, watch: Watch
    ) -> tuple[dict[str, Any], dict[str, Spread]]:
        steps = 4 if settings.quick else self.steps
        ids = token_windows(plain.tokenizer, pydoc_text(), length, 1)
        watch.say("prefill")
        past = prefill(plain.model, ids[:, : length - steps])
        arms: dict[str, Any] = {}
        calls: dict[str, Any] = {}
        made: dict[str, CacheArm] = {}
        prompt, last = ids[:, : length - steps], ids[:, length - steps :]
        for name in names:
            watch.say(f"preparing {name}")
            begun = time.perf_counter()
            try:
                if name in EVICTIONS:
                    arm = evicting_arm(name, prepared, prompt, length, "eff")
                else:
                    arm = make_arm(name, plain.model, prepared, past, length, self._ranges(name, plain), prompt)
                _steps(arm, last)
            except Exception as error:
                arms[name] = {"skipped": scrub(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")}
                continue
            made[name], calls[name] = arm, lambda arm=arm: _steps(arm, last)
            arms[name] = {
                "compile_seconds": float(f"{time.perf_counter() - begun:.4g}"),
                **_bytes(arm, plain, length, policy(name, prompt.shape[1])),
            }
        with no_collection():
            spreads = interleave(
                calls,
                timer_for("cpu"),
                settings.rounds,
                warmup=settings.warmup,
                before=lambda name: made[name].rewind(),
                tick=watch.tick,
            )
        spreads = {name: spread.scaled(1 / steps) for name, spread in spreads.items()}
        for name, spread in spreads.items():
            arms[name] = {"seconds": spread.to_json(), **arms[name]}
        return arms, spreads

    def _quality(
        self, plain: ZooModel, prepared: Any, names: Sequence[str], length: int, settings: Settings, watch: Watch
    ) -> tuple[dict[str, Any], dict[str, Spread]]:
        windows = token_windows(plain.tokenizer, pydoc_text(), length, 1 if settings.quick else settings.rounds)
        prompt = length // 4
        arms: dict[str, Any] = {name: {"skipped": OTHER} for name in names if name in EVICTIONS}
        names = [name for name in names if name not in EVICTIONS]
        samples: dict[str, list[float]] = {}
        scores: dict[str, Score] = {}
        made: dict[str, CacheArm] = {}  # of an arm that can be filled again, what was compiled serves all windows
        timer = timer_for("cpu")
        for ids in windows[:, None]:
            past = prefill(plain.model, ids[:, :prompt])
            watch.say("dynamic")
            wanted = _steps(make_arm("dynamic", plain.model, prepared, past, length), ids[:, prompt:])
            for name in names:
                watch.say(name)
                try:
                    arm = made.get(name)
                    if arm is not None and arm.fill is not None:
                        arm.fill(past)
                    else:
                        given = (name, plain.model, prepared, past, length, self._ranges(name, plain), ids[:, :prompt])
                        arm = made[name] = make_arm(*given)
                        _steps(arm, ids[:, prompt : prompt + 1])
                        arm.rewind()
                except Exception as error:
                    arms[name] = {"skipped": scrub(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")}
                    continue
                seconds, found = timer.time(lambda arm=arm, ids=ids: _steps(arm, ids[:, prompt:]))
                samples.setdefault(name, []).append(seconds / (length - prompt))
                scores.setdefault(name, Score()).add(found[0], wanted[0], ids[0, prompt:])
                arms[name] = _bytes(arm, plain, length, policy(name))
                watch.tick(name)
        return _with_quality(arms, samples, scores)

    def _evict(
        self, plain: ZooModel, prepared: Any, names: Sequence[str], length: int, settings: Settings, watch: Watch
    ) -> tuple[dict[str, Any], dict[str, Spread]]:
        windows = token_windows(plain.tokenizer, pydoc_text(), length, 1 if settings.quick else settings.rounds)
        prompt = 3 * length // 4
        arms: dict[str, Any] = {name: {"skipped": "drops no token"} for name in names}
        samples: dict[str, list[float]] = {}
        scores: dict[str, Score] = {}
        timer = timer_for("cpu")
        for ids in windows[:, None]:
            past = prefill(plain.model, ids[:, :prompt])
            watch.say("dynamic")
            wanted = _steps(make_arm("dynamic", plain.model, prepared, past, length), ids[:, prompt:])
            for name in (name for name in names if name in EVICTIONS):
                watch.say(name)
                arm = evicting_arm(name, prepared, ids[:, :prompt], length)
                seconds, found = timer.time(lambda arm=arm, ids=ids: _steps(arm, ids[:, prompt:]))
                samples.setdefault(name, []).append(seconds / (length - prompt))
                scores.setdefault(name, Score()).add(found[0], wanted[0], ids[0, prompt:])
                arms[name] = _bytes(arm, plain, length, policy(name, prompt))
                watch.tick(name)
        hunters: dict[str, pass_keys.Call] = {
            "dense": lambda ids, logits_to_keep: plain.model(ids, logits_to_keep=logits_to_keep).logits
        }
        hunters |= {name: key_reader(name, prepared) for name in scores}
        hunted, _ = pass_keys.measure(plain, hunters, prompt, 2 if settings.quick else self.keys, watch)
        for name in scores:
            arms[name]["pass_key"] = {**hunted[name]["pass_key"], "dense": hunted["dense"]["pass_key"]["found"]}
        arms, spreads = _with_quality(arms, samples, scores)
        if peers := [name for name in names if name in kvpress_arms.ARMS]:
            watch.say("kvpress")
            arms |= self._kvpress(plain, windows, prompt, peers, hunted["dense"]["pass_key"], settings)
        return arms, spreads

    def _kvpress(
        self,
        plain: ZooModel,
        windows: Tensor,
        prompt: int,
        names: Sequence[str],
        dense: dict[str, Any],
        settings: Settings,
    ) -> dict[str, Any]:
        keys = list(hunts(plain.tokenizer, austen_text(), prompt, dense["tries"]))
        few = min(32, prompt // 8)
        found = kvpress_arms.measure(plain.model, names, windows, prompt, keys, few, settings.threads)
        whole = cache_bytes(plain, windows.shape[1])
        return {name: kvpress_arms.told(arm, whole, dense["found"]) for name, arm in found.items()}

    def _generate(
        self, plain: ZooModel, prepared: Any, names: Sequence[str], length: int, settings: Settings, watch: Watch
    ) -> tuple[dict[str, Any], dict[str, Spread]]:
        count, tokens = (2, 8) if settings.quick else (self.prompts, self.tokens)
        windows = token_windows(plain.tokenizer, pydoc_text(), length, count)
        given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        arms: dict[str, Any] = {name: {"skipped": "generate is compared for compressed caches"} for name in names}
        samples: dict[str, list[float]] = {}
        same: dict[str, list[int]] = {}
        timer = timer_for("cpu")
        for ids in windows[:, None]:
            wanted = plain.model.generate(ids, cache_implementation="static", disable_compile=True, **given)
            for name in (name for name in names if name in FORMATS):
                watch.say(name)
                cache = eff.kv_cache(prepared, spelled(name, self._ranges(name, plain)), capacity=length + tokens)
                seconds, found = timer.time(
                    lambda cache=cache, ids=ids: prepared.generate(
                        ids, past_key_values=cache, disable_compile=True, **given
                    )
                )
                samples.setdefault(name, []).append(seconds / tokens)
                agreed = (found[0, length:] == wanted[0, length:]).int().cumprod(0).sum()
                same.setdefault(name, []).append(int(agreed))
                watch.tick(name)
        spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
        for name, spread in spreads.items():
            equal = sum(n == tokens for n in same[name])
            told = {"prompts": count, "tokens": tokens, "equal_prompts": equal, "equal_tokens": same[name]}
            arms[name] = {"seconds": spread.to_json(), "policy": FORMATS[name], "generate": told}
        return arms, spreads


def _steps(arm: CacheArm, ids: Tensor) -> Tensor:
    """Feed tokens one by one; return the logits `[1, S, V]`."""
    return torch.cat([arm.call(ids[:, place : place + 1]).clone() for place in range(ids.shape[1])], 1)


def _with_quality(
    arms: dict[str, Any], samples: dict[str, list[float]], scores: dict[str, Score]
) -> tuple[dict[str, Any], dict[str, Spread]]:
    """Add to each arm that ran its seconds and what its model says; return the arms and the spreads."""
    spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
    for name, spread in spreads.items():
        arms[name] = {"seconds": spread.to_json(), **arms[name], "quality": {"pydoc": scores[name].to_json()}}
    return arms, spreads


def _bytes(arm: CacheArm, loaded: ZooModel, length: int, policy: str) -> dict[str, Any]:
    held = arm.nbytes()
    return {"policy": policy, "bytes": held, "bytes_ratio": float(f"{held / cache_bytes(loaded, length):.4g}")}


def cache_bytes(loaded: ZooModel, length: int) -> int:
    """Return the bytes of keys and values of so many tokens in bfloat16."""
    config: Any = loaded.model.config
    heads, depth = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * heads * depth * length)
