"""Name and describe the experts of a graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from effcompile.core.experts import ExpertsCall, MoESite
from effcompile.core.program import Entry
from effcompile.core.site import Site
from effcompile.passes.recognize.expert_parts import shape
from effcompile.passes.recognize.routers import read_router

Naming = Callable[[fx.Node], tuple[str, str]]
"""Return the module path and the source line of a node."""


class Names:
    """Give sites their ids: the module that holds the experts, and a number where it holds several."""

    def __init__(self, entry: Entry, name_of: Naming) -> None:
        self.entry, self.name_of = entry, name_of
        self._used: dict[str, int] = {}

    def owner(self, node: fx.Node) -> str:
        """Return the module path of a node."""
        return self.name_of(node)[0]

    def site(self, node: fx.Node, idiom: str) -> Site:
        """Return a site for a node, with an id of its own."""
        path, source = self.name_of(node)
        name = path if path.endswith("experts") else f"{path or 'graph'}.experts"
        number = self._used[name] = self._used.get(name, -1) + 1
        return Site(name + (f".{number}" if number else ""), "moe", self.entry.name, source, idiom)


def describe(node: fx.Node, idiom: str, names: Names) -> MoESite:
    """Return the site of an `eff::moe_v1` node, and mark the node with it."""
    call = ExpertsCall.of(node)
    plain = names.site(node, idiom)
    tokens, hidden = shape(call.x)
    weight = shape(call.w2)
    node.meta["eff.site"] = plain.id
    return MoESite(
        plain.id,
        "moe",
        plain.entry,
        plain.source,
        idiom,
        tokens=tokens if isinstance(tokens, int) else str(tokens),
        top_k=int(shape(call.ids)[1]),
        experts=int(weight[0]),
        hidden=int(hidden),
        inner=int(weight[1 if call.transposed else 2]),
        gate=call.gate,
        bias=call.b1 is not None or call.b2 is not None,
        transposed=bool(call.transposed),
        side=call.side,
        router=read_router(call.ids, call.weights),
        dtype=str(call.x.meta["val"].dtype).removeprefix("torch."),
    )
