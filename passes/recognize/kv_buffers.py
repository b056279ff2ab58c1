"""Find KV caches that a model keeps in tensors of its own: buffers or inputs `[B, Hkv, C, D]` that it writes and attention reads.

Four spellings of a write are known: `index_copy_` and `index_put_` at a tensor of places, a slice that is assigned, and a copy of
the whole. What the attention reads must be the whole tensor and nothing else; where it is not, the reason says so. Keys and values
in two buffers that the graph only reads are a cache as well, of a cross attention: somebody else wrote it, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import TRUE
from effcompile.core.program import Entry, Program
from effcompile.core.site import CacheSite, Missed, Refusal
from effcompile.passes.recognize.match import same_size

Locate = Callable[[fx.Node], tuple[str, str]]
CODE = "EFF-K208"
_SAME = ("aten::alias", "aten::detach", "aten::contiguous", "aten::clone")
_DIM = 2  # of the tokens


@dataclass(frozen=True)
class Write:
    """Hold one write of tokens into a cache: `place` is the node of their places, int64 `[S]`, or the number of the first."""

    node: fx.Node
    base: fx.Node
    place: fx.Node | int
    tokens: fx.Node


@dataclass(frozen=True)
class BufferCache:
    """Hold a cache that was found: the attention that reads it, and what is written into it before."""

    site: CacheSite
    attention: fx.Node
    keys: Write
    values: Write


@dataclass(frozen=True)
class CrossCache:
    """Hold a cache that a graph only reads: the attention, and the buffers of its keys and values."""

    site: CacheSite
    attention: fx.Node
    keys: fx.Node
    values: fx.Node


Cached = BufferCache | CrossCache
Found = tuple[tuple[Cached, ...], tuple[Missed, ...]]


def find_buffers(program: Program, locate: Locate) -> Found:
    """Return the caches of a raised program, in the order of the graph, and what looks like one but cannot be stored otherwise."""
    found: list[Cached] = []
    missed: list[Missed] = []
    for entry in program.entries:
        writes, read = _writes(entry), set[fx.Node]()
        for node in entry.graph.graph.nodes:
            if node.op != "call_function" or node.target is not torch.ops.eff.attention_v1.default:
                continue
            call = AttentionCall.of(node)
            bases = [_base(x, writes) for x in (call.k, call.v)]
            read |= {base for base in bases if base is not None}
            if not any(base in writes for base in bases):
                if all(base is not None and _is_buffer(entry, base) for base in bases):
                    site, refusal = _site(entry, node, call, locate, bases), _refusal_cross(node, call, bases)
                    if refusal is None:
                        found.append(CrossCache(site, node, *bases))  # type: ignore[arg-type]
                    else:
                        missed.append(Missed(site, refusal))
                continue
            site = _site(entry, node, call, locate, bases)
            pair = [writes.get(base, []) if base is not None else [] for base in bases]
            refusal = _refusal(node, call, pair)
            if refusal is None:
                found.append(BufferCache(site, node, pair[0][0], pair[1][0]))
            else:
                missed.append(Missed(site, refusal))
        missed += [_unread(entry, base, mine[0], locate) for base, mine in writes.items() if base not in read]
    return tuple(found), tuple(missed)


def _writes(entry: Entry) -> dict[fx.Node, list[Write]]:
    """Return the writes into each input of the graph that could be a cache; one that is not understood counts as well."""
    found: dict[fx.Node, list[Write]] = {}
    for node in entry.graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        target, base = node.args[0], node.args[0]
        while base.op == "call_function" and base.args and isinstance(base.args[0], fx.Node) and is_view(base):
            base = base.args[0]
        value = base.meta.get("val")
        if base.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor) and value.dim() == 4:
            found.setdefault(base, []).append(_write(node, target, base) or Write(node, base, -1, base))
    return found


def _write(node: fx.Node, target: fx.Node, base: fx.Node) -> Write | None:
    name = node.target._schema.name  # type: ignore[union-attr]
    args: Sequence[Any] = node.args
    if name == "aten::index_copy_" and target is base and args[1] in (_DIM, _DIM - 4):
        return Write(node, base, args[2], args[3])
    if name == "aten::index_put_" and target is base:
        places = list(args[1])
        alone = len(places) == _DIM + 1 and places[:_DIM] == [None] * _DIM and isinstance(places[_DIM], fx.Node)
        adds = bool(args[3]) if len(args) > 3 else bool(node.kwargs.get("accumulate"))
        if alone and not adds and places[_DIM].meta["val"].dim() == 1:
            return Write(node, base, places[_DIM], args[2])
    if name == "aten::copy_" and target is base and isinstance(args[1], fx.Node):
        return None if _made_of(args[1], base) else Write(node, base, 0, args[1])
    if name == "aten::copy_" and target.op == "call_function" and isinstance(args[1], fx.Node):
        start = _slice(target, base)
        if start is not None:
            return Write(node, base, start, args[1])
    return None


def _made_of(node: fx.Node, base: fx.Node) -> bool:
    """Tell whether a tensor is made of the old tokens of a cache: moved, or beside new ones."""
    seen, left = set[fx.Node](), [node]
    while left:
        one = left.pop()
        if one is base:
            return True
        if one not in seen and one.op == "call_function" and one.target is not torch.ops.eff.attention_v1.default:
            seen.add(one)
            left += one.all_input_nodes
    return False


def _slice(node: fx.Node, base: fx.Node) -> int | None:
    """Return where a slice of the tokens begins whose other dimensions are whole."""
    start = 0
    while node is not base:
        if node.target is not torch.ops.aten.slice.Tensor:
            return None
        missing: tuple[Any, ...] = (None, 0, None, None, 1)[len(node.args) :]
        given: tuple[Any, ...] = (*node.args, *missing)
        whole, dim, first, last, step = given
        extent = whole.meta["val"].shape[dim]
        if step not in (1, None):
            return None
        if dim == _DIM and start == 0 and isinstance(first or 0, int):
            start = int(first or 0)
        elif first not in (0, None) or (isinstance(last, int) and last < extent):
            return None
        node = whole
    return start


def _base(node: fx.Node, writes: dict[fx.Node, list[Write]]) -> fx.Node | None:
    """Return the input that a node is as a whole, after what is written into it."""
    seen = {write.node: base for base, mine in writes.items() for write in mine}
    while True:
        if node in seen and (node.target._schema.name != "aten::copy_" or node.args[0] is seen[node]):  # type: ignore[union-attr]
            return seen[node]
        if node.op != "call_function":
            return node
        whole = _is_same(node)
        if not whole:
            return None
        node = node.args[0]  # type: ignore[assignment]


def _is_same(node: fx.Node) -> bool:
    """Tell whether a node is its first operand: a slice of all of it, a copy, or the same type again."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.args[0], fx.Node):
        return False
    name, before, after = node.target._schema.name, node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if name not in _SAME and name not in ("aten::slice", "aten::expand", "aten::to", "aten::_to_copy"):
        return False
    # Not by `==`, which would hold a symbolic size to the value that it happens to have.
    alike = before.dim() == after.dim() and all(map(same_size, before.shape, after.shape))
    return alike and before.dtype == after.dtype


def is_view(node: fx.Node) -> bool:
    """Tell whether a node is another form of its first operand, in the same memory."""
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and bool(target._schema.returns)
        and any(
            returned.alias_info is not None and not returned.alias_info.is_write for returned in target._schema.returns
        )
    )


def _site(
    entry: Entry, node: fx.Node, call: AttentionCall, locate: Locate, bases: Sequence[fx.Node | None]
) -> CacheSite:
    k, v = call.k.meta["val"], call.v.meta["val"]
    base = next(base for base in bases if base is not None)
    described = entry.input_of(base)
    return CacheSite(
        f"{node.meta.get('eff.site', 'graph')}.cache",
        "cache",
        entry.name,
        locate(node)[1],
        idiom="buffers" if described is not None and described.kind == "buffer" else "inputs",
        batch=_extent(k.shape[0]),
        kv_heads=_extent(k.shape[1]),
        head_dim=int(k.shape[3]),
        value_dim=int(v.shape[3]),
        capacity=_extent(k.shape[2]),
        dtype=str(k.dtype).removeprefix("torch."),
    )


def _is_buffer(entry: Entry, base: fx.Node) -> bool:
    described, value = entry.input_of(base), base.meta.get("val")
    held = isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()
    return held and described is not None and described.kind == "buffer"


def _unread(entry: Entry, base: fx.Node, write: Write, locate: Locate) -> Missed:
    """Say why a tensor that is written is no cache that can be stored otherwise: no attention reads it as it is."""
    value, described = base.meta["val"], entry.input_of(base)
    own = [base, write.node]
    readers = [user for node in own for user in node.users if user not in own and not is_view(user)]
    readers += [x for node in own for user in node.users if is_view(user) for x in user.users if x not in own]
    source = next((locate(node)[1] for node in (*readers, write.node) if locate(node)[1]), "")
    site = CacheSite(
        f"{described.name if described is not None else base.name}.cache",
        "cache",
        entry.name,
        locate(write.node)[1] or source,
        idiom="buffers" if described is not None and described.kind == "buffer" else "inputs",
        batch=_extent(value.shape[0]),
        kv_heads=_extent(value.shape[1]),
        capacity=_extent(value.shape[2]),
        dtype=str(value.dtype).removeprefix("torch."),
    )
    if write.place == -1:
        return Missed(site, _unknown(write))
    if not readers:
        return Missed(site, Refusal(CODE, "nothing reads it"))
    if readers[0].target is torch.ops.eff.attention_v1.default:
        return Missed(site, Refusal(CODE, "attention reads a part of it"))
    kept = f"attention reads what `{readers[0].target}` makes of it, as of the latents of MLA; only keys and values can be packed"
    return Missed(site, Refusal(CODE, f"{kept} ({source})" if source else kept))


def _unknown(write: Write) -> Refusal:
    """Say why a write is not understood."""
    if any(_made_of(x, write.base) for x in write.node.args[1:] if isinstance(x, fx.Node)):
        return Refusal(
            CODE,
            "its tokens are moved at every call, as in a window that slides by copying",
            "index_copy_(2, places, tokens), and a mask that hides what the window has left",
        )
    return Refusal(
        CODE, f"`{write.node.target}` writes it in a way that is not known", "index_copy_(2, places, tokens)"
    )


def _refusal_cross(node: fx.Node, call: AttentionCall, bases: Sequence[fx.Node | None]) -> Refusal | None:
    """Return why a cache that is only read cannot be stored in another form."""
    if bases[0] is bases[1]:
        return Refusal(CODE, "keys and values are the same buffer")
    for base in bases:
        assert base is not None
        others = [user for user in base.users if not _belongs(user, node, None)]
        if others:
            return Refusal(CODE, f"`{others[0].target}` reads the cache too", "leave the cache to its attention")
    if call.mask is None and not _sees_all(call):
        return Refusal(CODE, "the attention over it has an order", "a mask over all places")
    return _refusal_operands(call)


def _sees_all(call: AttentionCall) -> bool:
    return call.mask is None and call.keep == TRUE and call.bias is None


def _refusal_operands(call: AttentionCall) -> Refusal | None:
    if call.sinks is not None:
        return Refusal(CODE, "attention has sinks, which a compressed cache's does not")
    if call.q.meta["val"].dtype != call.k.meta["val"].dtype:
        return Refusal(CODE, "queries and the cache differ in dtype")
    return None


def _refusal(node: fx.Node, call: AttentionCall, pair: Sequence[Sequence[Write]]) -> Refusal | None:
    """Return why the cache cannot be stored in another form."""
    if not all(pair):
        return Refusal(CODE, "attention reads more than the cache, or keys and values that are no caches both")
    if any(len(mine) != 1 for mine in pair):
        return Refusal(CODE, "the cache is written more than once in a call")
    keys, values = pair[0][0], pair[1][0]
    order = {other: number for number, other in enumerate(node.graph.nodes)}
    for write in (keys, values):
        if isinstance(write.place, int) and write.place < 0:
            return _unknown(write)
        if order[write.node] > order[node]:
            return Refusal(CODE, "tokens are written after attention has read the cache")
        others = [user for user in [*write.base.users, *write.node.users] if not _belongs(user, node, write)]
        if others:
            return Refusal(CODE, f"`{others[0].target}` reads the cache too", "leave the cache to its attention")
    if keys.place is not values.place and keys.place != values.place:
        return Refusal(CODE, "keys and values are written to places that are not the same tensor")
    whole = all(
        w.place == 0 and same_size(w.tokens.meta["val"].shape[_DIM], w.base.meta["val"].shape[_DIM])
        for w in (keys, values)
    )
    if call.mask is None and not (whole and _sees_all(call)):
        return Refusal(
            CODE, "without a mask attention reads places of the cache that hold nothing yet", "a mask over all places"
        )
    return _refusal_operands(call)


def _belongs(user: fx.Node, attention: fx.Node, write: Write | None) -> bool:
    """Tell whether a node that reads a cache is its attention, its write, or a view between them."""
    if user is attention or (write is not None and user is write.node):
        return True
    if user.op != "call_function" or not (_is_same(user) or user.target is torch.ops.aten.slice.Tensor):
        return False
    return all(_belongs(other, attention, write) for other in user.users)


def _extent(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)
