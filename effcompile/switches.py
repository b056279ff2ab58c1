"""Turn compiled code off for a while, in the same process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Run everything eagerly inside the block: `with eff.off(): reference = model(*inputs)`. Compiled code is kept."""
    with torch.compiler.set_stance("force_eager"):
        yield
