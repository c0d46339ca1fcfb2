"""What was not measured, and what the figures do not say."""

from collections.abc import Iterable, Iterator

from vitral.reports.blocks import Block, Prose, Section, Side
from vitral.reports.material import Material


def limits(material: Material, sections: Iterable[Section]) -> Section:
    """Gather what is missing from the other sections, and say what no figure here says."""
    blocks: list[Block] = [Prose(text) for text in _always(material)]
    blocks += [Prose(doubt, "warning") for doubt in material.doubts]
    for use, count in material.pictures.left_out.items():
        blocks.append(Prose(f"{count:,} pictures of {use} were left out to keep the file small.", "missing"))
    if not material.pictures.wanted:
        blocks.append(Prose("Pictures were left out as asked.", "missing"))
    blocks += [
        Prose(f"{section.title}: {text}", "missing")
        for section in sections
        for text in _missing(section.blocks)
    ]
    lead = "What this report did not measure, and what its figures cannot say."
    return Section("limits", "Limits", lead, tuple(blocks))


def _always(material: Material) -> Iterator[str]:
    yield (
        "All figures are of images like those that were judged. Other cameras, places, times or crops were "
        "not tried, nor images made to deceive, nor images of no class at all."
    )
    if material.answers is not None:
        yield (
            "The intervals are of chance in which images were judged; they know nothing of chance in "
            "training. Another seed gives another model."
        )
        yield "Fairness between groups of people or places was not measured: the data names no such groups."
    yield "Speed and memory were not measured here; vitral bench does."


def _missing(blocks: Iterable[Block]) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, Prose) and block.tone == "missing":
            yield block.text
        elif isinstance(block, Side):
            yield from _missing(block.blocks)
