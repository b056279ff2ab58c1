"""Declare kernels: who can run a site on a target, at what cost, and how it is put into the graph.

Support is a question with a reason as the answer, because the reason reaches the user.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target

if TYPE_CHECKING:
    from effcompile.core.rewrite import Editor


@dataclass(frozen=True)
class Supported:
    """Say that the kernel can run the site exactly, and how long that takes (seconds).

    `tag` is measured or modelled; of a measured time, `error` is the relative error of reading it from the table.
    """

    seconds: float
    tag: str = "modelled"
    error: float | None = None


Answer = Supported | Refusal
NO_GRAD = "run inference under torch.no_grad()"


class AttentionKernel(ABC):
    """Lower one `eff::attention` call. Subclasses are frozen dataclasses in `lowering/attention/`, one a file."""

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False
    portable: ClassVar[bool] = False
    """Whether what it inserts is standard operators alone, as a graph for another runtime needs them."""

    @abstractmethod
    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Return the cost of running the site, or why it cannot be run."""

    def gradient(self, site: AttentionSite) -> Refusal | None:
        """Return why gradients of the site cannot flow through this kernel as they do in the source, else None."""
        if self.differentiable:
            return None
        return Refusal("EFF-A301", "no gradient flows through this kernel", NO_GRAD)

    @abstractmethod
    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the kernel before `node` and return the node of its result `[B, Hq, Q, Dv]`."""


class SparseKernel(ABC):
    """Lower one op that a policy inserted, such as attention over a block map that is known at run time only.

    Subclasses are frozen dataclasses in `lowering/`, one a file. They are apart from `AttentionKernel` because a kernel of the
    plain op would drop the map without a word.
    """

    name: ClassVar[str]
    op: ClassVar[str]

    @abstractmethod
    def supports(self, site: AttentionSite, target: Target, density: float) -> Answer:
        """Return the cost of running the site at a density (kept pairs over allowed pairs), or why it cannot be run."""

    @abstractmethod
    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the kernel before `node`, or return `node` itself where the op is its own kernel."""
