"""Describe one recognized attention before it is raised: operands, mask terms, and the node it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.passes.recognize.mask import ReadMask

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
    reader: fx.Node | None = field(default=None, compare=False)  # the step that read it; None: the anchor


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
    reads: tuple[tuple[fx.Node, fx.Node], ...] = ()  # (operand, who read it) where that is before the anchor
    path: tuple[fx.Node, ...] = ()  # what is computed between the first product and the anchor
    read: ReadMask | None = None  # the mask, where the source spells it as a function and not as terms


@dataclass(frozen=True)
class NoMatch:
    """Say why an occurrence is left as it is."""

    anchor: fx.Node
    idiom: str
    refusal: Refusal


def same_size(a: Any, b: Any) -> bool:
    """Tell whether two sizes are equal for every input, without adding a guard."""
    return bool(statically_known_true(a == b))


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool = False) -> bool:
    """Tell whether the operands of an attention are `[B, Hq, Q, D]`, `[B, Hkv, K, D]`, `[B, Hkv, K, Dv]` as they are.

    Operands that broadcast against each other are not. That D and K agree is taken from the operation,
    which would fail; `grouped` says that it also checks that Hkv divides Hq.
    """
    if not same_size(q.shape[0], k.shape[0]) or not same_size(q.shape[0], v.shape[0]):
        return False
    heads, groups = q.shape[1], k.shape[1]
    if not same_size(groups, v.shape[1]):
        return False
    return (
        grouped
        or same_size(heads, groups)
        or (isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0)
    )
