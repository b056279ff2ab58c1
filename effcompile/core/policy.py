"""Declare policies: named answers to one question about a site, which may approximate and run only when they are asked for.

A policy is a frozen dataclass whose fields are its parameters and its spelling: `sink-window{window=1024,sinks=4}`. It is asked
once for each site. It proposes, with what it would keep and cost, or it refuses with a reason; both go into the plan. One policy
a file: a folder is the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import fx

from effcompile.core.errors import EffError, unknown
from effcompile.core.kernel import AttentionKernel, SparseKernel, Supported
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.spec import build, spell, split
from effcompile.core.target import Target

if TYPE_CHECKING:
    from effcompile.core.rewrite import Editor

Exactness = Literal["bit-equal", "rounding", "lossy"]
RAISED = "eff::attention_v1"
SITE_FAMILIES = (
    "attention",
    "precision",
)  # the questions that one site can answer, in the order in which they are asked
DENSE_LAYER = "EFF-A501"  # the refusal of a layer that the policy was told to leave alone


@dataclass(frozen=True)
class Estimate:
    """Say what a policy would do at a site: the time of its kernel (seconds) and the density that it leaves.

    Density is kept pairs over allowed pairs. What depends on data is the policy's own setting, not a measurement.
    """

    seconds: float
    density: float
    tag: str = "modelled"


Proposal = Estimate | Refusal


@dataclass(frozen=True)
class Kernels:
    """Hold the catalog that a policy may ask: kernels of raised attention, and of the ops that policies insert.

    `choosing(policy, site, target, flops)` is the measured time of a policy's selector, or None. `before` is the op that the site
    is when a policy is asked: raised attention, or what the policy before it leaves; `density` is what that one keeps of the pairs.
    """

    exact: tuple[AttentionKernel, ...] = ()
    sparse: tuple[SparseKernel, ...] = ()
    choosing: Callable[[str, AttentionSite, Target, float], Supported | None] = lambda *given: None
    before: str = RAISED
    density: float = 1.0

    def of(self, op: str) -> tuple[SparseKernel, ...]:
        """Return the kernels that lower one op, by its name (`eff::attention_blocks_v1`)."""
        return tuple(kernel for kernel in self.sparse if kernel.op == op)


class Method(ABC):
    """Answer one family's question by name. Subclasses are frozen dataclasses, one a file; every field has a default."""

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    exactness: ClassVar[Exactness]
    differentiable: ClassVar[bool] = False

    @property
    def spelled(self) -> str:
        """Return the method as a user writes it, without fields that have their default."""
        return spell(self.name, self)


M = TypeVar("M", bound=Method)


class Policy(Method):
    """Answer a question about attention sites of a graph.

    `op` names the raised op that `apply` leaves behind: `eff::attention_v1` with a narrower mask, which exact kernels run, or an op
    of its own, which the kernels of `Kernels.of(op)` run; `inside` the raised ops that it can rewrite, so that policies of two
    families go together. `differentiable` says that gradients flow through what it inserts, `chooses` that it reads data to decide,
    which can take longer than what it saves.
    """

    op: ClassVar[str] = RAISED
    inside: ClassVar[tuple[str, ...]] = (RAISED,)
    chooses: ClassVar[bool] = False

    @abstractmethod
    def propose(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Return what the policy would do at the site, or why it cannot."""

    @abstractmethod
    def apply(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the rewritten op before `node` and return the node of its result `[B, Hq, Q, Dv]`."""

    def gradient(self, site: AttentionSite) -> Refusal | None:
        """Return why gradients of the site cannot flow through what the policy inserts, else None."""
        if self.differentiable:
            return None
        return Refusal("EFF-A301", "no gradient flows through this policy", "run inference under torch.no_grad()")

    def narrowed(self, site: AttentionSite) -> AttentionSite:
        """Return the site as kernels of `eff::attention_v1` see it after `apply`."""
        return site

    def told(self, estimate: Estimate, site: AttentionSite) -> str:
        """Return what the plan says of a proposal for a site."""
        return f"density {estimate.density:.3g} of the pairs that {site.mask} keeps"

    def leaves(self, op: str) -> str:
        """Return the op that `apply` leaves at a site that is `op`."""
        return self.op

    def settled(self) -> Policy:
        """Return the policy as a plan names it at one site: without parameters that only say which sites to take."""
        return self


def left_by(policies: Sequence[Policy]) -> str:
    """Return the op that policies leave behind, applied in order."""
    op = RAISED
    for policy in policies:
        op = policy.leaves(op)
    return op


def read_policy(family: str, text: str, known: Iterable[type[M]]) -> M:
    """Build the policy of a family from its spelling.

    Raises:
        EffError: EFF-U014 for a name, EFF-U003 for a field that does not exist, both with the near matches; EFF-U004 for a value.
    """
    classes = {cls.name: cls for cls in known if cls.family == family}
    name, given = split(text)
    if name not in classes:
        raise unknown("EFF-U014", f"policy of family `{family}`", name, classes, hint="eff passes")
    return build(classes[name], name, given)


def refused_value(policy: Method, field: str, wanted: str) -> EffError:
    """Return the error for a field whose value the policy cannot take."""
    value = getattr(policy, field)
    return EffError(
        "EFF-U004", f"`{field}={value}` of `{policy.name}`: it must be {wanted}", hint=f"eff passes {policy.name}"
    )


def check_whole(policy: Method, field: str, least: int = 0, multiple: int = 1) -> None:
    """Raise EFF-U004 unless the field is an int of at least `least`, and a multiple of `multiple`."""
    value = getattr(policy, field)
    if not _is_int(value) or value < least:
        raise refused_value(policy, field, f"a whole number of at least {least}")
    if value % multiple:
        raise refused_value(policy, field, f"a multiple of {multiple}")


def check_share(policy: Method, field: str) -> None:
    """Raise EFF-U004 unless the field is a number in (0, 1]."""
    value = getattr(policy, field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise refused_value(policy, field, "above 0 and at most 1")


def check_word(policy: Method, field: str, words: Sequence[str]) -> None:
    """Raise EFF-U004 unless the field is one of some words."""
    if getattr(policy, field) not in words:
        raise refused_value(policy, field, f"one of {', '.join(words)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def parameters(policy: Method) -> dict[str, Any]:
    """Return the parameters with their values."""
    return {field.name: getattr(policy, field.name) for field in fields(policy)}  # type: ignore[arg-type]
