"""Check that docs/adaptive.md is true: its example runs, and it names passes and files that are there."""

import re
from pathlib import Path

import pytest

from effcompile.compiler import all_passes
from effcompile.core.options import Options

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "adaptive.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, "adaptive.md", "exec"), {})


def test_passes_and_files_are_there():
    rows = re.findall(r"^\| [\w -]+ \| `([\w/.]+)` \| `([\w-]+)` \|", TEXT, re.MULTILINE)
    assert len(rows) == 4
    names = {item.name for item in all_passes(Options.parse(None, None))}
    assert {name for _, name in rows} <= names
    assert all((ROOT / file).is_file() for file, _ in rows)
