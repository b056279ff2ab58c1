"""Measure attention over a map of blocks, with its selector, against dense causal SDPA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import table_case
from bench.case import Case, Row, Settings, Watch
from bench.numerics import max_error
from bench.table_case import Kernel, seeded
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL

ARMS = ("sdpa-causal", "block-topk", "selector", "kernel", "gather")
_SAMPLE = 512  # last queries on which the kernel is compared with SDPA under the map as a tensor


@dataclass(frozen=True)
class SparseAttention(Case):
    """Time causal attention alone: dense, and over the blocks that block-topk chooses."""

    name: ClassVar[str] = "sparse-attention"
    title: ClassVar[str] = "Sparse attention"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "One causal self-attention, batch 1, 9 query and 3 key/value heads of dimension 64, no model around it. sdpa-causal is "
        "torch's SDPA with is_causal; block-topk chooses blocks and computes them, every call anew; selector and kernel are its "
        "two parts; gather computes the same map with torch operations (gathered keys, one product a group of blocks). density "
        "is kept over allowed pairs. The inputs are noise: this is about speed, the case sparse-quality about quality."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    lengths: tuple[int, ...] = (2048, 8192)
    densities: tuple[float, ...] = (0.1,)
    blocks: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the ways; dense SDPA is the baseline."""
        return ARMS

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return length x block x density x dtype."""
        lengths = settings.lengths or ((1024,) if settings.quick else self.lengths)
        shape = {"batch": 1, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return [
            Row(
                f"{n}-b{block}-{density}-{dtype}",
                {**shape, "length": n, "block": block, "density": density, "dtype": dtype},
            )
            for n in lengths
            for block in self.blocks
            for density in self.densities
            for dtype in self.dtypes
            if not settings.dtypes or dtype in settings.dtypes
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Check the kernel on the row's own map, then time all ways."""
        from effcompile import ops

        ops.register()
        torch.set_num_threads(settings.threads)
        problem = Problem.of(row)
        chosen = problem.choose()
        kept, error = problem.kept(chosen), problem.error(chosen)
        arms = self.chosen_arms(settings)
        kernels = {name: kernel for name, kernel in problem.kernels(chosen).items() if name in arms}
        found = table_case.measure(row, kernels, settings, watch, useful_flops=problem.flops(1.0))
        for name, arm in found["arms"].items():
            arm.pop("max_error", None)  # of another function: dense attention
            if name == "kernel":
                arm["error_on_its_map"] = float(f"{error:.3g}")
        found["density"] = round(kept, 4)
        return [found]


@dataclass(frozen=True)
class Problem:
    """Hold the tensors of a row."""

    q: Tensor
    k: Tensor
    v: Tensor
    block: int
    density: float

    @classmethod
    def of(cls, row: Row) -> Problem:
        """Draw the tensors of a row, in the layout that projections leave: positions before heads."""
        at = row.parameters
        length, dim, dtype = int(at["length"]), int(at["head_dim"]), str(at["dtype"])
        heads = (int(at["heads"]), int(at["kv_heads"]), int(at["kv_heads"]))
        q, k, v = (
            seeded((int(at["batch"]), length, count, dim), dtype, "cpu", seed).transpose(1, 2)
            for seed, count in enumerate(heads, 1)
        )
        return cls(q, k, v, int(at["block"]), float(at["density"]))

    @property
    def keep(self) -> str:
        """Return causal order as the ops take it."""
        return to_json(CAUSAL.keep)

    @property
    def scale(self) -> float:
        """Return SDPA's own scale."""
        return float(self.q.shape[3]) ** -0.5

    def flops(self, share: float) -> float:
        """Return the FLOP of a share of the allowed pairs."""
        return 4.0 * self.q.shape[1] * self.q.shape[2] * (self.q.shape[2] + 1) / 2 * self.q.shape[3] * share

    def choose(self) -> Tensor:
        """Return block-topk's map."""
        operands = (self.q, self.k, [], [], self.keep, self.density, self.block, self.block)
        chosen: Tensor = torch.ops.eff.topk_blocks_v1(*operands)
        return chosen

    def attend(self, chosen: Tensor) -> Tensor:
        """Compute attention over a map."""
        operands = (self.q, self.k, self.v, chosen, [], [], self.keep, "zero", self.scale, self.block, self.block)
        out: Tensor = torch.ops.eff.attention_blocks_v1(*operands)
        return out

    def pairs(self, chosen: Tensor, rows: slice) -> Tensor:
        """Return which pairs of some rows a map keeps `[1, H, R, K]`."""
        length = self.q.shape[2]
        at = torch.arange(length)[rows]
        wide = chosen[:, :, at // self.block].repeat_interleave(self.block, 3)[..., :length]
        return wide & (torch.arange(length) <= at[:, None])

    def kept(self, chosen: Tensor) -> float:
        """Return kept over allowed pairs, counted pair by pair."""
        length, total = self.q.shape[2], 0
        for begin in range(0, length, _SAMPLE):
            total += int(self.pairs(chosen, slice(begin, begin + _SAMPLE)).sum())
        return total / (self.q.shape[1] * length * (length + 1) / 2)

    def error(self, chosen: Tensor) -> float:
        """Return the largest difference to SDPA in float64 under the map as a tensor, on the last rows."""
        rows = slice(self.q.shape[2] - _SAMPLE, self.q.shape[2])
        kept = self.pairs(chosen, rows)
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (self.k, self.v))
        exact = F.scaled_dot_product_attention(self.q[:, :, rows].double(), k, v, attn_mask=kept)
        return max_error(self.attend(chosen)[:, :, rows].double(), exact)

    def kernels(self, chosen: Tensor) -> dict[str, Kernel | str]:
        """Return every way."""
        from effcompile.ops.attention_blocks import gathered

        blocks = (self.block, self.block)
        share = self.kept(chosen)

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=True)

        def gather() -> Tensor:
            return gathered(self.q, self.k, self.v, chosen, [], [], self.keep, self.scale, *blocks)[0]

        def kernel(call: Callable[[], Tensor], flops: float) -> Kernel:
            return Kernel(lambda: call, flops, {"density": round(share, 4)})

        def select() -> Tensor:
            self.choose()
            return self.q  # of the shape of the others' results

        work = self.flops(share)
        return {
            "sdpa-causal": Kernel(lambda: dense, self.flops(1.0)),
            "block-topk": kernel(lambda: self.attend(self.choose()), work),
            "selector": kernel(select, 0.0),
            "kernel": kernel(lambda: self.attend(chosen), work),
            "gather": kernel(gather, work),
        }
