"""Measure the rate of every attention kernel over dtype, length, head dimension and mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import table_case
from bench.case import Case, Row, Settings, Watch
from bench.sparse_arms import DENSITIES, SELECTORS, sparse_kernels
from bench.table_case import Kernel, seeded
from effcompile.core.expr import BATCH, BOOL, KEY, QUERY, TRUE, Expr, apply, axis, const, load
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.intervals import block_bounds
from effcompile.ops.tiled import K_BLOCK, Q_BLOCK

KERNELS = ("dense", "sdpa", "sdpa-causal", "padded", "blocked", "tiled", "span", "flex", "math")
SPARSE = (*(f"blocks-{density}" for density in DENSITIES), *(f"choose-{name}" for name in SELECTORS))
SQUARE = ("full", "causal", "window", "padding", "causal-padding", "documents")
DECODE = ("decode", "decode-mask")
MASKS = (*SQUARE, *DECODE)
_FLEX_BLOCK = 128


@dataclass(frozen=True)
class AttentionTable(Case):
    """Time each kernel of lowering/attention on the masks it can run; `gflops` counts the pairs that it visits."""

    name: ClassVar[str] = "attention-table"
    title: ClassVar[str] = "Attention kernels"
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = True
    about: ClassVar[str] = (
        "GFLOP/s over the (query, key) pairs that a kernel visits (useful_gflops: over those the mask keeps). Batch "
        "2, 9 query and 3 key/value heads; window 256; half of the positions are padding on the left (3/4 and 1/4 "
        "real); documents of S/4. decode is one query over S keys, decode-mask with 3/4 of them kept by a mask row. blocks-X is "
        "the kernel of block maps on a random map with a share X of the blocks (128 x 128; in decode, pages of 16 keys); "
        "choose-X is the selector of a policy with its default settings, and its flops are those of its products."
    )
    form_words: ClassVar[tuple[str, ...]] = MASKS
    lengths: tuple[int, ...] = (32, 128, 256, 512, 1024, 2048, 4096)
    decode_lengths: tuple[int, ...] = (8192, 16384, 32768)
    """More lengths for one query: there the choice of pages begins to pay."""
    head_dim: int = 64
    other_head_dims: tuple[int, ...] = (32, 128)
    """At one length only: the rate depends on the head dimension and on the length by nearly independent factors."""
    other_length: int = 1024
    masks: tuple[str, ...] = MASKS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch: int = 2
    heads: int = 9
    kv_heads: int = 3
    window: int = 256

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the kernels; the dense mask is the baseline."""
        return (*KERNELS, *SPARSE) if device == "cpu" else ("dense", "sdpa", "sdpa-causal", "flex", "math")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return length x mask x dtype, and every head dimension at one length; `--forms` names masks."""
        lengths = settings.lengths or ((256,) if settings.quick else (*self.lengths, *self.decode_lengths))
        shape = {"batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads}
        return [
            Row(f"{n}-d{dim}-{mask}-{dtype}", {**shape, "length": n, "head_dim": dim, "mask": mask, "dtype": dtype})
            for n in lengths
            for dim in (self.head_dim, *(self.other_head_dims if n == self.other_length else ()))
            for mask in self.masks
            if (not settings.forms or mask in settings.forms) and (mask in DECODE or n not in self.decode_lengths)
            for dtype in self.dtypes
            if not settings.dtypes or dtype in settings.dtypes
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure the kernels that can run the row's mask."""
        from effcompile import ops

        ops.register()
        problem = Problem.of(row, settings.device, self.window)
        chosen = self.chosen_arms(settings)
        known = problem.kernels() | (sparse_kernels(problem) if settings.device == "cpu" else {})
        kernels = {name: kernel for name, kernel in known.items() if name in chosen}
        return [table_case.measure(row, kernels, settings, watch, useful_flops=problem.flops(problem.kept()))]


@dataclass(frozen=True)
class Problem:
    """Hold the tensors of a row, its mask as a predicate and as the tensor a model would have built."""

    q: Tensor
    k: Tensor
    v: Tensor
    kind: str
    predicate: Expr
    loads: tuple[Tensor, ...]
    window: int

    @classmethod
    def of(cls, row: Row, device: str, window: int) -> Problem:
        """Draw the tensors of a row."""
        at = row.parameters
        batch, length, dim, dtype = int(at["batch"]), int(at["length"]), int(at["head_dim"]), str(at["dtype"])
        queries = 1 if str(at["mask"]) in DECODE else length
        q = seeded((batch, int(at["heads"]), queries, dim), dtype, device, 1)
        k, v = (seeded((batch, int(at["kv_heads"]), length, dim), dtype, device, seed) for seed in (2, 3))
        predicate, loads = predicate_of(str(at["mask"]), batch, length, window, device)
        return cls(q, k, v, str(at["mask"]), predicate, loads, window)

    @property
    def extents(self) -> tuple[int, int, int, int]:
        """Return batch, query heads, queries, keys."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]

    def mask(self) -> Tensor | None:
        """Return the bool tensor `[B|1, 1, S, S]`, or None for a full mask."""
        if self.kind in ("full", "decode"):
            return None
        batch, _, rows, columns = self.extents
        sizes = (batch, 1, rows, columns)
        axes = [
            torch.arange(n, device=self.q.device).reshape([n if d == at else 1 for d in range(4)])
            for at, n in enumerate(sizes)
        ]
        value = evaluate(self.predicate, axes, self.loads, ())
        return value.expand(value.shape[0], 1, rows, columns).contiguous()

    def kept(self) -> float:
        """Return the share of all pairs that the mask keeps."""
        mask = self.mask()
        return 1.0 if mask is None else float(mask.float().mean())

    def flops(self, share: float) -> float:
        """Return the FLOP of a share of all pairs."""
        return 4.0 * math.prod(self.extents) * int(self.q.shape[3]) * share

    def visited(self, block: tuple[int, int]) -> float:
        """Return the share of pairs in blocks that a block-skipping kernel visits."""
        _, some = block_bounds(self.predicate, self.extents, block, self.loads, (), self.q.device)
        return float(some.float().mean())

    def kernels(self) -> dict[str, Kernel | str]:
        """Return every kernel, or why it does not run this mask."""
        scale, gqa = self.q.shape[3] ** -0.5, {"enable_gqa": True}
        mask = self.mask()
        padded, causal = self.kind in ("padding", "causal-padding"), self.kind in ("causal", "causal-padding")

        def sdpa(**options: Any) -> Callable[[], Callable[[], Tensor]]:
            return lambda: lambda: F.scaled_dot_product_attention(self.q, self.k, self.v, **gqa, **options)

        found: dict[str, Kernel | str] = {
            "dense": Kernel(sdpa(attn_mask=mask), self.flops(1.0)) if mask is not None else "there is no mask",
            "sdpa": Kernel(sdpa(), self.flops(1.0)) if mask is None else "the mask is not full",
            "sdpa-causal": Kernel(sdpa(is_causal=True), self.flops(0.5))
            if self.kind == "causal"
            else "not causal alone",
            "padded": "the mask is not key padding",
            "blocked": "there is no mask",
            "tiled": "one query",
            "span": self._kernel(self._span, self.kept()) if self.kind == "decode-mask" else "the last key is not data",
            "flex": self._kernel(self._flex, self.visited((_FLEX_BLOCK, _FLEX_BLOCK)))
            if mask is not None and self.extents[2] > 1
            else "no mask, or one query",
            "math": self._kernel(self._math, 1.0)
            if self.kind in ("full", "causal", *DECODE)
            else "reads the mask as a tensor, as under causal",
        }
        if padded:
            keep = self.loads[0]
            real = keep.float().mean(-1)
            # With causal order the padded queries are skipped too; without it every query reads the real keys.
            share = 0.5 * float((real**2).mean()) if causal else float(real.mean())
            op = torch.ops.eff.attention_padded_v2
            found["padded"] = self._kernel(
                lambda: lambda: op(self.q, self.k, self.v, None, keep, causal, "zero", scale), share
            )
        if mask is not None and self.extents[2] > 1:
            blocked = torch.ops.eff.attention_blocked_v2
            text, loads = to_json(self.predicate), list(self.loads)
            found["blocked"] = self._kernel(
                lambda: lambda: blocked(self.q, self.k, self.v, None, loads, [], text, "zero", scale),
                self.visited((256, 64)),
            )
        if self.extents[2] > 1:
            tiled = torch.ops.eff.attention_tiled_v1
            words, data = to_json(self.predicate), list(self.loads)
            found["tiled"] = self._kernel(
                lambda: lambda: tiled(self.q, self.k, self.v, None, data, [], words, "zero", scale),
                self.visited((Q_BLOCK, K_BLOCK)),
            )
        return found

    def _kernel(self, build: Callable[[], Callable[[], Tensor]], share: float) -> Kernel:
        return Kernel(build, self.flops(share), {"visited": round(share, 4)})

    def _span(self) -> Callable[[], Tensor]:
        last = self.loads[0].sum(-1) - 1  # of each sequence: its first keys are there
        span, scale = torch.stack([torch.zeros_like(last), last]), self.q.shape[3] ** -0.5
        op = torch.ops.eff.attention_span_v1
        return lambda: op(self.q, self.k, self.v, None, None, span, "zero", scale)

    def _flex(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        keep = _mask_of(self.kind, self.loads, self.window)
        block_mask = None
        if keep is not None:
            batch = self.q.shape[0] if "padding" in self.kind else None
            rows = self.q.shape[2]
            block_mask = create_block_mask(
                keep, batch, None, rows, rows, device=str(self.q.device), BLOCK_SIZE=_FLEX_BLOCK
            )
        return lambda: compiled(self.q, self.k, self.v, block_mask=block_mask, enable_gqa=True)

    def _math(self) -> Callable[[], Tensor]:
        mask, group = self.mask(), self.q.shape[1] // self.k.shape[1]

        def run() -> Tensor:
            k, v = (x.repeat_interleave(group, 1) for x in (self.k, self.v))
            scores = (self.q @ k.transpose(-1, -2)) * self.q.shape[3] ** -0.5
            scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
            return torch.softmax(scores, -1, dtype=torch.float32).nan_to_num(0.0).to(v.dtype) @ v

        # The kernel is a chain of ATen operations, which TorchInductor compiles.
        return torch.compile(run, dynamic=False)


def predicate_of(kind: str, batch: int, length: int, window: int, device: str) -> tuple[Expr, tuple[Tensor, ...]]:
    query, key = axis(QUERY), axis(KEY)
    causal = apply("le", key, query)
    padding = load(0, (axis(BATCH), key), BOOL)
    documents = torch.arange(length, device=device) * 4 // length
    # Left padding, 3/4 and 1/4 of the bucket real: half on average.
    real = torch.tensor(
        [length - length // 4 if number % 2 == 0 else length // 4 for number in range(batch)], device=device
    )
    keep = torch.arange(length, device=device)[None, :] >= length - real[:, None]
    same = apply("eq", load(0, (query,), torch.int64), load(0, (key,), torch.int64))
    table: dict[str, tuple[Expr, tuple[Tensor, ...]]] = {
        "full": (TRUE, ()),
        "causal": (causal, ()),
        "window": (apply("and", causal, apply("gt", key, apply("sub", query, const(window)))), ()),
        "padding": (padding, (keep,)),
        "causal-padding": (apply("and", causal, padding), (keep,)),
        "documents": (apply("and", causal, same), (documents,)),
        "decode": (TRUE, ()),
        "decode-mask": (padding, (_filled(batch, length, device),)),
    }
    return table[kind]


def _filled(batch: int, length: int, device: str) -> Tensor:
    """Return which of `[B, S]` keys a cache holds: the first three quarters."""
    return torch.arange(length, device=device)[None, :].expand(batch, length) < length - length // 4


def _mask_of(kind: str, loads: tuple[Tensor, ...], window: int) -> Callable[..., Any] | None:
    """Return the mask as FlexAttention's function, spelled as a user would; None where there is no mask."""
    table: dict[str, Callable[..., Any]] = {
        "causal": lambda b, h, i, j: j <= i,
        "window": lambda b, h, i, j: (j <= i) & (j > i - window),
        "padding": lambda b, h, i, j: loads[0][b, j],
        "causal-padding": lambda b, h, i, j: (j <= i) & loads[0][b, j],
        "documents": lambda b, h, i, j: (j <= i) & (loads[0][i] == loads[0][j]),
    }
    return table.get(kind)
