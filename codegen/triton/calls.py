"""Find which binaries a program needs: its ops are launched on fake tensors, for a chip that is not here, and kept.

Sizes that vary stay symbols, so a grid is an expression of them: `9*s0*((s1 + 127)//128)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from effcompile.codegen import triton as folder
from effcompile.codegen.triton import launch
from effcompile.codegen.triton.launch import Launch
from effcompile.core.errors import EffError
from effcompile.core.program import Program


@dataclass(frozen=True)
class Call:
    """Hold the launches that one op of a program makes, the op's name, and where in the model it stands."""

    op: str
    site: str
    launches: tuple[Launch, ...]


def calls(program: Program, compute: str) -> tuple[Call, ...]:
    """Return the launches of every op of a program that has a Triton kernel.

    Raises:
        EffError: EFF-K101 for the chip; EFF-E153 where an op cannot be launched without data.
    """
    found = []
    for entry in program.entries:
        for module in entry.graph.modules():
            if isinstance(module, fx.GraphModule):
                found += [_call(node, compute) for node in module.graph.nodes if _name(node) in folder.LAUNCHES]
    return tuple(found)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if node.op == "call_function" and schema is not None else ""


def _call(node: fx.Node, compute: str) -> Call:
    op = _name(node)
    schema: Any = node.target._schema  # type: ignore[union-attr]
    values = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    args, kwargs = list(values[0]), dict(values[1])
    for place, argument in enumerate(schema.arguments):
        if place >= len(args):
            args.append(kwargs.pop(argument.name, argument.default_value))
    mode = next((x.fake_mode for x in args if hasattr(x, "fake_mode")), None) or FakeTensorMode()
    with mode, launch.assume(compute), launch.keeping() as kept:
        try:
            folder.launcher(op)(*args)
        except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
            # What looks at data after the launches repairs rows without keys; it launches nothing.
            if not kept:
                raise EffError(
                    "EFF-E153",
                    f"{op} cannot be launched without data: {' '.join(str(error).split())[:200]}",
                    hint="kernels:all has every kernel without a model's launches",
                ) from error
    if not kept:
        raise EffError(
            "EFF-E153",
            f"{op} does not run on its Triton kernel for these shapes and dtypes",
            hint="--dtype bf16: the kernels read float16, bfloat16 and float32",
        )
    return Call(op, str(node.meta.get("eff.site", "")) or node.name, tuple(kept))


def written(value: Any) -> str:
    """Return an argument or a grid size as text: an expression of sizes, a number, or the dtype and shape of a tensor."""
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value.node.expr)
    return repr(value)
