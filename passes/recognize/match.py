"""Describe one recognized attention before it is raised: operands, mask terms, and the node it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import fx

from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal

Operand = Callable[[Editor], fx.Node]


@dataclass(frozen=True)
class Term:
    """Hold one step that masks or biases the scores, in order of application.

    add: scores + node; fill: scores where node is False, else `fill`; keep: scores where node is True, else `fill`.
    """

    kind: Literal["add", "fill", "keep"]
    node: fx.Node
    fill: float = 0.0
    rank3: bool = False  # the scores were [B*H, Q, K] when it was applied


@dataclass(frozen=True)
class Match:
    """Hold softmax(softcap(q k^T scale) + terms) v; the operand builders yield 4-D nodes."""

    idiom: str
    anchor: fx.Node
    q: Operand
    k: Operand
    v: Operand
    terms: tuple[Term, ...] = ()
    causal: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    sinks: fx.Node | None = None
    rank3: tuple[object, object] | None = None  # (batch, heads) where the anchor is [B*H, Q, Dv]
    out_dims: tuple[int, ...] = (0, 1, 2, 3)  # how the anchor permutes [B, H, Q, Dv]


@dataclass(frozen=True)
class NoMatch:
    """Say why an occurrence is left as it is."""

    anchor: fx.Node
    idiom: str
    refusal: Refusal
