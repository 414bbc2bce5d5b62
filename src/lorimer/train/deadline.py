"""A run that ends in time: how many steps still fit, planned anew after each of them.

What must still happen at the end (the last evaluation, saving, the proof on held-out rows) is set aside
first. The learning rate's schedule then goes by the steps that are planned, so it is complete when the
time is up, whatever the speed.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta

from lorimer.errors import ConfigError, UserError

# Steps that the time of one is judged by.
TIMED = 10
# Steps assumed before one was timed: the warm-up begins gently.
UNKNOWN = 200
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def seconds_of(text: str) -> float:
    """`3h`, `90m`, `1h30m`, `120s` in seconds; the setting's pattern lets nothing else through."""
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)([hms])", text))


def seconds_until(text: str, now: datetime) -> float:
    """Until this time of day, today or tomorrow. Raises UserError for what is not HH:MM."""
    found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text.strip())
    if found is None:
        raise UserError(
            f"--finish-by {text} is not a time of day (wanted: HH:MM, 00:00 to 23:59)",
            fix="For example: --finish-by 07:00",
        )
    at = now.replace(hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0)
    return ((at if at > now else at + timedelta(days=1)) - now).total_seconds()


class Deadline:
    """`seconds` for the whole run, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.seconds = seconds
        self._ends = clock() + seconds
        self._step_began = clock()
        self._steps: deque[float] = deque(maxlen=TIMED)
        # What the end needs, by its name, as it was last measured.
        self.reserved: dict[str, float] = {}

    def use(self, seconds: float) -> None:
        """So much of the time was used before, by a run that is resumed."""
        self._ends -= seconds

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run that are gone."""
        return self.seconds - (self._ends - self._clock())

    def reserve(self, name: str, seconds: float) -> None:
        self.reserved[name] = seconds

    def step_begins(self) -> None:
        self._step_began = self._clock()

    def step_ends(self) -> float:
        """How long the step took."""
        self._steps.append(self._clock() - self._step_began)
        return self._steps[-1]

    @property
    def left(self) -> float:
        """Seconds for steps."""
        return self._ends - self._clock() - sum(self.reserved.values())

    def check(self) -> None:
        """Raise ConfigError if not even a first step can begin."""
        if self.left <= 0:
            needed = sum(self.reserved.values())
            at_the_end = f", and {needed:.0f} s are needed at the end" if needed else ""
            raise ConfigError(
                f"`train.budget` is {self.seconds:.0f} s, and loading took {self.elapsed:.0f} s"
                + at_the_end,
                fix="Give more time, or fewer held-out rows with `evaluate.rows`.",
            )

    def total_steps(self, done: int) -> int:
        """How many steps there will be in all, if they go on as fast as the last ones."""
        if not self._steps:
            return done + UNKNOWN
        return done + max(0, int(self.left / (sum(self._steps) / len(self._steps))))
