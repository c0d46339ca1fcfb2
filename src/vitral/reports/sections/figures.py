"""The papers' figures of this model, with what there is to see in each."""

import csv
import io

from vitral.explain.figures.page import Entry, Shot
from vitral.images.files import opened
from vitral.reports.blocks import Block, Column, Figure, Prose, Section, Side, Table
from vitral.reports.material import Material

_MOST_ROWS = 40  # of a figure's numbers; filters have thousands
_USE = "the papers' figures"


def figures(material: Material) -> Section:
    """Show each figure in both schemes, with its finding and its recipe."""
    title, page = "The papers' figures", material.figures
    if page is None or isinstance(page, str):
        return Section("figures", title, "", (Prose(page or "They were not asked for.", "missing"),))
    of = f" Those of images are of {page.count:,} of them." if page.count else ""
    lead = f"What the papers on Vision Transformers draw, of this model.{of}"
    drawn = tuple(_figure(material, entry, shot) for entry in page.entries for shot in entry.shots)
    blocks: list[Block] = [Side(drawn)]
    blocks += [Prose(f"{name}: {reason}.", "missing") for name, reason in page.not_drawn]
    return Section("figures", title, lead, tuple(blocks))


def _figure(material: Material, entry: Entry, shot: Shot) -> Figure:
    light, dark = shot.painted.light, shot.painted.dark
    with opened(light) as image:
        size = image.size
    pair = [material.pictures.whole(content, "webp", size, _USE) for content in dict.fromkeys((light, dark))]
    return Figure(
        entry.title, entry.see, shot.finding, entry.recipe, pair[0], pair[-1], _numbers(entry, shot)
    )


def _numbers(entry: Entry, shot: Shot) -> Table:
    rows = list(csv.reader(io.StringIO(shot.table)))
    head, body = rows[0] if rows else [], rows[1:]
    cut = f" (the first {_MOST_ROWS} of {len(body):,} rows)" if len(body) > _MOST_ROWS else ""
    shown = body[:_MOST_ROWS]
    columns = tuple(
        Column(name, "written" if _is_number(shown, place) else "text") for place, name in enumerate(head)
    )
    return Table(f"{entry.title}: the numbers{cut}", columns, [tuple(row) for row in shown])


def _is_number(rows: list[list[str]], place: int) -> bool:
    try:
        for row in rows:
            float(row[place])
    except (ValueError, IndexError):
        return False
    return bool(rows)
