"""Refuse a call of compiled code when it runs, and not while it is traced.

What an error becomes that is raised while Dynamo traces is another thing in every torch: it is handed on, or the frame runs in
Python, or Dynamo stumbles over it. An operation that raises is an error of the call in all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops import flash
from effcompile.ops.attention import define

REFUSE = "eff::kv_refuse_v1"
Why = tuple[str, str, str]
"""Code, text and hint of an error."""


def refused(x: Tensor, why: Why) -> Tensor:
    """Return x in a traced graph, which raises the error where x is computed."""
    found: Tensor = torch.ops.eff.kv_refuse_v1.default(x, *why)
    return found


def refused_attention(q: Tensor, v: Tensor, why: Why) -> tuple[Tensor, Tensor]:
    """Return what has the shapes of (output, LSE) in a traced graph, which raises the error where they are computed."""
    column = refused(q, why)[..., :1]
    return column.expand(*q.shape[:3], v.shape[3]).contiguous(), column[..., 0].to(flash.lse_dtype(q))


def refuse(x: Tensor, code: str, text: str, hint: str) -> Tensor:
    """Raise the error.

    Raises:
        EffError: always.
    """
    raise EffError(code, text, hint=hint or None)


def register() -> None:
    """Register the op, once."""
    define(REFUSE, "(Tensor x, str code, str text, str hint) -> Tensor", refuse, lambda x, *rest: torch.empty_like(x))
