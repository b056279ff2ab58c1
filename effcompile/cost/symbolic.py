"""Price ops as sympy expressions: FLOP, bytes, exponentials and passes of attention, GEMM and elementwise work.

Attention traffic and passes follow FuseMax (arXiv 2406.10491): bytes that every mapping must move, plus what spills
between passes when a row of scores does not fit on the chip. A multiply-add is two FLOP, so dense attention is
`4 B Hq Nq Nk D`, the convention of all published TFLOP/s figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import sympy

from effcompile.cost import cascade

Expr: TypeAlias = Any  # a sympy expression or a plain number; sympy carries no types

AttentionKind = Literal["materialized", "materialized-deferred", "two-pass", "flash"]
Grouping = Literal["packed", "per-head", "expanded"]


def _symbol(name: str, **assumptions: bool) -> Expr:
    return sympy.Symbol(name, positive=True, **assumptions)


@dataclass(frozen=True)
class Cost:
    """Hold what an op needs, as numbers or sympy expressions.

    `flops` are executed, `useful_flops` those the model asked for (None: the same); `bytes` go to and from device
    memory in any mapping, `spill_bytes` on top because of the passes; `load_bytes` come from the shared cache (L2) into
    the cores; `exps` are exponentials; `calls` kernel launches.
    """

    flops: Expr = 0
    bytes: Expr = 0
    exps: Expr = 0
    passes: int = 1
    spill_bytes: Expr = 0
    load_bytes: Expr = 0
    calls: Expr = 1
    useful_flops: Expr | None = None

    @property
    def useful(self) -> Expr:
        """Return the useful FLOP."""
        return self.flops if self.useful_flops is None else self.useful_flops

    @property
    def moved(self) -> Expr:
        """Return all bytes to and from device memory, spills included."""
        return self.bytes + self.spill_bytes

    def subs(self, values: Mapping[Expr, Expr]) -> Cost:
        """Put values (numbers or expressions) for symbols."""
        put = {
            each.name: sympy.sympify(getattr(self, each.name)).subs(values)
            for each in fields(self)
            if each.name != "passes" and getattr(self, each.name) is not None
        }
        return replace(self, **put)

    @property
    def free_symbols(self) -> frozenset[Expr]:
        """Return the symbols that no number has been put for."""
        found: set[Expr] = set()
        for each in fields(self):
            found |= sympy.sympify(getattr(self, each.name) or 0).free_symbols
        return frozenset(found)

    def __add__(self, other: Cost) -> Cost:
        """Fuse two costs into one overlapped piece of work; work in sequence is a tuple of costs instead."""
        useful = None if self.useful_flops is None and other.useful_flops is None else self.useful + other.useful
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.exps + other.exps,
            max(self.passes, other.passes),
            self.spill_bytes + other.spill_bytes,
            self.load_bytes + other.load_bytes,
            self.calls + other.calls,
            useful,
        )


@dataclass(frozen=True)
class AttentionShape:
    """Hold the sizes of an attention site: q `[B, Hq, Nq, D]`, k `[B, Hkv, Nk, D]`, v `[B, Hkv, Nk, Dv]`.

    Every field is a symbol until a number is given for it.
    """

    B: Expr = field(default_factory=lambda: _symbol("B", integer=True))
    Hq: Expr = field(default_factory=lambda: _symbol("Hq", integer=True))
    Hkv: Expr = field(default_factory=lambda: _symbol("Hkv", integer=True))
    Nq: Expr = field(default_factory=lambda: _symbol("Nq", integer=True))
    Nk: Expr = field(default_factory=lambda: _symbol("Nk", integer=True))
    D: Expr = field(default_factory=lambda: _symbol("D", integer=True))
    Dv: Expr = field(default_factory=lambda: _symbol("Dv", integer=True))

    @property
    def group(self) -> Expr:
        """Return the query heads per key-value head."""
        return sympy.sympify(self.Hq) / self.Hkv


def cascade_of(kind: AttentionKind) -> cascade.Cascade:
    """Return the einsum cascade behind a kind of attention kernel."""
    return {
        "materialized": cascade.THREE_PASS,
        "materialized-deferred": cascade.THREE_PASS_DEFERRED,
        "two-pass": cascade.TWO_PASS,
        "flash": cascade.ONE_PASS,
    }[kind]


def spill(count: int, queries: Expr, keys: Expr, *, resident: Expr = 1, on_chip: Expr = 0) -> Expr:
    """Return the score elements that a kernel of `count` passes moves: one write and one read per pass boundary.

    Zero for one pass, or when `resident` rows of `keys` scores fit into `on_chip` elements.
    """
    between = 2 * (count - 1) * sympy.sympify(queries) * keys
    fits = sympy.sympify(resident) * keys <= on_chip
    if count == 1 or fits == sympy.true:
        return sympy.Integer(0)
    return between if fits == sympy.false else sympy.Piecewise((0, fits), (between, True))


def attention(
    shape: AttentionShape,
    kind: AttentionKind = "flash",
    *,
    element_bytes: Expr = 2,
    score_bytes: Expr = 4,
    block_density: Expr = 1,
    pair_density: Expr | None = None,
    grouping: Grouping = "packed",
    block_q: Expr = 128,
    block_k: Expr = 128,
    on_chip: Expr = 0,
) -> Cost:
    """Price `softmax(q k^T) v` by kind of kernel.

    `block_density` (visited blocks / all blocks) is paid: a partly masked block is computed whole. `pair_density` (kept
    pairs / all pairs, at most the block density; None: equal) counts only as useful. A materialized kernel visits
    everything whatever the mask is. `grouping`: `packed` puts the query heads of a group on the rows of one tile and
    loads k and v once for them, `per-head` loads them for every query head, `expanded` writes the repeated k and v to
    memory first. `block_q` and `block_k` are the tile's rows and keys, `on_chip` the score elements that stay on the
    chip between passes, `score_bytes` the size of a spilled one.
    """
    einsums = cascade_of(kind)
    count = cascade.count_passes(einsums)
    s, dims = shape, sympy.sympify(shape.D) + shape.Dv
    visited = block_density if kind in ("flash", "two-pass") else sympy.Integer(1)
    pairs = sympy.sympify(s.B) * s.Hq * s.Nq * s.Nk
    extents = {"e": s.D, "f": s.Dv, "p": s.Nq, "m": s.Nk, "m0": block_k, "m1": sympy.sympify(s.Nk) / block_k}
    exps = sympy.sympify(s.B) * s.Hq * cascade.operations(einsums, "exp", extents)
    queries = element_bytes * s.B * s.Hq * s.Nq * dims
    keys = element_bytes * s.B * s.Hkv * s.Nk * dims
    if grouping == "packed":
        load = keys * sympy.ceiling(s.group * s.Nq / block_q)
    else:
        load = element_bytes * s.B * s.Hq * s.Nk * dims * sympy.ceiling(sympy.sympify(s.Nq) / block_q)
    repeated = keys * (2 * s.group) if grouping == "expanded" else 0
    spilled = score_bytes * s.B * s.Hq * spill(count, s.Nq, s.Nk, resident=block_q, on_chip=on_chip)
    return Cost(
        flops=2 * pairs * dims * visited,
        bytes=queries + keys + repeated,
        exps=exps * visited,
        passes=count,
        spill_bytes=spilled * visited,
        load_bytes=load * visited,
        calls=count + (1 if grouping == "expanded" else 0),
        useful_flops=2 * pairs * dims * (visited if pair_density is None else pair_density),
    )


def causal_pair_density(queries: Expr, keys: Expr) -> Expr:
    """Return kept pairs / all pairs of a causal mask aligned at the last query and key (`queries <= keys`)."""
    q, k = sympy.sympify(queries), sympy.sympify(keys)
    return 1 - (q - 1) / (2 * k)


def causal_block_density(length: Expr, block: Expr) -> Expr:
    """Return visited blocks / all blocks of a square causal mask cut into `block` x `block`."""
    blocks = sympy.ceiling(sympy.sympify(length) / block)
    return (blocks + 1) / (2 * blocks)


def gemm(m: Expr, n: Expr, k: Expr, *, element_bytes: Expr = 2, weight_bytes: Expr | None = None) -> Cost:
    """Price `[m, k] @ [k, n]`: activations and result at `element_bytes`, the `[k, n]` side at `weight_bytes`."""
    weights = element_bytes if weight_bytes is None else weight_bytes
    m, n, k = sympy.sympify(m), sympy.sympify(n), sympy.sympify(k)
    moved = element_bytes * (m * k + m * n) + weights * k * n
    return Cost(flops=2 * m * n * k, bytes=moved)


def elementwise(
    elements: Expr, *, reads: int = 1, writes: int = 1, flops: Expr = 1, exps: Expr = 0, element_bytes: Expr = 2
) -> Cost:
    """Price a fused elementwise kernel: tensors read and written, FLOP and exponentials per element."""
    n = sympy.sympify(elements)
    return Cost(flops=flops * n, bytes=(reads + writes) * element_bytes * n, exps=exps * n)


def kv_decode(
    shape: AttentionShape,
    *,
    kept: Expr | None = None,
    kv_bytes: Expr = 2,
    element_bytes: Expr = 2,
    page: Expr = 16,
    score: Literal["none", "mean", "minmax"] = "none",
) -> Cost:
    """Price attention of `Nq` new tokens (1 in decode) over a KV cache of `Nk` tokens of which `kept` are read.

    `kv_bytes` is the real size of a stored element, scales included (KIVI at 4 bits and groups of 32: 5/8). `score`
    adds the page selector: one mean vector per page of k (Kinetics) or a minimum and a maximum (Quest).
    """
    s = shape
    tokens = sympy.sympify(s.Nk if kept is None else kept)
    rows, dims = sympy.sympify(s.B) * s.Hq * s.Nq, sympy.sympify(s.D) + s.Dv
    vectors = {"none": 0, "mean": 1, "minmax": 2}[score] * sympy.sympify(s.Nk) / page
    cache = kv_bytes * s.B * s.Hkv * tokens * dims + element_bytes * s.B * s.Hkv * vectors * s.D
    return Cost(
        flops=2 * rows * (tokens * dims + vectors * s.D),
        bytes=cache + element_bytes * rows * dims,
        exps=rows * tokens,
        load_bytes=cache,
        calls=1 if score == "none" else 2,
        useful_flops=2 * rows * tokens * dims,
    )


def selector(
    shape: AttentionShape,
    kind: Literal["pooled", "probe", "antidiagonal"],
    *,
    block: Expr = 128,
    probes: Expr = 64,
    stride: Expr = 16,
    element_bytes: Expr = 2,
) -> Cost:
    """Price the choice of blocks before a sparse prefill.

    `pooled` multiplies block means of q and k, `probe` the last `probes` queries with all keys, `antidiagonal` every
    `stride`-th score by one reshaped GEMM (XAttention). Reads q and k once; the softmax is over the scores it made.
    """
    s = shape
    rows: Expr
    rows, keys = {
        "pooled": (sympy.sympify(s.Nq) / block, sympy.sympify(s.Nk) / block),
        "probe": (sympy.sympify(probes), sympy.sympify(s.Nk)),
        "antidiagonal": (sympy.sympify(s.Nq) / stride, sympy.sympify(s.Nk) / stride),
    }[kind]
    depth = s.D * stride if kind == "antidiagonal" else s.D
    scores = sympy.sympify(s.B) * s.Hq * rows * keys
    read = rows if kind == "probe" else s.Nq
    moved = element_bytes * s.B * s.D * (s.Hq * read + s.Hkv * s.Nk)
    return Cost(flops=2 * scores * depth, bytes=moved, exps=scores, calls=2, useful_flops=0)
