"""Charts draw what they are given, where it belongs: places worked out by hand."""

import re
from xml.etree import ElementTree

import pytest

from vitral.reports.charts.bars import (
    Bin,
    Estimate,
    interval_chart,
    interval_strip,
    reliability_chart,
    stacked_bar,
)
from vitral.reports.charts.frame import Axis, Frame
from vitral.reports.charts.lines import Line, Mark, line_chart


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([0, 16.4], [0, 5, 10, 15, 20]),
        ([0.62, 0.91], [0.6, 0.7, 0.8, 0.9, 1.0]),
        ([3, 3], [3, 4, 5, 6]),
        ([-0.4, 1.1], [-0.5, 0, 0.5, 1, 1.5]),
        ([], [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values: list[float], ticks: list[float]) -> None:
    axis = Axis.around("x", values)
    assert axis.ticks == pytest.approx(ticks)
    assert all(axis.low <= value <= axis.high for value in values)


def test_values_that_are_no_numbers_do_not_spoil_an_axis() -> None:
    assert Axis.around("x", [1.0, float("nan"), float("inf"), 2.0]).high == 2


def test_the_ends_of_an_axis_are_the_edges_of_the_plot() -> None:
    frame = Frame(Axis("x", 0, 10), Axis("y", 0, 4))
    assert (frame.at_x(0), frame.at_x(10)) == (frame.left, frame.width - frame.right)
    assert (frame.at_y(0), frame.at_y(4)) == (frame.height - frame.bottom, frame.top)
    assert frame.at_x(5) == (frame.left + frame.width - frame.right) / 2


def test_a_line_goes_through_its_points() -> None:
    x, y = Axis("x", 0, 2), Axis("y", 0, 1)
    frame = Frame(x, y)
    svg = line_chart(x, y, [Line("a", [(0, 0), (1, 1), (2, 0.5)])], "alt", Mark(1, "best"))
    path = next(part.get("d") for part in ElementTree.fromstring(svg) if part.get("class") == "line s1")
    places = re.findall(r"([\d.]+),([\d.]+)", path or "")
    expected = [(frame.at_x(a), frame.at_y(b)) for a, b in ((0, 0), (1, 1), (2, 0.5))]
    assert [(float(a), float(b)) for a, b in places] == [pytest.approx(place, abs=0.06) for place in expected]


def test_lines_differ_by_more_than_their_colour() -> None:
    x, y = Axis("x", 0, 1), Axis("y", 0, 1)
    svg = line_chart(x, y, [Line(name, [(0, 0), (1, 1)]) for name in "abcd"], "alt")
    markers = {
        part.get("class"): part.get("d")
        for part in ElementTree.fromstring(svg)
        if "marker" in part.get("class", "")
    }
    assert len(markers) == len(set(markers.values())) == 4


def test_every_chart_is_well_formed_and_says_what_it_shows() -> None:
    hostile = "<b>&\"'"
    bins = [Bin(0.8, 0.9, 10, 0.85, 0.7, (0.4, 0.9)), Bin(0.9, 1, 40, 0.97, 0.95, (0.8, 1))]
    charts = [
        reliability_chart(bins, hostile),
        stacked_bar([(hostile, 3.0), ("step", 1.0)], hostile),
        interval_strip(0.1, 0.5, 0.9, hostile),
        interval_chart(
            [Estimate(hostile, 0.5, 0.2, 0.8), Estimate("random", 0, -0.1, 0.1, control=True)],
            Axis("x", -1, 1),
            hostile,
        ),
        line_chart(Axis("x", 0, 1), Axis("y", 0, 1), [Line(hostile, [])], hostile),
    ]
    for chart in charts:
        assert ElementTree.fromstring(chart).get("aria-label") == hostile


def test_parts_of_a_bar_are_as_long_as_their_shares() -> None:
    parts = ElementTree.fromstring(stacked_bar([("decode", 3.0), ("step", 1.0)], "alt"))
    widths = [float(part.get("width", 0)) for part in parts if part.get("height") == "26.0"]
    assert widths == [pytest.approx(358), pytest.approx(118)]  # of 480, less the gap of 2
