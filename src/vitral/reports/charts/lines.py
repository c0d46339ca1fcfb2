"""Lines over an axis: learning curves, risk against coverage."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vitral.reports.charts.frame import Axis, Frame

_MOST_MARKERS = 26
# A path about (0, 0) for each series: no two differ by colour alone.
_MARKERS = (
    "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",
    "M-3,-3h6v6h-6z",
    "M0,-4L3.6,3H-3.6z",
    "M0,-4.2L4.2,0L0,4.2L-4.2,0z",
)
SERIES = len(_MARKERS)


@dataclass(frozen=True)
class Line:
    """A series of (x, y), by rising x."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high) about it


@dataclass(frozen=True)
class Mark:
    """A value on the x axis that is pointed out."""

    x: float
    words: str


def line_chart(
    x: Axis, y: Axis, lines: Sequence[Line], alt: str, mark: Mark | None = None, *, steps: bool = False
) -> Markup:
    """Draw up to four lines, each with a dash and a marker of its own; a legend where there are several."""
    frame = Frame(x, y)
    frame.axes()
    if mark is not None:
        _point_out(frame, mark)
    for place, line in enumerate(lines):
        _band(frame, line, place)
        _draw(frame, line, place, steps=steps)
    if len(lines) > 1:
        _legend(frame, [line.name for line in lines])
    return frame.svg(alt)


def _point_out(frame: Frame, mark: Mark) -> None:
    at = frame.at_x(mark.x)
    frame.line(at, frame.top - 4, at, frame.height - frame.bottom, "mark")
    near_end = at > 0.7 * frame.width
    frame.text(
        at + (-5 if near_end else 5), frame.top + 6, mark.words, "note", "end" if near_end else "start"
    )


def _band(frame: Frame, line: Line, place: int) -> None:
    if line.band:
        upper = [f"{frame.at_x(x):.1f},{frame.at_y(high):.1f}" for x, _, high in line.band]
        lower = [f"{frame.at_x(x):.1f},{frame.at_y(low):.1f}" for x, low, _ in reversed(line.band)]
        frame.add(
            '<polygon class="band s{n}" points="{points}"/>', n=place + 1, points=" ".join(upper + lower)
        )


def _draw(frame: Frame, line: Line, place: int, *, steps: bool) -> None:
    if not line.points:
        return
    parts, before = [], 0.0
    for x, y in line.points:
        right, up = frame.at_x(x), frame.at_y(y)
        if not parts:
            parts.append(f"M{right:.1f},{up:.1f}")
        elif steps:
            parts.append(f"L{right:.1f},{before:.1f}L{right:.1f},{up:.1f}")
        else:
            parts.append(f"L{right:.1f},{up:.1f}")
        before = up
    frame.add('<path class="line s{n}" d="{d}"/>', n=place + 1, d="".join(parts))
    if len(line.points) <= _MOST_MARKERS and not steps:
        for x, y in line.points:
            _marker(frame, place, frame.at_x(x), frame.at_y(y))


def _marker(frame: Frame, place: int, x: float, y: float) -> None:
    frame.add(
        '<path class="marker s{n}" transform="translate({x},{y})" d="{d}"/>',
        n=place + 1, x=float(x), y=float(y), d=_MARKERS[place % SERIES],
    )  # fmt: skip


def _legend(frame: Frame, names: Sequence[str]) -> None:
    """To the right of the y label, from the right end."""
    right = float(frame.width - frame.right)
    for place, name in reversed(list(enumerate(names))):
        frame.text(right, 12, name, "legend", "end")
        right -= 7.6 * len(name) + 10
        frame.add('<path class="line s{n}" d="M{a},8h22"/>', n=place + 1, a=right - 22)
        _marker(frame, place, right - 11, 8)
        right -= 38
