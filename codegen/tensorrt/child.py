"""Run a builder in a process of its own, with a time limit; it may abort or hang, and nothing half-written is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effcompile.codegen.tensorrt import rtx_child
from effcompile.codegen.tensorrt.complaints import complaint
from effcompile.core.errors import EffError

COMMAND = (sys.executable, str(rtx_child.__file__))


def build(
    job: Mapping[str, Any],
    seconds: float,
    hear: Callable[[str], None] = lambda text: None,
    command: Sequence[str] = COMMAND,
    product: str = "TensorRT-RTX",
) -> dict[str, Any]:
    """Build one engine and return what the child told of it.

    `job` is what `rtx_child.build` reads: `onnx` and `engine` (paths), `chips` (`SM89`), `profiles` (three shapes by input, each).

    Raises:
        EffError: EFF-E160 and EFF-E161 where the builder refuses, EFF-E162 where it crashes, EFF-E163 where it takes longer than
            `seconds`.
    """
    where = f" for {', '.join(job['chips'])}"
    model = Path(job["onnx"])  # the child knows its name alone: an engine holds the path that it was read from
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps({**job, "onnx": model.name}), encoding="utf-8")
        with Path(folder, "stderr").open("w+", encoding="utf-8", errors="replace") as told:
            process = subprocess.Popen(
                [*command, str(file)],
                stdout=subprocess.PIPE,
                stderr=told,
                text=True,
                errors="replace",
                cwd=model.parent,
            )
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(seconds, stop)
            timer.start()
            try:
                lines = list(_lines(process, hear))
                status = process.wait()
            finally:
                timer.cancel()
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            told.seek(0)
            last = " ".join(told.read().split())[-300:]
    made = Path(job["engine"])
    if not late.is_set() and status == 0 and lines and lines[-1].get("done") and made.is_file():
        return lines[-1]
    made.unlink(missing_ok=True)
    if late.is_set():
        raise EffError(
            "EFF-E163",
            f"the build{where} took more than {seconds:g} s and was ended",
            hint="--seconds gives it more time",
        )
    if status != 0:
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        before = next((str(line["text"]) for line in reversed(lines) if "text" in line), last)
        raise EffError(
            "EFF-E162",
            f"the builder crashed{where} ({name}): {before[:300] or 'it said nothing'}",
            hint="--to onnx is read by other runtimes; --static may build",
        )
    raise complaint(lines, where, product)


def _lines(process: subprocess.Popen[str], hear: Callable[[str], None]) -> Any:
    assert process.stdout is not None
    for text in process.stdout:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a library printed something of its own
        if not isinstance(line, dict):
            continue
        if "phase" in line:
            hear(f"{line['phase']} {line['step']}/{line['steps']}")
        else:
            yield line
