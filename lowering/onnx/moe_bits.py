"""QMoE of ONNX Runtime for experts whose weights are those of a quantizer, in 4 or 8 bits.

Weights that were turned back into floats are found to be codes again where they lie on a grid (`grid.py`), and no number changes:
4 bits with a step for every block of 16, 32 or 128 inputs, or for every output, and a whole code as zero (GGUF's Q4_0, AWQ, GPTQ);
8 bits with a step for every output. Blocks of 8 bits are left alone: ONNX Runtime's CPU kernel for them rounds activations to 8
bits, which is 3e-3 away. The router is any, as for floats (`moe_ort.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.experts import ExpertsCall
from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import VALUE, Editor
from effcompile.lowering.onnx.grid import Grid, grid_of, packed
from effcompile.lowering.onnx.moe_ort import candidates, order, router, some_logits, weighed
from effcompile.lowering.onnx.piece import piece
from effcompile.ops import moe

BLOCKS = (128, 32, 16)
LEAST = 1 << 12
"""How many weights an expert's product has that is worth it."""


@dataclass(frozen=True)
class QuantizedExperts(OnnxForm):
    """Find experts in float32 whose weights are constants on such a grid, both products on one of the same kind."""

    name: ClassVar[str] = "moe-bits"
    order: ClassVar[int] = 1

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every `eff::moe_v1` whose weights are codes and whose gate the operator has."""
        for node, call, attributes in candidates(edit, dialect):
            if (grids := _grids(call)) is not None:
                yield _place(edit, node, call, attributes, grids)


def _place(
    edit: Editor, node: fx.Node, call: ExpertsCall[fx.Node], attributes: dict[str, Any], grids: Sequence[Grid]
) -> Placement:
    first = grids[0]
    attributes = {**attributes, "expert_weight_bits": first.bits, "quant_type": "int"}
    attributes |= {"weights_prepacked": 0, "accuracy_level": 1}  # as they are, and products in float32
    if not _by_row(first):
        attributes["block_size"] = first.block
    with_zeros = not all(grid.plain for grid in grids)
    held = [
        None if value is None else edit.constant(f"{node.name}_{word}", value)
        for word, value in zip(
            ("codes1", "steps1", "zeros1", "codes2", "steps2", "zeros2"), _operands(grids, with_zeros)
        )
    ]
    with edit.before(node):
        routed = router(edit, call)
        b1 = call.b1
        if b1 is not None and call.layout == "concat":
            b1 = edit.inline(lambda b: order(b[..., None], False, True)[..., 0], b1)
    codes1, steps1, zeros1, codes2, steps2, zeros2 = held
    inputs = [call.x, routed.logits, codes1, steps1, b1, codes2, steps2, call.b2, None, None, None, zeros1, zeros2]
    while inputs[-1] is None:
        inputs.pop()
    return Placement(
        "moe-bits",
        "com.microsoft::QMoE",
        tuple(inputs),
        (node,),
        _Reference(call, grids, with_zeros),
        attributes,
        sample=functools.partial(_sample, call, grids, with_zeros),
        values=(node.meta["val"],),
        finish=functools.partial(weighed, node, routed.total),
        site=str(node.meta.get("eff.site", "")),
    )


def _by_row(grid: Grid) -> bool:
    """Tell whether an output has one step."""
    return grid.block == int(grid.codes.shape[-1])


def _operands(grids: Sequence[Grid], with_zeros: bool) -> Iterator[Tensor | None]:
    """Yield codes, steps and zeros of both products in the operator's layout."""
    for grid in grids:
        rows = _by_row(grid)
        yield packed(grid.codes, grid.bits)
        yield grid.steps.squeeze(-1) if rows else grid.steps
        yield packed(grid.zeros.squeeze(-1) if rows else grid.zeros, grid.bits) if with_zeros else None


def _grids(call: ExpertsCall[fx.Node]) -> tuple[Grid, Grid] | None:
    """Return the codes of both products, `[E, out, in]` with gate and up in turn."""
    w1, w2 = known_value(call.w1), known_value(call.w2)
    if w1 is None or w2 is None or w1.dtype != torch.float32 or min(w1[0].numel(), w2[0].numel()) < LEAST:
        return None

    def both(count: int, bits: int, block: int) -> tuple[Grid, Grid] | None:
        found = []
        for w, turn in ((w1, call.layout == "concat"), (w2, False)):
            rows = order(w[:count], call.transposed, turn)
            grid = grid_of(rows, bits, block or rows.shape[-1])
            if grid is None:
                return None
            found.append(grid)
        return found[0], found[1]

    for bits, block in ((4, 0), *((4, block) for block in BLOCKS), (8, 0)):
        if both(1, bits, block) is not None and (found := both(w1.shape[0], bits, block)) is not None:
            return found
    return None


def known_value(node: fx.Node) -> Tensor | None:
    """Return the value of a node that is made of weights alone, such as a stack of those of single experts; else None."""
    if isinstance(value := node.meta.get(VALUE), Tensor):
        return value
    seen, waiting, given = set[fx.Node](), [node], list[fx.Node]()
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        if isinstance(each.meta.get(VALUE), Tensor):
            given.append(each)
        elif each.op != "call_function" or not each.all_input_nodes:
            return None
        else:
            waiting.extend(each.all_input_nodes)
    made = piece(given, [node])
    if made is None:
        return None
    with torch.no_grad():
        (value,) = made(*(x.meta[VALUE].detach() for x in given))
    return value if isinstance(value, Tensor) else None


class _Reference:
    """Compute the experts from the numbers that a sample's codes mean."""

    def __init__(self, call: ExpertsCall[fx.Node], grids: Sequence[Grid], with_zeros: bool) -> None:
        self.call, self.grids = call, _sample_grids(call, grids, with_zeros)

    def __call__(self, x: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        call = self.call
        b1 = rest[2].double() if call.b1 is not None else None
        b2 = rest[4 + (b1 is not None)].double() if call.b2 is not None else None
        chosen = logits.double().topk(int(call.ids.meta["val"].shape[1]), 1)
        layout = "none" if call.layout == "none" else "interleaved"
        more = (call.act, layout, False, "out", call.alpha, call.beta, call.limit)
        w1, w2 = (grid.numbers() for grid in self.grids)
        share = torch.softmax(chosen.values, 1)
        return moe.composed(ExpertsCall(x.double(), chosen.indices, share, w1, b1, w2, b2, *more)).to(x.dtype)


def _sample_grids(call: ExpertsCall[fx.Node], grids: Sequence[Grid], with_zeros: bool) -> tuple[Grid, Grid]:
    """Return small weights of the same kind: two blocks wide."""
    draw = torch.Generator().manual_seed(0)
    experts, bits, rows = int(grids[0].codes.shape[0]), grids[0].bits, _by_row(grids[0])
    width = 64 if rows else 2 * grids[0].block
    wide, top, found = (1 if call.layout == "none" else 2) * width, 1 << bits, []
    for outputs in (wide, width):
        shape = (experts, outputs, 1 if rows else 2)
        steps = (torch.rand(shape, generator=draw) + 0.5) / (top * width**0.5)
        zeros = torch.randint(0, top, shape, generator=draw) if with_zeros else torch.full(shape, top // 2)
        codes = torch.randint(0, top, (experts, outputs, width), generator=draw)
        found.append(Grid(codes.to(torch.uint8), steps, zeros.to(torch.uint8), bits, width if rows else grids[0].block))
    return found[0], found[1]


def _sample(call: ExpertsCall[fx.Node], grids: Sequence[Grid], with_zeros: bool) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    small = _sample_grids(call, grids, with_zeros)
    experts, wide, hidden = (int(n) for n in small[0].codes.shape)
    logits = some_logits(7, experts, int(call.ids.meta["val"].shape[1]), draw)
    b1, b2 = (
        None if b is None else torch.randn(experts, n, generator=draw) for b, n in ((call.b1, wide), (call.b2, hidden))
    )
    codes1, steps1, zeros1, codes2, steps2, zeros2 = _operands(small, with_zeros)
    x = torch.randn(7, hidden, generator=draw)
    given = (x, logits, codes1, steps1, b1, codes2, steps2, b2, zeros1, zeros2)
    return tuple(value for value in given if value is not None)
