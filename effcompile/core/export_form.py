"""Declare forms: what stands in an ONNX file for an operation or for a few of them, and how to tell whether it means the same.

A form is one file in `lowering/onnx/`. It names the places in a graph that it can take, with the operator that stands there, and a
torch function of the same inputs. The operator is run alone before it is used; where it gives other numbers the place stays as it
is, and the reason is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx

from effcompile.core.site import AttentionSite

if TYPE_CHECKING:
    from effcompile.core.rewrite import Editor

FLAVORS = ("portable", "ort")
"""`portable` files hold standard operators alone; `ort` ones those of ONNX Runtime too (domain com.microsoft)."""
OWN = "eff"
"""Domain of the functions that forms write themselves; they are inlined before a file is written."""
Sites = Mapping[str, AttentionSite]
Value = bool | int | float | str | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class Dialect:
    """Say which operators a file may hold."""

    opset: int
    flavor: str = "portable"


@dataclass(frozen=True)
class Placement:
    """Put one operator where `outputs` are computed.

    `op` is `domain::Name` or `Name`. `inputs` are nodes, None for one that is left out. `body` is the text of the function that it
    is, where the domain is ours. `reference` computes what the operator gives from the inputs that are not None; `sample` gives
    such inputs, by default random ones of the shapes that were traced. Where the operator gives other tensors than the graph has,
    `values` are fake ones of them, and `finish` makes the nodes that take the place of `outputs`. An output that nothing reads is
    None. `inside` are the nodes that nothing but `outputs` reads. `shared` has pairs of places of an input and an output that are
    one piece of memory when a file runs, and when the operator is tried.
    """

    form: str
    op: str
    inputs: tuple[fx.Node | None, ...]
    outputs: tuple[fx.Node | None, ...]
    reference: Callable[..., Any]
    attributes: Mapping[str, Value] = field(default_factory=dict)
    body: str = ""
    sample: Callable[[], tuple[Tensor, ...]] | None = None
    values: tuple[Tensor, ...] = ()
    finish: Callable[[Editor, Sequence[fx.Node]], Sequence[fx.Node]] | None = None
    inside: tuple[fx.Node, ...] = ()
    shared: tuple[tuple[int, int], ...] = ()
    site: str = ""


class OnnxForm(ABC):
    """Find places for one operator. Subclasses are frozen dataclasses in `lowering/onnx/`, one a file."""

    name: ClassVar[str]
    order: ClassVar[int] = 1
    """Forms with a smaller number look at the graph first."""

    @abstractmethod
    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield the places that the dialect has an operator for; nothing is changed yet, but nodes may be inserted.

        `sites` are what is known of each site of attention, by its id.
        """

    def instead(self, placement: Placement, edit: Editor) -> fx.Node | None:
        """Return what stands there where the operator gives other numbers: by default what the graph has (None)."""
        return None
