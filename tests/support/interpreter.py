"""Run single tests in a child process in which Triton interprets its kernels on the CPU.

TRITON_INTERPRET is read when a kernel is decorated, and one process can have it one way only. The child starts with the first
test that needs it and runs one test after the other; run as a script, this file is the child.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
WORD = "TRITON_INTERPRET"


def interpreting() -> bool:
    """Tell whether this process is such a child (or the user made it one)."""
    return os.environ.get(WORD) == "1"


@dataclass
class Child:
    """Hold the process; `ask` runs one test in it."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, folder: Path) -> Child:
        """Start a child for the tests of a folder; it ends with this process."""
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            cwd=ROOT,
            env={**os.environ, WORD: "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(process.kill)
        return cls(process)

    def ask(self, test: str) -> tuple[str, str]:
        """Return (passed, skipped or failed, the report) of one test, named by its node id."""
        source, sink = self.process.stdin, self.process.stdout
        assert source is not None
        assert sink is not None
        source.write(json.dumps(test) + "\n")
        source.flush()
        line = sink.readline()
        if not line:
            return "failed", f"the interpreter's process ended with code {self.process.wait()}"
        outcome, text = json.loads(line)
        return outcome, text


class Server:
    """Run the tests that are asked for, instead of all that were collected."""

    def __init__(self, source: IO[str], sink: IO[str]) -> None:
        self.source, self.sink = source, sink
        self.outcome, self.text = "failed", ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take the report of the call, or of a set-up or tear-down that failed."""
        if report.when == "call" or report.outcome != "passed":
            self.outcome, self.text = report.outcome, str(report.longreprtext)

    def pytest_runtestloop(self, session: Any) -> bool:
        """Answer node ids, one a line, until the input ends."""
        items = {item.nodeid: item for item in session.items}
        for line in self.source:
            name = json.loads(line)
            self.outcome, self.text = "failed", f"{name} was not collected"
            if name in items:
                session.config.hook.pytest_runtest_protocol(item=items[name], nextitem=None)
            self.sink.write(json.dumps([self.outcome, self.text]) + "\n")
            self.sink.flush()
        return True


def prepare() -> None:
    """Mend what the interpreter of Triton 3.6 to 3.9 does not do as the hardware does, and skip what it does twice.

    Its dot multiplies the bit patterns of bfloat16; 3.6 reads a loop bound in a way that NumPy no longer allows; and every call
    of a device function patches the language modules it sees once more, where once a launch is enough.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, launch, patch_tensor = builder.create_dot, interpreter.GridExecutor.__call__, interpreter._patch_lang_tensor
    patched: set[frozenset[int]] = set()

    def exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def device_call(self: Any, *args: Any, **named: Any) -> Any:
        seen = frozenset(id(value) for value in self.fn.__globals__.values() if value is tl or value is tl.core)
        if seen not in patched:
            patched.add(seen)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **named)

    def fresh_launch(self: Any, *args: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *args, **named)

    def patch_tensor_index(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    builder.create_dot = exact_dot
    interpreter._patch_lang_tensor = patch_tensor_index
    interpreter.GridExecutor.__call__ = fresh_launch
    interpreter.InterpretedFunction.__call__ = device_call


def main() -> None:
    """Serve the tests of the folder that is named on the command line."""
    import pytest

    # What pytest and the tests print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path.insert(0, str(ROOT))
    options = ("-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist")
    pytest.main([*options, *sys.argv[1:]], [Server(sys.stdin, answers)])


if __name__ == "__main__":
    main()
