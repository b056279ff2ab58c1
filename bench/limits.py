"""Stop what takes too long."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class OutOfTime(BaseException):
    """Report that a time box ended.

    Not an Exception: compilers catch those and fall back, and the arm would be measured as something it is not.
    """


@contextlib.contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body after `seconds`; 0 means no limit.

    It needs the main thread and an alarm signal; elsewhere the body runs without a limit. A call that stays in native
    code ends at the first return to Python.
    """
    if seconds <= 0 or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    begun = time.monotonic()
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)
        # A box around this one goes on counting, and rings at once where its time is up.
        left = max(outer - (time.monotonic() - begun), 1e-3) if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
