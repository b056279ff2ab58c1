"""Run one command line in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from effcompile.cli.main import main


@dataclass(frozen=True)
class Ran:
    """Hold what a command gave back."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """Return stdout as the one JSON value that it must be."""
        return json.loads(self.out)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Ran:
    """Run `eff WORDS...`."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    return Ran(code, told.out, told.err)
