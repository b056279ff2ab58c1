"""Collect the model matrix."""

from __future__ import annotations

from tests.support.hf_zoo import decoders, diffusion, encoders, moe, seq2seq, vision
from tests.support.hf_zoo.matrix import MatrixCase


def cases() -> tuple[MatrixCase, ...]:
    """Return every case, grouped by family."""
    return (
        *decoders.cases(),
        *moe.cases(),
        *encoders.cases(),
        *vision.cases(),
        *seq2seq.cases(),
        *diffusion.cases(),
    )


def case(name: str) -> MatrixCase:
    """Return the case called `name`.

    Raises:
        KeyError: there is none; the message lists all.
    """
    for found in cases():
        if found.name == name:
            return found
    raise KeyError(f"no case {name}; there are {', '.join(c.name for c in cases())}")
