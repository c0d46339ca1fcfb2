"""The verdict: how good, how sure, and where weakest, in words and in a few numbers."""

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.classes import ByClass, ClassSummary
from vitral.evaluation.multi_label import MultiLabelEvaluation
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes
from vitral.reports.blocks import Tile, Tiles, percent
from vitral.reports.material import Material
from vitral.reports.subject import Subject
from vitral.reports.words import clock, held_out_words

# A calibration error below this is as good as none for people.
_WELL_CALIBRATED = 0.02


def verdict(material: Material) -> tuple[str, Tiles]:
    """Say the verdict in a few sentences, and give the numbers in it."""
    answers, classes = material.answers, material.classes
    if answers is None or classes is None:
        return _recorded(material.subject), Tiles(tuple(_of_run(material.subject)))
    weakest = weakest_class(classes)
    evaluation = answers.evaluation
    if isinstance(evaluation, SingleLabelEvaluation):
        parts, tiles = _single(evaluation, answers)
    else:
        assert isinstance(evaluation, MultiLabelEvaluation)
        parts, tiles = _multi(evaluation)
    if weakest is not None:
        parts.append(_weakest(weakest, classes))
        tiles.append(Tile("Weakest class", weakest.name, f"{percent(weakest.recall.value or 0.0)} found"))
    parts.append(held_out_words(answers))
    return " ".join(parts), Tiles((*tiles, *_of_run(material.subject)))


def _single(evaluation: SingleLabelEvaluation, answers: Answers) -> tuple[list[str], list[Tile]]:
    low, high = evaluation.ci95
    right = round(evaluation.top1 * evaluation.n)
    interval = f"{100 * low:.1f} to {percent(high)}"
    parts = [
        f"Of {evaluation.n:,} images, the model names {right:,} rightly: {percent(evaluation.top1)} "
        f"(95 % interval {interval}); always naming the commonest class would give "
        f"{percent(evaluation.chance)}.",
        _calibration(evaluation, answers),
    ]
    tiles = [
        Tile("Accuracy", percent(evaluation.top1), interval),
        Tile("Calibration error", percent(evaluation.ece), "mean gap of probability"),
    ]
    return parts, tiles


def _calibration(evaluation: SingleLabelEvaluation, answers: Answers) -> str:
    outcomes = answers.outcomes
    assert isinstance(outcomes, SingleLabelOutcomes)
    gap = float(np.mean(outcomes.confidences)) - evaluation.top1
    if evaluation.ece < _WELL_CALIBRATED:
        off = percent(evaluation.ece)
        return f"Its probabilities can be taken at their word: they are off by {off} on average."
    way = "too sure" if gap > 0 else "too modest"
    return (
        f"Its probabilities are off by {percent(evaluation.ece)} on average; on the whole it is {way}, "
        f"by {percent(abs(gap))}."
    )


def _multi(evaluation: MultiLabelEvaluation) -> tuple[list[str], list[Tile]]:
    parts = [
        f"On {evaluation.n:,} images, each with any number of {len(evaluation.per_class)} labels, the model "
        f"reaches a mean average precision of {percent(evaluation.mean_average_precision)}; at a threshold "
        f"of 0.5, {percent(evaluation.exact_match)} of the images get exactly their labels."
    ]
    tiles = [
        Tile("Mean average precision", percent(evaluation.mean_average_precision), "mean over the labels"),
        Tile("F1 at 0.5", percent(evaluation.micro_f1), "all labels together"),
        Tile("Exactly right", percent(evaluation.exact_match), "of the images, at 0.5"),
    ]
    return parts, tiles


def weakest_class(classes: ByClass) -> ClassSummary | None:
    """Find the class that is recognised least; None if all are recognised alike."""
    judged = [each for each in classes.classes if each.recall.value is not None]
    if not judged or len({each.recall.value for each in judged}) == 1:
        return None
    return min(judged, key=lambda each: (each.recall.value, -each.images))


def _weakest(weakest: ClassSummary, classes: ByClass) -> str:
    recall = weakest.recall
    text = (
        f"It is weakest at “{weakest.name}”: {recall.count:,} of {recall.total:,} found "
        f"({100 * recall.low:.0f} to {percent(recall.high, 0)})"
    )
    taken = next((pair for pair in classes.pairs if pair.truth == weakest.name), None)
    return (
        f"{text}, most often taken for “{taken.taken_for}” ({taken.share.count:,})." if taken else f"{text}."
    )


def _recorded(subject: Subject) -> str:
    """What the run itself wrote down, where no images were given."""
    best = max((each.get(subject.score_key) or 0.0 for each in subject.evaluations), default=None)
    if best is None:
        return (
            "Nothing is known yet of how good this model is: no record came with it, nor were images given."
        )
    words = "mean average precision" if subject.classifier.multi_label else "accuracy"
    test = subject.summary.get("test")
    key = subject.score_key.removeprefix("val_")
    if isinstance(test, dict) and key in test:
        return (
            f"By the run's own record its {words} is {percent(test[key])} on test images, and at best "
            f"{percent(best)} on validation images."
        )
    return f"By the run's own record its {words} is at best {percent(best)} on its validation images."


def _of_run(subject: Subject) -> list[Tile]:
    height, width = subject.classifier.preprocess.img_size
    tiles = [Tile("Size", f"{subject.parameters / 1e6:.3g} M", f"parameters, {height} by {width} pixels")]
    if subject.evaluations:
        last = subject.evaluations[-1]
        tiles.append(Tile("Trained", clock(last["seconds"]), f"{last['epoch']:.1f} epochs"))
    return tiles
