"""Write complex numbers out as two real ones: ONNX has none.

Some rotary embeddings are spelled with them (DeepSeek-V2, Llama 4). Every complex node becomes a real and an
imaginary one. Where an operation in between is not one of those below, the graph stays as it is, and torch's exporter says what it
does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from effcompile.core.rewrite import Editor

_ATEN = torch.ops.aten
Pair = tuple[fx.Node, fx.Node]
_SHAPED = {
    _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.reshape.default, _ATEN.view.default, _ATEN.expand.default,
    _ATEN.alias.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.slice.Tensor, _ATEN.select.int, _ATEN.flatten.using_ints,
    _ATEN.clone.default,
}  # fmt: skip
"""Operations that move elements and leave them as they are."""
_COPIES = {_ATEN._to_copy.default, _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.device}


def open_complex(edit: Editor) -> None:
    """Write out every complex node of a graph, if all of them can be."""
    nodes = [node for node in edit.graph.nodes if node.op == "call_function"]
    touched = [node for node in nodes if _is_complex(node) or any(_is_complex(x) for x in node.all_input_nodes)]
    if not touched or not all(map(_known, touched)):
        return
    pairs: dict[fx.Node, Pair] = {}
    for node in touched:
        with edit.before(node):
            if _is_complex(node):
                pairs[node] = _made(edit, node, pairs)
            elif node.target == _ATEN.view_as_real.default:  # the way out
                edit.replace(node, edit.call(_ATEN.stack.default, list(pairs[node.args[0]]), -1, like=node))  # type: ignore[index]
    for node in reversed(touched):
        if node.graph is edit.graph and node in edit.graph.nodes and not node.users:
            edit.graph.erase_node(node)


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def _known(node: fx.Node) -> bool:
    target = node.target
    if not _is_complex(node):
        return target in (_ATEN.view_as_real.default, _ATEN._assert_tensor_metadata.default)
    if any(_is_complex(x) and x.op != "call_function" for x in node.all_input_nodes):
        return False
    if target in _COPIES:
        source: Any = node.args[0]
        return _is_complex(source) and bool(node.meta["val"].dtype == source.meta["val"].dtype)
    if target in (_ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.rsub.Scalar):
        return not node.kwargs and not any(isinstance(x, complex) for x in node.args)
    if target == _ATEN.view_as_complex.default:
        return True
    return target in _SHAPED or target in (_ATEN.polar.default, _ATEN.complex.default)


def _made(edit: Editor, node: fx.Node, pairs: dict[fx.Node, Pair]) -> Pair:
    """Return the real and the imaginary part of a node."""
    target, args = node.target, node.args
    if target == _ATEN.complex.default:
        return args[0], args[1]  # type: ignore[return-value]
    if target == _ATEN.polar.default:
        size, angle = args
        parts = (edit.call(function, angle) for function in (_ATEN.cos.default, _ATEN.sin.default))
        real, imaginary = (edit.call(_ATEN.mul.Tensor, size, part) for part in parts)
        return real, imaginary
    if target == _ATEN.view_as_complex.default:
        real, imaginary = (edit.call(_ATEN.select.int, args[0], -1, place) for place in (0, 1))
        return real, imaginary
    if target in _COPIES:
        return pairs[args[0]]  # type: ignore[index]
    if target in _SHAPED:
        real, imaginary = (edit.call(target, part, *args[1:], **node.kwargs) for part in pairs[args[0]])  # type: ignore[arg-type, index]
        return real, imaginary
    left, right = (pairs.get(x) if isinstance(x, fx.Node) else None for x in args[:2])
    if target == _ATEN.rsub.Scalar:
        real, imaginary = pairs[args[0]]  # type: ignore[index]
        return edit.call(target, real, args[1]), edit.call(_ATEN.neg.default, imaginary)
    if target == _ATEN.mul.Tensor:
        return _product(edit, left, right, args[0], args[1])
    return _sum(edit, target, left, right, args[0], args[1])  # type: ignore[arg-type]


def _product(edit: Editor, left: Pair | None, right: Pair | None, first: Any, second: Any) -> Pair:
    def times(a: Any, b: Any) -> fx.Node:
        return edit.call(_ATEN.mul.Tensor, a, b)

    if left is None or right is None:
        pair, number = (right, first) if left is None else (left, second)
        assert pair is not None
        return times(pair[0], number), times(pair[1], number)
    (a, b), (c, d) = left, right
    real = edit.call(_ATEN.sub.Tensor, times(a, c), times(b, d))
    return real, edit.call(_ATEN.add.Tensor, times(a, d), times(b, c))


def _sum(
    edit: Editor, target: Callable[..., Any], left: Pair | None, right: Pair | None, first: Any, second: Any
) -> Pair:
    if left is not None and right is not None:
        real, imaginary = (edit.call(target, a, b) for a, b in zip(left, right))  # type: ignore[arg-type]
        return real, imaginary
    pair = left or right
    assert pair is not None
    real = edit.call(target, left[0] if left else first, right[0] if right else second)  # type: ignore[arg-type]
    turned = target == _ATEN.sub.Tensor and left is None
    shape = [edit.size(size) for size in real.meta["val"].shape]
    part = edit.call(_ATEN.neg.default, pair[1]) if turned else pair[1]
    return real, edit.call(_ATEN.expand.default, part, shape)
