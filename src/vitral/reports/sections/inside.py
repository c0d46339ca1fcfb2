"""What the model looks at, and how far to believe it."""

from collections.abc import Sequence

from vitral.explain.attribution.methods import METHODS
from vitral.explain.faithfulness.record import Faithfulness
from vitral.explain.faithfulness.redrawn import HALF
from vitral.explain.faithfulness.scored import Scored
from vitral.explain.render import Scale, enlarged, overlay
from vitral.reports.blocks import Block, Card, Chart, Column, Gallery, Picture, Prose, Section, Table, short
from vitral.reports.charts.bars import Estimate, interval_chart
from vitral.reports.charts.frame import Axis
from vitral.reports.looking import Explained, Panel
from vitral.reports.material import NO_DATA, Material
from vitral.reports.words import label_words

_SIDE = 176  # pixels of a picture
_USE = "what the model looks at"


def inside(material: Material) -> Section:
    """Show maps over a few right and wrong answers, each with method, class, layers, scale and score."""
    title = "What the model looks at"
    if material.answers is None:
        return Section("inside", title, "", (Prose(NO_DATA, "missing"),))
    if isinstance(material.explained, str):
        return Section("inside", title, "", (Prose(material.explained, "missing"),))
    blocks: list[Block] = []
    for heading, right in (("Wrong answers", False), ("Right answers", True)):
        found = [each for each in material.explained if each.answer.right is right]
        if found:
            cards = tuple(_card(material, each) for each in found)
            blocks.append(Gallery(f"{heading}, drawn by chance", cards, slider=material.pictures.wanted))
    method = next((panel.method for each in material.explained for panel in each.panels), None)
    lead = "No label was given to these images, so there is nothing to explain."
    if method is not None:
        lead = (
            f"Maps by {method}: {METHODS[method].says}. A map shows what the score depends on, not that the "
            f"answer is right. {_faith(material, method)}"
        )
        if limit := METHODS[method].limits:
            blocks.insert(0, Prose(f"To know of {method}: {limit}."))
    return Section("inside", title, lead, tuple(blocks))


def _faith(material: Material, method: str) -> str:
    scores = material.faithfulness
    if not isinstance(scores, Faithfulness):
        return "How faithful they are to this model was not measured."
    srg = scores[method].fills[scores.fills[0]].srg
    return (
        f"On {scores.n:,} images of this run its SRG is {srg.mean:.2f} ({srg.low:.2f} to {srg.high:.2f}) "
        "logits; a random map has 0."
    )


def _card(material: Material, each: Explained) -> Card:
    """The image, and its maps on one scale."""
    answer, panels = each.answer, each.panels
    truth = "right" if answer.right else f"is {label_words(answer.truth)}"
    title = f"{label_words(answer.answer)}: {truth}"
    alt = f"{answer.name} as the model sees it: said {label_words(answer.answer)}, {truth}"
    plain = material.pictures.drawn(each.view, _SIDE, _USE)
    if not panels:
        return Card(alt, title, (answer.name,), plain)
    scale = Scale.of(panel.values for panel in panels)
    more = " and more" if scale.clipped else ""
    span = f"{short(scale.low)} to {short(scale.high)}{more}"
    about = f"{panels[0].method}, layers: {panels[0].layers}; scale {span}"
    lines = (*(f"for {_line(panel)}" for panel in panels), about, answer.name)
    maps = [_mapped(material, each, panel, scale) for panel in panels]
    return Card(alt, title, lines, plain, tuple(one for one in maps if plain and one))


def _line(panel: Panel) -> str:
    """What a map is of, and the score that it explains."""
    outside = f", {panel.prefix_mass:.0%} on prefix tokens" if panel.prefix_mass >= 0.005 else ""
    probability = "" if panel.is_difference else f", probability {panel.probability:.2f}"
    return f"{panel.question}: score {panel.score:.2f}{probability}{outside}"


def _mapped(material: Material, each: Explained, panel: Panel, scale: Scale) -> Picture | None:
    # As large as it is shown, so that a map over a small image is smooth.
    over = overlay(enlarged(each.view, panel.values.shape, _SIDE), panel.values, scale)
    alt = f"{panel.method} for {_line(panel)}, layers: {panel.layers}"
    return material.pictures.drawn(each.view, _SIDE, _USE, over, alt)


def faithfulness(material: Material) -> Section:
    """Show how far to believe maps of this model, beside controls."""
    title, scores = "How faithful the maps are", material.faithfulness
    if material.answers is None:
        return Section("faithfulness", title, "", (Prose(NO_DATA, "missing"),))
    if not isinstance(scores, Faithfulness):
        return Section("faithfulness", title, "", (Prose(scores or NO_DATA, "missing"),))
    lead = " ".join(f"{sentence[:1].upper()}{sentence[1:]}." for sentence in scores.conclusions())
    text = (
        "SRG: by how many logits of the predicted class taking the least relevant patches first is better "
        f"than taking the most relevant first, patches being left out; {scores.n:,} images, intervals of "
        "95 %. Redrawn: the rank correlation of the maps with those after the upper half of the weights is "
        "redrawn; of a map that shows what was learnt it is low."
    )
    blocks: list[Block] = [_chart(scores), Prose(text)]
    return Section("faithfulness", title, lead, tuple(blocks))


def _chart(scores: Faithfulness) -> Chart:
    fill = scores.fills[0]
    estimates = [_estimate(each, each.fills[fill].srg) for each in scores.methods]
    low, high = min(each.low for each in estimates), max(each.high for each in estimates)
    x = Axis.around("SRG, logits", [min(low, 0.0), high])
    said = "; ".join(f"{each.name} {each.value:.2f}" for each in estimates)
    return Chart(
        f"SRG of each method, leaving patches out ({fill})",
        interval_chart(estimates, x, said),
        said,
        _table(scores.methods, fill),
    )


def _estimate(each: Scored, srg) -> Estimate:
    return Estimate(each.method, srg.mean, srg.low, srg.high, each.control)


def _table(methods: Sequence[Scored], fill) -> Table:
    rows = []
    for each in methods:
        scores, redrawn = each.fills[fill], each.redrawn.get(HALF)
        rows.append(
            (
                each.method, scores.srg.mean, (scores.srg.low, scores.srg.high), scores.group or None,
                scores.deletion.mean, scores.insertion.mean, each.saco.mean,
                redrawn.mean if redrawn else None, "control" if each.control else "method",
            )
        )  # fmt: skip
    columns = (
        Column("method"), Column("SRG", "signed"), Column("95 % interval", "range"), Column("alike"),
        Column("deletion", "signed"), Column("insertion", "signed"), Column("SaCo", "signed"),
        Column("redrawn", "signed"), Column("kind"),
    )  # fmt: skip
    return Table(
        "Scores of each method; those that share a letter do not differ beyond chance", columns, rows
    )
