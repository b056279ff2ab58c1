"""Rewrite attention for a phase of Re-ttention: tensors that hold the state become inputs, which the graph writes in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import TRUE, apply
from effcompile.core.expr_eval import to_json
from effcompile.core.program import Input, Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite
from effcompile.ops.attention_blocks import bounds
from effcompile.passes.attention.re_ttention import Phase, ReTtention
from effcompile.passes.attention.video import place_major

BLOCK, ROWS, KEYS = 64, 24, 32
"""Edges of the blocks of a band. The C++ kernel has whole register tiles in 24 rows, and 32 keys waste less at the band's edges: on
the video of bench/schedule_replay.py it takes about three quarters of what blocks of 64 take (AVX2, float32, one run)."""


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


def blocks_of(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Return the blocks (queries, keys) in which a device attends to a band."""
    return (ROWS, KEYS) if device.type == "cpu" and dtype == torch.float32 else (BLOCK, BLOCK)


def _attend(
    edit: Editor, call: AttentionCall, state: Mapping[str, fx.Node], policy: ReTtention, phase: Phase
) -> fx.Node:
    tokens = call.q.meta["val"].shape[2]
    kept = policy.band(tokens)
    band, others, everything = to_json(kept), to_json(apply("not", kept)), to_json(TRUE)
    scale, growth, text, frames = call.scale, policy.growth, policy.text, policy.frames
    attend = torch.ops.eff.attention_epilogue_v1.default

    def run(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, residual: Tensor) -> Tensor:
        order = place_major(tokens, text, frames, q.device) if frames else None
        blocks = blocks_of(q.device, q.dtype)
        chosen = torch.ones((1, 1, *(-(-tokens // block) for block in blocks)), dtype=torch.bool, device=q.device)
        near, inside = chosen, band
        if q.device.type != "cpu" and frames:
            # Ranges of places beside text are no mask of the kernel for GPUs: there the band grows to whole blocks.
            near, inside = bounds(band, (1, 1, tokens, tokens), blocks, [], [], q.device)[1], everything
        fixed: tuple[Any, ...] = ("zero", scale, *blocks, order)
        if phase == "sparse":
            grown = (rho + growth).clamp(max=1)
            rho.copy_(grown)
            return attend(q, k, v, near, grown, residual, [], [], inside, *fixed)[0]
        narrow, part = attend(q, k, v, near, None, None, [], [], inside, *fixed)
        if q.device.type == "cpu":
            # What the band leaves out, alone: no pair is computed twice, and what a row without any has is 0, with an LSE of -inf.
            rest, left = attend(q, k, v, chosen, None, None, [], [], others, *fixed)
            fresh = (part - left).sigmoid()
            missed = (1 - fresh)[..., None] * rest
            residual.copy_(missed)
            out = (fresh[..., None] * narrow + missed).to(narrow.dtype)
        else:
            out, whole = attend(q, k, v, chosen, None, None, [], [], everything, *fixed)
            # In float32 and from the sums of scores: a ratio of probabilities would underflow.
            fresh = (part - whole).exp().clamp(max=1)
            residual.copy_(out - (fresh[..., None] * narrow).to(out.dtype))
        rho.copy_(fresh)
        return out

    return edit.inline(run, call.q, call.k, call.v, state["rho"], state["residual"])
