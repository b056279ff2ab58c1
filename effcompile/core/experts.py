"""Describe a mixture of experts: the site, the gate inside an expert, and who can run it.

A site is what comes after routing: tokens, the ids and weights of the experts of each token, and the weights of all experts.
Routing stays as the source wrote it, so that ties are never broken in another way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from torch import fx

from effcompile.core.kernel import Answer
from effcompile.core.site import Refusal, Site
from effcompile.core.target import Target

if TYPE_CHECKING:
    from effcompile.core.rewrite import Editor

FAMILY = "moe"
RAISED_EXPERTS = "eff::moe_v1"
ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
LAYOUTS = ("concat", "interleaved", "none")


@dataclass(frozen=True)
class Gate:
    """Describe what happens between the two products of an expert.

    The first product gives gate g and up u, halves that lie one behind the other (`concat`) or in turn (`interleaved`), or g alone
    (`none`). With g capped at `limit` and u clamped to +-`limit` (0: neither), the second product gets act(g) * (u + beta). Of silu
    the sigmoid is of alpha * g.
    """

    act: str = "silu"
    layout: str = "concat"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0

    def __str__(self) -> str:
        extras = [f"{name}={value:g}" for name, value in self._extras if value]
        return " ".join([self.act, self.layout, *extras])

    @property
    def _extras(self) -> tuple[tuple[str, float], ...]:
        return ("alpha", self.alpha if self.alpha != 1 else 0.0), ("beta", self.beta), ("limit", self.limit)


@dataclass(frozen=True)
class MoESite(Site):
    """Describe the experts of one layer: y[t] = sum over j of weight[t, j] * expert[id[t, j]](x[t]).

    `tokens` is an int or the text of a symbolic size; `inner` the width between the two products; `transposed` tells that
    weights are `[E, in, out]`; `side` whether a weight multiplies what an expert gives (`out`) or what it gets (`in`). `router`
    says in words how ids and weights came to be. With a `capacity` the site is the two halves that send tokens to places of experts
    and bring results back: what the experts do with `hidden` numbers in between is the graph's own, and `inner` is 0.
    """

    tokens: int | str = 1
    top_k: int = 1
    experts: int = 1
    hidden: int = 1
    inner: int = 1
    gate: Gate = Gate()
    bias: bool = False
    transposed: bool = False
    side: str = "out"
    router: str = ""
    dtype: str = "float32"
    capacity: int | str = 0

    @property
    def gated(self) -> bool:
        """Tell whether the first product gives two halves."""
        return self.gate.layout != "none"


class ExpertDispatch(ABC):
    """Lower one `eff::moe_v1` call.

    Subclasses are frozen dataclasses in `lowering/moe/`, one a file; all are exact up to rounding. Those with `capacity` lower the
    two halves of a site with capacity instead.
    """

    name: ClassVar[str]
    portable: ClassVar[bool] = False
    """Whether what it inserts is standard operators alone."""
    capacity: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    """Whether it runs only where it is asked for, until it has measured times: its kernels were never timed beside the others."""

    @abstractmethod
    def supports(self, site: MoESite, target: Target) -> Answer:
        """Return the cost of running the site, or why it cannot be run."""

    @abstractmethod
    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Insert the dispatch before `node` and return the node of its result `[T, H]`, or `node` itself."""


Value = TypeVar("Value")


@dataclass(frozen=True)
class ExpertsCall(Generic[Value]):
    """Hold the operands of `eff::moe_v1` by name, in the order of its schema: nodes of a graph, or tensors."""

    x: Value
    ids: Value
    weights: Value
    w1: Value
    b1: Value | None
    w2: Value
    b2: Value | None
    act: str
    layout: str
    transposed: bool
    side: str
    alpha: float
    beta: float
    limit: float

    @staticmethod
    def of(node: fx.Node) -> ExpertsCall[fx.Node]:
        """Read a node's arguments."""
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        return ExpertsCall(**{**dict(zip(names, node.args)), **node.kwargs})  # type: ignore[arg-type]

    @property
    def gate(self) -> Gate:
        """Return the gate."""
        return Gate(self.act, self.layout, self.alpha, self.beta, self.limit)


def unready(site: Site, code: str, reason: str, hint: str = "") -> Refusal:
    """Return a refusal for a mixture of experts that is left as it is."""
    return Refusal(code, f"{site.idiom}: {reason}" if site.idiom else reason, hint)
