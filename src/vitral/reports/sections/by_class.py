"""Each class: how well it is found, how far its name can be believed, and what it is taken for."""

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.classes import ByClass
from vitral.evaluation.multi_label import MultiLabelEvaluation
from vitral.reports.blocks import Block, Column, Matrix, Prose, Section, Table, percent
from vitral.reports.charts.bars import interval_strip
from vitral.reports.material import NO_DATA, Material

_MOST_ROWS = 200
_MOST_PAIRS = 12
_MOST_IN_MATRIX = 25
_TITLE = "By class"


def by_class_section(material: Material) -> Section:
    """Show each class with intervals, the confusion, and the pairs that are most confused."""
    classes, answers = material.classes, material.answers
    if classes is None or answers is None:
        return Section("classes", _TITLE, "", (Prose(NO_DATA, "missing"),))
    blocks: list[Block] = [_table(classes, answers)]
    if len(classes.classes) > _MOST_ROWS:
        blocks.append(
            Prose(
                f"The table has the {_MOST_ROWS} least found of {len(classes.classes):,} classes.", "missing"
            )
        )
    if classes.confusion is not None:
        blocks += _confusion(classes)
    return Section("classes", _TITLE, _lead(classes), tuple(blocks))


def _lead(classes: ByClass) -> str:
    found = [each.recall.value for each in classes.classes if each.recall.value is not None]
    text = (
        f"Between its best and its worst class lie {percent(max(found))} and {percent(min(found))} of the "
        "images found."
    )
    if classes.pairs:
        pair = classes.pairs[0]
        text += (
            f" The most frequent mistake is to take “{pair.truth}” for “{pair.taken_for}”: "
            f"{pair.share.count:,} of {pair.share.total:,} images."
        )
    return text


def _table(classes: ByClass, answers: Answers) -> Table:
    order = sorted(
        classes.classes, key=lambda each: (each.recall.value is None, each.recall.value, each.name)
    )
    order = order[:_MOST_ROWS]
    rows = [
        (
            each.name,
            each.images,
            each.recall.value,
            (each.recall.low, each.recall.high) if each.recall.total else None,
            each.precision.value,
            (each.precision.low, each.precision.high) if each.precision.total else None,
        )
        for each in order
    ]
    columns = [
        Column("class"), Column("images", "count"),
        Column("found, %", "percent"), Column("95 % interval", "interval"),
        Column("right when named, %", "percent"), Column("95 % interval ", "interval"),
    ]  # fmt: skip
    evaluation = answers.evaluation
    if isinstance(evaluation, MultiLabelEvaluation):
        columns.append(Column("average precision, %", "percent"))
        rows = [(*row, evaluation.per_class[row[0]].average_precision) for row in rows]
    strips = [
        interval_strip(
            each.recall.low, each.recall.value or 0.0, each.recall.high,
            f"{each.name}: {percent(each.recall.value or 0.0)} found",
        )
        for each in order
    ]  # fmt: skip
    caption = "Classes, the least found first"
    return Table(caption, tuple(columns), rows, ("found, 0 to 100 %", strips))


def _confusion(classes: ByClass) -> list[Block]:
    names = [each.name for each in classes.classes]
    chosen = _most_confused(classes, len(names))
    counts = classes.confusion.tocsr()[chosen][:, chosen].toarray().tolist()
    shown = tuple(names[place] for place in chosen)
    blocks: list[Block] = []
    if len(chosen) < len(names):
        text = f"The confusion is of the {len(chosen)} classes in the most mistakes, of {len(names):,}."
        blocks.append(Prose(text, "missing"))
    blocks += [
        Matrix("Confusion, % of each true class", "true \\ answer", shown, counts, normalised=True),
        Matrix("Confusion in images", "true \\ answer", shown, counts, normalised=False, folded=True),
    ]
    if classes.pairs:
        pairs = classes.pairs[:_MOST_PAIRS]
        rows = [
            (
                each.truth,
                each.taken_for,
                each.share.count,
                each.share.value,
                (each.share.low, each.share.high),
            )
            for each in pairs
        ]
        columns = (
            Column("true class"), Column("taken for"), Column("images", "count"),
            Column("of the class, %", "percent"), Column("95 % interval", "interval"),
        )  # fmt: skip
        blocks.append(Table("The most frequent mistakes", columns, rows))
    return blocks


def _most_confused(classes: ByClass, count: int) -> list[int]:
    """The places of the classes to draw, in the model's order."""
    if count <= _MOST_IN_MATRIX:
        return list(range(count))
    confusion = classes.confusion
    mistakes = confusion.sum(axis=1) + confusion.sum(axis=0) - 2 * confusion.diagonal()
    return sorted(np.argsort(-mistakes, kind="stable")[:_MOST_IN_MATRIX].tolist())
