"""Hold parameters of `bottleneck` for models by name, each with its origin.

The constants of the paper (arXiv:2503.18940) are not public. What is here comes from a re-implementation (`port`) or was derived
from the arithmetic of step costs and native shifts (`ours`); neither has been tuned on the models themselves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Hold the parameters, and who says so."""

    origin: str
    steps: tuple[int, ...]
    low: float
    strength: tuple[float, ...]
    shift: tuple[float, ...]
    renoise: str = "sigma"


_OURS = "ours: from step costs and native shifts, not tuned"

PRESETS = {
    "flux-port": Preset(
        "port: the constants of a re-implementation for another model; not checked against the paper",
        (4, 13, 8),
        0.5,
        (1.0, 0.8, 0.6),
        (9.0, 6.0, 9.0),
        "strength",
    ),
    "flux": Preset(_OURS, (4, 13, 8), 0.5, (1.0, 0.8, 0.6), (3.158, 1.878, 3.158)),
    "flux-fast": Preset(_OURS, (3, 9, 6), 0.5, (1.0, 0.8, 0.6), (3.158, 1.878, 3.158)),
    "sd3": Preset(_OURS, (3, 9, 6), 0.5, (1.0, 0.8, 0.6), (3.0, 1.5, 3.0)),
    "hunyuan-video": Preset(_OURS, (4, 23, 8), 0.75, (1.0, 0.8, 0.6), (7.0, 5.3, 7.0)),
}
