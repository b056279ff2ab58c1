"""Hold the arms of the attention table that policies need: the kernel of block maps at some densities, and selectors.

The planner reads them as curves `blocks-0.1` and `choose-xattention`, so that the price of a sparse site is measured in both parts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.table_case import Kernel
from effcompile.core.expr import BATCH, HEAD, axes_of
from effcompile.core.expr_eval import to_json
from effcompile.core.intervals import block_bounds
from effcompile.core.mask import Mask
from effcompile.core.policy import Policy
from effcompile.core.site import AttentionSite
from effcompile.ops.attention_tokens import kept_tokens

if TYPE_CHECKING:
    from bench.cases.attention_table import Problem

DENSITIES = (0.1, 0.3, 1.0)
SELECTORS = ("block-topk", "quest", "xattention", "pooled-cdf", "vertical-slash", "zipvl")
LEAST = 512
"""Keys below which the blocks that always stay are most of what there is."""
FORMS = ("full", "causal", "causal-padding", "decode", "decode-mask")


def sparse_kernels(problem: Problem) -> dict[str, Kernel | str]:
    """Return every arm, or why it does not run the row's mask."""
    names = (*(f"blocks-{density}" for density in DENSITIES), *(f"choose-{name}" for name in SELECTORS))
    if problem.kind not in FORMS or problem.extents[3] < LEAST:
        return dict.fromkeys(names, f"fewer than {LEAST} keys, or a mask that is priced like another one")
    found: dict[str, Kernel | str] = {f"blocks-{density}": _blocks(problem, density) for density in DENSITIES}
    return found | {f"choose-{name}": _selector(problem, name) for name in SELECTORS}


def _blocks(problem: Problem, density: float) -> Kernel:
    size = (1, 16) if problem.extents[2] == 1 else (128, 128)
    keep, loads = to_json(problem.predicate), list(problem.loads)
    used = axes_of(problem.predicate)
    lead = (problem.extents[0] if BATCH in used else 1, problem.extents[1] if HEAD in used else 1)
    _, some = block_bounds(problem.predicate, (*lead, *problem.extents[2:]), size, loads, (), torch.device("cpu"))
    draw = torch.Generator().manual_seed(7)
    chosen = torch.rand((*problem.extents[:2], *some.shape[2:]), generator=draw) < density
    # A row without any block would be computed anew under its mask.
    first = some.int().argmax(-1, keepdim=True) == torch.arange(some.shape[-1])
    chosen = (chosen | first) & some
    scale = problem.q.shape[3] ** -0.5
    op = torch.ops.eff.attention_blocks_v1

    def run() -> Tensor:
        out: Tensor = op(problem.q, problem.k, problem.v, chosen, loads, [], keep, "zero", scale, *size)
        return out

    share = float(chosen.float().mean())
    return Kernel(lambda: run, problem.flops(share), {"visited": round(share, 4)})


def _selector(problem: Problem, name: str) -> Kernel | str:
    policy = _policy(name)
    one = problem.extents[2] == 1
    if policy.phase not in ("both", "decode" if one else "prefill"):
        return "for decode" if policy.phase == "decode" else "for many queries"
    if policy.ordered and not problem.kind.startswith("causal"):
        return "the mask has no causal order"
    site = _site(problem)
    call = _choice(policy, site, problem)

    def run() -> Tensor:
        call()
        return problem.q  # of the shape of the others' results

    return Kernel(lambda: run, policy.search(site))


def _policy(name: str) -> Any:
    from effcompile.compiler import all_policies
    from effcompile.core.policy import read_policy

    policy: Policy = read_policy("attention", name, all_policies())
    return policy


def _site(problem: Problem) -> AttentionSite:
    batch, heads, rows, columns = problem.extents
    return AttentionSite(
        "table", "attention", "graph", "", "sdpa", batch, heads, problem.k.shape[1], q_len=rows, kv_len=columns,
        head_dim=problem.q.shape[3], value_dim=problem.v.shape[3], mask=Mask(keep=problem.predicate),
        dtype=str(problem.q.dtype).removeprefix("torch."),
    )  # fmt: skip


def _choice(policy: Any, site: AttentionSite, problem: Problem) -> Callable[[], Tensor]:
    """Return the call of a policy's selector, as the policy itself spells it."""
    head = (problem.q, problem.k, list(problem.loads), [], to_json(problem.predicate))
    scale = problem.q.shape[3] ** -0.5
    if policy.name == "zipvl":
        settings = (float(policy.mass), policy.recent, policy.spread, float(policy.floor))
        return lambda: kept_tokens(*head, scale, *settings)
    call: Any = SimpleNamespace(scale=scale)
    return lambda: policy.map(call, head, site, _Direct())


class _Direct:
    """Run what a policy would insert into a graph."""

    def call(self, target: Callable[..., Tensor], *operands: Any) -> Tensor:
        return target(*operands)
