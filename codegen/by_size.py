"""Run one of two callables of a graph, by the actual value of a symbolic size.

Dynamo sees one callable and adds no guard. The second is compiled when a value of its range first arrives, which is after Dynamo's
own compilation has ended: in the tracing context of that compilation, as AOTAutograd does with backward graphs, so that its symbols
mean the same. Dynamo no longer checks what that compilation assumes about sizes, so the assumptions are checked here, call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from effcompile.codegen.emit import emit_graph
from effcompile.core import compat
from effcompile.core.options import Options
from effcompile.core.plan import Split
from effcompile.core.sizes import SizePlace, place_of_size

Call = Callable[..., Any]


@dataclass
class Late:
    """Compile a graph after Dynamo's compilation has ended, in its context, and keep what it assumes about sizes."""

    build: Callable[[], fx.GraphModule]
    options: Options
    contexts: tuple[Any, ...] = field(default_factory=compat.compilation_contexts)

    def compile(self) -> tuple[Call, Assumptions]:
        """Return the callable and its assumptions; raises whatever a stage raises."""
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            mode = compat.dynamo_fake_mode()
            env = getattr(mode, "shape_env", None)
            known = {str(guard.expr) for guard in env.guards} if env is not None else set()
            graph = self.build()
            inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            run = emit_graph(graph, inputs, self.options)
            fresh = [guard.expr for guard in env.guards if str(guard.expr) not in known] if env is not None else []
        return run, Assumptions.of(graph.graph, fresh)


@dataclass(frozen=True)
class Assumptions:
    """Hold conditions on symbolic sizes; `unread` names a size that no input of the graph holds."""

    conditions: tuple[Any, ...] = ()
    places: tuple[tuple[Any, SizePlace], ...] = ()
    unread: str = ""

    @classmethod
    def of(cls, graph: fx.Graph, conditions: Sequence[Any]) -> Assumptions:
        """Return the conditions with the places where a call holds the sizes in them."""
        symbols = sorted({symbol for each in conditions for symbol in each.free_symbols}, key=str)
        places = [(symbol, place_of_size(graph, str(symbol))) for symbol in symbols]
        unread = next((str(symbol) for symbol, place in places if place is None), "")
        return cls(tuple(conditions), tuple((s, place) for s, place in places if place is not None), unread)

    def hold(self, args: Sequence[Any]) -> bool:
        """Tell whether all conditions are true of a call."""
        if self.unread:
            return False
        values = {symbol: sympy.Integer(place.read(args)) for symbol, place in self.places}
        return all(each.xreplace(values) == sympy.true for each in self.conditions)


def by_size(
    first: Call,
    late: Late,
    split: Split,
    place: SizePlace,
    hint: int,
    *,
    compiled: Callable[[str], None],
    failed: Callable[[Exception], None],
) -> Call:
    """Return a callable that runs `first` in the range of `hint` and what `late` compiles in the other.

    `first` is right for every size, and runs them all where the other cannot be compiled (`failed` is told) or where
    its assumptions do not hold. `compiled` is told the range when it is compiled.
    """
    here = split.side(hint)
    second: list[tuple[Call, Assumptions]] = []

    def run(*args: Any) -> Any:
        side = split.side(place.read(args))
        if side == here:
            return first(*args)
        if not second:
            try:
                second.append(late.compile())
                compiled(split.text(side))
            except Exception as error:
                failed(error)
                second.append((first, Assumptions()))
        other, assumed = second[0]
        return other(*args) if not assumed.conditions or assumed.hold(args) else first(*args)

    return run
