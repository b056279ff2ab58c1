"""Run experts on a GPU with the Triton kernels behind `eff::moe_blocks_v1`, for any number of tokens, where that is asked for.

Slots are put into blocks of rows that one expert multiplies; the first product gathers the rows and applies the gate, the second
weighs its rows and scatters them (codegen/triton/moe.py). No host reads a count, so that a CUDA graph can hold it. The kernels were
checked in an interpreter and compiled for each chip, and never timed on one: `eff bench gpu-moe` times them there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.experts import ExpertDispatch, MoESite
from effcompile.core.kernel import Answer
from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention.triton_blocks import tuned
from effcompile.lowering.moe.price import price

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class BlockAligned(ExpertDispatch):
    """Call the op that launches the kernels."""

    name: ClassVar[str] = "block-aligned"
    on_request: ClassVar[bool] = True

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer for GPUs of sm_80 and later and CDNA 3 and 4, in the dtypes of the kernels."""
        if target.device.kind == "cpu":
            return Refusal("EFF-M209", "the kernels are for GPUs")
        if not tuned(target.device.compute) or site.dtype not in DTYPES:
            return Refusal("EFF-M209", f"no kernel for {site.dtype} on {target.device.compute}")
        return price(self.name, site, target)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Insert the call."""
        return edit.call(torch.ops.eff.moe_blocks_v1.default, *node.args, like=node, same=True, **node.kwargs)
