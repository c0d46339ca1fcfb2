"""The frame of a chart: scales, ticks, grid and labels, in units of the drawing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from vitral.reports.blocks import short

WIDTH, HEIGHT = 480, 270
_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, both of which are shown."""

    label: str
    low: float
    high: float
    show: Callable[[float], str] = short
    log: bool = False

    @classmethod
    def around(
        cls,
        label: str,
        values: Sequence[float],
        show: Callable[[float], str] = short,
        *,
        zero: bool = False,
        log: bool = False,
    ) -> "Axis":
        """An axis that has room for the values; `zero` lets it begin at 0."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if log:
            return cls(label, low, high if high > low else low * 10, show, log=True)
        low = min(low, 0.0) if zero else low
        if high == low:
            high = low + (abs(low) or 1.0)
        step = _step(high - low)
        return cls(label, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, show)

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high."""
        if self.log:
            span = math.log(self.high / self.low) or 1.0
            return math.log(max(value, self.low) / self.low) / span
        return (value - self.low) / ((self.high - self.low) or 1.0)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**power for power in powers] if len(powers) > 1 else [self.low, self.high]
        step = _step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + place) * step for place in range(count)]


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, about five of which make the span."""
    raw = span / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)


@dataclass
class Frame:
    """A drawing that grows by marks over two axes."""

    x: Axis
    y: Axis
    width: int = WIDTH
    height: int = HEIGHT
    left: int = 54
    top: int = 34
    right: int = 14
    bottom: int = 44
    marks: list[Markup] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        return self.left + self.x.share(value) * (self.width - self.left - self.right)

    def at_y(self, value: float) -> float:
        return self.height - self.bottom - self.y.share(value) * (self.height - self.top - self.bottom)

    def add(self, markup: str, **values: object) -> None:
        """Add an element; text among the values is escaped, and numbers have one decimal."""
        shown = {
            name: f"{value:.1f}" if isinstance(value, float) else value for name, value in values.items()
        }
        self.marks.append(Markup(markup).format(**shown))

    def text(self, x: float, y: float, words: str, kind: str = "tick", anchor: str = "middle") -> None:
        self.add(
            '<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>',
            kind=kind, x=float(x), y=float(y), anchor=anchor, words=words,
        )  # fmt: skip

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add(
            '<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>',
            kind=kind, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2),
        )  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.add(
            '<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>',
            kind=kind, x=float(x), y=float(y), width=float(max(width, 0)), height=float(max(height, 0)),
        )  # fmt: skip

    def axes(self) -> None:
        """Draw the grid, the ticks and the labels of both axes."""
        for value in self.y.ticks:
            self.line(self.left, self.at_y(value), self.width - self.right, self.at_y(value), "grid")
            self.text(self.left - 8, self.at_y(value) + 4, self.y.show(value), anchor="end")
        for value in self.x.ticks:
            self.text(self.at_x(value), self.height - self.bottom + 18, self.x.show(value))
        bottom = self.height - self.bottom
        self.line(self.left, bottom, self.width - self.right, bottom, "axis")
        self.text((self.left + self.width - self.right) / 2, self.height - 6, self.x.label, "label")
        self.text(0, 12, self.y.label, "label", anchor="start")

    def svg(self, alt: str) -> Markup:
        """Close the drawing."""
        return wrapped(self.marks, self.width, self.height, alt)


def wrapped(marks: Sequence[Markup], width: int, height: int, alt: str, kind: str = "plot") -> Markup:
    """Put marks into an SVG element that screen readers say as `alt`."""
    head = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        kind, width, height, escape(alt)
    )
    return head + Markup("").join(marks) + Markup("</svg>")
