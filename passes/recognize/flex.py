"""Recognize a user's own `flex_attention` call: the higher-order op with its `score_mod`, `mask_mod` and BlockMask.

What it means is `mask_mod` on the blocks that its lists name, so it is raised only where the lists are proved to name what the
function keeps (`block_lists.py`). A call that asks for more than its result, or that tunes its own kernel, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from effcompile.core import compat
from effcompile.core.expr import FLOAT, Expr, apply, axis, const
from effcompile.core.mask import substitute
from effcompile.core.site import Refusal
from effcompile.passes.recognize.block_lists import BlockLists, Unproved, prove
from effcompile.passes.recognize.elements import Reader, Unreadable, op_name
from effcompile.passes.recognize.mask import ReadMask, split
from effcompile.passes.recognize.match import Match, NoMatch, Operand, attends
from effcompile.passes.recognize.mods import NotAttention, ScoreMod, read_mask_mod, read_score_mod
from effcompile.passes.recognize.sdpa import unrepeated

IDIOM = "flex"
_NAMES = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options")
_LISTS = "create the BlockMask with create_block_mask inside the compiled code, or keep it on the module"


def is_flex(node: fx.Node) -> bool:
    """Tell whether a node is the higher-order op of a `flex_attention` call."""
    target = node.target
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() == "flex_attention"


def match_flex(node: fx.Node, reader: Reader, training: bool = False, grouped: bool = True) -> Match | NoMatch | None:
    """Return the attention that a call computes, or why it stays; `grouped` looks through repeated key/value heads.

    `reader` walks the graph that holds the call; the match refers to its loads and sizes.
    """
    if not is_flex(node):
        return None
    anchor = _part(node, 0) or _part(node, 1) or _part(node, 2)
    if anchor is None:
        return None
    given: dict[str, Any] = dict(zip((*_NAMES, "score_buffers", "mask_buffers"), node.args)) | dict(node.kwargs)
    q, k, v, scale = given["query"], given["key"], given["value"], given["scale"]
    why = _unsuited(node, given, training)
    if why is not None:
        return NoMatch(anchor, IDIOM, why)
    plain_k, plain_v = (unrepeated(k), unrepeated(v)) if grouped else (k, v)
    if not attends(q.meta["val"], plain_k.meta["val"], plain_v.meta["val"]):
        plain_k, plain_v = k, v
    shape = (*q.meta["val"].shape[:3], k.meta["val"].shape[2])
    try:
        read, score = _read(node, given, shape, reader)
    except NotAttention as refusal:
        return NoMatch(anchor, IDIOM, refusal.refusal)
    except Unproved as reason:
        return NoMatch(anchor, IDIOM, Refusal("EFF-A108", str(reason), _LISTS))
    except Unreadable as reason:
        return NoMatch(anchor, IDIOM, Refusal("EFF-A103", f"its mask or score function: {reason}"))
    return Match(
        idiom=IDIOM + ("" if plain_k is k else "+repeat_kv"),
        anchor=anchor,
        q=_node(q),
        k=_node(plain_k),
        v=_node(plain_v),
        scale=float(scale) * score.scale,
        softcap=score.softcap,
        reads=((q, node), (plain_k, k if plain_k is not k else node), (plain_v, v if plain_v is not v else node)),
        read=read,
    )


def _node(node: fx.Node) -> Operand:
    def build(edit: Any) -> fx.Node:
        return node

    return build


def _part(node: fx.Node, number: int) -> fx.Node | None:
    """Return the reader of one result: the attention, its LSE, or the largest scores."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == number and user.users:
            return user
    return None


def _unsuited(node: fx.Node, given: dict[str, Any], training: bool) -> Refusal | None:
    if training:
        return Refusal("EFF-A301", "its gradients are its own", "run inference under torch.no_grad()")
    if any(user.target is not operator.getitem for user in node.users) or _part(node, 1) or _part(node, 2):
        return Refusal("EFF-A109", "its LSE or its largest scores are read", "drop return_lse and return_aux")
    q, k, v = (given[name].meta["val"] for name in ("query", "key", "value"))
    if torch.is_autocast_enabled(
        q.device.type
    ):  # which the op obeys, and the dtypes that tracing recorded for it do not
        return Refusal("EFF-A107", "autocast is on around the model", "cast the model and its inputs instead")
    asked, usual = dict(given["kernel_options"]), compat.flex_kernel_options(q, k, v)
    odd = [name for name in asked if name != "OUTPUT_LOGSUMEXP" and asked[name] != usual.get(name)]
    if odd:
        return Refusal("EFF-A109", f"it asks for its own kernel: {', '.join(sorted(odd))}", "drop kernel_options")
    if not isinstance(given["scale"], int | float):
        return Refusal("EFF-A106", "the scale is computed in the graph")
    heads, groups = q.shape[1], k.shape[1]
    if not attends(q, k, v, grouped=isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0):
        return Refusal("EFF-A105", "query, key and value are broadcast against each other", "expand them")
    return None


def _read(node: fx.Node, given: dict[str, Any], shape: Sequence[Any], reader: Reader) -> tuple[ReadMask, ScoreMod]:
    module, at = node.graph.owning_module, reader.order[node]
    fields = compat.flex_block_fields(given["block_mask"])
    masks, scores = (_graph_of(module, item) for item in (fields["mask_mod"], given["score_mod"]))
    keep = _single(read_mask_mod(masks, given.get("mask_buffers", ()), reader, at), shape)
    pinned = prove(BlockLists.of(fields), keep, shape, reader, at)
    score = read_score_mod(scores, given.get("score_buffers", ()), reader, at)
    element = keep
    if score.addend is not None:
        element = apply("where", keep, _single(score.addend, shape), const(-float("inf")))
    wide = torch.promote_types(given["query"].meta["val"].dtype, FLOAT)
    q_len, k_len = reader.number(shape[2]), reader.number(shape[3])
    mask = split(element, q_len, k_len, "zero", wide, score.added)
    nodes = (*reader.pinned, *pinned)
    found = ReadMask(
        mask, tuple(reader.loads), tuple(reader.sizes), tuple(dict.fromkeys(nodes)), element, tuple(reader.snapshots)
    )
    return found, score


def _single(expr: Expr, shape: Sequence[Any]) -> Expr:
    """Put 0 for an axis that has one place, as reading a tensor of that shape does."""
    for number, extent in enumerate(shape):
        if isinstance(extent, int) and extent == 1:
            expr = substitute(expr, axis(number), const(0))
    return expr


def _graph_of(module: Any, node: Any) -> fx.GraphModule:
    found = getattr(module, str(node.target), None) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    if not isinstance(found, fx.GraphModule):
        raise Unreadable("it is no graph")
    return found


def erase(call: fx.Node) -> None:
    """Remove a call that nobody reads any more, and what was computed for it alone."""
    graph = call.graph
    for user in list(call.users):
        graph.erase_node(user)
    waiting, gone = [call], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in gone or node.users or not (node is call or _local(node)):
            continue
        waiting.extend(node.all_input_nodes)
        gone.add(node)
        graph.erase_node(node)


_ARITHMETIC = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)
_MADE = ("new_zeros", "zeros", "new_ones")


def _local(node: fx.Node) -> bool:
    """Tell whether a node only computes, or only writes to a tensor that was made here and that nobody else looks at."""
    target = node.target
    if node.op == "get_attr" or target in _ARITHMETIC:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if not target._schema.is_mutable:
        return torch.Tag.nondeterministic_seeded not in target.tags
    base = node.args[0] if node.args else None
    if op_name(node) != "index_put_" or not isinstance(base, fx.Node) or op_name(base) not in _MADE:
        return False
    return all(user is node or op_name(user) in _MADE for user in base.users)  # those read its dtype, not its values
