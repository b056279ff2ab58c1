"""Compile many kernels at once in child processes, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effcompile.core.errors import EffError

MOST = 16
"""Processes; each holds a compiler of some hundred megabytes."""
COMMAND = (sys.executable, "-m", "effcompile.codegen.triton.worker")


def cores() -> int:
    """Return how many processes can work at once: the cores that this one may use, and not more than memory has room for."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def compile_all(
    jobs: Sequence[Mapping[str, Any]],
    seconds: float,
    processes: int = 2,
    done: Callable[[int], None] = lambda count: None,
    command: Sequence[str] = COMMAND,
) -> list[dict[str, Any]]:
    """Return the answer of `worker.work` for every job, in order.

    Raises:
        EffError: EFF-K102 where the compiler refuses a kernel; EFF-E154 where a child ends without an answer, EFF-E155 where one
            kernel takes more than `seconds`.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(jobs)):
        waiting.put(place)
    found: dict[int, dict[str, Any]] = {}
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            with _Child(command) as child:
                while not failed:
                    try:
                        place = waiting.get_nowait()
                    except queue.Empty:
                        return
                    found[place] = child.ask(jobs[place], seconds)
                    done(len(found))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=serve) for _ in range(min(processes, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [found[place] for place in range(len(jobs))]


class _Child:
    """Hold one child process; it is killed at the end of the block if it has not ended by itself."""

    def __init__(self, command: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")
        self._told: list[str] = []
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._told = [*self._told[-20:], line.strip()]

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a job and wait for the answer."""
        where, late = f"{job['kernel']} for {job['compute']}", threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            raise EffError("EFF-E155", f"{where} took more than {seconds:g} s", hint="--seconds gives it more time")
        if not line:
            status = self.process.wait()
            self._reader.join(1)
            raise EffError(
                "EFF-E154",
                f"the compiler ended with status {status} at {where}: {' '.join(self._told)[-300:]}",
                hint="a machine with more memory; --target without that chip builds the others",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = answer["error"]
            raise EffError(error["code"], error["message"], hint=error["hint"])
        return answer

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
