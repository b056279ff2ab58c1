"""RMSNormalization (opset 23; ONNX Runtime's SimplifiedLayerNormalization before): x / sqrt(mean(x^2) + eps) * scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import Editor

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class RmsNorm(OnnxForm):
    """Find the norm as models spell it: a power, a mean, a reciprocal root and two products."""

    name: ClassVar[str] = "rms-norm"

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every norm over the last dimension with a scale for each of its numbers."""
        if dialect.opset < 23:
            return
        for node in list(edit.graph.nodes):
            found = _read(node)
            if found is not None:
                x, scale, eps = found
                yield Placement(
                    self.name,
                    "RMSNormalization",
                    (x, scale),
                    (node,),
                    _reference(eps),
                    {"axis": -1, "epsilon": eps, "stash_type": 1},
                )


def _reference(eps: float) -> Any:
    def norm(x: Tensor, scale: Tensor) -> Tensor:
        wide = F.rms_norm(x.double(), scale.shape, None, eps)
        return wide.to(x.dtype) * scale

    return norm


def _read(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """Return operand, scale and eps of the norm that ends in a node, else None."""
    if node.target == _ATEN.rms_norm.default:
        x, shape, scale, eps = (*node.args, None, None)[:4]
        if isinstance(x, fx.Node) and isinstance(scale, fx.Node) and len(shape) == 1 and isinstance(eps, float):
            return x, scale, eps
        return None
    if node.target != _ATEN.mul.Tensor or len(node.args) != 2:
        return None
    for scale, normed in (node.args, node.args[::-1]):
        if not isinstance(scale, fx.Node) or not isinstance(normed, fx.Node):
            continue
        value, wanted = scale.meta.get("val"), node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != wanted.dtype:
            continue
        back = _behind_cast(normed)
        inner = back if back is not None else normed
        if inner.target != _ATEN.mul.Tensor or (inner is not normed and len(normed.users) > 1):
            continue
        for x, root in (inner.args, inner.args[::-1]):
            eps = _root_of(root, x)
            if eps is None or not isinstance(x, fx.Node):
                continue
            source = _behind_cast(x) or x
            kind = source.meta["val"].dtype
            if kind == wanted.dtype and value.shape[0] == wanted.shape[-1]:
                return source, scale, eps
    return None


def _root_of(root: Any, x: Any) -> float | None:
    """Return eps where `root` is 1 / sqrt(mean(x^2) + eps) over the last dimension, kept."""
    if not isinstance(root, fx.Node) or root.target != _ATEN.rsqrt.default:
        return None
    total = root.args[0]
    if not isinstance(total, fx.Node) or total.target not in (_ATEN.add.Tensor, _ATEN.add.Scalar) or total.kwargs:
        return None
    mean, eps = total.args
    if isinstance(mean, float):
        mean, eps = eps, mean
    if not isinstance(eps, float) or not isinstance(mean, fx.Node) or mean.target != _ATEN.mean.dim:
        return None
    square, dims, keep = (*mean.args, None)[:3]
    last = len(mean.meta["val"].shape) - 1
    if list(dims) not in ([-1], [last]) or keep is not True or mean.kwargs:  # type: ignore[call-overload]
        return None
    if not isinstance(square, fx.Node) or square.target != _ATEN.pow.Tensor_Scalar or square.args[1] != 2:
        return None
    return eps if square.args[0] is x else None


def _behind_cast(node: fx.Node) -> fx.Node | None:
    """Return what a cast to another dtype is of, None for any other node."""
    if node.target in (_ATEN.to.dtype, _ATEN._to_copy.default) and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None
