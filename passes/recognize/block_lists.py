"""Prove that the block lists of a FlexAttention call say what its `mask_mod` says.

FlexAttention visits only the blocks that are listed, and asks `mask_mod` only in those listed as partial: a BlockMask made for
another predicate is part of what the call means. Three kinds of lists are understood: the one block of a call without BlockMask;
those that the graph itself makes of a mask tensor as `create_block_mask` does, where the tensor's element is read like any other
mask; and those held by a buffer, which are compared block by block and then pinned. Anything else is not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BATCH, BOOL, HEAD, KEY, QUERY, Expr, apply, axes_of, axis, const, show, walk
from effcompile.core.expr_eval import evaluate
from effcompile.core.intervals import block_bounds
from effcompile.passes.recognize.elements import Reader, Unreadable, op_name, readable
from effcompile.passes.recognize.match import same_size

ONE_BLOCK = 1 << 30  # what `flex_attention` takes for the block of a call without BlockMask
_LONGEST = 8192  # rows and columns of a mask that is compared element by element
_SAME = ("to", "_to_copy", "contiguous", "clone", "alias")
_WIDE = (torch.int32, torch.int64)


class Unproved(Exception):
    """Say why block lists are not known to follow from the mask function."""


@dataclass(frozen=True)
class BlockLists:
    """Hold the operands of one call: nodes, or None for absent lists; block sizes in rows and columns."""

    counts: Any
    indices: Any
    full_counts: Any
    full_indices: Any
    block: tuple[int, int]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> BlockLists:
        """Read the operands by name (`compat.flex_block_fields`)."""
        block = (fields["BLOCK_SIZE[0]"], fields["BLOCK_SIZE[1]"])
        if not all(isinstance(size, int) for size in block):
            raise Unproved("its block size is computed in the graph")
        partial = (fields["kv_num_blocks"], fields["kv_indices"])
        return cls(*partial, fields["full_kv_num_blocks"], fields["full_kv_indices"], block)


def prove(lists: BlockLists, keep: Expr, shape: Sequence[Any], reader: Reader, at: int) -> tuple[fx.Node, ...]:
    """Return the buffers that a proof rests on; raise `Unproved`. `shape` is (batch, heads, queries, keys)."""
    if _is_one_block(lists, reader, at):
        return ()
    if (lists.full_counts is None) != (lists.full_indices is None):
        raise Unproved("full blocks are listed without their number")
    values = [_known(node, reader) for node in (lists.counts, lists.indices, lists.full_counts, lists.full_indices)]
    if values[0] is not None and values[1] is not None:
        return _compared(lists, values, keep, shape, reader)
    held = reader.buffers(lists.counts) if isinstance(lists.counts, fx.Node) else None
    if held is not None and held.is_meta:
        raise Unproved("its block lists have no content on the meta device")
    mask, maker = _source(lists)
    _unwritten(lists, mask, reader)
    extents = mask.meta["val"].shape
    if len(extents) != 4 or not all(map(same_size, extents[2:], shape[2:])):
        raise Unproved("the blocks were made for other lengths")
    if not all(same_size(extent, 1) or same_size(extent, whole) for extent, whole in zip(extents[:2], shape[:2])):
        raise Unproved("the blocks were made for another batch or number of heads")
    try:
        found = reader.element(mask, tuple(map(axis, (BATCH, HEAD, QUERY, KEY))), reader.order[maker])
    except Unreadable as why:
        raise Unproved(f"what the blocks were made of is not known: {why}") from None
    if apply("to", found, dtype=BOOL) != keep:
        raise Unproved(f"the blocks were made for {show(found)}, the mask function keeps {show(keep)}")
    return ()


def _is_one_block(lists: BlockLists, reader: Reader, at: int) -> bool:
    """Tell whether one partial block covers everything, as in a call without BlockMask."""
    if lists.full_counts is not None or min(lists.block) < ONE_BLOCK:
        return False
    zero = const(0)
    try:
        count = reader.element(lists.counts, (zero,) * lists.counts.meta["val"].dim(), at)
        index = reader.element(lists.indices, (zero,) * lists.indices.meta["val"].dim(), at)
    except Unreadable:
        return False
    return all(n == 1 for n in lists.counts.meta["val"].shape) and count == const(1) and index == zero


# --- lists that the graph makes of a mask tensor ----------------------------------------------------------------------------


def _source(lists: BlockLists) -> tuple[fx.Node, fx.Node]:
    """Return the boolean tensor `[B, H, Q, K]` of which the lists were made as `create_block_mask` makes them, and its reader."""
    partial = _listed(lists.counts, lists.indices)
    area = lists.block[0] * lists.block[1]
    if lists.full_counts is None:
        sums = _compared_with(partial, "gt", 0)
    else:
        sums = _compared_with(_listed(lists.full_counts, lists.full_indices), "eq", area)
        if op_name(partial) not in ("__and__", "bitwise_and", "logical_and"):
            raise Unproved("its partial blocks are not those with some keys and some without")
        first, second = partial.args[:2]
        if {_compared_with(first, "gt", 0), _compared_with(second, "lt", area)} != {sums}:
            raise Unproved("its partial and its full blocks come from different masks")
    return _blocks_summed(sums, lists.block)


def _unwritten(lists: BlockLists, mask: fx.Node, reader: Reader) -> None:
    """Raise where anything between the mask tensor and the lists is written in place: the lists then say what was written."""
    waiting = [lists.counts, lists.indices, lists.full_counts, lists.full_indices]
    seen: set[fx.Node] = {mask}
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if reader.aliases.writes(node):
            raise Unproved(f"`{node.name}`, of which its block lists are made, is written in place")
        waiting.extend(node.all_input_nodes)


def _plain(node: Any, dtypes: Sequence[torch.dtype]) -> fx.Node:
    """Look through copies, and through casts that keep every value: to one of `dtypes`."""
    while op_name(node) in _SAME and node.meta["val"].dtype in dtypes:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        raise Unproved("its lists are not made in this graph")
    return node


def _listed(counts: Any, indices: Any) -> fx.Node:
    """Return the boolean map `[B', H', Qb, Kb]` whose sums and whose descending stable order the lists are."""
    total, order = _step(counts, "sum"), _step(indices, "argsort")
    dense = total.args[0]
    if not isinstance(dense, fx.Node) or order.args[0] is not dense or len(total.args) > 2 or total.kwargs:
        raise Unproved("its lists are not the order of one map of blocks")
    last = (-1, dense.meta["val"].dim() - 1)
    given = dict(zip(("stable", "dim", "descending"), order.args[1:])) | dict(order.kwargs)
    if total.args[1] not in ([last[0]], [last[1]]) or given.get("dim", -1) not in last:
        raise Unproved("its lists are not the order of one map of blocks")
    if not given.get("stable") or not given.get("descending"):
        raise Unproved("its lists are not the stable, descending order of a map of blocks")
    found = _plain(dense, (torch.int8, *_WIDE))
    if found.meta["val"].dtype != BOOL:
        raise Unproved("its map of blocks is no boolean tensor")
    return found


def _step(node: Any, name: str) -> fx.Node:
    if not isinstance(node, fx.Node):
        raise Unproved("its lists are not made in this graph")
    found = _plain(node, _WIDE)
    if op_name(found) != name:
        raise Unproved(_made(found))
    return found


def _made(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "its block lists are inputs of the graph, made elsewhere"
    return f"its block lists come from `{op_name(node) or node.name}`"


def _compared_with(node: Any, name: str, number: int) -> fx.Node:
    node = _plain(node, (torch.int8, *_WIDE))
    if op_name(node) != name or node.args[1] != number or not isinstance(node.args[0], fx.Node):
        raise Unproved(f"its blocks are not those whose number of kept pairs is {name} {number}")
    return node.args[0]


def _blocks_summed(sums: fx.Node, block: tuple[int, int]) -> tuple[fx.Node, fx.Node]:
    """Return x, and who reads it, where `sums` adds up the blocks of x: pad to whole blocks, view, permute, sum."""
    wrong = Unproved("its blocks are not the sums over blocks of a mask tensor")
    if op_name(sums) != "sum" or sums.args[1:] not in (([-2, -1],), ([4, 5],)) or sums.kwargs:
        raise wrong
    moved = sums.args[0]
    if op_name(moved) != "permute" or moved.args[1] != [0, 1, 2, 4, 3, 5]:  # type: ignore[union-attr]
        raise wrong
    split = moved.args[0]  # type: ignore[union-attr]
    if op_name(split) not in ("view", "reshape", "_unsafe_view"):  # type: ignore[arg-type]
        raise wrong
    padded = split.args[0]  # type: ignore[union-attr]
    whole, parts = padded.meta["val"].shape, split.meta["val"].shape  # type: ignore[union-attr]
    if len(whole) != 4 or len(parts) != 6 or (parts[3], parts[5]) != block:
        raise wrong
    if not all(map(same_size, whole[:2], parts[:2])):
        raise wrong
    if not same_size(parts[2] * block[0], whole[2]) or not same_size(parts[4] * block[1], whole[3]):
        raise wrong
    if padded.meta["val"].dtype != BOOL:  # type: ignore[union-attr]
        raise Unproved("its blocks are sums over a mask that is no boolean tensor")
    found = _unpadded(padded, block)  # type: ignore[arg-type]
    return (found, split) if found is padded else (found, padded)  # type: ignore[return-value]


def _unpadded(node: fx.Node, block: tuple[int, int]) -> fx.Node:
    """Return x where `node` is x with False appended to its last two dimensions, up to whole blocks."""
    if op_name(node) not in ("pad", "constant_pad_nd"):
        return node
    widths = list(node.args[1])  # type: ignore[arg-type]
    rest = list(node.args[2:]) + list(node.kwargs.values())
    if (
        len(widths) != 4
        or widths[0] != 0
        or widths[2] != 0
        or any(value not in ("constant", None, 0) for value in rest)
    ):
        raise Unproved("its mask tensor is padded with something else than False behind its end")
    source = node.args[0]
    assert isinstance(source, fx.Node)
    extents = zip(source.meta["val"].shape[2:], node.meta["val"].shape[2:], block)
    if not all(same_size(whole, (extent + size - 1) // size * size) for extent, whole, size in extents):
        raise Unproved("its mask tensor is cut, or padded by more than a block")
    return source


# --- lists that a buffer holds ------------------------------------------------------------------------------------------------


def _known(node: Any, reader: Reader) -> torch.Tensor | None:
    """Return the content of a buffer or of a constant of the graph, where there is one that can be watched or cannot change."""
    if not isinstance(node, fx.Node):
        return None
    held = reader.buffers(node)
    if held is None and node.op == "get_attr":
        held = getattr(reader.graph.owning_module, str(node.target), None)
    if not isinstance(held, torch.Tensor) or not readable(held):
        return None
    return None if reader.aliases.writes(node) else held


def _compared(
    lists: BlockLists, values: Sequence[torch.Tensor | None], keep: Expr, shape: Sequence[Any], reader: Reader
) -> tuple[fx.Node, ...]:
    """Compare the lists with the predicate; raise where they differ or where that cannot be told."""
    used = axes_of(keep)
    extents = [n if number >= QUERY or number in used else 1 for number, n in enumerate(shape)]
    if not all(isinstance(n, int) for n in extents) or max(extents[2:]) > _LONGEST or _symbolic(reader.graph):
        raise Unproved("its block lists can only be compared for fixed sizes, and lengths up to 8192")
    if any(node.op == "size" for node in walk(keep)):
        raise Unproved("its mask function reads a size that is not fixed")
    slots = sorted({int(node.value or 0) for node in walk(keep) if node.op == "load"})
    data = {slot: _known(reader.loads[slot], reader) for slot in slots}
    if any(value is None for value in data.values()):
        raise Unproved("its block lists were made elsewhere, and its mask function reads data")
    loads = [data.get(slot) for slot in range(len(reader.loads))]
    counts, indices, full_counts, full_indices = values
    assert counts is not None
    assert indices is not None
    partial = _dense(counts, indices, lists.block, extents)
    full = torch.zeros_like(partial)
    if lists.full_counts is not None:
        if full_counts is None or full_indices is None:
            raise Unproved("its full blocks are not held by a buffer")
        full = _dense(full_counts, full_indices, lists.block, extents)
    for axis_number in (BATCH, HEAD):
        widths = {partial.shape[axis_number], full.shape[axis_number]}
        if axis_number in used and not widths <= {1, extents[axis_number]}:
            raise Unproved("its block lists are for another batch or number of heads")
    if bool((partial & full).any()):
        raise Unproved("it lists a block both as full and as partial")
    _agree(partial, full, keep, extents, lists.block, loads)
    nodes = (lists.counts, lists.indices, lists.full_counts, lists.full_indices, *(reader.loads[n] for n in slots))
    return tuple(node for node in nodes if isinstance(node, fx.Node) and node.op == "placeholder")


def _symbolic(graph: fx.Graph) -> bool:
    """Tell whether any size is open: where a buffer changes, the backend compiles the graph anew, which it then cannot."""
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    return any(isinstance(n, torch.SymInt) for n in (*values, *(n for shape in shapes for n in shape)))


def _dense(counts: torch.Tensor, indices: torch.Tensor, block: tuple[int, int], extents: Sequence[int]) -> torch.Tensor:
    """Return the listed blocks as a map `[B', H', Qb, Kb]`."""
    rows, columns = (-(-n // size) for n, size in zip(extents[2:], block))
    while counts.dim() < 3:
        counts, indices = counts.unsqueeze(0), indices.unsqueeze(0)
    counts, indices = counts.cpu().long(), indices.cpu().long()
    if counts.dim() != 3 or counts.shape != indices.shape[:3] or counts.shape[2] < rows:
        raise Unproved("its block lists have another shape than its lengths")
    counts, indices = counts[:, :, :rows], indices[:, :, :rows]
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    if bool((listed & ((indices < 0) | (indices >= columns))).any()) or bool((counts > indices.shape[-1]).any()):
        raise Unproved("it lists blocks behind the last key")
    times = torch.zeros((*counts.shape, columns + 1), dtype=torch.int64)
    times.scatter_add_(3, torch.where(listed, indices, columns), torch.ones_like(indices))
    if bool((times[..., :columns] > 1).any()):
        raise Unproved("it lists a block twice")
    return times[..., :columns] > 0


def _agree(
    partial: torch.Tensor,
    full: torch.Tensor,
    keep: Expr,
    extents: Sequence[int],
    block: tuple[int, int],
    loads: Sequence[Any],
) -> None:
    """Raise unless full blocks keep every pair and absent ones none. Intervals settle most; the rest is evaluated."""
    batch, heads, rows, columns = extents
    device = torch.device("cpu")
    loads = [value.cpu() if isinstance(value, torch.Tensor) else value for value in loads]
    every, some = block_bounds(keep, (batch, heads, rows, columns), block, loads, [], device)
    for line in range(full.shape[2]):
        claims, gaps = full[:, :, line], ~(full | partial)[:, :, line]
        if not bool((claims & ~every[:, :, line]).any()) and not bool((gaps & some[:, :, line]).any()):
            continue
        begin, end = line * block[0], min(rows, (line + 1) * block[0])
        axes = [torch.arange(n).reshape([n if d == place else 1 for d in range(4)]) for place, n in enumerate(extents)]
        axes[QUERY] = torch.arange(begin, end).reshape(1, 1, -1, 1)
        kept = evaluate(keep, axes, loads, []).expand(batch, heads, end - begin, columns)
        missing = -columns % block[1]
        all_kept = torch.nn.functional.pad(kept, (0, missing), value=True).unflatten(3, (-1, block[1])).all(4).all(2)
        any_kept = torch.nn.functional.pad(kept, (0, missing)).unflatten(3, (-1, block[1])).any(4).any(2)
        if bool((claims & ~all_kept).any()):
            raise Unproved("it lists a block as full that its mask function does not keep whole")
        if bool((gaps & any_kept).any()):
            raise Unproved("it leaves out a block in which its mask function keeps pairs")
