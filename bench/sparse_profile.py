"""Run a model whose attention a policy narrowed, op by op, and read what its block maps keep and what choosing them costs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from effcompile import ops
from effcompile.backend import target_of
from effcompile.compiler import compile_program
from effcompile.core.dump import Dump
from effcompile.core.expr_eval import evaluate, from_json, to_json
from effcompile.core.mask import CAUSAL
from effcompile.core.options import Options
from effcompile.observe import observe
from effcompile.ops.attention_tokens import kept_tokens
from effcompile.skeleton import real

BLOCKS, TOKENS = "attention_blocks_v1", "attention_tokens_v1"
_ROWS = 1024


@dataclass
class Profile:
    """Hold seconds of one eager run, and the pairs of all sites that ran over block maps.

    `selector` are seconds of ops that only a block map needs, `attention` those of the ops that the maps go into, `dense` those of
    exact attention at the same sites, by the faster of two kernels.
    """

    selector: float = 0.0
    attention: float = 0.0
    dense: float = 0.0
    whole: float = 0.0
    kept: int = 0
    allowed: int = 0
    sites: int = 0
    densities: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return density (kept pairs over allowed pairs, of the sites with maps) and the selector's share of time."""
        if not self.sites:
            return {}
        return {
            "map_sites": self.sites,
            "density": _short(self.kept / max(1, self.allowed)),
            "density_by_site": [_short(value) for value in self.densities],
            "selector_share": _short(self.selector / (self.selector + self.attention)),
            "selector_of_saved": self.of_saved,
            "selector_share_of_run": _short(self.selector / self.whole),
        }

    @property
    def of_saved(self) -> float | None:
        """Return the selector's time over the attention time that the maps save; None where they save nothing."""
        saved = self.dense - self.attention
        return _short(self.selector / saved) if saved > 0 else None


def profile(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], policy: str) -> Profile:
    """Run the model's rewritten graphs on the inputs of one call; layers are not outlined, so that each site is seen."""
    result = Profile()
    asked = {"attention": policy, "require": {"attention": 0}, "disable": "outline-layers", "strict": True}
    options = Options.parse(asked, None)
    ops.register()
    with torch.no_grad():
        seen = observe(real(model, args, kwargs), dynamic=False, keep_inputs=True)
        for graph in seen.graphs:
            if graph.program is None:
                continue
            target = target_of(options, graph.program.device)
            compiled = compile_program(graph.program, target, options, Dump())
            for entry in compiled.program.entries:
                _Reader(entry.graph, result).run(*graph.inputs)
    return result


class _Reader(fx.Interpreter):  # type: ignore[misc]  # torch is Any here
    def __init__(self, graph: fx.GraphModule, into: Profile) -> None:
        super().__init__(graph)
        self.into, self.choosing = into, _only_for_maps(graph.graph)

    def run_node(self, n: fx.Node) -> Any:
        begun = time.perf_counter()
        value = super().run_node(n)
        spent = time.perf_counter() - begun  # what else is timed below is not of the run
        self.into.whole += spent
        if n in self.choosing:
            self.into.selector += spent
        if _is(n, BLOCKS):
            self.into.attention += spent
            self.into.dense += _dense(*self.fetch_args_kwargs_from_env(n)[0])
            self._count_blocks(*self.fetch_args_kwargs_from_env(n)[0])
        elif _is(n, TOKENS):
            self._count_tokens(spent, *self.fetch_args_kwargs_from_env(n)[0])
        return value

    def _count_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, loads: Any, sizes: Any, keep: str, *rest: Any
    ) -> None:
        self._count(pairs(keep, chosen, (*q.shape[:3], k.shape[2]), loads, sizes, (int(rest[-2]), int(rest[-1]))))

    def _count_tokens(
        self, spent: float, q: Tensor, k: Tensor, v: Tensor, loads: Any, sizes: Any, keep: str, *rest: Any
    ) -> None:
        """Choose once more, to see the choice and its time, which the op keeps to itself."""
        begun = time.perf_counter()
        kept = kept_tokens(q, k, loads, sizes, keep, *rest[1:])
        choosing = time.perf_counter() - begun
        self.into.selector += choosing
        self.into.attention += max(0.0, spent - choosing)
        self.into.dense += _dense(q, k, v, None, loads, sizes, keep, *rest)
        chosen = kept[:, None, :, None] & kept[:, None, None, :]
        self._count(pairs(keep, chosen, (*q.shape[:3], k.shape[2]), loads, sizes, (1, 1)))

    def _count(self, found: tuple[int, int]) -> None:
        kept, allowed = found
        self.into.kept += kept
        self.into.allowed += allowed
        self.into.sites += 1
        self.into.densities.append(kept / max(1, allowed))


def pairs(
    keep: str,
    chosen: Tensor,
    extents: tuple[int, int, int, int],
    loads: Any,
    sizes: Any,
    blocks: tuple[int, int],
) -> tuple[int, int]:
    """Count the (query, key) pairs that a predicate and a map `[B|1, H', Qb, Kb]` keep, and those of the predicate alone."""
    batch, heads = extents[:2]
    kept = allowed = 0
    for begin in range(0, chosen.shape[2], step := max(1, _ROWS // blocks[0])):
        # Sites of one model ask for the same counts, which take longer than the product with a site's map.
        counted = _counts(keep, extents, tuple(loads or ()), tuple(sizes or ()), blocks, begin, begin + step)
        allowed += int(counted.sum()) * (batch // counted.shape[0]) * (heads // counted.shape[1])
        lines = chosen[:, :, begin : begin + step].repeat_interleave(heads // chosen.shape[1], 1)
        kept += int((counted * lines).expand(batch, heads, -1, -1).sum())
    return kept, allowed


@functools.lru_cache(maxsize=64)
def _counts(
    keep: str,
    extents: tuple[int, int, int, int],
    loads: tuple[Tensor, ...],  # by identity
    sizes: tuple[int, ...],
    blocks: tuple[int, int],
    begin: int,
    end: int,
) -> Tensor:
    """Count what a predicate allows in each block of some rows of blocks: `[B|1, H|1, end - begin, Kb]`."""
    batch, heads, rows, columns = extents
    axes = (
        torch.arange(batch)[:, None, None, None],
        torch.arange(heads)[None, :, None, None],
        torch.arange(begin * blocks[0], min(end * blocks[0], rows))[None, None, :, None],
        torch.arange(columns)[None, None, None, :],
    )
    inside = evaluate(from_json(keep), axes, loads, sizes)
    inside = inside.expand(torch.broadcast_shapes(inside.shape, (1, 1, axes[2].numel(), columns)))
    return _sum_blocks(_sum_blocks(inside, 3, blocks[1]), 2, blocks[0])


def _sum_blocks(values: Tensor, dim: int, block: int) -> Tensor:
    """Add up runs of `block` elements of one dimension, the last of which may be shorter."""
    short = -values.shape[dim] % block
    parts = F.pad(values.to(torch.int64), (0, 0) * (values.ndim - 1 - dim) + (0, short)).unflatten(dim, (-1, block))
    return parts.sum(dim + 1)


def _dense(q: Tensor, k: Tensor, v: Tensor, _: Any, loads: Any, sizes: Any, keep: str, *rest: Any) -> float:
    """Return the seconds of exact attention on the operands of an op over maps; `rest` begins with empty_row and scale."""
    ways: list[Callable[[], Tensor]] = [
        lambda: torch.ops.eff.attention_tiled_v1(q, k, v, None, loads, sizes, keep, rest[0], rest[1])
    ]
    if keep == to_json(CAUSAL.keep) and q.shape[2] == k.shape[2]:
        gqa = q.shape[1] != k.shape[1]
        ways.append(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rest[1], enable_gqa=gqa))
    found = []
    for way in ways:
        begun = time.perf_counter()
        way()
        found.append(time.perf_counter() - begun)
    return min(found)


def _is(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and name in str(node.target)


def _only_for_maps(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose every use ends in the block map of an attention op."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if (
            node.op == "call_function"
            and node.users
            and all(_as_map(node, user) or user in found for user in node.users)
        ):
            found.add(node)
    return found


def _as_map(node: fx.Node, user: fx.Node) -> bool:
    return _is(user, BLOCKS) and user.args[3] is node and sum(arg is node for arg in user.all_input_nodes) == 1


def _short(value: float) -> float:
    return float(f"{value:.4g}")
