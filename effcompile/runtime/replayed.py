"""Run a denoiser that carries state over the steps of a run: one graph a phase, chosen on the host by the number of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Graph = Callable[[Mapping[str, Tensor], tuple[Any, ...]], Tensor]
"""(state by name, arguments of the denoiser) -> its answer; the state is written in place."""


@dataclass(frozen=True)
class Phases:
    """Hold the graphs for arguments of one form, by phase, and the tensors that go from one to the next."""

    graphs: Mapping[str, Graph]
    state: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the state."""
        return sum(x.numel() * x.element_size() for x in self.state.values())


class ReplayedDenoiser:
    """Be the denoiser: `phase(number)` says what the call `number` behind a reset does, `build` makes the graphs of new shapes.

    A run, a stage and arguments of another form begin anew; rows of guidance must keep their order between two resets.
    """

    def __init__(self, phase: Callable[[int], str], build: Callable[[tuple[Any, ...]], Phases]) -> None:
        self._phase, self._build = phase, build
        self._made: dict[Any, Phases] = {}
        self._last: Any = None
        self.number = 0
        self.phases: list[str] = []

    def reset(self) -> None:
        """Begin anew, as a run and each of its stages do."""
        self.number, self._last, self.phases = 0, None, []

    @property
    def nbytes(self) -> int:
        """Return the bytes of all state."""
        return sum(made.nbytes for made in self._made.values())

    def __call__(self, *args: Any) -> Tensor:
        """Return the denoiser's answer."""
        key = tuple((tuple(x.shape), x.dtype, str(x.device)) if isinstance(x, Tensor) else x for x in args)
        if key not in self._made:
            self._made[key] = self._build(args)
        if key != self._last:
            self.number, self._last = 0, key
        made, phase = self._made[key], self._phase(self.number)
        self.number += 1
        self.phases.append(phase)
        with torch.no_grad():
            return made.graphs[phase](made.state, args)
