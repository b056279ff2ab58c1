"""Read one element of a graph value as an expression, by walking the subgraph that builds it.

`Reader.element(node, index)` answers "what is node[index]?" without looking at example values. An op that has a rule is
looked through; any other node is a *load*: its elements are taken as they are. In-place writes are honoured: a read sees
exactly the writes that precede its consumer. A small integer tensor that is written after it was read, such as the counter of a
static cache, is loaded from a *snapshot*: a copy made where the tensor came to be, which no write reaches. What cannot be proved
raises `Unreadable`, and the mask stays opaque.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effcompile.core.expr import BOOL, INT, Expr, apply, axes_of, const, load, size
from effcompile.core.expr import KEY as K_AXIS
from effcompile.core.expr import QUERY as Q_AXIS
from effcompile.passes.recognize.aliases import Aliases, Write, shares, written

Index = tuple[Expr, ...]
Rule = Callable[["Reader", fx.Node, Index, int], Expr]
_INTEGERS = (torch.int64, torch.int32)
_SMALL = 64  # elements: counters, one for each sequence at most; a copy of anything larger is no trifle


class Unreadable(Exception):
    """Say why an element cannot be expressed; the reason reaches the user through `explain`."""


def op_name(node: fx.Node) -> str:
    """Return the ATen name without namespace and overload: `add`, `masked_fill_`; '' for anything else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    return target._schema.name.removeprefix("aten::")


def is_write(node: fx.Node) -> bool:
    """Tell whether the node writes into one of its operands."""
    return bool(written(node))


@dataclass
class Reader:
    """Walk one graph; `loads` and `sizes` collect the operands that expressions refer to by slot.

    `snapshots` are those loads that stand for what the node held where it came to be: it is written later.
    """

    graph: fx.Graph
    rules: dict[str, Rule]
    buffers: Callable[[fx.Node], torch.Tensor | None] = lambda node: None
    loads: list[fx.Node] = field(default_factory=list)
    snapshots: list[fx.Node] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)
    pinned: list[fx.Node] = field(default_factory=list)
    extents: tuple[Any, ...] = ()  # of batch, heads, queries and keys, where known

    def __post_init__(self) -> None:
        self.aliases = Aliases(self.graph)
        self.order = self.aliases.order
        self._memo: dict[tuple[fx.Node, Index, int, bool], Expr] = {}
        self._depth = 0
        self._unsure = 0

    # --- sizes -------------------------------------------------------------------------------------------------------

    def number(self, value: Any) -> Expr:
        """Return an integer argument (int, SymInt, or the node of one) as an expression."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, bool | int | float):
            return const(value)
        if isinstance(value, torch.SymInt):
            return self._symbolic(value.node.expr, value.node.shape_env)
        raise Unreadable(f"a size that is not an integer ({type(value).__name__})")

    def expression(self, expr: Any, like: torch.SymInt) -> Expr:
        """Return a sympy integer over the same symbols as `like`."""
        return self._symbolic(sympy.expand(expr), like.node.shape_env)

    def _symbolic(self, expr: Any, environment: Any) -> Expr:
        if expr.is_Integer:
            return const(int(expr))
        if isinstance(expr, sympy.Add):
            total = const(0)
            for term in expr.args:
                total = apply("add", total, self._symbolic(term, environment))
            return total
        if isinstance(expr, sympy.Mul) and len(expr.args) == 2 and expr.args[0].is_Integer:
            return apply("mul", self._symbolic(expr.args[1], environment), const(int(expr.args[0])))
        if expr not in self.sizes:
            self.sizes.append(expr)
        slot = self.sizes.index(expr)
        return size(slot) if environment.bound_sympy(expr).lower >= 0 else apply("signed", size(slot))

    def shape(self, node: fx.Node) -> list[Any]:
        """Return the recorded shape of a tensor node."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise Unreadable(f"`{node.name}` is not a tensor")
        return list(value.shape)

    # --- elements ----------------------------------------------------------------------------------------------------

    def element(self, node: Any, index: Index, at: int) -> Expr:
        """Return node[index] as the consumer at position `at` sees it; numbers are taken as constants."""
        if not isinstance(node, fx.Node):
            return self.number(node)
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return self.number(node)
        dims = self.shape(node)
        if len(dims) != len(index):  # broadcasting: leading dimensions of the index do not exist here
            index = index[len(index) - len(dims) :]
        index = tuple(const(0) if isinstance(n, int) and n == 1 else i for i, n in zip(index, dims))
        key = (node, index, self.aliases.last_write(node, at), self._unsure > 0)
        if key not in self._memo:
            self._depth += 1
            if self._depth > 200:
                raise Unreadable("the subgraph is too deep")
            try:
                self._memo[key] = self._read(node, index, at)
            finally:
                self._depth -= 1
        return self._memo[key]

    def _read(self, node: fx.Node, index: Index, at: int) -> Expr:
        if self.aliases.writes(node):
            root = self.aliases.root(node)
            if node is root:
                return self._after_writes(root, index, at)
            views = written(node)
            if len(views) == 1:  # the result of an in-place op is what it wrote to
                return self.element(views[0], index, at)
            if views or not shares(node, node.args[0] if node.args else None):
                raise Unreadable(f"what `{node.name}` shares with a value that is written in place")
        if not shares(node, node.args[0] if node.args else None):
            at = self.order[node]  # a copy holds what its source held when it was made
        rule = self.rules.get(op_name(node))
        return self.leaf(node, index, at) if rule is None or is_write(node) else rule(self, node, index, at)

    @contextlib.contextmanager
    def unsure(self) -> Iterator[None]:
        """Read at places that may lie outside a tensor, under a condition that drops those elements."""
        self._unsure += 1
        try:
            yield
        finally:
            self._unsure -= 1

    def _inside(self, index: Index, shape: Sequence[Any]) -> Index:
        """Move places that may lie outside to the nearest element: evaluating a load must never fail."""
        if any(isinstance(n, int) and n == 0 for n in shape):
            raise Unreadable("a mask made from an empty tensor")

        def moved(place: Expr, extent: Any) -> Expr:
            known = (
                place.op == "axis"
                and self.extents
                and statically_known_true(self.extents[int(place.value or 0)] == extent)
            )
            if place == const(0) or known:
                return place
            return apply("minimum", apply("maximum", place, const(0)), apply("sub", self.number(extent), const(1)))

        return tuple(moved(place, extent) for place, extent in zip(index, shape))

    def leaf(self, node: fx.Node, index: Index, at: int) -> Expr:
        """Return a load of a tensor that exists anyway, as position `at` sees it; one over query x key positions is refused."""
        value = node.meta["val"]
        later = any(write.at > self.order[node] for write in self.aliases.writes(node))
        if later and not self._may_copy(node, at):
            raise Unreadable(f"`{node.name}` is written in place after the mask read it")
        number = self._written_number(node)
        if number is not None:
            return number
        if later and node not in self.snapshots:
            self.snapshots.append(node)
        known = self.buffers(node)
        if known is not None and readable(known) and not later:
            proved = triangle(known, index)
            if proved is not None:
                self.pinned.append(node)
                return proved
        spread = [axes_of(part) & {Q_AXIS, K_AXIS} for part in index]
        if sum(1 for axes in spread if Q_AXIS in axes) and sum(1 for axes in spread if K_AXIS in axes):
            alone = [axes for axes in spread if axes]
            if len(alone) > 1 and known is not None and known.is_meta:
                raise Unreadable(f"the buffer `{node.name}` holds it, and has no content on the meta device")
            if len(alone) > 1:
                raise Unreadable(
                    f"the values of `{node.name}` {tuple(value.shape)} are data over query and key positions"
                )
        if value.dtype not in (BOOL, *_INTEGERS) and not value.dtype.is_floating_point:
            raise Unreadable(f"`{node.name}` has dtype {value.dtype}")
        index = self._inside(index, value.shape) if self._unsure else index
        if node not in self.loads:
            self.loads.append(node)
        return load(self.loads.index(node), index, INT if value.dtype in _INTEGERS else value.dtype)

    def _may_copy(self, node: fx.Node, at: int) -> bool:
        """Tell whether a copy of `node`, made where it came to be, is small and holds what the node holds at position `at`."""
        value = node.meta["val"]
        small = all(isinstance(n, int) for n in value.shape) and value.numel() <= _SMALL
        if value.layout != torch.strided or value.dtype not in (BOOL, *_INTEGERS) or not small:
            return False
        return self.aliases.written_between(node, self.order[node], at) is None

    def _written_number(self, node: fx.Node) -> Expr | None:
        """Return the number that the source spells as a 0-dimensional tensor: a part of the program, not of its data."""
        named = node.op == "get_attr" and str(node.target).startswith("_tensor_constant")
        held = getattr(self.graph.owning_module, str(node.target), None) if named else None
        if not isinstance(held, torch.Tensor) or held.dim() or held.dtype not in (BOOL, *_INTEGERS, torch.float32):
            return None
        return None if self.aliases.writes(node) else const(held.item(), held.dtype)

    # --- in-place writes -----------------------------------------------------------------------------------------------

    def _after_writes(self, root: fx.Node, index: Index, at: int) -> Expr:
        writes = [write for write in self.aliases.writes(root) if write.at < at]
        if not writes:
            return self._unwritten(root, index, at)
        last = writes[-1]
        position, inside = self._inverse(root, last.view, index)
        dtype = root.meta["val"].dtype
        if dtype not in (BOOL, *_INTEGERS) and not dtype.is_floating_point:
            raise Unreadable(f"`{root.name}` has dtype {dtype}")
        if inside.is_const and inside.value:
            return apply("to", self._written(last, position), dtype=dtype)
        if inside.is_const:
            return self._after_writes(root, index, last.at)
        with self.unsure():
            new = apply("to", self._written(last, position), dtype=dtype)
        return apply("where", inside, new, self._after_writes(root, index, last.at))

    def _unwritten(self, root: fx.Node, index: Index, at: int) -> Expr:
        rule = self.rules.get(op_name(root))
        at = self.order[root]
        return self.leaf(root, index, at) if rule is None else rule(self, root, index, at)

    def _written(self, write: Write, index: Index) -> Expr:
        name = op_name(write.node)
        if write.node.args[0] is not write.view:
            raise Unreadable(f"`{name or write.node.name}` writes to a later operand")
        if name == "copy_":
            value = write.view.meta["val"]
            return apply("to", self.element(write.node.args[1], index, write.at), dtype=value.dtype)
        rule = self.rules.get(name.removesuffix("_")) if name.endswith("_") else None
        if rule is None:
            raise Unreadable(f"in-place `{name}` has no rule")
        return rule(self, write.node, index, write.at)

    def _inverse(self, root: fx.Node, view: fx.Node, index: Index) -> tuple[Index, Expr]:
        """Map an index of the storage to one of its view, with the condition that the view covers it."""
        chain: list[fx.Node] = []
        node = view
        while node is not root:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or not shares(node, source):
                raise Unreadable(f"an in-place write through `{node.name}`")
            if not is_write(node):
                chain.append(node)
            node = source
        inside = const(True)
        position = list(index)
        for step in reversed(chain):
            name = op_name(step)
            args = list(step.args) + [None] * 4
            if name in ("alias", "detach"):
                continue
            if name == "unsqueeze":
                dim = int(args[1])  # type: ignore[arg-type]
                position.insert(dim % (len(position) + 1), const(0))
            elif name == "select":
                base = step.args[0]
                assert isinstance(base, fx.Node)
                dim = int(args[1]) % len(position)  # type: ignore[arg-type]
                place = self.number(from_front(self.shape(base)[dim], args[2]))
                inside = apply("and", inside, apply("eq", position.pop(dim), place))
            elif name == "slice":
                dim = int(args[1] or 0) % len(position)  # type: ignore[arg-type]
                if args[4] not in (None, 1):
                    raise Unreadable("an in-place write through a strided slice")
                begin = slice_begin(self, step, dim, args[2])
                here, end = position[dim], apply("add", begin, self.number(self.shape(step)[dim]))
                inside = apply("and", inside, apply("and", apply("ge", here, begin), apply("lt", here, end)))
                position[dim] = apply("sub", here, begin)
            else:
                raise Unreadable(f"an in-place write through `{name or step.name}`")
        return tuple(position), inside


def from_front(extent: Any, place: Any) -> Any:
    """Return a place along a dimension as torch counts it: a negative one from the end."""
    place = place.meta["val"] if isinstance(place, fx.Node) else place
    if statically_known_true(place < 0):
        return extent + place
    if not statically_known_true(place >= 0):
        raise Unreadable("a place along a dimension whose sign is data")
    return place


def slice_begin(reader: Reader, node: fx.Node, dim: int, begin: Any) -> Expr:
    """Return where a slice begins; one before the front begins at 0, one past the end is empty."""
    begin = begin.meta["val"] if isinstance(begin, fx.Node) else 0 if begin is None else begin
    source = node.args[0]
    assert isinstance(source, fx.Node)
    extent = reader.shape(source)[dim]
    if isinstance(begin, int) and isinstance(extent, int):
        return const(min(max(begin + extent if begin < 0 else begin, 0), extent))
    if statically_known_true(begin >= 0):
        return reader.number(begin)
    if statically_known_true(begin < 0) and statically_known_true(begin + extent >= 0):
        return reader.number(begin + extent)
    # Tracing has settled the sign for this graph: the view's offset within the storage tells what it found.
    old, new = source.meta["val"], node.meta["val"]
    offset, stride = (
        sympy.sympify(getattr(getattr(n, "node", n), "expr", n))
        for n in (new.storage_offset() - old.storage_offset(), old.stride(dim))
    )
    place, rest = sympy.fraction(sympy.cancel(offset / stride)) if stride != 0 else (0, 0)
    if rest != 1:
        raise Unreadable("a slice that begins at a place whose sign is data")
    return reader.expression(place, extent if isinstance(extent, torch.SymInt) else begin)


def readable(buffer: torch.Tensor) -> bool:
    """Tell whether a buffer has content to read, and a version to watch afterwards: on meta there is none, nor in a dry run."""
    return not (buffer.is_meta or isinstance(buffer, FakeTensor) or buffer.is_inference())


def triangle(buffer: torch.Tensor, index: Sequence[Expr]) -> Expr | None:
    """Return the predicate of a module buffer that holds a causal triangle in its last two dimensions, else None.

    The caller pins the buffer: its address and version are compared before every call.
    """
    if buffer.dim() < 2 or buffer.shape[-1] != buffer.shape[-2] or buffer.shape[-1] < 2 or buffer.shape[-1] > 8192:
        return None
    if any(extent != 1 for extent in buffer.shape[:-2]):
        return None
    flat = buffer.reshape(buffer.shape[-2:])
    lower = torch.ones(flat.shape, dtype=BOOL).tril()
    row, column = index[-2], index[-1]
    inside = apply("le", column, row)
    if flat.dtype == BOOL or not flat.dtype.is_floating_point:
        kept = flat.cpu() != 0
        if bool(((flat == 0) | (flat == 1)).all()):
            one, zero = const(1, flat.dtype), const(0, flat.dtype)
            if torch.equal(kept, lower):
                return apply("where", inside, one, zero)
            if torch.equal(~kept, lower) or torch.equal(kept, lower.logical_not()):
                return apply("where", inside, zero, one)
        return None
    low, high = flat[-1, 0].item(), flat[0, -1].item()
    if torch.equal(flat.cpu(), torch.where(lower, low, high).to(flat.dtype)) and low != high:
        return apply("where", inside, const(low, flat.dtype), const(high, flat.dtype))
    return None
