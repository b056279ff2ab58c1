"""Check a compiled call whose code refuses what it is given while it is traced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def refused_or_right(call: Callable[[], Tensor], code: str, wanted: Callable[[], Tensor], near: float) -> bool:
    """Tell whether a call raised an error with a code, or gave what another one gives.

    torch 2.13 hands the error on. 2.11's Dynamo stumbles over it and names the line that raised it; 2.15 runs the frame in Python,
    where the call is right.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    try:
        found = call()
    except Exception as error:
        return code in str(error) or (version < (2, 12) and "raise EffError(" in str(error))
    if version < (2, 14):
        return False
    expected = wanted()
    return float((found - expected).abs().max()) <= near * float(expected.abs().max())
