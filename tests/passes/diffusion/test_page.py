"""Check that docs/diffusion.md is true: its example runs, and its tables name every policy."""

from __future__ import annotations

import re
from pathlib import Path

from effcompile.compiler import all_methods
from effcompile.core.schedule import StepCache, StepSchedule

PAGE = Path(__file__).resolve().parents[3] / "docs" / "diffusion.md"


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})


def test_every_policy_is_in_its_table() -> None:
    listed = set(re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {cls.name for cls in all_methods() if issubclass(cls, StepSchedule | StepCache)}
