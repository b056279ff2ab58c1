"""Rewrite attention for a phase of Re-ttention: tensors that hold the state become inputs, which the graph writes in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import to_json
from effcompile.core.program import Input, Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite
from effcompile.ops.attention_blocks import bounds
from effcompile.passes.attention.re_ttention import Phase, ReTtention
from effcompile.passes.attention.video import place_major

BLOCK = 64


@dataclass(frozen=True)
class Residual:
    """Say what one site carries from step to step: rho float32 `[B, H, N]`, and R `[B, H, N, Dv]` of the dtype of its values."""

    site: str
    rho: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of both."""
        return math.prod(self.rho) * 4 + math.prod(self.shape) * self.dtype.itemsize

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Return fresh tensors by the names of the inputs."""
        return {
            f"{self.site}.rho": torch.ones(self.rho, dtype=torch.float32, device=device),
            f"{self.site}.residual": torch.zeros(self.shape, dtype=self.dtype, device=device),
        }


def replay(
    program: Program, sites: Sequence[AttentionSite], policy: ReTtention, phase: Phase
) -> tuple[Program, dict[str, Residual]]:
    """Return the program with these sites as the phase computes them, and what each of them carries."""
    chosen = {site.id: site for site in sites}
    found: dict[str, Residual] = {}
    if phase == "dense":
        return program, found
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        inputs = list(entry.inputs)
        for node in list(edit.graph.nodes):
            name = node.meta.get("eff.site")
            if (
                name not in chosen
                or node.op != "call_function"
                or node.target is not torch.ops.eff.attention_v1.default
            ):
                continue
            value = node.meta["val"]
            one = Residual(name, tuple(value.shape[:3]), tuple(value.shape), value.dtype)
            state = add_inputs(edit, inputs, one, value)
            with edit.before(node):
                result = _attend(edit, AttentionCall.of(node), state, policy, phase)
            edit.replace(node, result)
            found[name] = one
        entries = tuple(
            replace(e, graph=edit.finish(), inputs=tuple(inputs)) if e.name == entry.name else e
            for e in program.entries
        )
        program = replace(program, entries=entries)
    return program, found


def add_inputs(edit: Editor, inputs: list[Input], one: Residual, like: Tensor) -> Mapping[str, fx.Node]:
    mode, made = like.fake_mode, {}  # type: ignore[attr-defined]
    first = next(node for node in edit.graph.nodes if node.op != "placeholder")
    for name, tensor in one.state(torch.device("meta")).items():
        with edit.graph.inserting_before(first):
            node = edit.graph.placeholder(name.replace(".", "_"))
        with mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=like.device)
        inputs.append(Input(node.name, "packed", name))
        made[name.rpartition(".")[2]] = node
    return made


def _attend(
    edit: Editor, call: AttentionCall, state: Mapping[str, fx.Node], policy: ReTtention, phase: Phase
) -> fx.Node:
    tokens = call.q.meta["val"].shape[2]
    band, everything = to_json(policy.band(tokens)), to_json(TRUE)
    scale, growth, text, frames = call.scale, policy.growth, policy.text, policy.frames
    attend = torch.ops.eff.attention_epilogue_v1.default

    def run(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, residual: Tensor) -> Tensor:
        if frames:
            order = place_major(tokens, text, frames, q.device)
            q, k, v = (x.index_select(2, order) for x in (q, k, v))
        count = -(-tokens // BLOCK)
        chosen = torch.ones((1, 1, count, count), dtype=torch.bool, device=q.device)
        near, inside = chosen, band
        if q.device.type != "cpu" and frames:
            # Ranges of places beside text are no mask of the kernel for GPUs: there the band grows to whole blocks.
            near, inside = bounds(band, (1, 1, tokens, tokens), (BLOCK, BLOCK), [], [], q.device)[1], everything
        fixed: tuple[Any, ...] = ([], [], inside, "zero", scale, BLOCK, BLOCK)
        if phase == "refresh":
            if _flash(q, k, v):
                out, whole = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
            else:
                out, whole = attend(q, k, v, chosen, None, None, [], [], everything, *fixed[3:])
            narrow, part = attend(q, k, v, near, None, None, *fixed)
            # In float32 and from the sums of scores: a ratio of probabilities would underflow.
            fresh = (part - whole).exp().clamp(max=1)
            rho.copy_(fresh)
            residual.copy_(out - (fresh[..., None] * narrow).to(out.dtype))
        else:
            grown = (rho + growth).clamp(max=1)
            rho.copy_(grown)
            out, _ = attend(q, k, v, near, grown, residual, *fixed)
        return out.index_select(2, order.argsort()) if frames else out

    return edit.inline(run, call.q, call.k, call.v, state["rho"], state["residual"])


def _flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether torch's own kernel gives attention of all pairs with its LSE, as fast as the dense steps are."""
    plain = q.shape[1] == k.shape[1] and k.shape[3] == v.shape[3]
    return q.device.type == "cpu" and q.dtype == torch.float32 and plain
