"""Price sites and matrix products on a device, and find the lengths from which one kernel beats another.

The floor of a site is the roofline of a one-pass kernel that visits only what the mask keeps: no kernel can be faster
on that device. Crossovers ask the kernels themselves at every length, so that they are the lengths at which the planner
changes its mind.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from effcompile.core.kernel import AttentionKernel, Supported
from effcompile.core.program import Entry
from effcompile.core.site import AttentionSite, shared
from effcompile.core.target import Device, Target
from effcompile.cost.crossover import Crossover, measured_crossover
from effcompile.cost.roofline import Efficiency, bottleneck, time
from effcompile.cost.symbolic import AttentionShape, attention, gemm

NOMINAL = 1024  # what a symbolic size is priced at
_LENGTHS = tuple(2**power for power in range(6, 18))  # 64 to 131,072 tokens
# What runs a site the way its source spells it, cheapest change first: the side that another kernel has to beat.
_WHOLE = Efficiency(overhead=0.0)
_AS_WRITTEN = ("dense", "sdpa", "math")
_PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul")


@dataclass(frozen=True)
class Floor:
    """Hold the roofline time of a site (seconds) and the term that decides it: compute, exp, memory or l2."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Pays:
    """Say from which length `kernel` beats `against`."""

    kernel: str
    against: str
    where: Crossover

    @property
    def decides(self) -> bool:
        """Tell whether the length matters: a kernel that always or never pays has no crossover."""
        return self.where.direction not in ("always", "never")

    def __str__(self) -> str:
        return f"{self.where.text(self.kernel)} against {self.against}"


def extent(value: int | str) -> int:
    """Return a size, or the nominal one for a symbolic size."""
    return value if isinstance(value, int) else NOMINAL


def floor(site: AttentionSite, device: Device, visited: float) -> Floor:
    """Return the roofline of the site, every unit at its peak; `visited` is the share of blocks that the mask leaves."""
    shape = AttentionShape(
        B=extent(site.batch),
        Hq=extent(site.heads),
        Hkv=extent(site.kv_heads),
        Nq=extent(site.q_len),
        Nk=extent(site.kv_len),
        D=site.head_dim,
        Dv=site.value_dim,
    )
    dtype = site.dtype if device.supports(site.dtype) else "float32"
    width = 2 if site.dtype in ("bfloat16", "float16") else 8 if site.dtype == "float64" else 4
    cost = attention(shape, "flash", element_bytes=width, block_density=visited)
    return Floor(float(time(cost, device, dtype, _WHOLE)), bottleneck(cost, device, dtype, _WHOLE))


def crossovers(site: AttentionSite, kernels: Sequence[AttentionKernel], target: Target) -> tuple[Pays, ...]:
    """Return, for every kernel but the one that runs the source as it is written, where it is faster than that one.

    Both lengths grow together in self-attention, the keys alone where there is one query or another source of keys.
    """
    able = {kernel.name: kernel for kernel in kernels if isinstance(kernel.supports(site, target), Supported)}
    written = ("flex", *_AS_WRITTEN) if site.idiom.startswith("flex") else _AS_WRITTEN
    against = next((name for name in written if name in able), None)
    if against is None:
        return ()
    found = []
    base = _times(able[against], site, target)
    for name in sorted(able.keys() - {against}):
        other = _times(able[name], site, target)
        lengths = [length for length in _LENGTHS if length in base and length in other]
        if len(lengths) < 2:
            continue
        where = measured_crossover(lengths, [base[n].seconds for n in lengths], [other[n].seconds for n in lengths])
        found.append(Pays(name, against, _tagged(where, base, other, lengths)))
    return tuple(found)


def _tagged(
    where: Crossover, base: Mapping[int, Supported], other: Mapping[int, Supported], lengths: Sequence[int]
) -> Crossover:
    """Call a crossover measured where the times on both sides of each of its ends are, and give it their error."""
    ends = {end for interval in where.intervals for end in interval} - {where.lo, where.hi}
    near = {n for end in ends for n in _around(end, lengths)} or set(lengths)
    answers = [times[n] for n in near for times in (base, other)]
    if {answer.tag for answer in answers} != {"measured"}:
        return replace(where, tag="modelled")
    errors = [max(times[n].error or 0.0 for n in near) for times in (base, other)]
    return replace(where, tag="measured", fit_error=math.hypot(*errors))


def _around(length: int, lengths: Sequence[int]) -> tuple[int, int]:
    """Return the examined lengths on both sides of one."""
    right = min(max(1, bisect.bisect_left(lengths, length)), len(lengths) - 1)
    return lengths[right - 1], lengths[right]


def _times(kernel: AttentionKernel, site: AttentionSite, target: Target) -> dict[int, Supported]:
    answers = {length: kernel.supports(_at(site, length), target) for length in _LENGTHS}
    return {length: answer for length, answer in answers.items() if isinstance(answer, Supported)}


def _at(site: AttentionSite, length: int) -> AttentionSite:
    if site.q_len == site.kv_len:
        return replace(site, q_len=length, kv_len=length)
    return replace(site, kv_len=length)


def products(entry: Entry, device: Device, values: Mapping[str, int] | None = None) -> float:
    """Return the roofline time of all products with a weight in a captured graph (seconds, modelled).

    `values` are those of symbolic sizes; a size that has none is `NOMINAL`. Products of two activations are attention's,
    which its sites price.
    """
    weights = {item.node for item in entry.inputs if item.kind in ("parameter", "packed")}
    nodes = entry.graph.graph.nodes
    shapes = Counter(
        shape
        for node in nodes
        if _name(node) in _PRODUCTS and _has_weight(node, weights)
        if (shape := _shape(node, values or {})) is not None
    )
    return sum(count * _product(*shape, device) for shape, count in shapes.items())


def _name(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return ""
    return str(node.target.overloadpacket.__name__)


def _has_weight(node: fx.Node, weights: set[str]) -> bool:
    return any(_origin(arg).name in weights for arg in node.args if isinstance(arg, fx.Node))


_LOOKS = ("t", "transpose", "permute", "view", "reshape", "expand", "select", "slice", "to", "unsqueeze", "squeeze")


def _origin(node: fx.Node) -> fx.Node:
    """Follow views and casts back to the value that they look at."""
    while _name(node) in _LOOKS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _shape(node: fx.Node, values: Mapping[str, int]) -> tuple[int, int, int, str, int] | None:
    """Return rows, columns, depth, dtype and bytes an element of `[..., m, k] @ [k, n]`, from the recorded shapes."""
    recorded = [arg.meta.get("val") for arg in node.args if isinstance(arg, fx.Node)]
    tensors = [value for value in recorded if isinstance(value, torch.Tensor)]
    out = node.meta.get("val")
    left = tensors[1] if _name(node) in ("addmm", "baddbmm") and len(tensors) > 1 else tensors[0] if tensors else None
    if left is None or not isinstance(out, torch.Tensor) or not out.dtype.is_floating_point or not out.dim():
        return None
    depth, columns = _number(left.shape[-1], values), _number(out.shape[-1], values)
    rows = math.prod(_number(size, values) for size in out.shape[:-1])
    return rows, columns, depth, str(out.dtype).removeprefix("torch."), out.element_size()


def _product(rows: int, columns: int, depth: int, dtype: str, width: int, device: Device) -> float:
    """Price a product; batched products run as one call."""
    word = dtype if device.supports(dtype) else "float32"  # no units for this dtype: the chip computes it in float32
    return float(time(gemm(rows, columns, depth, element_bytes=width), device, word))


def _number(size: Any, values: Mapping[str, int]) -> int:
    """Return a size, with values put for its symbols."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    found = expr.xreplace({s: sympy.Integer(values[str(s)]) for s in expr.free_symbols if str(s) in values})
    return int(found) if found.is_Integer else NOMINAL


def once(compute: Callable[[AttentionSite], Any]) -> Callable[[AttentionSite], Any]:
    """Remember what `compute` gave for equal layers."""
    known: dict[AttentionSite, Any] = {}

    def cached(site: AttentionSite) -> Any:
        key = shared(site)
        if key not in known:
            known[key] = compute(key)
        return known[key]

    return cached
