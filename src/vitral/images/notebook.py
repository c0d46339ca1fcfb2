"""Small pieces of HTML for notebooks: tables, bars, heat maps and pictures."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

_PICTURE_PIXELS = 128
_BLUE = "70, 130, 180"


def table(rows: Iterable[Sequence[str]], headings: Sequence[str] = (), title: str = "") -> str:
    """Return a table of plain text."""
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in headings) + "</tr>" if headings else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{caption}{head}{body}</table>"


def heat_map(counts: Sequence[Sequence[int]], names: Sequence[str], title: str) -> str:
    """Return a square table of numbers, each cell as dark as its share of the row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    rows = []
    for name, row in zip(names, counts, strict=True):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td style="background: rgba({_BLUE}, {count / total:.2f})">{count:,}</td>' for count in row
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f"<table><caption>{escape(title)}</caption><tr>{head}</tr>{''.join(rows)}</table>"


def bars(shares: Iterable[tuple[str, float]]) -> str:
    """Return a row for each name, with a bar as long as its share, 0 to 1."""
    style = f"height: 0.8em; background: rgb({_BLUE})"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{share:.1%}</td>"
        f'<td><div style="width: {100 * share:.0f}px; {style}"></div></td></tr>'
        for name, share in shares
    )
    return f"<table>{rows}</table>"


def picture(image: Image.Image) -> str:
    """Return an image of 128 pixels at most, inside the page."""
    small = image.convert("RGB")
    small.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    content = io.BytesIO()
    small.save(content, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">'
