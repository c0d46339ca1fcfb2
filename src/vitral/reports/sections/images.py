"""Single images: the worst errors, the most doubtful, the likely label errors, the near-duplicates."""

from collections.abc import Sequence

from vitral.data.split import Images
from vitral.evaluation.analysis.label_errors import LabelErrors
from vitral.evaluation.analysis.near_duplicates import NEAR, NearDuplicate, NearDuplicates
from vitral.evaluation.analysis.notable import ImageAnswer, most_doubtful, worst_errors
from vitral.reports.blocks import Block, Card, Column, Gallery, Picture, Prose, Section, Table, percent
from vitral.reports.material import NO_DATA, Material
from vitral.reports.words import label_words

_ERRORS, _DOUBTFUL, _SUSPECTS, _PAIRS = 21, 14, 21, 12
_SIDE = 144  # pixels of a picture's longer side
_MOST_LISTED = 200


def images(material: Material) -> Section:
    """Show the wrong answers of which the model was surest, and the images of which it was least sure."""
    title, answers = "Errors and doubts", material.answers
    if answers is None:
        return Section("errors", title, "", (Prose(NO_DATA, "missing"),))
    count = int(answers.outcomes.wrong.sum())
    errors, doubts = worst_errors(answers, _ERRORS), most_doubtful(answers, _DOUBTFUL)
    lead = f"{count:,} of {len(answers):,} answers are wrong."
    if errors:
        lead += (
            " Look first at those of which the model was surest: they show what it has not understood, and "
            "labels that are wrong."
        )
    blocks: list[Block] = []
    if errors:
        cards = image_cards(material, errors, "worst errors")
        blocks.append(Gallery("The worst errors, the surest first", cards))
    cards = image_cards(material, doubts, "doubtful images")
    intro = "The answer and the next likeliest are nearly as probable. More such images would teach it most."
    if material.multi_label:
        intro = "A label's probability is nearest to the threshold of 0.5."
    blocks.append(Gallery("The most doubtful images", cards, intro))
    if answers.damaged:
        rows = answers.damaged[:_MOST_LISTED]
        caption = f"{len(answers.damaged):,} images that could not be read, and were left out"
        blocks.append(Table(caption, (Column("image"), Column("reason")), rows))
    return Section("errors", title, lead, tuple(blocks))


def image_cards(material: Material, found: Sequence[ImageAnswer], use: str) -> tuple[Card, ...]:
    """Give each image with its answer and its truth."""
    assert material.answers is not None
    pictures, cards = material.answers.split.images, []
    for each in found:
        truth, answer = label_words(each.truth), label_words(each.answer)
        alt = f"{each.name}: said {answer}, is {truth}"
        picture = material.pictures.of(pictures, each.row, _SIDE, use)
        cards.append(Card(alt, *_said(each, truth, answer), picture))
    return tuple(cards)


def _said(each: ImageAnswer, truth: str, answer: str) -> tuple[str, tuple[str, ...]]:
    """The title and the lines under an image."""
    shares = dict(each.probabilities)
    if isinstance(each.truth, tuple):
        likeliest = ", ".join(f"{name} {percent(share, 0)}" for name, share in each.probabilities[:3])
        return answer, (f"is {truth}", likeliest, each.name)
    title = f"{answer} ({percent(shares[answer], 0)})"
    if each.right:
        other, share = each.probabilities[1] if len(shares) > 1 else each.probabilities[0]
        return title, (f"right, before {other} ({percent(share, 0)})", each.name)
    known = f" ({percent(shares[truth], 0)})" if truth in shares else ""
    return title, (f"is {truth}{known}", each.name)


def data_quality(material: Material) -> Section:
    """Show labels that are likely wrong, and pictures that are in both training and held-out images."""
    title, answers = "Labels and duplicates", material.answers
    if answers is None:
        return Section("labels", title, "", (Prose(NO_DATA, "missing"),))
    blocks: list[Block] = []
    lead = []
    if material.labels is not None:
        lead.append(_suspects_lead(material.labels))
        blocks += _suspects(material, material.labels)
    if material.duplicates is not None:
        lead.append(_duplicates_lead(material.duplicates))
        blocks += _duplicates(material, material.duplicates)
    else:
        blocks.append(Prose("Near-duplicates were not looked for.", "missing"))
    return Section("labels", title, " ".join(lead), tuple(blocks))


def _suspects_lead(found: LabelErrors) -> str:
    share = len(found.suspects) / max(found.images, 1)
    if not found.suspects:
        return f"No label of the {found.images:,} images looks wrong by confident learning."
    return (
        f"Confident learning suspects {len(found.suspects):,} of {found.images:,} labels ({percent(share)}): "
        "the model is as sure of another class as it is of that class on its own images. A model that is "
        "often wrong suspects many labels that are right, so look at the first of them."
    )


def _suspects(material: Material, found: LabelErrors) -> list[Block]:
    assert material.answers is not None
    blocks: list[Block] = [Prose(found.note)]
    cards = []
    for each in found.suspects[:_SUSPECTS]:
        picture = material.pictures.of(
            material.answers.split.images, each.image.row, _SIDE, "suspected labels"
        )
        alt = f"{each.image.name}: labelled {each.given}, more likely {each.suggested}"
        lines = (f"labelled {each.given}", f"{percent(each.self_confidence)} for its label", each.image.name)
        cards.append(Card(alt, f"{each.suggested}?", lines, picture))
    if cards:
        blocks.append(Gallery("Likely label errors, the most suspicious first", tuple(cards)))
        rows = [
            (each.image.name, each.given, each.suggested, each.self_confidence)
            for each in found.suspects[:_MOST_LISTED]
        ]
        columns = (
            Column("image"),
            Column("labelled"),
            Column("more likely"),
            Column("probability of its label", "percent"),
        )
        caption = f"List of {len(rows):,} of {len(found.suspects):,} suspected labels"
        blocks.append(Table(caption, columns, rows, folded=True))
    return blocks


def _duplicates_lead(found: NearDuplicates) -> str:
    if not found.pairs:
        looked = f"{found.held_out:,} held-out and {found.train:,} training images"
        return f"Among {looked} no picture was found twice."
    return (
        f"{found.leaked:,} of {found.held_out:,} held-out images have a near-duplicate among "
        f"{found.train:,} training images: what is measured on them says little of new images."
    )


def _duplicates(material: Material, found: NearDuplicates) -> list[Block]:
    blocks: list[Block] = []
    if found.left_out:
        text = f"{found.left_out:,} images were not looked at: too many, or damaged."
        blocks.append(Prose(text, "missing"))
    if found.limit < NEAR:
        text = (
            f"Pictures of this data are alike by nature: {found.akin:,} held-out images are near another. "
            "Only those are named that are as near as copies are."
        )
        blocks.append(Prose(text))
    cards = [_pair(material, pair) for pair in found.pairs[:_PAIRS]]
    if cards:
        blocks.append(Gallery("Near-duplicates, the nearest first", tuple(cards)))
    return blocks


def _pair(material: Material, pair: NearDuplicate) -> Card:
    assert material.answers is not None
    of_held_out = material.answers.split.images
    ours = _picture(material, of_held_out, pair.row)
    theirs = _picture(material, of_held_out if pair.within else material.training_images, pair.other_row)
    mirrored = ", mirrored" if pair.mirrored else ""
    lines = (
        f"beside {pair.other_name}, {'held out too' if pair.within else 'in training'}",
        f"distance {pair.distance:.3f}{mirrored}{'' if pair.same_label else '; their labels differ'}",
    )
    alt = f"{pair.name} and {pair.other_name} are nearly the same picture"
    return Card(alt, pair.name, lines, ours, (theirs,) if ours and theirs else ())


def _picture(material: Material, images: Images | None, row: int) -> Picture | None:
    return None if images is None else material.pictures.of(images, row, _SIDE, "near-duplicates")
