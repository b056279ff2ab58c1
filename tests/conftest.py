"""Set up what all tests share: how many examples a property test draws, and a clean compiler before each test that compiles."""

from __future__ import annotations

import gc
import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# EFF_PROFILE=deep draws many examples, others each time; the default draws a few, the same each time.
settings.register_profile(
    "quick", max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
settings.register_profile(
    "deep", max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile(os.environ.get("EFF_PROFILE", "quick"))

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
