"""Read one element of a graph value as an expression, by walking the subgraph that builds it.

`Reader.element(node, index)` answers "what is node[index]?" without looking at example values. An op that has a rule is
looked through; any other node is a *load*: its elements are taken as they are. In-place writes are honoured: a read sees
exactly the writes that precede its consumer. What cannot be proved raises `Unreadable`, and the mask stays opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from effcompile.core.expr import BOOL, INT, Expr, apply, axes_of, const, load, size
from effcompile.core.expr import KEY as K_AXIS
from effcompile.core.expr import QUERY as Q_AXIS

Index = tuple[Expr, ...]
Rule = Callable[["Reader", fx.Node, Index, int], Expr]
_INTEGERS = (torch.int64, torch.int32)


class Unreadable(Exception):
    """Say why an element cannot be expressed; the reason reaches the user through `explain`."""


def op_name(node: fx.Node) -> str:
    """Return the ATen name without namespace and overload: `add`, `masked_fill_`; '' for anything else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    return target._schema.name.removeprefix("aten::")


def is_write(node: fx.Node) -> bool:
    """Tell whether the node writes into its first argument."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and bool(node.args)


VIEWS = frozenset(
    "alias detach view view_as reshape _unsafe_view expand expand_as permute transpose t select slice squeeze unsqueeze "
    "flatten unflatten movedim numpy_T diagonal narrow".split()
)


def _may_alias(node: fx.Node) -> bool:
    """Tell whether a cast is a no-op that returns its own input, so that later writes show through."""
    if op_name(node) not in ("to", "contiguous") or not isinstance(node.args[0], fx.Node):
        return False
    return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)


@dataclass(frozen=True)
class Write:
    """Record that `node` overwrites the elements of `view` (an alias of one storage) at position `at`."""

    node: fx.Node
    view: fx.Node
    at: int


@dataclass
class Reader:
    """Walk one graph; `loads` and `sizes` collect the operands that expressions refer to by slot."""

    graph: fx.Graph
    rules: dict[str, Rule]
    buffers: Callable[[fx.Node], torch.Tensor | None] = lambda node: None
    loads: list[fx.Node] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)
    pinned: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order = {node: number for number, node in enumerate(self.graph.nodes)}
        self._memo: dict[tuple[fx.Node, Index, int], Expr] = {}
        self._writes: dict[fx.Node, list[Write]] = {}
        self._depth = 0
        for node in self.graph.nodes:
            if is_write(node) and isinstance(node.args[0], fx.Node):
                self._writes.setdefault(self.root(node.args[0]), []).append(Write(node, node.args[0], self.order[node]))

    def root(self, node: fx.Node) -> fx.Node:
        """Return the node that owns the storage which `node` looks at."""
        while (op_name(node) in VIEWS or is_write(node) or _may_alias(node)) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    # --- sizes -------------------------------------------------------------------------------------------------------

    def number(self, value: Any) -> Expr:
        """Return an integer argument (int, SymInt, or the node of one) as an expression."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, bool | int | float):
            return const(value)
        if isinstance(value, torch.SymInt):
            return self._symbolic(value.node.expr)
        raise Unreadable(f"a size that is not an integer ({type(value).__name__})")

    def _symbolic(self, expr: Any) -> Expr:
        if expr.is_Integer:
            return const(int(expr))
        if isinstance(expr, sympy.Add):
            total = const(0)
            for term in expr.args:
                total = apply("add", total, self._symbolic(term))
            return total
        if isinstance(expr, sympy.Mul) and len(expr.args) == 2 and expr.args[0].is_Integer:
            return apply("mul", self._symbolic(expr.args[1]), const(int(expr.args[0])))
        if expr not in self.sizes:
            self.sizes.append(expr)
        return size(self.sizes.index(expr))

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
        key = (node, index, at if self.root(node) in self._writes else -1)
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
        root = self.root(node)
        if root in self._writes:
            if node is root:
                return self._after_writes(root, index, at)
            if is_write(node):
                assert isinstance(node.args[0], fx.Node)
                return self.element(node.args[0], index, at)
        if _may_alias(node) and any(self.order[node] < write.at < at for write in self._writes.get(root, ())):
            raise Unreadable(f"`{node.name}` may or may not see a later in-place write")
        if op_name(node) not in VIEWS and not _may_alias(node):
            at = self.order[node]  # a copy holds what its source held when it was made
        rule = self.rules.get(op_name(node))
        if rule is None or (is_write(node) and root not in self._writes):
            return self.leaf(node, index)
        return rule(self, node, index, at)

    def leaf(self, node: fx.Node, index: Index) -> Expr:
        """Return a load of a tensor that exists anyway; a tensor over query x key positions is refused."""
        value = node.meta["val"]
        if any(write.at > self.order[node] for write in self._writes.get(self.root(node), ())):
            raise Unreadable(f"`{node.name}` is written in place after the mask read it")
        known = self.buffers(node)
        if known is not None:
            proved = triangle(known, index)
            if proved is not None:
                self.pinned.append(node)
                return proved
        spread = [axes_of(part) & {Q_AXIS, K_AXIS} for part in index]
        if sum(1 for axes in spread if Q_AXIS in axes) and sum(1 for axes in spread if K_AXIS in axes):
            alone = [axes for axes in spread if axes]
            if len(alone) > 1:
                raise Unreadable(f"the values of `{node.name}` {tuple(value.shape)} are data over query and key positions")
        if value.dtype not in (BOOL, *_INTEGERS) and not value.dtype.is_floating_point:
            raise Unreadable(f"`{node.name}` has dtype {value.dtype}")
        if node not in self.loads:
            self.loads.append(node)
        return load(self.loads.index(node), index, INT if value.dtype in _INTEGERS else value.dtype)

    # --- in-place writes -----------------------------------------------------------------------------------------------

    def _after_writes(self, root: fx.Node, index: Index, at: int) -> Expr:
        writes = [write for write in self._writes[root] if write.at < at]
        if not writes:
            return self._unwritten(root, index, at)
        last = writes[-1]
        position, inside = self._inverse(root, last.view, index)
        new = self._written(last, position)
        if inside.is_const and inside.value:
            return new
        return apply("where", inside, new, self._after_writes(root, index, last.at))

    def _unwritten(self, root: fx.Node, index: Index, at: int) -> Expr:
        rule = self.rules.get(op_name(root))
        return self.leaf(root, index) if rule is None else rule(self, root, index, self.order[root])

    def _written(self, write: Write, index: Index) -> Expr:
        name = op_name(write.node)
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
            if not is_write(node):
                chain.append(node)
            node = node.args[0]  # type: ignore[assignment]
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
                dim = int(args[1]) % len(position)  # type: ignore[arg-type]
                inside = apply("and", inside, apply("eq", position.pop(dim), self.number(args[2])))
            elif name == "slice":
                base = step.args[0]
                assert isinstance(base, fx.Node)
                dim = int(args[1] or 0) % len(position)  # type: ignore[arg-type]
                begin, end, stride = slice_bounds(self, self.shape(base)[dim], args[2], args[3], args[4])
                if stride != 1:
                    raise Unreadable("an in-place write through a strided slice")
                here = position[dim]
                inside = apply("and", inside, apply("and", apply("ge", here, begin), apply("lt", here, end)))
                position[dim] = apply("sub", here, begin)
            else:
                raise Unreadable(f"an in-place write through `{name or step.name}`")
        return tuple(position), inside


def slice_bounds(reader: Reader, extent: Any, begin: Any, end: Any, stride: Any) -> tuple[Expr, Expr, int]:
    """Return the bounds of a slice as expressions; negative bounds count from the end, large ones are clamped."""

    def place(value: Any, default: Any) -> Expr:
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                value = extent + value
                if isinstance(value, int):
                    value = max(value, 0)
            elif isinstance(extent, int):
                value = min(value, extent)
            elif value >= 2**31:
                value = extent
        return reader.number(value)

    return place(begin, 0), place(end, extent), int(stride or 1)


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

