"""Measure cases whose rows are one call of one module, in the arms of arms.py."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from bench.arms import default_arms, known_names
from bench.case import Case, Row, Settings, Watch
from bench.peers import measure
from bench.workload import Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelCase(Case):
    """Build a workload for a row; everything else is the same for every model."""

    @abstractmethod
    def workload(self, row: Row, settings: Settings) -> Workload:
        """Build module and inputs of a row, on the device of the settings."""

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the peers of a device."""
        return default_arms(device)

    def known_arms(self, device: str) -> tuple[str, ...]:
        """Return every arm that the device can run."""
        return known_names(device)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one row in this process."""
        watch.say("building the model")
        return [measure(row, self.workload(row, settings), self.chosen_arms(settings), settings, watch)]
