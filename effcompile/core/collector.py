"""Pause Python's garbage collector while a graph is compiled.

Compilation makes millions of objects that live until it ends, and each full collection walks all of them, and all of the model's
and of torch's: a cold compilation of 30 layers takes a tenth less time without. What cycles it leaves is collected afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing inside; a collector that was off before stays off."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
