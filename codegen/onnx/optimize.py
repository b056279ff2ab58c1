"""Run torch's own rules over an ONNX model, in time that grows with its nodes.

Rules of several outputs look through the whole graph at every node, whatever that node is: on a decoder of thirty layers that is
most of the time. Here such a rule is tried at nodes of its first operator alone, where it can match; what it finds is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def optimize(model: Any) -> None:
    """Fold constants and simplify a model (onnx_ir) in its place."""
    from onnxscript import optimizer, rewriter

    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if not isinstance(rules, tuple):  # another version: slower, and the same file
        optimizer.optimize_ir(model)
        return
    with _replaced(rewriter, "_DEFAULT_REWRITE_RULES", tuple(map(_by_operator, rules))):
        optimizer.optimize_ir(model)


def _by_operator(rule: Any) -> Any:
    """Return a rule of several outputs with a quick answer for nodes that are not its first one."""
    outputs = list(getattr(getattr(rule, "_target_pattern", None), "output_nodes", ()))
    first = outputs[0].op_identifier() if len(outputs) > 1 else None
    if first is None:
        return rule
    quick, tried = copy.copy(rule), rule.try_rewrite

    def try_rewrite(model: Any, graph: Any, node: Any, **more: Any) -> Any:
        return tried(model, graph, node, **more) if node.op_identifier() == first else None

    quick.try_rewrite = try_rewrite
    return quick


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
