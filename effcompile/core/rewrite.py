"""Change a graph safely: an `Editor` keeps fake values, sites and source lines on every node that it makes.

A pass declares what it needs and what it keeps; the runner in `compiler.py` verifies after each one.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile.core import compat
from effcompile.core.errors import RewriteError
from effcompile.core.expr import Expr
from effcompile.core.plan import Plan
from effcompile.core.program import Entry, Program

VALUE, OWN = "eff.value", "eff.own"
"""In the meta of an input: the tensor that it always is, and that it is one of our own making."""
_KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack", "eff.site", "eff.source")


@dataclass(frozen=True)
class PassResult:
    """Return the program, whether it changed, and what the pass has to say (one line a note)."""

    program: Program
    changed: bool = False
    notes: tuple[str, ...] = ()


class Pass(ABC):
    """Rewrite a program mechanically, as the plan says.

    `phase` is raised (sees `eff::` dense ops) or lowered (sees ATen and kernels); `after` names passes that must have run;
    `differentiable` says that gradients flow through what it inserts, `portable` that it inserts standard operators alone;
    `apart_from` names families of policies that could no longer do their work behind it, and beside which it does not run.
    """

    name: ClassVar[str]
    phase: ClassVar[str] = "raised"
    after: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[bool] = False
    default: ClassVar[bool] = True
    portable: ClassVar[bool] = False
    apart_from: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the rewritten program; the given one stays as it is."""


def ordered(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Sort by phase, then so that each pass comes after those it names; ties keep their order."""
    phases = ("captured", "raised", "lowered")
    waiting = sorted(passes, key=lambda item: phases.index(item.phase))
    placed: list[Pass] = []
    while waiting:
        here = {item.name for item in placed}
        known = {item.name for item in waiting} | here
        ready = next((p for p in waiting if all(name in here or name not in known for name in p.after)), None)
        assert ready is not None, f"passes wait for each other: {[p.name for p in waiting]}"
        placed.append(ready)
        waiting.remove(ready)
    return tuple(sorted(placed, key=lambda item: phases.index(item.phase)))


def fake_mode_of(graph: fx.Graph) -> Any | None:
    """Return the FakeTensorMode of the graph's values."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return None


@dataclass
class Editor:
    """Insert and replace nodes of one graph module; new nodes get a fake value by running the op on fake operands."""

    module: fx.GraphModule
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph = self.module.graph
        self._mode = fake_mode_of(self.graph)
        self._shared: dict[Any, fx.Node] = {}
        self._sizes: dict[Any, fx.Node] = {}
        self._traced: dict[Any, fx.Graph] = {}

    def call(
        self, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, same: bool = False, **kwargs: Any
    ) -> fx.Node:
        """Insert a call before the current insertion point and compute its fake value.

        With `same` the fake value is that of `like`: for a call that replaces one and returns what it returned.
        """
        node = self.graph.call_function(target, args, kwargs)
        if same and like is not None:
            node.meta["val"] = like.meta["val"]
        else:
            values = fx.node.map_arg((node.args, node.kwargs), _value)
            with self._mode or nullcontext():
                node.meta["val"] = target(*values[0], **values[1])
            if self._mode is not None:
                compat.forget_fresh_symbols(self._mode)
        if like is not None:
            copy_meta(like, node)
        return node

    def inline(self, function: Callable[..., torch.Tensor], *operands: Any) -> fx.Node:
        """Insert the operations that a function of nodes and numbers performs, and return the node of its result."""
        result: fx.Node = self.inline_all(function, *operands)
        return result

    def inline_all(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Do as `inline` for a function of several results: return their nodes as it returns them.

        A function is traced once for operands of the same kinds and shapes.
        """
        key = _call_key(function, operands)
        traced = self._traced.get(key) if key is not None else None
        if traced is None:
            with self._mode or nullcontext():
                traced = make_fx(function)(*map(_operand, operands)).graph
            if self._mode is not None:
                compat.forget_fresh_symbols(self._mode)
            if key is not None:
                self._traced[key] = traced
        given = iter(operands)
        made: dict[fx.Node, Any] = {}
        for node in traced.nodes:
            if node.op == "placeholder":
                made[node] = next(given)
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = self.graph.call_function(node.target, args, kwargs)
                made[node].meta["val"] = node.meta.get("val")  # an op that only writes has none
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], made.__getitem__)
            else:
                raise RewriteError("EFF-X904", f"a function that is written out holds a `{node.op}`")
        raise AssertionError("a graph without output")

    def size(self, value: Any) -> Any:
        """Return an int, or the node of a symbolic size; compound sizes are built from the graph's own symbols."""
        if isinstance(value, fx.Node) or not isinstance(value, torch.SymInt):
            return value
        return self.symbolic(value.node.expr)

    def symbolic(self, expr: Any) -> Any:
        """Return the node (or int) of a sympy size expression."""
        if expr.is_Integer:
            return int(expr)
        found = self._sizes.get(expr)
        if found is not None:
            return found
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if node.op != "placeholder":
                break
            if isinstance(value, torch.SymInt) and value.node.expr == expr:
                self._sizes[expr] = node
                return node
        if expr.is_Symbol:
            self._sizes[expr] = self._sym_size(expr)
            return self._sizes[expr]
        if expr.is_Add or expr.is_Mul:
            total: Any = None
            for part in expr.args:
                item = self.symbolic(part)
                total = item if total is None else self.call(operator.add if expr.is_Add else operator.mul, total, item)
            return total
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == expr:
                return node
        raise RewriteError("EFF-X904", f"no node computes the size {expr}")

    def _sym_size(self, symbol: Any) -> fx.Node:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        after = next(node for node in self.graph.nodes if node.op != "placeholder")
        for node in inputs:
            value = node.meta.get("val")
            for dim, extent in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(extent, torch.SymInt) and extent.node.expr == symbol:
                    with self.graph.inserting_before(after):
                        return self.call(torch.ops.aten.sym_size.int, node, dim)
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return node
        raise RewriteError("EFF-X904", f"no input has the size {symbol}")

    def before(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Insert what follows before `node`."""
        return self.graph.inserting_before(node)

    def shared(self, key: Any, operands: Sequence[Any], make: Callable[[], fx.Node]) -> fx.Node:
        """Return the node made earlier for `key`, or make it right after its operands: one block map serves thirty layers."""
        if key not in self._shared:
            needed = {operand for operand in operands if isinstance(operand, fx.Node)}
            after = False
            for node in self.graph.nodes:
                if not needed and (after := after or node.op not in ("placeholder", "get_attr")):
                    with self.graph.inserting_before(node):
                        self._shared[key] = make()
                    break
                needed.discard(node)
        return self._shared[key]

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """Add an input that is a tensor of our own making, behind the inputs that are known to be constants."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        last = next((node for node in reversed(inputs) if VALUE in node.meta), None)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        node.target = node.name
        with self._mode or nullcontext():
            fake = value if self._mode is None else self._mode.from_tensor(value, static_shapes=True)
        node.meta |= {"val": fake, VALUE: value, OWN: True}
        return node

    def constants(self) -> dict[str, torch.Tensor]:
        """Return the inputs that `constant` added, by name; those that nobody reads are removed."""
        found = {}
        for node in [node for node in self.graph.nodes if node.op == "placeholder" and OWN in node.meta]:
            if node.users:
                found[node.name] = node.meta[VALUE]
            else:
                self.graph.erase_node(node)
        return found

    def attach(self, name: str, module: fx.GraphModule) -> fx.Node:
        """Add a sub-graph under a fresh name and return the `get_attr` node that reads it."""
        count = 0
        while hasattr(self.module, f"{name}_{count}"):
            count += 1
        self.module.add_submodule(f"{name}_{count}", module)
        node = self.graph.get_attr(f"{name}_{count}")
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` read `new`, and remove `old`; shape, dtype and device must agree."""
        a, b = old.meta.get("val"), new.meta.get("val")
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if len(a.shape) != len(b.shape) or a.dtype != b.dtype or a.device != b.device:
                raise RewriteError("EFF-X902", f"replacing {a.dtype}{list(a.shape)} by {b.dtype}{list(b.shape)}")
        copy_meta(old, new)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def prune(self) -> None:
        """Remove what nobody reads, and forget the sizes and shared nodes that were among it."""
        self.graph.eliminate_dead_code(is_impure_node=impure)
        alive = set(self.graph.nodes)
        for known in (self._sizes, self._shared):
            for key in [key for key, node in known.items() if node not in alive]:
                del known[key]

    def finish(self) -> fx.GraphModule:
        """Remove what nobody reads, check the graph, and return the module."""
        self.graph.eliminate_dead_code(is_impure_node=impure)
        self.graph.lint()
        self.module.recompile()
        return self.module


def impure(node: fx.Node) -> bool:
    """Tell whether a node must stay although nobody reads it: inputs, outputs, writes and assertions."""
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return (
            bool(target._schema.is_mutable)
            or target in _ASSERTIONS()
            or torch.Tag.nondeterministic_seeded in target.tags
        )
    if target is torch._C._set_grad_enabled:  # a builtin; without it gradients flow through a no_grad block
        return True
    return node.op == "call_function" and not isinstance(target, _builtin) and not _is_operator(target)


def _ASSERTIONS() -> tuple[Any, ...]:
    names = (
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    )
    return tuple(getattr(torch.ops.aten, n).default for n in names if hasattr(torch.ops.aten, n))


_builtin = type(len)


def _is_operator(target: Any) -> bool:
    return getattr(target, "__module__", "") in ("_operator", "operator", "math", "torch")


def _operand(item: Any) -> Any:
    return _value(item) if isinstance(item, fx.Node) else item


def _call_key(function: Callable[..., Any], operands: Sequence[Any]) -> Any | None:
    """Return what the trace of a function depends on: code, closure and kinds of operands; None where that is unknown."""
    if not isinstance(function, FunctionType):
        return None
    closed = tuple(cell.cell_contents for cell in function.__closure__ or ())
    closed += (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if not all(map(_is_fixed, closed)):
        return None
    # A number goes with its type: 1, 1.0 and True are equal.
    return function.__code__, tuple((type(item), item) for item in closed), tuple(_kind(_operand(n)) for n in operands)


def _is_fixed(value: Any) -> bool:
    """Tell whether a value cannot change between two calls."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | Expr)


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape, strides = map(str, value.shape), map(str, value.stride())
        return value.dtype, tuple(shape), tuple(strides), value.device
    return type(value), str(value) if isinstance(value, torch.SymInt) else value


def _value(node: fx.Node) -> Any:
    if "val" not in node.meta and node.op == "get_attr":
        return getattr(node.graph.owning_module, str(node.target))
    return node.meta["val"]


def copy_meta(old: fx.Node, new: fx.Node) -> None:
    """Carry the site and the user's source line from one node to another."""
    for key in _KEPT:
        if key in old.meta and key not in new.meta:
            new.meta[key] = old.meta[key]


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Return a deep enough copy: own graph and node metadata, shared tensors and sub-modules."""
    graph, seen = fx.Graph(), dict[fx.Node, fx.Node]()
    result = graph.graph_copy(module.graph, seen)
    old_output = next(node for node in module.graph.nodes if node.op == "output")
    graph.output(result).meta = dict(old_output.meta)
    new = compat.graph_module(module, graph)
    new.meta = dict(module.meta)
    for old, copy in seen.items():
        copy.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            copy._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return new


def editing(program: Program, entry: Entry) -> tuple[Entry, Editor]:
    """Return the entry and an editor on a copy of its graph."""
    return entry, Editor(copy_graph(entry.graph))


def require_inputs(nodes: Sequence[fx.Node]) -> None:
    """Assert that a graph still starts with its placeholders (a pass must not reorder inputs)."""
    kinds = [node.op == "placeholder" for node in nodes]
    if kinds != sorted(kinds, reverse=True):
        raise RewriteError("EFF-X903", "placeholders are no longer the first nodes")
