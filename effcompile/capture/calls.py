"""Tell which module Python is calling, where a graph that Dynamo brings does not know its own place in the model."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn


def called_path() -> str:
    """Return the path of the innermost module that is being called, within the outermost one; '' where that is one and the same.

    Asked while Dynamo compiles a frame: modules that Python calls are on its stack, with their instance as `self`.
    """
    called: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        me = frame.f_locals.get("self")
        if isinstance(me, nn.Module):
            called.append(getattr(me, "_orig_mod", me))  # a compiled model is named as the model
        frame = frame.f_back
    paths = {id(module): path for path, module in called[-1].named_modules()} if called else {}
    return next((paths[id(module)] for module in called if id(module) in paths), "")
