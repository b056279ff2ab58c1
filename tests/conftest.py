"""Set up what all tests share: how many examples a property test draws, and a clean compiler before each test that compiles."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from effcompile.core.processor import fingerprint

# EFF_PROFILE=deep draws many examples, others each time; the default draws a few, the same each time.
settings.register_profile(
    "quick", max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
settings.register_profile(
    "deep", max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile(os.environ.get("EFF_PROFILE", "quick"))

# Code that torch's own backend compiled for another instruction set, in an earlier run or on a machine that shares the folder,
# would be taken for this one's (effcompile/core/processor.py).
_CACHE = Path(tempfile.gettempdir(), f"effcompile-tests-{getattr(os, 'getuid', int)()}")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(_CACHE / f"{fingerprint()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'all')}")
)

# Tracing makes and drops many small objects beside a large heap of modules, which the default thresholds walk far too
# often: a tenth of a test's time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def clean_compiler() -> None:
    """Forget compiled code and reports, so that no test sees the graphs of another."""
    if "effcompile.report" in sys.modules:
        sys.modules["effcompile.report"].clear()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
