"""Line charts: ticks that are round, axes that fit, points where they belong."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lorimer.evaluate.chart import (
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Point,
    is_wide,
    line_chart,
    round_ticks,
    smooth,
    thin,
)


@pytest.mark.parametrize(
    ("low", "high", "about", "ticks"),
    [
        (0, 7, 4, (0, 2, 4, 6)),
        (0, 1, 5, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (1, 300, 6, (50, 100, 150, 200, 250, 300)),
        (0, 0.0011, 4, (0, 0.0005, 0.001)),
        (2.31, 2.34, 4, (2.31, 2.32, 2.33, 2.34)),
        (-3, 3, 3, (-2, 0, 2)),
    ],
)
def test_ticks_are_round(low: float, high: float, about: int, ticks: tuple[float, ...]) -> None:
    assert round_ticks(low, high, about) == pytest.approx(ticks)


def labels(svg: str, style: str) -> list[str]:
    return re.findall(rf'class="{style}"[^>]*>([^<]*)</text>', svg)


def path(svg: str, style: str) -> list[Point]:
    (found,) = re.findall(rf'<path class="{style}" d="M([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in (place.split() for place in found.split("L"))]


CURVES: dict[str, tuple[list[float], list[str], list[str]]] = {
    # losses of steps 1, 2, ...; labels of x; labels of y
    "a few": ([4.0, 3.0, 2.5], ["1", "2", "3"], ["2.5", "3", "3.5", "4"]),
    "a fall": ([4.0, 1.0, 0.3], ["1", "2", "3"], ["0.2", "0.5", "1", "2", "5"]),
    "a long fall": (
        [300.0, 1.0, 0.002],
        ["1", "2", "3"],
        ["0.001", "0.01", "0.1", "1", "10", "100", "1000"],
    ),
    "near zero": ([0.5, 0.2, 0.01], ["1", "2", "3"], ["0", "0.2", "0.4"]),
    "one step": ([2.0], ["1"], ["1.8", "1.9", "2", "2.1", "2.2"]),
    "all equal": ([0.0] * 7, ["1", "2", "3", "4", "5", "6", "7"], ["0", "0.5", "1"]),
}


@pytest.mark.parametrize("name", CURVES)
def test_axes_fit_the_values(name: str) -> None:
    values, across, up = CURVES[name]
    points = [(float(step), value) for step, value in enumerate(values, 1)]
    svg = line_chart([Line("train", points)], label="Loss", log=name != "near zero")
    assert labels(svg, "x") == across
    assert labels(svg, "y") == up
    ElementTree.fromstring(svg)
    places = path(svg, "train")
    assert len(places) == len(values)
    for (x, y), value in zip(places, values, strict=True):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= 250
        assert (y > places[0][1]) == (value < values[0])  # less is lower on the page
    assert [x for x, _ in places] == sorted(x for x, _ in places)


def test_a_value_lies_at_its_tick() -> None:
    svg = line_chart([Line("train", [(1, 10.0), (2, 1.0), (3, 0.5)])], label="Loss", log=True)
    ticks = {label: float(y) for y, label in re.findall(r'class="y"[^>]* y="([\d.]*)">([^<]*)<', svg)}
    assert [y for _, y in path(svg, "train")] == [ticks["10"], ticks["1"], ticks["0.5"]]


def test_a_single_point_is_a_dot_and_the_mark_is_at_its_step() -> None:
    svg = line_chart([Line("train", [(1, 2.0), (5, 1.0)]), Line("valid", [(5, 1.5)])], label="Loss", mark=5)
    (dot,) = re.findall(r'<circle class="valid" cx="([\d.]*)"', svg)
    assert f'class="mark" d="M{dot} ' in svg
    assert 'circle class="train"' not in svg


def test_thinning_keeps_the_mean_and_short_curves() -> None:
    points = [(float(n), float(n % 2)) for n in range(10)]
    assert thin(points, 10) == points
    assert thin(points, 5) == [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.5, 0.5), (8.5, 0.5)]
    assert len(thin(points, 3)) == 3
    assert thin([], 3) == []


def test_smoothing_is_a_mean_of_as_many_on_both_sides() -> None:
    points = [(1.0, 0.0), (2.0, 3.0), (3.0, 0.0), (4.0, 3.0), (5.0, 9.0)]
    assert smooth(points, 1) == [(1, 0), (2, 1), (3, 2), (4, 4), (5, 9)]
    assert [round(y, 3) for _, y in smooth(points, 2)] == [0, 1, 3, 4, 9]


@pytest.mark.parametrize(
    ("values", "wide"), [([1, 9.9], False), ([1, 10], True), ([0, 100], False), ([5], False)]
)
def test_a_log_axis_needs_a_wide_span_above_zero(values: list[float], wide: bool) -> None:
    assert is_wide(values) is wide
