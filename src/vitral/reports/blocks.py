"""What a section is made of. The page and the JSON are two renderings of the same blocks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from markupsafe import Markup

_MISSING = "\N{EN DASH}"


def percent(value: float, places: int = 1) -> str:
    """Write a share of 0..1 as ``87.1 %``, with a space that does not break."""
    return f"{100 * value:.{places}f}\N{NO-BREAK SPACE}%"


def short(value: float) -> str:
    """Write a number in three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# How the values of a column are written for people.
_SHOWN: dict[str, Callable[[Any], str]] = {
    "text": str,
    "count": lambda value: f"{value:,}",
    "percent": percent,
    "points": lambda value: f"{100 * value:+.1f}",
    "number": short,
    "written": str,
    "signed": lambda value: f"{value:+.3f}",
    "interval": lambda value: f"{100 * value[0]:.1f} to {100 * value[1]:.1f}",
    "range": lambda value: f"{value[0]:+.3f} to {value[1]:+.3f}",
    "difference": lambda value: f"{100 * value[0]:+.1f} to {100 * value[1]:+.1f}",
}
Kind = Literal[
    "text", "count", "percent", "points", "number", "signed", "interval", "range", "difference", "written"
]


@dataclass(frozen=True)
class Column:
    """A heading, and how the values under it are written."""

    name: str
    kind: Kind = "text"

    @property
    def is_number(self) -> bool:
        return self.kind != "text"

    def shown(self, value: Any) -> str:
        """Write a value; one that is missing or no number is a dash."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return _MISSING
        return _SHOWN[self.kind](value)

    def order(self, value: Any) -> str:
        """Give what a script sorts rows by."""
        first = value[0] if isinstance(value, tuple) and value else value
        return "" if first is None else str(first)


@dataclass(frozen=True)
class Table:
    """Rows of values under columns; `lines` adds a drawn cell to each row."""

    kind: ClassVar[str] = "table"

    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[Any, ...]]
    drawn: tuple[str, Sequence[Markup]] | None = None  # heading and a small picture a row
    folded: bool = False  # shown when it is asked for

    def to_dict(self) -> dict[str, Any]:
        names = [column.name for column in self.columns]
        return {"table": self.caption, "rows": [dict(zip(names, row, strict=True)) for row in self.rows]}


@dataclass(frozen=True)
class Matrix:
    """A square table of shares as shades, with the numbers in it; rows are the truth."""

    kind: ClassVar[str] = "matrix"

    caption: str
    corner: str
    names: tuple[str, ...]
    counts: Sequence[Sequence[int]]
    normalised: bool
    folded: bool = False

    @property
    def shares(self) -> list[list[float]]:
        """Each count as a share of its row."""
        return [[count / max(sum(row), 1) for count in row] for row in self.counts]

    def to_dict(self) -> dict[str, Any]:
        cells = self.shares if self.normalised else [list(row) for row in self.counts]
        return {"matrix": self.caption, "classes": list(self.names), "rows": cells}


@dataclass(frozen=True)
class Chart:
    """A drawing, what it shows in words and numbers, and the table of what is drawn."""

    kind: ClassVar[str] = "chart"

    title: str
    svg: Markup
    alt: str
    table: Table

    def to_dict(self) -> dict[str, Any]:
        return {"chart": self.title, "says": self.alt, **self.table.to_dict()}


@dataclass(frozen=True)
class Side:
    """Blocks that stand side by side where there is room."""

    kind: ClassVar[str] = "side"

    blocks: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"blocks": [block.to_dict() for block in self.blocks]}


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """The few numbers that people remember."""

    kind: ClassVar[str] = "tiles"

    tiles: tuple[Tile, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"figures": [vars(tile) for tile in self.tiles]}


@dataclass(frozen=True)
class Facts:
    """Names and values; `code` sets the values as the computer writes them."""

    kind: ClassVar[str] = "facts"

    title: str
    rows: tuple[tuple[str, str], ...]
    code: bool = False
    folded: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"facts": self.title, **dict(self.rows)}


@dataclass(frozen=True)
class Prose:
    """A paragraph; "missing" says what is not here and why, "warning" what to be careful of."""

    kind: ClassVar[str] = "prose"

    text: str
    tone: Literal["plain", "missing", "warning"] = "plain"

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "tone": self.tone}


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, perhaps with a map over it."""

    uri: str
    width: int
    height: int
    over: str = ""  # a map as a data URI, stretched over the image
    coarse: bool = False  # so small that its pixels are to be seen
    alt: str = ""  # where it says more than the card that it is on


@dataclass(frozen=True)
class Card:
    """One image, and what is said under it."""

    alt: str
    title: str
    lines: tuple[str, ...]
    picture: Picture | None = None
    more: tuple[Picture, ...] = ()  # beside the first

    def to_dict(self) -> dict[str, Any]:
        return {"image": self.title, "says": list(self.lines)}


@dataclass(frozen=True)
class Gallery:
    """Images beside one another."""

    kind: ClassVar[str] = "gallery"

    title: str
    cards: tuple[Card, ...]
    intro: str = ""
    slider: bool = False  # whether the maps over the images can be made weaker

    def to_dict(self) -> dict[str, Any]:
        return {"gallery": self.title, "images": [card.to_dict() for card in self.cards]}


@dataclass(frozen=True)
class Figure:
    """A drawing as a picture, in both schemes, with what to see in it, its recipe and its numbers."""

    kind: ClassVar[str] = "figure"

    title: str
    see: str
    alt: str
    recipe: str
    light: Picture | None
    dark: Picture | None
    table: Table

    def to_dict(self) -> dict[str, Any]:
        return {"figure": self.title, "says": self.alt, "recipe": self.recipe, **self.table.to_dict()}


Block = Table | Matrix | Chart | Side | Tiles | Facts | Prose | Gallery | Figure


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading."""

    key: str
    title: str
    lead: str  # what it says, in a sentence or two
    blocks: tuple[Block, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {
            "section": self.key,
            "title": self.title,
            "says": self.lead,
            "blocks": [block.to_dict() for block in self.blocks],
        }
