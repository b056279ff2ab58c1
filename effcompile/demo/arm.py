"""Run a model in one way, in a process of its own, one request a line.

    python -m effcompile.demo.arm MODEL BACKEND

Requests and answers are JSON lines on stdin and stdout; whatever else prints goes to stderr. `first` makes the call
that compiles, `run` a timed one. The log-likelihoods that `run` returns come from the logits of that same call.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROWS = 256  # of logits that are normalized at a time, so that scoring stays far below the peak of the call


class Arm:
    """Hold the model and its compiled form; `backend` is a name for `torch.compile`, or `eager`."""

    def __init__(self, model: str, backend: str) -> None:
        from effcompile.models import zoo

        self._zoo = zoo.load(model)
        module: Callable[..., Any] = self._zoo.model
        # Every length is a shape of its own here; the first one must not teach Dynamo to expect others.
        self._call = module if backend == "eager" else torch.compile(module, backend=backend, dynamic=False)

    def first(self, ids: Sequence[int]) -> dict[str, Any]:
        """Make the call that compiles; seconds."""
        seconds, _ = self._timed(ids)
        return {"seconds": seconds}

    def run(self, ids: Sequence[int]) -> dict[str, Any]:
        """Make a timed call; seconds, log-likelihood of every next token, and the process's memory in bytes."""
        before = _start_peak()
        seconds, logits = self._timed(ids)
        peak = _peak()
        return {"seconds": seconds, "scores": _scores(logits, ids), "peak": peak, "rise": peak - before}

    def report(self) -> dict[str, Any]:
        """Return what the eff backend did in this process, and the process's peak over its whole life in bytes."""
        import effcompile

        return {"eff": effcompile.report(), "peak": _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}

    def _timed(self, ids: Sequence[int]) -> tuple[float, Tensor]:
        args, kwargs = self._inputs(ids)
        with torch.no_grad():
            begun = time.perf_counter()
            result = self._call(*args, **kwargs)
            seconds = time.perf_counter() - begun
        return seconds, getattr(result, "logits", result)

    def _inputs(self, ids: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call of the zoo entry with its token ids replaced by these."""
        tokens = torch.tensor([list(ids)])
        args, kwargs = self._zoo.example_inputs(1, len(ids))

        def place(value: Any) -> Any:
            return tokens if isinstance(value, Tensor) and value.shape == tokens.shape else value

        return tuple(place(value) for value in args), {key: place(value) for key, value in kwargs.items()}


def _scores(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """Return the log-likelihood (nats) of tokens 1 to S-1 given those before; logits `[1, S, vocab]`."""
    target = torch.tensor(list(ids[1:]))
    found = []
    for start in range(0, len(target), _ROWS):
        rows = logits[0, start : start + _ROWS][: len(target) - start].float()
        wanted = target[start : start + len(rows), None]
        found.append(rows.log_softmax(-1).gather(1, wanted)[:, 0])
    return [float(value) for value in torch.cat(found)]


def _start_peak() -> int:
    """Make the kernel count this process's peak from here on, where it can; return the memory in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    # ru_maxrss cannot be reset, and a child starts with its parent's: VmHWM is this process's own.
    try:
        return _status("VmHWM")
    except (OSError, StopIteration):
        return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _bytes(maximum: int) -> int:
    return maximum if sys.platform == "darwin" else maximum * 1024


def main(model: str, backend: str) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arm = Arm(model, backend)
    asks: dict[str, Callable[..., dict[str, Any]]] = {"first": arm.first, "run": arm.run, "report": arm.report}
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        _answer(answers, asks[request["do"]](*([request["ids"]] if "ids" in request else [])))


def _answer(stream: Any, value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
