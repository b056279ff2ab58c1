"""Say in words how tokens were routed: what was done to the scores before and after the top-k.

For reports only: routing is never rewritten, so nothing depends on an answer.
"""

from __future__ import annotations

import operator

from torch import fx

from effcompile.passes.recognize.elements import op_name

_WORDS = {"softmax": "softmax", "_softmax": "softmax", "sigmoid": "sigmoid", "sqrt": "sqrt", "softplus": "softplus"}
_STEPS = 40


def read_router(ids: fx.Node, weights: fx.Node) -> str:
    """Return words such as `softmax, top 2, renormalized`; '' where no top-k is behind the ids."""
    choice = _back(ids, ("topk", "argmax"))
    if choice is None:
        return ""
    count = choice.args[1] if op_name(choice) == "topk" else 1
    before = _scores(choice.args[0])  # type: ignore[arg-type]
    words = [*before, f"top {count}"]
    if op_name(weights) == "gather":  # of weights that were made after the choice, for all experts
        late = [word for word in _scores(weights.args[0]) if word not in before]  # type: ignore[arg-type]
        words += [f"{word} of the chosen" for word in late]
    after = _between(weights, choice)
    if any(op_name(node) in ("softmax", "_softmax") for node in after):
        words.append("softmax of the chosen")
    if any(op_name(node) in ("div", "div_") for node in after):
        words.append("renormalized")
    scale = next((node.args[1] for node in after if op_name(node) in ("mul", "mul_") and _number(node.args[1])), None)
    if scale is not None:
        words.append(f"times {scale:g}")
    return ", ".join(words)


def _number(value: object) -> bool:
    return isinstance(value, int | float)


def _back(node: fx.Node, names: tuple[str, ...]) -> fx.Node | None:
    """Return the first node of one of some names, going back along first operands."""
    for _ in range(_STEPS):
        if op_name(node) in names:
            return node
        following = node.args[0] if node.args else None
        if not isinstance(following, fx.Node):
            return None
        node = following
    return None


def _scores(node: fx.Node) -> list[str]:
    """Return what was done to the router's logits, in order."""
    words: list[str] = []
    for _ in range(_STEPS):
        name = op_name(node)
        if name in ("linear", "mm", "addmm", "matmul"):
            break
        if name in _WORDS:
            words.append(_WORDS[name])
        elif name == "masked_fill":
            words.append("limited to groups")
        elif name == "add" and isinstance(node.args[1], fx.Node) and node.args[1].op == "placeholder":
            words.append("plus a bias")
        following = node.args[0] if node.args else None
        if not isinstance(following, fx.Node):
            break
        node = following
    return list(dict.fromkeys(reversed(words)))


def _between(node: fx.Node, choice: fx.Node) -> list[fx.Node]:
    """Return the nodes from the weights back to the top-k, or to the gather of the chosen scores."""
    found: list[fx.Node] = []
    for _ in range(_STEPS):
        if node is choice or op_name(node) == "gather":
            break
        if node.target is not operator.getitem:
            found.append(node)
        following = node.args[0] if node.args else None
        if not isinstance(following, fx.Node):
            break
        node = following
    return found
