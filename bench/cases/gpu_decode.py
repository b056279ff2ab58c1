"""Check and time attention of one token over packed KV caches on a GPU, beside FlashAttention and cuDNN over unpacked ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import gpu_arms
from bench.case import Case, Row, Settings, Watch
from bench.cases.gpu_attention import skipped, take_turns
from bench.exact import banded, sample
from bench.gpu_arms import Arm
from bench.gpu_problems import Problem
from bench.peers import release
from effcompile.core.cache import CacheShape, Storage
from effcompile.ops.kv.grouped import Grouped
from effcompile.ops.kv.per_token import PerToken8

STORAGES: dict[str, Storage] = {
    "int8": PerToken8(),
    "fp8": PerToken8(floats=True),
    "kivi-4": Grouped(4, 32, 128),
    "kivi-2": Grouped(2, 32, 128),
}
ARMS = ("flash", "cudnn", *STORAGES, "block-topk")
_CHUNK = 4096  # tokens that are packed at a time
PAGE = 16


@dataclass(frozen=True)
class GpuDecode(Case):
    """Time one layer's attention of a decode step of an 8B model."""

    name: ClassVar[str] = "gpu-decode"
    title: ClassVar[str] = "Decode attention on a GPU over packed KV caches"
    headline: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    about: ClassVar[str] = (
        "One layer, 32 query and 8 key/value heads of 128, one new token in each of 16 sequences, bfloat16, random data. flash and "
        "cudnn read the unpacked cache; the others a packed one, each compared with float64 over what it holds; block-topk reads a "
        "sixteenth of unpacked pages. Caches are larger than L2, so none is in it."
    )
    form_words: ClassVar[tuple[str, ...]] = ("decode",)
    dtype_words: ClassVar[tuple[str, ...]] = ("bfloat16",)
    lengths: tuple[int, ...] = (32768, 8192)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    sequences: int = 16
    seconds: float = 330.0
    begun: list[float] = field(default_factory=list, compare=False)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return attention over unpacked caches, and over each packed form."""
        return ARMS

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return a row for each length, the longest first."""
        lengths = settings.lengths or ((2048,) if settings.quick else self.lengths)
        return [Row(f"decode-{n}", {"form": "decode", "length": n}) for n in lengths]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Check every arm of a row against float64, then let those that agree take turns."""
        from effcompile import ops

        ops.register()
        names = self.chosen_arms(settings)
        if not self.begun:
            self.begun.append(time.monotonic())
        if self.seconds and time.monotonic() - self.begun[0] > self.seconds:
            return [skipped(row, settings, names, self.seconds)]
        release()
        with torch.no_grad():
            return [
                take_turns(
                    self.problem(int(row.parameters["length"]), settings.device, names), row, names, settings, watch
                )
            ]

    def problem(self, length: int, device: str, names: Sequence[str] = ARMS) -> Problem:
        """Set up a row: q `[B, Hq, 1, D]`, and caches of `length` tokens of which the last is that of the step."""
        draw = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "generator": draw, "dtype": torch.bfloat16}
        q = torch.randn((self.sequences, self.heads, 1, self.head_dim), **options)
        k, v = (torch.randn((self.sequences, self.kv_heads, length, self.head_dim), **options) for _ in range(2))
        scale = self.head_dim**-0.5
        whole = sample(q, k, v, banded(1, length, 0), scale)
        arms: dict[str, Arm] = {}
        if "flash" in names:
            arms["flash"] = gpu_arms.sdpa("FLASH_ATTENTION", whole, scale=scale)
        if "cudnn" in names:
            arms["cudnn"] = gpu_arms.sdpa("CUDNN_ATTENTION", whole, scale=scale)
        for name in (name for name in STORAGES if name in names):
            arms[name] = _packed(STORAGES[name], q, k, v, scale)
        if "block-topk" in names:
            arms["block-topk"] = _pages(q, k, v, scale, max(1, length // PAGE // 16))
        return Problem([(q, k, v)], arms)


def _packed(storage: Storage, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Arm:
    """Return attention over a packed cache of the same tokens; the last one is read as it is."""
    batch, heads, length, depth = k.shape
    shape = CacheShape(batch, heads, storage.capacity(length), depth, v.shape[3], k.dtype, k.device)
    state = {
        name: torch.zeros(size, dtype=dtype, device=k.device) for name, (size, dtype) in storage.tensors(shape).items()
    }
    state |= {name: torch.zeros((), dtype=torch.int64, device=k.device) for name in storage.counters}
    for first in range(0, length - 1, _CHUNK):
        last = min(first + _CHUNK, length - 1)
        storage.append(state, k[:, :, first:last], v[:, :, first:last])
    new = (k[:, :, -1:].contiguous(), v[:, :, -1:].contiguous())
    storage.append(state, *new)
    held = storage.read(state, 0, length - 1, torch.bfloat16)
    keys, values = (torch.cat([old[..., : x.shape[3]], x], 2) for old, x in zip(held, new))
    exact = sample(q, keys, values, banded(1, length, 0), scale)

    def run(q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return storage.attend(state, q, *new, None, False, scale, 0.0, 0, "")[:2]

    return gpu_arms.ours(run, exact)


def _pages(q: Tensor, k: Tensor, v: Tensor, scale: float, count: int) -> Arm:
    """Return attention over `count` chosen pages of 16 of the unpacked cache: choice by centroids that are there, and reading."""
    batch, heads, length, _ = k.shape
    k, v = (x[:, :, : length // PAGE * PAGE].unflatten(2, (-1, PAGE)) for x in (k, v))
    centroids = k.float().mean(3).to(k.dtype)
    lengths = torch.full((batch,), length // PAGE * PAGE, dtype=torch.int32, device=q.device)

    def chosen(q: Tensor) -> Tensor:
        mean = q.unflatten(1, (heads, -1)).mean(2)
        return (mean @ centroids.transpose(2, 3))[:, :, 0].topk(count, 2).indices.sort(2).values.to(torch.int32)

    pages = chosen(q)
    kept = torch.zeros(batch, heads, k.shape[2], dtype=torch.bool, device=q.device).scatter(2, pages.long(), True)
    group = q.shape[1] // heads

    def keep(b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        return kept[b, h // group].repeat_interleave(PAGE, 1)

    exact = sample(q, k.flatten(2, 3), v.flatten(2, 3), keep, scale)

    def run(q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        found: Callable[..., tuple[Tensor, Tensor]] = torch.ops.eff.paged_decode_v1
        return found(q, k, v, lengths, None, chosen(q), None, scale, 0.0, 0)

    return gpu_arms.ours(run, exact)
