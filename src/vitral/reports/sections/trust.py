"""How far to trust the probabilities: reliability, and what is won by not answering."""

from vitral.evaluation.analysis.abstention import RiskCoverage, Threshold, risk_coverage, threshold_for
from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.reliability import Reliability, reliability
from vitral.reports.blocks import Block, Chart, Column, Prose, Section, Side, Table, percent
from vitral.reports.charts.bars import Bin, reliability_chart
from vitral.reports.charts.frame import Axis
from vitral.reports.charts.lines import Line, line_chart
from vitral.reports.material import NO_DATA, Material

_WISHED = (0.90, 0.95, 0.98, 0.99, 0.995)
_POINTS = 120
_IN_TABLE = 11
_TITLE = "Calibration and abstention"


def trust(material: Material) -> Section:
    """Show whether probabilities mean what they say, and which threshold gives a wished accuracy."""
    answers = material.answers
    if answers is None:
        return Section("trust", _TITLE, "", (Prose(NO_DATA, "missing"),))
    found = reliability(answers)
    curve = risk_coverage(answers)
    charts: list[Block] = [_diagram(found)]
    blocks: list[Block] = []
    lead = f"A probability of this model is off by {percent(found.error)} on average."
    if curve is None:
        text = (
            "Where an image shows any number of classes, no one confidence says how sure the model is of it."
        )
        blocks = [*charts, Prose(text, "missing")]
    else:
        wished = [threshold for level in _WISHED if (threshold := threshold_for(answers, level))]
        blocks = [Side((*charts, _curve(curve))), _thresholds(wished, answers)]
        lead = f"{lead} {_advice(wished, answers)}"
    return Section("trust", _TITLE, lead, tuple(blocks))


def _diagram(found: Reliability) -> Chart:
    bins = [
        Bin(
            each.low,
            each.high,
            each.accuracy.total,
            each.confidence,
            each.accuracy.value or 0.0,
            (each.accuracy.low, each.accuracy.high),
        )
        for each in found.bins
        if each.confidence is not None
    ]
    surest = bins[-1]
    alt = (
        f"Reliability: over {found.questions:,} answers the calibration error is {percent(found.error)}; of "
        f"the {surest.n:,} answers surest by probability ({percent(surest.confidence)} on average), "
        f"{percent(surest.accuracy)} are right"
    )
    rows = [((each.low, each.high), each.n, each.confidence, each.accuracy, each.interval) for each in bins]
    columns = (
        Column("probability, %", "interval"),
        Column("answers", "count"),
        Column("mean probability, %", "percent"),
        Column("right, %", "percent"),
        Column("95 % interval", "interval"),
    )
    table = Table("Answers by probability", columns, rows)
    return Chart("Reliability: is 80 % right 80 % of the time?", reliability_chart(bins, alt), alt, table)


def _curve(curve: RiskCoverage) -> Chart:
    drawn = curve.at_most(_POINTS)
    points = list(zip(drawn.coverage.tolist(), drawn.risk.tolist(), strict=True))
    lines = [
        Line("surest first", points),
        Line("any order", [(0.0, curve.risk_of_all), (1.0, curve.risk_of_all)]),
    ]
    x = Axis("answered, % of the images", 0, 1, lambda value: f"{100 * value:.0f}")
    top = max([curve.risk_of_all, *(risk for _, risk in points)])
    y = Axis.around("wrong, %", [0.0, top], lambda value: f"{100 * value:.3g}", zero=True)
    half = next((risk for coverage, risk in points if coverage >= 0.5), curve.risk_of_all)
    alt = (
        f"Risk against coverage: {percent(curve.risk_of_all)} wrong if all images are answered, "
        f"{percent(half)} if the surest half is; area {curve.area:.4f}, at best {curve.least_area:.4f}"
    )
    few = curve.at_most(_IN_TABLE)
    rows = list(zip(few.coverage.tolist(), few.risk.tolist(), few.confidence.tolist(), strict=True))
    columns = (
        Column("answered, %", "percent"),
        Column("wrong, %", "percent"),
        Column("from probability, %", "percent"),
    )
    return Chart(
        "Risk against coverage: what is won by not answering",
        line_chart(x, y, lines, alt, steps=False),
        alt,
        Table("Risk by coverage", columns, rows),
    )


def _thresholds(wished: list[Threshold], answers: Answers) -> Table:
    rows = [
        (
            each.wished,
            each.confidence,
            each.coverage.value,
            each.accuracy.value,
            (each.accuracy.low, each.accuracy.high) if each.accuracy.total else None,
            each.assured_confidence,
            each.assured_coverage,
        )
        for each in wished
    ]
    columns = (
        Column("wished accuracy", "percent"),
        Column("answer from probability", "percent"),
        Column("answered", "percent"),
        Column("right of these", "percent"),
        Column("95 % interval", "interval"),
        Column("assured from", "percent"),
        Column("then answered", "percent"),
    )
    return Table(
        f"The threshold for a wished accuracy: half of {len(answers):,} images chose it, the others judge it",
        columns,
        rows,
    )


def _advice(wished: list[Threshold], answers: Answers) -> str:
    accuracy = answers.evaluation.score
    useful = [
        each
        for each in wished
        if each.wished > accuracy and each.confidence is not None and each.coverage.count
    ]
    if not useful:
        return "No threshold makes it more accurate, among those for the accuracies below."
    one = useful[0]
    return (
        f"If it answers only from a probability of {percent(one.confidence or 0.0)} on, it answers "
        f"{percent(one.coverage.value or 0.0, 0)} of the images and is right on "
        f"{percent(one.accuracy.value or 0.0)} of these."
    )
