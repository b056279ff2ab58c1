"""Check that docs/tokens.md is true: its example runs, and its table names every policy."""

import re
from pathlib import Path

import pytest

from effcompile.compiler import all_tokens

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tokens.md"


@pytest.mark.slow
def test_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {})


def test_table_names_every_policy():
    listed = re.findall(r"^\| `([\w-]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(policy.name for policy in all_tokens())
