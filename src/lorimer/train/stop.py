"""Ctrl-C and SIGTERM: the step at hand is finished and saved, unless it takes long."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from lorimer.errors import Terminated

# Seconds that a step may go on once somebody asked to stop: those who send SIGTERM wait 30 or so.
STOP_PATIENCE = 12.0


@dataclass(slots=True)
class Stop:
    """Set by the first Ctrl-C or SIGTERM; the step at hand is finished and saved, unless it takes long."""

    number: int | None = None
    since: float = 0.0

    @property
    def asked(self) -> bool:
        return self.number is not None

    @property
    def overdue(self) -> bool:
        """Whether the step has had its time: who asked may kill the process soon."""
        return self.asked and time.monotonic() - self.since > STOP_PATIENCE


@contextmanager
def interruptible() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks to stop, the second ends at once. Only the main thread listens."""
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise Terminated("ended at once") if number == signal.SIGTERM else KeyboardInterrupt
        stop.number, stop.since = number, time.monotonic()

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, on_signal) for number in numbers]
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
