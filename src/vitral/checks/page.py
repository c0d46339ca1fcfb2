"""A check as a page: what was found, a section a kind of trouble, with the pictures side by side."""

from collections.abc import Iterator
from dataclasses import replace

from vitral.checks.check import Check
from vitral.checks.findings import Finding, Kind
from vitral.reports.blocks import Block, Card, Column, Gallery, Picture, Prose, Section, Table, Tile, Tiles
from vitral.reports.page import render
from vitral.reports.pictures import Pictures
from vitral.runtime.version import vitral_version

_SHOWN, _BESIDE, _LISTED = 24, 4, 500  # findings as pictures, pictures of one, findings in the list
_SIDE = 144  # pixels of a picture's longer side
_LEVELS = {"wrong": "wrong", "doubtful": "look at it", "note": "good to know"}
_SECTIONS = (
    ("files", "Images", ("broken", "blank", "tiny", "shape")),
    (
        "copies",
        "The same picture again",
        ("same_file_labels", "same_file_splits", "same_file", "near_splits", "near_labels", "near"),
    ),
    ("labels", "Labels", ("label", "few", "shortcut")),
)


def page_of(found: Check, megabytes: float = 4.0) -> str:
    """Write the page: one file that loads nothing, of about so many MB at most."""
    pictures = Pictures(int(megabytes * 1e6))
    overview = Section("overview", "What was found", "", (_table(found),))
    stored = tuple(kind.key for kind in found.kinds if kind.key.startswith("stored:"))
    parts = (*_SECTIONS, ("stored", "How images are stored", stored))
    sections = [overview]
    for key, title, keys in parts:
        blocks = [
            block for kind in found.kinds if kind.key in keys for block in _blocks(found, kind, pictures)
        ]
        sections.append(Section(key, title, "" if blocks else "Nothing was found.", tuple(blocks)))
    if pictures.left_out:
        count = sum(pictures.left_out.values())
        text = f"{count:,} more pictures had no room in {megabytes:g} MB."
        sections[0] = replace(overview, blocks=(*overview.blocks, Prose(text, "missing")))
    made_by = f"Vitral {vitral_version()}"
    return render(
        found.subject.data.source, verdict(found), _tiles(found), tuple(sections), made_by, "Data check"
    )


def verdict(found: Check) -> str:
    """Say in two sentences what was found."""
    total = f"{len(found.subject):,} images"
    if not found.problems:
        return f"Nothing is wrong with the {total}, as far as was looked."
    wrong, doubtful = (_images(found, level) for level in ("wrong", "doubtful"))
    said = f"Of {total}, {wrong:,} are part of what is certainly wrong, and {doubtful:,} of what is in doubt."
    return f"{said} {found.advice}."


def _images(found: Check, level: str) -> int:
    kinds = (kind for kind in found.problems if kind.level == level)
    return len({row for kind in kinds for finding in kind.findings for row in finding.rows})


def _tiles(found: Check) -> Tiles:
    data = found.subject.data
    splits = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    leaks = {
        row
        for key in ("same_file_splits", "near_splits")
        for each in found.kind(key).findings
        for row in each.rows
    }
    return Tiles(
        (
            Tile("Images", f"{len(found.subject):,}", splits),
            Tile("Classes", f"{len(data.classes):,}"),
            Tile("In several splits", f"{len(leaks):,}", "images whose picture is in another split too"),
            Tile("Better left out", f"{len(found.left_out):,}", "see docs/check.md for the rule"),
        )
    )


def _table(found: Check) -> Table:
    rows = [
        (kind.title, _LEVELS[kind.level], len(kind.findings), kind.images, _meaning(kind))
        for kind in found.kinds
        if kind.findings or kind.missing
    ]
    columns = (
        Column("what"),
        Column("how bad"),
        Column("findings", "count"),
        Column("images", "count"),
        Column("what it means"),
    )
    return Table("All that was found", columns, rows)


def _meaning(kind: Kind) -> str:
    return f"Not looked for: {kind.missing}." if kind.missing else kind.means


def _blocks(found: Check, kind: Kind, pictures: Pictures) -> Iterator[Block]:
    title = f"{kind.title[:1].upper()}{kind.title[1:]}"
    if kind.missing:
        yield Prose(f"{title} was not looked for: {kind.missing}.", "missing")
    if not kind.findings:
        return
    pictured = [each for each in kind.findings if each.rows][:_SHOWN] if kind.key != "broken" else []
    if pictured:
        cards = tuple(_card(found, each, pictures, kind.title) for each in pictured)
        yield Gallery(title, cards, kind.means)
    elif kind.means:
        yield Prose(f"{title}. {kind.means}")
    yield _list(found, kind, folded=bool(pictured))


def _card(found: Check, finding: Finding, pictures: Pictures, use: str) -> Card:
    subject = found.subject
    shown: list[Picture] = []
    for row in finding.rows[:_BESIDE]:
        picture = pictures.of(subject.split.images, row, _SIDE, use)
        if picture is not None:
            shown.append(picture)
    lines = tuple(
        f"{subject.split_of(row)}, {subject.label_words(row)}: {subject.split.names[row]}"
        for row in finding.rows[:_BESIDE]
    )
    more = len(finding.rows) - _BESIDE
    lines = (*lines, f"and {more:,} more") if more > 0 else lines
    title = finding.says or f"{len(finding.rows):,} times"
    return Card(
        f"{subject.split.names[finding.rows[0]]}: {title}",
        title,
        lines,
        shown[0] if shown else None,
        tuple(shown[1:]),
    )


def _list(found: Check, kind: Kind, *, folded: bool) -> Table:
    subject = found.subject
    rows = [
        (
            ", ".join(subject.split.names[row] for row in each.rows) or "-",
            ", ".join(dict.fromkeys(map(subject.split_of, each.rows))),
            " / ".join(dict.fromkeys(map(subject.label_words, each.rows))),
            each.says,
        )
        for each in kind.findings[:_LISTED]
    ]
    columns = Column("images"), Column("split"), Column("label"), Column("what")
    caption = f"{kind.title}: {len(rows):,} of {len(kind.findings):,} findings"
    return Table(caption, columns, rows, folded=folded)
