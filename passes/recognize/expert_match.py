"""Hold a recognized mixture of experts before it is raised, and what its idioms read alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from effcompile.core.experts import Gate
from effcompile.passes.recognize.expert_parts import Product, Seen, Stop, shape


@dataclass(frozen=True)
class Match:
    """Hold the operands of a mixture of experts, the node that has its result, and what lies in between.

    Where `spread` is set, `weights` are the numbers that it `[T, E]` has at `ids`, and are fetched when the experts are raised.
    """

    idiom: str
    anchor: fx.Node
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    first: Product
    second: Product
    gate: Gate
    seen: Seen
    side: str = "out"
    spread: bool = False


def weighted(node: fx.Node, seen: Seen) -> tuple[fx.Node, fx.Node]:
    """Return (results, weights) of a product of the two; weights have one number a row."""
    seen.take(node, "the weighting")
    sides = node.args[:2]
    for value, share in (sides, sides[::-1]):
        if isinstance(share, fx.Node) and isinstance(value, fx.Node) and len(shape(share)) and shape(share)[-1] == 1:
            return value, share
    raise Stop("EFF-M102", "results are multiplied by something else than one weight each")
