"""Bars and intervals: reliability, parts of a whole, estimates side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vitral.reports.blocks import percent
from vitral.reports.charts.frame import Axis, Frame, wrapped

_STRIP = (140, 18)
_ROW = 26
_SHARES = Axis("", 0, 1, lambda value: f"{100 * value:.0f}")


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence."""

    low: float
    high: float
    n: int
    confidence: float  # their mean
    accuracy: float
    interval: tuple[float, float]  # of the accuracy, 95 %


def reliability_chart(bins: Sequence[Bin], alt: str) -> Markup:
    """Draw accuracy over confidence, with intervals, the diagonal, and where the answers lie."""
    x = Axis("probability of the answer, %", 0, 1, _SHARES.show)
    frame = Frame(x, Axis("right, %", 0, 1, _SHARES.show), height=300)
    frame.axes()
    most = max((each.n for each in bins), default=1)
    base = frame.height - frame.bottom
    for each in bins:
        tall = 0.22 * (base - frame.top) * each.n / most
        left, right = frame.at_x(each.low) + 1, frame.at_x(each.high) - 1
        frame.box(left, base - tall, right - left, tall, "amount")
    frame.line(frame.at_x(0), frame.at_y(0), frame.at_x(1), frame.at_y(1), "mark")
    frame.text(frame.at_x(0.03), frame.at_y(0.93), "above the line: too modest", "note", "start")
    frame.text(frame.at_x(0.99), frame.at_y(0.42), "below: too sure", "note", "end")
    for each in bins:
        if each.n:
            at, (low, high) = frame.at_x(each.confidence), each.interval
            frame.line(at, frame.at_y(low), at, frame.at_y(high), "whisker s1")
            frame.add('<circle class="dot s1" cx="{x}" cy="{y}" r="4"/>', x=at, y=frame.at_y(each.accuracy))
    return frame.svg(alt)


def stacked_bar(parts: Sequence[tuple[str, float]], alt: str) -> Markup:
    """Draw parts of a whole as one bar, each named below with its share."""
    total, width = sum(value for _, value in parts) or 1.0, 480
    frame = Frame(_SHARES, _SHARES, width=width, height=48 + _ROW * ((len(parts) + 1) // 2))
    left = 0.0
    for place, (_, value) in enumerate(parts):
        wide = width * value / total
        frame.box(left, 0, max(wide - 2, 0.5), 26, f"part s{place % 6 + 1}")
        left += wide
    for place, (name, value) in enumerate(parts):
        x, y = (place % 2) * width / 2, 52 + _ROW * (place // 2)
        frame.box(x, y - 11, 12, 12, f"part s{place % 6 + 1}")
        frame.text(x + 20, y, f"{name}, {percent(value / total)}", "legend", "start")
    return frame.svg(alt)


def interval_strip(low: float, value: float, high: float, alt: str) -> Markup:
    """Draw an estimate and its interval on a scale of 0 to 1, for a cell of a table."""
    width, height = _STRIP
    frame = Frame(_SHARES, _SHARES, width, height, left=4, top=0, right=4, bottom=0)
    middle = height / 2
    frame.line(frame.at_x(0), middle, frame.at_x(1), middle, "grid")
    frame.line(frame.at_x(low), middle, frame.at_x(high), middle, "whisker s1")
    frame.add('<circle class="dot s1" cx="{x}" cy="{y}" r="3.5"/>', x=frame.at_x(value), y=middle)
    return wrapped(frame.marks, width, height, alt, "strip")


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, under a name."""

    name: str
    value: float
    low: float
    high: float
    control: bool = False  # something to compare with


def interval_chart(estimates: Sequence[Estimate], x: Axis, alt: str) -> Markup:
    """Draw estimates one under the other, on one scale; controls are hollow."""
    longest = max((len(each.name) for each in estimates), default=1)
    frame = Frame(
        x, _SHARES, height=56 + _ROW * len(estimates), left=min(int(7.2 * longest) + 14, 210), top=6
    )
    bottom = frame.height - frame.bottom
    for value in x.ticks:
        frame.line(frame.at_x(value), frame.top, frame.at_x(value), bottom, "grid")
        frame.text(frame.at_x(value), bottom + 18, x.show(value))
    frame.text((frame.left + frame.width) / 2, frame.height - 6, x.label, "label")
    if x.low < 0 < x.high:
        frame.line(frame.at_x(0), frame.top, frame.at_x(0), bottom, "axis")
    for place, each in enumerate(estimates):
        at = frame.top + _ROW * (place + 0.5)
        kind = "s2 hollow" if each.control else "s1"
        frame.text(frame.left - 10, at + 4, each.name, "legend", "end")
        frame.line(frame.at_x(each.low), at, frame.at_x(each.high), at, f"whisker {kind}")
        frame.add(
            '<circle class="dot {kind}" cx="{x}" cy="{y}" r="4"/>', kind=kind, x=frame.at_x(each.value), y=at
        )
    return frame.svg(alt)
