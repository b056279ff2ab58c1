"""Tell from which inputs of a graph a value derives: what tells cross attention from self-attention.

The keys of a self-attention derive from everything that its queries derive from, also where they come out of a cache. The keys of
a cross attention (an encoder's output, a text) do not know the tokens or latents that the queries were made of.
"""

from __future__ import annotations

from torch import fx

from effcompile.core.program import Entry
from effcompile.passes.recognize.aliases import storages, written


class Origins:
    """Hold, for every value of a graph, the set of user inputs that it was computed from, as bits."""

    def __init__(self, entry: Entry, graph: fx.Graph) -> None:
        user = [item.node for item in entry.inputs if item.kind == "user"]
        self._bits = {name: 1 << number for number, name in enumerate(user)}
        self._known: dict[fx.Node, int] = {}
        self._stored: dict[int, int] = {}  # what in-place writes added to a storage
        for node in graph.nodes:
            mine = self.of(node)
            for view in written(node):
                for storage in storages(view):
                    self._stored[storage] = self._stored.get(storage, 0) | mine

    def of(self, node: fx.Node) -> int:
        """Return the inputs of a value, of a node that was added to the graph since as well."""
        if node not in self._known:
            found = self._bits.get(node.name, 0) if node.op == "placeholder" else 0
            for operand in node.all_input_nodes:
                found |= self.of(operand)
            self._known[node] = found
        return self._known[node] | self._written(node)

    def _written(self, node: fx.Node) -> int:
        found = 0
        for storage in storages(node):
            found |= self._stored.get(storage, 0)
        return found

    def cross(self, q: fx.Node, k: fx.Node, same_length: bool) -> bool:
        """Tell whether queries derive from an input that keys do not derive from.

        Queries and keys that are inputs themselves tell nothing: equal lengths are then taken for self-attention.
        """
        apart = bool(self.of(q) & ~self.of(k))
        return apart and not (same_length and self._given(q) and self._given(k))

    def _given(self, node: fx.Node) -> bool:
        """Tell whether a value is an input, or an input seen in another layout or dtype."""
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        return node.op == "placeholder" and node.name in self._bits
