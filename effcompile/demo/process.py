"""Start an arm in its own process with an empty compiler cache, ask it, and end it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from effcompile.core.errors import EffError


class ArmProcess:
    """Talk to one arm. Use as a context manager: the process ends with it, whatever happened."""

    def __init__(self, model: str, backend: str, folder: Path) -> None:
        self.backend = backend
        self._log = folder / f"{backend}.log"
        # A cache of its own, empty at the start: what is measured is the first compilation on a machine.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{backend}")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "effcompile.demo.arm", model, backend],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the weights are loaded."""
        self._read("load")

    def ask(self, do: str, ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Send one request and return the answer; raise EFF-D001 with the arm's last words where it died."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died between two requests; reading finds out how
            self._process.stdin.write(json.dumps({"do": do} | ({} if ids is None else {"ids": list(ids)})) + "\n")
            self._process.stdin.flush()
        return self._read(do)

    def _read(self, doing: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self._process.wait()
        words = [text.strip() for text in self._log.read_text(errors="replace").splitlines() if text.strip()]
        raise EffError(
            "EFF-D001",
            f"the {self.backend} arm ended with {code} in `{doing}`: {words[-1] if words else 'no message'}",
            hint="eff doctor",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
