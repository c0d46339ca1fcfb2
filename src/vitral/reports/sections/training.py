"""How the training went: its curves, and where its time went."""

from typing import Any

from vitral.reports.blocks import Block, Chart, Column, Prose, Section, Side, Table, percent, short
from vitral.reports.charts.bars import stacked_bar
from vitral.reports.charts.frame import Axis
from vitral.reports.charts.lines import Line, Mark, line_chart
from vitral.reports.material import Material
from vitral.reports.subject import Subject
from vitral.reports.words import clock
from vitral.runtime.threads import cpu_count
from vitral.training.bounds import Means, bound_of
from vitral.training.clock import PARTS, TimeSpent

_PARTS = 5  # of the time, that are named


def training(material: Material) -> Section:
    """Draw the curves of the run, as far as it has come."""
    subject = material.subject
    title = "Training"
    if subject.history is None:
        text = "There are no curves: this is a model's folder, and no run's."
        return Section("training", title, "", (Prose(text, "missing"),))
    if not subject.evaluations:
        text = "There are no curves: the run has not judged its weights yet, or metrics.jsonl is gone."
        return Section("training", title, "", (Prose(text, "missing"),))
    blocks: list[Block] = []
    if not subject.finished:
        blocks.append(Prose("The run has not finished: the figures are those of its way so far.", "warning"))
    charts = [_losses(subject), _scores(subject), _rates(subject)] if len(subject.evaluations) > 1 else []
    missing = [] if charts else ["The run judged its weights once, so there are no curves."]
    spent = TimeSpent.of(subject.summary or subject.evaluations[-1])
    if spent is None:
        missing.append("The run did not record where its time went.")
    else:
        charts.append(_time(spent))
        bound = bound_of(_seconds(spent), Means.of(_named(subject.settings), _cores(subject)))
        if bound is not None:
            blocks.append(Prose(f"{str(bound)[0].upper()}{str(bound)[1:]}."))
    blocks += [Side(tuple(charts[first : first + 2])) for first in range(0, len(charts), 2)]
    blocks += [Prose(text, "missing") for text in missing]
    return Section("training", title, _lead(subject), tuple(blocks))


def _lead(subject: Subject) -> str:
    last, best = subject.evaluations[-1], best_evaluation(subject)
    spent = f"The run took {last['step']:,} steps, {last['epoch']:.1f} epochs, in {clock(last['seconds'])}."
    if best is None:
        return spent
    found = f"Its best validation figure, {percent(best[subject.score_key])}, came at step {best['step']:,}"
    if best["step"] >= 0.9 * last["step"]:
        return f"{spent} {found}, at its end: with more time it might have gone on improving."
    return f"{spent} {found}; what followed did not improve it."


def best_evaluation(subject: Subject) -> dict[str, Any] | None:
    """Find the evaluation with the best score, by the run's own choice where it made one."""
    key, step = subject.score_key, subject.summary.get("best_step")
    scored = [each for each in subject.evaluations if each.get(key) is not None]
    chosen = [each for each in scored if each["step"] == step]
    return (chosen or [max(scored, key=lambda each: each[key])])[0] if scored else None


def series(subject: Subject, key: str) -> list[tuple[float, float]]:
    """Give (epoch, value) of each evaluation that has the value."""
    found = ((each["epoch"], each.get(key)) for each in subject.evaluations)
    return [(float(epoch), float(value)) for epoch, value in found if value is not None]


def _losses(subject: Subject) -> Chart:
    lines = [Line("training", series(subject, "train_loss")), Line("validation", series(subject, "val_loss"))]
    return _curves(subject, "Loss", lines, "number", Axis.around("nats", _values(lines), zero=True))


def _scores(subject: Subject) -> Chart:
    name = "mean average precision" if subject.classifier.multi_label else "accuracy"
    lines = [
        Line("training", series(subject, "train_accuracy")),
        Line("validation", series(subject, subject.score_key)),
    ]
    axis = Axis.around("%", _values(lines), lambda value: f"{100 * value:.0f}")
    return _curves(subject, name.capitalize(), lines, "percent", axis)


def _rates(subject: Subject) -> Chart:
    lines = [Line("learning rate", series(subject, "learning_rate"))]
    return _curves(subject, "Learning rate", lines, "number", Axis.around("", _values(lines), zero=True))


def _time(spent: TimeSpent) -> Chart:
    """Draw the parts of the time; the smallest of them together with what was not timed."""
    named = sorted(spent.parts.items(), key=lambda part: -part[1])[:_PARTS]
    rest = spent.total - sum(seconds for _, seconds in named)
    parts = [*((PARTS[name], seconds) for name, seconds in named), ("other", max(rest, 0.0))]
    total = max(spent.total, 1e-9)
    said = ", ".join(f"{name} {percent(seconds / total, 0)}" for name, seconds in parts)
    rows: list[tuple[Any, ...]] = [(name, seconds, seconds / total) for name, seconds in parts]
    rows.append(("decoding, of all processes", spent.decoding, None))
    rows.append(("augmentation, of all processes", spent.altering, None))
    rows.append(("moving to the device, while images were waited for", spent.moving, None))
    columns = (Column("part"), Column("seconds", "number"), Column("share", "percent"))
    table = Table("Seconds by part; decoding and augmentation may run beside the rest", columns, rows)
    return Chart(f"Where {clock(spent.total)} went", stacked_bar(parts, said), said, table)


def _seconds(spent: TimeSpent) -> dict[str, float]:
    return {**spent.parts, "decoding": spent.decoding, "altering": spent.altering, "moving": spent.moving}


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their own names, whatever group a file lists them in."""
    return {name.rsplit(".", 1)[-1]: value for name, value in settings.items()}


def _cores(subject: Subject) -> int:
    cores = subject.machine.get("cores")
    return int(cores) if cores else cpu_count()


def _values(lines: list[Line]) -> list[float]:
    return [value for line in lines for _, value in line.points]


def _curves(subject: Subject, title: str, lines: list[Line], kind: Any, y: Axis) -> Chart:
    lines = [line for line in lines if line.points]
    best = best_evaluation(subject)
    mark = Mark(best["epoch"], "best") if best and len(lines) > 1 else None
    x = Axis.around("epoch", [0.0, *(epoch for line in lines for epoch, _ in line.points)], zero=True)
    return Chart(
        title,
        line_chart(x, y, lines, _said(title, lines, kind), mark),
        _said(title, lines, kind),
        _table(title, lines, kind),
    )


def _said(title: str, lines: list[Line], kind: str) -> str:
    write = percent if kind == "percent" else short
    ends = (f"{line.name} from {write(line.points[0][1])} to {write(line.points[-1][1])}" for line in lines)
    return f"{title} by epoch: {'; '.join(ends)}"


def _table(title: str, lines: list[Line], kind: Any) -> Table:
    epochs = sorted({epoch for line in lines for epoch, _ in line.points})
    by_line = [dict(line.points) for line in lines]
    rows = [(epoch, *(values.get(epoch) for values in by_line)) for epoch in epochs]
    columns = (Column("epoch", "number"), *(Column(line.name, kind) for line in lines))
    return Table(f"{title} by epoch", columns, rows)
