"""Say what machine and versions a measurement was made on, and how much of the machine others used meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from effcompile.core.processor import cpuinfo
from effcompile.models.trained import require

_PACKAGES = ("effcompile", "torch", "transformers", "numpy")
NOISY_SHARE = 0.10
"""Share of all cores that others may use before the figures are called noisy."""
NOISY_SPREAD = 0.10
"""Distance between the quartiles of an arm's rounds, over their median, before they are called noisy."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return the CPU, the cores that torch uses, the memory in bytes and the system."""
    import torch

    psutil = require("psutil", "demo")
    return {
        "cpu": cpu_name(),
        "isa": str(torch.backends.cpu.get_cpu_capability()),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": int(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """Return the CPU's model name, or what Python knows of it."""
    found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Reading:
    """Hold the clocks of the machine and of our processes at one moment (seconds), and its load average."""

    wall: float
    busy: float
    ours: float
    load: float


@dataclass(frozen=True)
class Load:
    """Say how busy the machine was: load average before and after, and the cores that others used in between."""

    before: float
    after: float
    others: float
    cores: int

    @property
    def share(self) -> float:
        """Return the share of all cores that others used."""
        return self.others / self.cores

    def to_json(self) -> dict[str, float]:
        """Return the fields as JSON values."""
        return {"before": self.before, "after": self.after, "others_cores": self.others, "others_share": self.share}


def read_load(processes: Iterable[int]) -> Reading:
    """Read the clocks; `processes` are the ids of our own processes besides this one."""
    psutil = require("psutil", "demo")
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts guests' time in user's as well, and stolen time is somebody else's.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    ours = sum(_spent(psutil, pid) for pid in (os.getpid(), *processes))
    return Reading(time.perf_counter(), total - idle, ours, psutil.getloadavg()[0])


def _spent(psutil: Any, pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def between(begin: Reading, end: Reading) -> Load:
    """Return the load of the time between two readings."""
    wall = max(end.wall - begin.wall, 1e-9)
    others = max(0.0, (end.busy - begin.busy) - (end.ours - begin.ours)) / wall
    return Load(begin.load, end.load, others, require("psutil", "demo").cpu_count() or 1)
