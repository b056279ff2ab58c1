"""MatMulNBits of ONNX Runtime: a linear layer over weights of 4 bits, where the weights are such.

Weights that a quantizer made (GGUF's Q4_0, Q4_1 and others with blocks of 32) and that were turned back into floats still lie on a
grid: in every block of 32 along the input they are low + step * code with codes of 0 to 15. Where that holds for every block, to
float32's rounding, the codes are found again and no number changes: the file has a fifth of the bytes, and a step reads as few. The
operator takes one of 16 codes as zero; what the lowest value of a block is beside that is multiplied by sums of the input over
blocks, a product of a 32nd of the size. Weights of 8 bits stay floats: with products in float32, which is what is exact, ONNX
Runtime 1.32 takes 50 times as long for one token of them (3.2 ms against 0.07 for 576 x 1536).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core import compat
from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import VALUE, Editor
from effcompile.lowering.onnx.piece import hint

_ATEN = torch.ops.aten
BLOCK = 32
LEAST = 1 << 16  # weights of a layer that is worth it
NEAR = 1e-4  # of a step: what float32 leaves of a number that is a whole one
ZERO = 8  # the code that means 0 unless the operator is given another


@dataclass(frozen=True)
class Codes:
    """Hold weights `[N, K]` as codes `[N, K / 32, 32]`, steps `[N, K / 32]`, and what code 8 stands for, None where that is 0."""

    codes: Tensor
    steps: Tensor
    middle: Tensor | None

    def packed(self) -> Tensor:
        """Return the bytes `[N, K / 32, 16]`; of two codes in a byte the first is the low half."""
        return self.codes[..., 0::2] | self.codes[..., 1::2] << 4


def codes_of(weight: Tensor) -> Codes | None:
    """Return the codes that float32 weights `[N, K]` are made of; None where one of them lies between two codes."""
    rows, width = weight.shape
    if width % BLOCK or weight.dtype != torch.float32:
        return None
    blocks = weight.detach().reshape(rows, width // BLOCK, BLOCK)
    return _codes(blocks) if _codes(blocks[:1]) is not None else None  # most weights show in their first row


def _codes(blocks: Tensor) -> Codes | None:
    low, span = blocks.amin(2), blocks.amax(2) - blocks.amin(2)
    steps, found = torch.ones_like(span), torch.zeros_like(blocks)
    left = torch.ones_like(span, dtype=torch.bool)
    for count in range(15, 0, -1):  # steps between the lowest and the highest number: 15 but where codes are unused
        size = (span[left] / count).clamp_min(1e-30)
        exact = (blocks[left] - low[left][:, None]) / size[:, None]
        whole = exact.round()
        fits = ((exact - whole).abs() <= NEAR).all(1)
        places = left.nonzero()[fits].unbind(1)
        steps[places], found[places] = size[fits], whole[fits]
        left[places] = False
        if not left.any():
            middle = low + ZERO * steps
            flat = bool((middle.abs() <= NEAR * steps).all())  # Q4_0 has no lowest value
            return Codes(found.to(torch.uint8), steps, None if flat else middle)
    return None


@dataclass(frozen=True)
class WeightBits(OnnxForm):
    """Find linear layers in float32 whose weights are constants on such a grid."""

    name: ClassVar[str] = "weight-bits"

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every such layer."""
        if dialect.flavor != "ort":
            return
        known: dict[fx.Node, Codes | None] = {}
        for node in list(edit.graph.find_nodes(op="call_function", target=_ATEN.linear.default)):
            x, weight, bias = (*node.args, None)[:3]
            value = weight.meta.get(VALUE) if isinstance(weight, fx.Node) else None
            if not isinstance(x, fx.Node) or not isinstance(value, Tensor) or value.numel() < LEAST:
                continue
            assert isinstance(weight, fx.Node)
            if weight not in known:
                known[weight] = codes_of(value)
            if (codes := known[weight]) is not None:
                yield self._place(edit, node, x, weight, bias, codes)

    def _place(self, edit: Editor, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, codes: Codes) -> Placement:
        rows, blocks, _ = codes.codes.shape
        held = [
            edit.constant(f"{weight.name}_codes", codes.packed()),
            edit.constant(f"{weight.name}_steps", codes.steps.reshape(-1)),
        ]
        middle = None if codes.middle is None else edit.constant(f"{weight.name}_middle", codes.middle)
        sizes = {"K": blocks * BLOCK, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": 1}

        def finish(edit: Editor, made: Any) -> list[fx.Node]:
            total = made[0]
            if middle is not None:
                parts = edit.call(_ATEN.unflatten.int, x, -1, [blocks, BLOCK])
                sums = edit.call(_ATEN.sum.dim_IntList, parts, [-1])
                with compat.symbolic_calls():
                    total = edit.call(_ATEN.add.Tensor, total, edit.call(_ATEN.linear.default, sums, middle))
            return [total if bias is None else edit.call(_ATEN.add.Tensor, total, bias, like=node)]

        return Placement(
            self.name,
            "com.microsoft::MatMulNBits",
            (x, *held),
            (node,),
            _reference(codes),
            sizes,
            sample=lambda: _sample(x, codes),
            values=(node.meta["val"],),
            finish=finish,
        )


def _reference(codes: Codes) -> Any:
    def product(x: Tensor, packed: Tensor, steps: Tensor) -> Tensor:
        numbers = (codes.codes.double() - ZERO) * codes.steps.double()[..., None]
        return (x.double() @ numbers.flatten(1).T).to(x.dtype)

    return product


def _sample(x: fx.Node, codes: Codes) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    shape = [min(3, hint(size, {})) for size in x.meta["val"].shape[:-1]]
    given = torch.randn(*shape, codes.codes.shape[1] * BLOCK, generator=draw)
    return given, codes.packed(), codes.steps.reshape(-1)
