"""Fill KV caches of every kind with the same tokens, and set them back to that between measurements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import effcompile as eff
from bench import arms_onnx_cache
from bench.workload import primary

FORMATS: Mapping[str, str] = {
    "plain": "plain",
    "int8": "int8-per-token",
    "fp8": "fp8",
    "kivi-4": "kivi{bits=4,group=32,residual=128}",
    "kivi-2": "kivi{bits=2,group=32,residual=128}",
    "static-8": "static-channel{bits=8}",
    "static-4": "static-channel{bits=4}",
    "two-plane": "two-plane{theta=0.1}",
    "two-plane-stale": "two-plane{theta=0.1,stale=True}",
    "zipvl": "zipvl-mixed{mass=0.97}",
}
"""What is measured, by the name of its arm."""
ALL_JUDGE = 2048
"""Let every query of a prompt judge up to this length; beyond it some do, since their number goes with the square."""
MIXED = ("zipvl",)
"""Arms that read a prompt by themselves, since where a token goes depends on the queries."""
EVICTIONS: Mapping[str, tuple[str, str]] = {
    "sink-window": ("plain", "sink-window{{window={rest},sinks=4}}"),
    "snapkv": ("plain", "snapkv{{budget={half},window={few}}}"),
    "snapkv-kivi-4": ("kivi{bits=4,group=32,residual=128}", "snapkv{{budget={half},window={few}}}"),
    "expected-attention": ("plain", "expected-attention{{keep=0.5,least=16}}"),
    "keyformer": ("plain", "keyformer{{keep=0.5,least=16{probes}}}"),
    "keyformer-silent": ("plain", "keyformer{{keep=0.5,least=16,noise=False{probes}}}"),
    "keyformer-int8": ("int8-per-token", "keyformer{{keep=0.5,least=16{probes}}}"),
}
"""Format and eviction of an arm that holds half of its prompt."""
PEERS = ("static-inductor", "static-eff", "quantized-quanto", "quantized-hqq", "dynamic")
Past = list[tuple[Tensor, Tensor]]
"""Keys and values `[1, Hkv, S, D]` of every layer."""


@dataclass(frozen=True)
class CacheArm:
    """Hold a way to decode: `call` takes token ids `[1, n]` and returns their logits `[1, n, V]`.

    `rewind` sets the cache back to the prompt; `nbytes` counts the bytes that it holds now. `fill` gives the cache another prompt
    of as many tokens, so that what was compiled for it serves again; None where an arm has to be made anew for that.
    """

    call: Callable[[Tensor], Tensor]
    rewind: Callable[[], None]
    nbytes: Callable[[], int]
    fill: Callable[[Past], None] | None = None


def twin(model: Any) -> Any:
    """Return a copy of a model that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def shorten(model: Any, layers: int) -> None:
    """Leave the first layers of a decoder, whose numbers mean nothing then: for runs that only see whether all goes well."""
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]


def prefill(model: Any, ids: Tensor) -> Past:
    """Run the unmodified model over a prompt and return its keys and values."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def policy(name: str, prompt: int = 0) -> str:
    """Return what an arm of ours does with a prompt of so many tokens, or which export it is; '' for others."""
    if name in EVICTIONS:
        return " evict=".join(evicting(name, prompt))
    return arms_onnx_cache.title(name) if name in arms_onnx_cache.EXPORTS else FORMATS.get(name, "")


def spelled(name: str, ranges: str) -> str:
    """Return the format of an arm, with the file of ranges where it needs one."""
    form = FORMATS[name]
    return form.replace("}", f",ranges={ranges}}}") if form.startswith("static-channel") else form


def evicting(name: str, prompt: int) -> tuple[str, str]:
    """Return format and eviction of an arm, spelled for a prompt of so many tokens."""
    form, policy = EVICTIONS[name]
    half = prompt // 2
    probes = ",probes=128" if prompt > ALL_JUDGE else ""
    return form, policy.format(half=half, rest=half - 4, few=min(32, half // 4), probes=probes)


def evicting_arm(name: str, prepared: Any, prompt: Tensor, capacity: int, backend: str = "") -> CacheArm:
    """Return an arm that reads a prompt `[1, n]` by itself, since what it drops depends on the queries.

    Its steps are eager unless `backend` names a compiler: arms that are compared by what the model says need none.
    """
    form, policy = evicting(name, prompt.shape[1])
    cache: Any = eff.kv_cache(prepared, form, evict=policy, capacity=capacity)
    prepared(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    states = [layer.state for layer in cache.packed]
    saved = [{part: tensor.clone() for part, tensor in state.items()} for state in states]

    def rewind() -> None:
        for state, kept in zip(states, saved):
            for part, tensor in kept.items():
                state[part].copy_(tensor)

    return CacheArm(_stepper(_compiled(prepared, backend) if backend else prepared, cache), rewind, cache.nbytes)


def key_reader(name: str, prepared: Any) -> Callable[..., Tensor]:
    """Return how an arm that drops tokens looks for pass keys: it reads a prompt, then the answer token by token."""

    def call(ids: Tensor, logits_to_keep: int) -> Tensor:
        cut = ids.shape[1] - logits_to_keep
        form, policy = evicting(name, cut)
        cache: Any = eff.kv_cache(prepared, form, evict=policy, capacity=ids.shape[1])
        prepared(ids[:, :cut], past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = _stepper(prepared, cache)
        return torch.cat([step(ids[:, n : n + 1]) for n in range(cut, ids.shape[1])], 1)

    return call


def make_arm(
    name: str, plain: Any, prepared: Any, past: Past, capacity: int, ranges: str = "", prompt: Tensor | None = None
) -> CacheArm:
    """Return an arm whose cache holds `past`, the tokens of `prompt` `[1, n]`, and has place for `capacity` tokens.

    `plain` and `prepared` are two copies of one model, the second one prepared for compressed caches; `ranges` is a file of
    `eff.calibrate_kv`.

    Raises:
        ImportError: for a quantized cache of transformers whose package is not installed.
    """
    if name in arms_onnx_cache.EXPORTS:
        made = arms_onnx_cache.make(name, plain, past, ranges)
        return CacheArm(made.step, made.rewind, made.nbytes, made.fill)
    if name in FORMATS:
        mixed = name in MIXED
        cache: Any = eff.kv_cache(prepared, spelled(name, ranges), capacity=capacity, batch=None if mixed else 1)
        if mixed:
            prepared(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        kept: list[dict[str, Tensor]] = []

        def fill(past: Past) -> None:
            cache.reset()
            for layer, (k, v) in zip(cache.packed, past):
                layer.append(k, v)
            keep()

        def keep() -> None:
            kept[:] = [{part: tensor.clone() for part, tensor in layer.state.items()} for layer in cache.packed]

        def rewind() -> None:
            for layer, saved in zip(cache.packed, kept):
                for part, tensor in saved.items():
                    layer.state[part].copy_(tensor)

        if mixed:
            keep()
        else:
            fill(past)
        step = _stepper(_compiled(prepared, "eff"), cache)
        return CacheArm(step, rewind, cache.nbytes, None if mixed else fill)
    cache = _own_cache(name, plain, capacity)
    held: list[dict[str, Any]] = []

    def refill(past: Past) -> None:
        cache.reset()
        put(past)

    def put(past: Past) -> None:
        for number, (k, v) in enumerate(past):
            cache.update(k, v, number)
        # What a layer holds is replaced by the next update, or counted by a tensor.
        held[:] = [
            {
                key: value.clone() if key == "cumulative_length" and isinstance(value, Tensor) else value
                for key, value in vars(layer).items()
            }
            for layer in cache.layers
        ]

    put(past)
    function = plain if "-" not in name or "quantized" in name else _compiled(plain, name.partition("-")[2])

    def reset() -> None:
        for layer, saved in zip(cache.layers, held):
            for key, value in saved.items():
                if key == "cumulative_length" and isinstance(value, Tensor):
                    layer.cumulative_length.copy_(value)
                else:
                    setattr(layer, key, value)

    size = lambda: sum(_bytes(vars(layer)) for layer in cache.layers)  # noqa: E731
    return CacheArm(_stepper(function, cache), reset, size, refill if name.startswith("static") else None)


def _own_cache(name: str, model: Any, capacity: int) -> Any:
    from transformers import DynamicCache, QuantizedCache, StaticCache

    kind, _, backend = name.partition("-")
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=capacity)
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return QuantizedCache(backend, model.config, nbits=4, q_group_size=32, residual_length=128, **_AXES[backend])


_AXES = {"quanto": {"axis_key": 0, "axis_value": 0}, "hqq": {"axis_key": 1, "axis_value": 1}}
"""Both backends' own choice of axis where they offer one."""


def _compiled(model: Any, backend: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"strict": True} if backend == "eff" else {}
    found: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False, options=options or None)
    return found


def _stepper(function: Callable[..., Any], cache: Any) -> Callable[[Tensor], Tensor]:
    def call(ids: Tensor) -> Tensor:
        logits: Tensor = primary(function(ids, past_key_values=cache, use_cache=True))
        return logits

    return call


def _bytes(value: Any) -> int:
    """Return the bytes of all tensors inside a value, of packed tensors those that they are made of."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
            names, _ = value.__tensor_flatten__()
            return sum(_bytes(getattr(value, name)) for name in names)
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0
