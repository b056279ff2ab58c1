"""Run float linear layers through oneDNN, or through a kernel for a few rows, where it beats the BLAS that torch links.

torch's CPU wheel runs `linear` through MKL, which on AMD processors reaches 0.75 to 0.87 of oneDNN's rate at the sizes of
transformer layers (bench/results/amd-x86-64-avx512+bf16/linear-table.json). The weight stays the user's own tensor: oneDNN packs
it inside the call, so that an updated weight is seen. That packing costs small layers with few rows more than it gains; where it
pays is looked up in the table that was measured on this family of CPUs (`rates.py`), by the widths of the nearest measured layer.
On a CPU that is not in the table the layers stay with torch: on an Intel CPU, where MKL takes its own best code, oneDNN everywhere
made a whole prefill of SmolLM2 0.92 times as fast as eager in one run of `eff demo`.

With one to eight rows, as in a step of decoding, a layer is bound by reading its weight, and MKL reads it with one core: on the
same AMD machine 12 GB/s of a large layer where two cores read 24. Such layers run on `eff::linear_rows_v1` where the table
(step-table) says that it gains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core import compat
from effcompile.core.density import NOMINAL
from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.lowering.rates import Rates, rates_of
from effcompile.ops import native
from effcompile.ops.linear_rows import MOST
from effcompile.targets.detect import detect_cpu

GAIN = 1.05  # how many times as fast it has to be: less is within the noise of the table


@dataclass(frozen=True)
class SelectLinear(Pass):
    """Replace `aten.linear` by oneDNN's linear, or by the kernel for a few rows, on CPU."""

    name: ClassVar[str] = "select-linear"
    phase: ClassVar[str] = "lowered"

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with the float linears replaced that gain."""
        if program.device != "cpu":
            return PassResult(program)
        count = {"eff::linear_v1": 0, "eff::linear_rows_v1": 0}
        rates = rates_of(detect_cpu())
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            for node in list(edit.graph.nodes):
                op = _op(node, rates) if node.target is torch.ops.aten.linear.default else None
                if op is not None:
                    with edit.before(node):
                        bias = node.args[2] if len(node.args) > 2 else None
                        call = edit.call(op, node.args[0], node.args[1], bias, like=node, same=True)
                    edit.replace(node, call)
                    count[op._schema.name] += 1
            program = program.with_graph(entry, edit.finish())
        told = zip(count.values(), ("linears on oneDNN", "linears of a few rows"))
        return PassResult(program, any(count.values()), tuple(f"{many} {what}" for many, what in told if many))


def _op(node: fx.Node, rates: Rates | None) -> torch._ops.OpOverload | None:
    """Return the op that is faster than torch's own, or None."""
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    value, matrix = x.meta["val"], weight.meta["val"]
    if value.dtype not in (torch.float32, torch.bfloat16) or matrix.dtype != value.dtype or weight.op != "placeholder":
        return None
    if node.meta["val"].dtype != value.dtype:  # autocast decides the dtype of this call
        return None
    if matrix.dim() != 2 or value.dim() < 2:
        return None
    rows = math.prod(extent if isinstance(extent, int) else NOMINAL for extent in value.shape[:-1])
    outputs, inputs = matrix.shape
    if not isinstance(outputs, int) or not isinstance(inputs, int):
        return None
    dtype = str(value.dtype).removeprefix("torch.")
    if rates is None:
        return None
    if 1 <= rows <= MOST and all(isinstance(extent, int) for extent in value.shape):
        gain = rates.few_gain(rows, inputs, outputs, dtype)
        if gain is not None and gain >= GAIN and native.library(native.ROWS) is not None:
            return torch.ops.eff.linear_rows_v1.default
    gain = rates.linear_gain(rows, inputs, outputs, dtype)
    able = gain is not None and gain >= GAIN and compat.has_mkldnn_linear()
    return torch.ops.eff.linear_v1.default if able else None
