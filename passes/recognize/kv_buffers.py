"""Find KV caches that a model keeps in tensors of its own: buffers or inputs `[B, Hkv, C, D]` that it writes and attention reads.

Four spellings of a write are known: `index_copy_` and `index_put_` at a tensor of places, a slice that is assigned, and a copy of
the whole. What the attention reads must be the whole tensor and nothing else; where it is not, the reason says so. Keys and values
in two buffers that the graph only reads are a cache as well, of a cross attention: somebody else wrote it, once. A buffer from
which both keys and values are computed holds latents (`kv_latents.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import TRUE, apply, linear
from effcompile.core.mask import Mask, causal_offset, window_left
from effcompile.core.program import Entry, Program
from effcompile.core.site import CacheSite, Missed, Refusal
from effcompile.passes.recognize.kv_latents import LatentCache, find_latents
from effcompile.passes.recognize.kv_writes import CODE, Locate, Write, is_view, unknown, writes_of
from effcompile.passes.recognize.match import same_size

_SAME = ("aten::alias", "aten::detach", "aten::contiguous", "aten::clone")
_DIM = 2  # of the tokens of keys and values


@dataclass(frozen=True)
class BufferCache:
    """Hold a cache that was found: the attention that reads it, and what is written into it before."""

    site: CacheSite
    attention: fx.Node
    keys: Write
    values: Write

    @property
    def base(self) -> fx.Node:
        """Return the input that holds the keys."""
        return self.keys.base


@dataclass(frozen=True)
class CrossCache:
    """Hold a cache that a graph only reads: the attention, and the buffers of its keys and values."""

    site: CacheSite
    attention: fx.Node
    keys: fx.Node
    values: fx.Node

    @property
    def base(self) -> fx.Node:
        """Return the input that holds the keys."""
        return self.keys


Cached = BufferCache | CrossCache | LatentCache
Found = tuple[tuple[Cached, ...], tuple[Missed, ...]]


def find_buffers(program: Program, locate: Locate) -> Found:
    """Return the caches of a raised program, in the order of the graph, and what looks like one but cannot be stored otherwise."""
    found: list[Cached] = []
    missed: list[Missed] = []
    for entry in program.entries:
        writes, read = writes_of(entry), set[fx.Node]()
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
        latents, other = find_latents(entry, {base for base in read if base in writes}, locate)
        found, missed = [*found, *latents], [*missed, *other]
        read |= {write.base for cache in latents for write in cache.writes}
        missed += [_unread(entry, base, mine[0], locate) for base, mine in writes.items() if base not in read]
    return tuple(found), tuple(missed)


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
        window=_window(call),
        dtype=str(k.dtype).removeprefix("torch."),
    )


def _window(call: AttentionCall) -> int:
    """Return how many of the last tokens a query sees at most, itself included; 0 where that is not known, or all.

    Of k <= q + o and k >= q - w, where o is the place of the first query, w + o is a number of tokens.
    """
    parts = Mask(call.keep).parts() if call.keep is not None else ()
    ends = [o for part in parts if (o := causal_offset(part)) is not None]
    starts = [w for part in parts if (w := window_left(part)) is not None]
    for end in ends:
        for start in starts:
            terms, number = linear(apply("add", start, end))
            if not any(terms.values()) and number >= 0:
                return number + 1
    return 0


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
        return Missed(site, unknown(write))
    if not readers:
        return Missed(site, Refusal(CODE, "nothing reads it"))
    if readers[0].target is torch.ops.eff.attention_v1.default:
        return Missed(site, Refusal(CODE, "attention reads a part of it"))
    kept = f"attention reads what `{readers[0].target}` makes of it, as of the latents of MLA; only keys and values can be packed"
    return Missed(site, Refusal(CODE, f"{kept} ({source})" if source else kept))


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
            return unknown(write)
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
