"""Several runs beside one another: how good, what differs beyond chance, and in which settings."""

import json
from collections.abc import Sequence
from typing import Any

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.comparison import Comparison, recipe_differences
from vitral.evaluation.analysis.notable import image_answers
from vitral.evaluation.single_label import SingleLabelEvaluation
from vitral.reports.blocks import Block, Chart, Column, Gallery, Prose, Section, Side, Table, percent
from vitral.reports.charts.bars import Estimate, interval_chart
from vitral.reports.charts.frame import Axis
from vitral.reports.charts.lines import SERIES, Line, line_chart
from vitral.reports.material import NO_DATA, Material
from vitral.reports.sections.images import image_cards
from vitral.reports.sections.training import best_evaluation
from vitral.reports.words import clock

# Of the second run and on: each beside the first, on the images that both judged.
Against = Sequence[tuple[Material, Comparison]]
_SHOWN = 14


def side_by_side(materials: Sequence[Material]) -> Section:
    """Give the figures of all runs in one table, and their scores with intervals."""
    rows = [_row(material) for material in materials]
    columns = (
        Column("run"), Column("score", "percent"), Column("95 % interval", "interval"),
        Column("loss", "number"), Column("calibration error", "percent"), Column("parameters", "count"),
        Column("GFLOPs", "number"), Column("epochs", "number"), Column("time"),
    )  # fmt: skip
    blocks: list[Block] = [Table("Runs", columns, rows)]
    estimates = [Estimate(row[0], row[1], *row[2]) for row in rows if row[1] is not None and row[2]]
    if len(estimates) > 1:
        low, high = min(each.low for each in estimates), max(each.high for each in estimates)
        x = Axis.around("accuracy, %", [low, high], lambda value: f"{100 * value:.3g}")
        said = "; ".join(f"{each.name} {percent(each.value)}" for each in estimates)
        table = Table("Accuracy of each run", columns[:3], [row[:3] for row in rows])
        chart = interval_chart(estimates, x, f"Accuracy with 95 % intervals: {said}")
        blocks.append(Chart("Accuracy with 95 % intervals", chart, said, table))
    if materials[0].answers is None:
        blocks.append(Prose(NO_DATA, "missing"))
    return Section("runs", "Side by side", "", tuple(blocks))


def _row(material: Material) -> tuple[Any, ...]:
    subject = material.subject
    score, interval, loss, error = None, None, None, None
    if material.answers is not None:
        evaluation = material.answers.evaluation
        score, loss = evaluation.score, evaluation.loss
        if isinstance(evaluation, SingleLabelEvaluation):
            interval, error = evaluation.ci95, evaluation.ece
    elif best := best_evaluation(subject):
        score, loss = best[subject.score_key], best["val_loss"]
    last = subject.evaluations[-1] if subject.evaluations else None
    flops = subject.flops / 1e9 if subject.flops else None
    spent = (last["epoch"], clock(last["seconds"])) if last else (None, None)
    return (subject.name, score, interval, loss, error, subject.parameters, flops, *spent)


def differences(first: Material, others: Against) -> Section:
    """Say which run beats the first beyond chance, image by image."""
    title = "Beyond chance"
    if not others:
        return Section("differences", title, "", (Prose(NO_DATA, "missing"),))
    rows = [
        (
            other.subject.name, found.all.images, found.all.value, (found.all.low, found.all.high),
            found.all.gained, found.all.lost, found.all.p_value,
            "yes" if found.all.beyond_chance else "no",
        )
        for other, found in others
    ]  # fmt: skip
    columns = (
        Column(f"beside {first.subject.name}"), Column("images", "count"),
        Column("difference, points", "points"),
        Column("95 % interval, points", "difference"), Column("it alone right", "count"),
        Column(f"{first.subject.name} alone right", "count"), Column("p", "number"), Column("beyond chance"),
    )  # fmt: skip
    blocks: list[Block] = [Table("On the same images (McNemar's exact test)", columns, rows)]
    blocks.append(_by_class(first, others))
    if any(found.left_out for _, found in others):
        blocks.append(
            Prose("Images that only one of two runs judged are left out of their comparison.", "warning")
        )
    return Section("differences", title, verdict_of(first, others), tuple(blocks))


def verdict_of(first: Material, others: Against) -> str:
    """Say in a sentence a run whether it is better than the first."""
    parts = []
    for other, found in others:
        found_all, name, beside = found.all, other.subject.name, first.subject.name
        points = f"{100 * abs(found_all.value):.1f} points"
        if not found_all.beyond_chance:
            parts.append(f"“{name}” and “{beside}” differ by {points}, which may be chance.")
        else:
            way = "more" if found_all.value > 0 else "less"
            parts.append(f"“{name}” is {points} {way} accurate than “{beside}”, beyond chance.")
    return " ".join(parts)


def _by_class(first: Material, others: Against) -> Table:
    columns = [Column("class"), Column("images", "count"), Column(first.subject.name, "percent")]
    columns += [column for other, _ in others for column in _two_columns(other.subject.name)]
    by_class = [dict(found.by_class) for _, found in others]
    rows = []
    for name, one in others[0][1].by_class:
        cells = [name, one.images, one.first]
        for found in by_class:
            cells += [found[name].second, found[name].value] if name in found else [None, None]
        rows.append(tuple(cells))
    return Table("Found of each class", tuple(columns), rows)


def _two_columns(name: str) -> tuple[Column, Column]:
    return Column(name, "percent"), Column(f"{name}, difference in points", "points")


def curves(materials: Sequence[Material]) -> Section:
    """Draw the runs' validation curves over time."""
    drawn = [material.subject for material in materials if material.subject.evaluations][:SERIES]
    title = "Training"
    if not drawn:
        return Section("training", title, "", (Prose("None of these has curves.", "missing"),))
    charts = []
    for name, key, kind in (("Validation loss", "val_loss", "number"), ("Validation score", "", "percent")):
        lines = [
            Line(
                subject.name,
                [
                    (each["seconds"] / 60, each[key or subject.score_key])
                    for each in subject.evaluations
                    if each.get(key or subject.score_key) is not None
                ],
            )
            for subject in drawn
        ]
        charts.append(_curve(name, [line for line in lines if line.points], kind))
    blocks: list[Block] = [Side(tuple(charts))]
    if len(drawn) < len(materials):
        text = f"Curves are of {len(drawn)} of the {len(materials)} runs: of {SERIES} at most that have some."
        blocks.append(Prose(text, "missing"))
    return Section("training", title, "Over time on the machine of each run.", tuple(blocks))


def _curve(title: str, lines: Sequence[Line], kind: Any) -> Chart:
    values = [y for line in lines for _, y in line.points]
    show = {"percent": lambda value: f"{100 * value:.3g}"}.get(kind, lambda value: f"{value:.3g}")
    x = Axis.around("minutes", [0.0, *(x for line in lines for x, _ in line.points)], zero=True)
    y = Axis.around("%" if kind == "percent" else "nats", values, show)
    said = f"{title}: " + "; ".join(f"{line.name} ends at {show(line.points[-1][1])}" for line in lines)
    rows = [(line.name, *point) for line in lines for point in line.points]
    columns = (Column("run"), Column("minutes", "number"), Column(title.lower(), kind))
    return Chart(title, line_chart(x, y, lines, said), said, Table(f"{title} by time", columns, rows))


def settings(materials: Sequence[Material]) -> Section:
    """List the settings in which the runs differ."""
    runs = [material.subject for material in materials if material.subject.settings]
    title = "Settings that differ"
    if len(runs) < 2:
        return Section("settings", title, "", (Prose("Fewer than two of these have a recipe.", "missing"),))
    found = recipe_differences([subject.settings for subject in runs])
    if not found:
        return Section("settings", title, "The recipes are the same.", ())
    rows = [(name, *(_written(value) for value in values)) for name, values in found.items()]
    columns = (Column("setting"), *(Column(subject.name) for subject in runs))
    return Section("settings", title, "", (Table(f"{len(rows)} settings", columns, rows),))


def _written(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False).strip('"')


def turned(first: Material, others: Against) -> Section:
    """Show images that one run has right and the first has not, and the other way round."""
    title = "Images that turned"
    if not others or first.answers is None:
        return Section("turned", title, "", (Prose(NO_DATA, "missing"),))
    blocks: list[Block] = []
    for other, _ in others:
        assert other.answers is not None
        pairs = ((other, first, first.answers), (first, other, other.answers))
        blocks += [_gallery(one, two, answers) for one, two, answers in pairs]
    return Section("turned", title, "", tuple(blocks))


def _gallery(one: Material, two: Material, answers: Answers) -> Block:
    places = _only_right(one, two)
    title = f"{len(places):,} that {one.subject.name} has right and {two.subject.name} wrong"
    cards = image_cards(two, image_answers(answers, places[:_SHOWN]), "images that turned")
    if not cards:
        return Prose(f"There are no images that {one.subject.name} has right and {two.subject.name} wrong.")
    return Gallery(title, cards, f"Under each, what {two.subject.name} says; the surest first.")


def _only_right(one: Material, two: Material) -> list[int]:
    """The images that `one` has right and `two` wrong: positions in `two`, its surest errors first."""
    assert one.answers is not None
    assert two.answers is not None
    wrong_of_one = one.answers.outcomes.wrong
    right = {one.answers.name(place) for place in range(len(one.answers)) if not wrong_of_one[place]}
    outcomes = two.answers.outcomes
    found = [
        place
        for place in range(len(two.answers))
        if outcomes.wrong[place] and two.answers.name(place) in right
    ]
    return sorted(found, key=lambda place: -outcomes.confidences_in_error[place])
