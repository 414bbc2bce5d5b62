"""Numbers by step -> a line chart as SVG text: axes, round ticks, no script, colours by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH = 640
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 10, 32
# More points than this cannot be told apart at the width of a page, and the file would grow with the run.
MOST_POINTS = 400
# Beyond this ratio of largest to smallest a linear axis shows the end of a curve as a flat line.
LOG_FROM = 10.0
# A curve of fewer points is easier to read as it is than smoothed.
SMOOTHED_FROM = 30


@dataclass(frozen=True, slots=True)
class Line:
    """Points in order of x. `style` is the class of the path; `dots` marks each point."""

    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` on a length of pixels that may run backwards (up the page)."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line], *, label: str, height: int = 250, log: bool = False, mark: float | None = None
) -> str:
    """An <svg> of the lines over steps; `mark` draws a vertical line there. At least one point.

    With `log` the axis is logarithmic if the values span so much that they need it.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across = _steps_axis(min(xs), max(xs))
    bottom = height - BOTTOM
    up = (_log_axis if log and is_wide(ys) else _linear_axis)(min(ys), max(ys), bottom)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img"><title>{label}</title>']
    for tick in up.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{up(tick):.1f}">{tick:g}</text>')
    for tick in across.ticks:
        parts.append(f'<path class="tick" d="M{across(tick):.1f} {bottom}v5"/>')
        parts.append(f'<text class="x" x="{across(tick):.1f}" y="{height - 8}">{tick:,.0f}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    if mark is not None:
        parts.append(f'<path class="mark" d="M{across(mark):.1f} {TOP}V{bottom}"/>')
    for line in lines:
        places = [(across(x), up(y)) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="{line.style}" d="M{path}"/>')
        if line.dots or len(places) == 1:
            parts += [
                f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places
            ]
    return "".join([*parts, "</svg>"])


def is_wide(values: Sequence[float]) -> bool:
    """Whether the values span so much that a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most that many points, each the mean of neighbours."""
    size = math.ceil(len(points) / most)
    return [_mean(points[start : start + size]) for start in range(0, len(points), max(1, size))]


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """Each point as the mean of itself and up to `reach` neighbours on each side, as many on both."""
    smoothed = []
    for place, (x, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        smoothed.append((x, _mean(points[place - near : place + near + 1])[1]))
    return smoothed


def _mean(points: Sequence[Point]) -> Point:
    return math.fsum(x for x, _ in points) / len(points), math.fsum(y for _, y in points) / len(points)


def round_ticks(low: float, high: float, about: int) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten within low..high: for 0..7 about 4, (0, 2, 4, 6)."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(number * step, 12) for number in range(first, last + 1))


def _steps_axis(low: float, high: float) -> Axis:
    """Steps are whole: ticks never fall between them."""
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    ticks = tuple(tick for tick in round_ticks(low, high, 6) if tick == round(tick))
    return Axis(low, high, LEFT + 6, WIDTH - RIGHT - 6, ticks)


def _linear_axis(low: float, high: float, bottom: float) -> Axis:
    """A little more than the values; from 0 if they come near it."""
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = 0.0 if 0 <= low <= 2 * room else low - room, high + room
    return Axis(low, high, bottom, TOP, round_ticks(low, high, 4))


def _log_axis(low: float, high: float, bottom: float) -> Axis:
    """Ticks at 1, 2 and 5 in each decade, or at its 1 if there are many; from a tick to a tick."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    every = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    first = max(tick for tick in every if tick <= low)
    last = min(tick for tick in every if tick >= high)
    ticks = tuple(tick for tick in every if first <= tick <= last)
    return Axis(first, last, bottom, TOP, ticks, log=True)
