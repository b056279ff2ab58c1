"""Time one call: wall clock on the CPU, events on a CUDA stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from effcompile.core.errors import EffError, unknown


class Timer(ABC):
    """Run a call and say how long it took."""

    @abstractmethod
    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return (seconds, the call's result)."""


class WallTimer(Timer):
    """Time with the monotonic clock of the host; the call is complete when it returns."""

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return (seconds, the call's result)."""
        begun = time.perf_counter()
        result = call()
        return time.perf_counter() - begun, result


class CudaTimer(Timer):
    """Time with two events on the current stream, after everything before them is done."""

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return (seconds, the call's result)."""
        import torch

        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before.record()
        result = call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3, result


DEVICES = ("cpu", "cuda")


def timer_for(device: str) -> Timer:
    """Return the timer of a device type.

    Raises:
        EffError: EFF-B105 for a word that is no device type.
    """
    if device == "cpu":
        return WallTimer()
    if device == "cuda":
        return CudaTimer()
    raise unknown("EFF-B105", "device", device, DEVICES)


def require_device(device: str) -> None:
    """Check that the device is here.

    Raises:
        EffError: EFF-B105 for an unknown device, or `cuda` where torch sees none.
    """
    timer_for(device)
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise EffError("EFF-B105", "torch sees no GPU here", hint="eff bench --device cpu")
