"""Check the order of turns, what is timed and what is not, and the choice of a timer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.clocks import CudaTimer, Timer, WallTimer, require_device, timer_for
from bench.limits import OutOfTime, time_box
from bench.rounds import interleave
from effcompile.core.errors import EffError


class Counter(Timer):
    """Say that the n-th call took n seconds."""

    def __init__(self) -> None:
        self.calls = 0

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.calls += 1
        return float(self.calls), call()


def test_arms_take_turns_and_the_warmup_is_thrown_away() -> None:
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "ABC"}
    spreads = interleave(calls, Counter(), 2, warmup=1, settle=0, before=lambda name: log.append(name.lower()))
    assert "".join(log) == "aAbBcC" * 3
    assert {name: spread.samples for name, spread in spreads.items()} == {"A": (4, 7), "B": (5, 8), "C": (6, 9)}


def test_preparation_and_rest_are_not_timed() -> None:
    spreads = interleave({"A": lambda: None}, WallTimer(), 2, settle=0.02, before=lambda name: time.sleep(0.02))
    assert max(spreads["A"].samples) < 0.02


def test_a_result_is_gone_before_the_next_call() -> None:
    alive: list[int] = []

    class Big:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    seen: list[int] = []
    calls: dict[str, Callable[[], Any]] = {"A": Big, "B": lambda: seen.append(len(alive))}
    interleave(calls, WallTimer(), 2, settle=0)
    assert seen == [0, 0]


def test_no_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interleave({"A": lambda: None}, WallTimer(), 0)


def test_every_call_ticks() -> None:
    ticks: list[str] = []
    interleave({"A": lambda: 1, "B": lambda: 2}, WallTimer(), 2, warmup=1, settle=0, tick=ticks.append)
    assert "".join(ticks) == "ABABAB"


def test_each_device_has_its_timer() -> None:
    assert isinstance(timer_for("cpu"), WallTimer)
    assert isinstance(timer_for("cuda"), CudaTimer)
    with pytest.raises(EffError, match="cuda") as caught:
        timer_for("cudo")
    assert caught.value.code == "EFF-B105"


def test_a_cuda_timer_takes_the_time_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: Event) -> float:
            assert other is not self
            return 1500.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: log.append("drain"))
    assert CudaTimer().time(lambda: log.append("call")) == (1.5, None)
    assert log == ["drain", "record", "call", "record", "wait"]


def test_a_gpu_that_is_not_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EffError, match="no GPU") as caught:
        require_device("cuda")
    assert caught.value.code == "EFF-B105"
    require_device("cpu")


def test_a_time_box_ends_what_catches_exceptions() -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    begun = time.perf_counter()
    with pytest.raises(OutOfTime, match="not done"), time_box(0.1):
        stubborn()
    assert time.perf_counter() - begun < 5
    with time_box(0):
        time.sleep(0.001)


def test_an_outer_time_box_goes_on() -> None:
    def inner() -> None:
        with time_box(60):
            time.sleep(0.01)
        time.sleep(30)

    with pytest.raises(OutOfTime, match="after 0 s"), time_box(0.2):
        inner()
