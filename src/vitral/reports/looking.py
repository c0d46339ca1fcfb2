"""What the model looks at: maps of a few right and wrong answers, how faithful they are, and the figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.notable import ImageAnswer, image_answers
from vitral.explain.attribution.asking import POSITIVE
from vitral.explain.attribution.methods import DEFAULT
from vitral.explain.faithfulness.record import Faithfulness
from vitral.explain.figures.house import need_matplotlib
from vitral.explain.inside import Inside
from vitral.explain.maps import Relevance
from vitral.reports.subject import Subject
from vitral.runtime.errors import VitralError

_SEED = 0  # of the choice of images
_MOST_LABELS = 3  # maps of one image of a multi-label model
# Scored where a report is written: the default, what knows no class, and its nearest rival.
_SCORED = (DEFAULT, "attention_gradient", "rollout")
# Passes that the curves of these and the controls take of an image, half of its tokens being left on average.
_PASSES = 100
# FLOPs that scoring may take unless more is asked for: about a minute of two cores.
_AFFORDABLE = 3e12
_FEWEST, _MOST = 16, 48


@dataclass(frozen=True)
class Panel:
    """One map and what it is a map of."""

    values: np.ndarray  # (rows, columns)
    method: str
    question: str  # which class, or which against which
    score: float  # the explained logit, or the difference of two
    is_difference: bool
    probability: float
    layers: str
    prefix_mass: float
    certificate: float


@dataclass(frozen=True)
class Explained:
    """An image as the model sees it, what it said, and maps of why."""

    answer: ImageAnswer
    view: Image.Image
    panels: tuple[Panel, ...]


def explained(subject: Subject, answers: Answers, count: int) -> tuple[Explained, ...]:
    """Explain half as many wrong and half as many right answers, drawn by a seed.

    Each image has a map for the answer; and one for the answer against the truth where it is wrong, and
    against the next likeliest class where it is right. Of a multi-label model, a map a label.

    Raises:
        VitralError: if the model is not one of ours, or the method cannot serve it.
    """
    need_matplotlib()
    inside = Inside(subject.classifier)
    return tuple(_explained(inside, answers, each) for each in image_answers(answers, _drawn(answers, count)))


def _drawn(answers: Answers, count: int) -> list[int]:
    """Half of them wrong and half right, as far as there are so many; the wrong ones first."""
    wrong = answers.outcomes.wrong
    random = np.random.default_rng(_SEED)
    errors, hits = (random.permutation(np.flatnonzero(of)).tolist() for of in (wrong, ~wrong))
    return [*errors[: (count + 1) // 2], *hits[: count // 2]]


def _explained(inside: Inside, answers: Answers, each: ImageAnswer) -> Explained:
    preprocess = inside.classifier.preprocess
    picture = preprocess.open(answers.split.images[each.row])
    return Explained(each, preprocess.fit(picture), tuple(_panels(inside, picture, each)))


def _panels(inside: Inside, picture: Image.Image, each: ImageAnswer) -> Iterator[Panel]:
    if isinstance(each.answer, tuple):
        found = inside.relevance(picture, method=DEFAULT, target=POSITIVE)
        yield from (_panel(found, place) for place in range(min(len(found.values), _MOST_LABELS)))
        return
    # By their places, for two classes may have the same name.
    other: Any = "predicted" if each.right else _place(inside, each)
    yield _panel(inside.relevance(picture, method=DEFAULT), 0)
    if len(each.probabilities) > 1:
        yield _panel(inside.relevance(picture, method=DEFAULT, against=other), 0)


def _place(inside: Inside, each: ImageAnswer) -> str:
    assert isinstance(each.truth, str)
    return each.truth if each.truth in inside.classifier.labels else "predicted"


def _panel(found: Relevance, place: int) -> Panel:
    against = f" rather than {found.against[place]}" if found.against else ""
    return Panel(
        found.values[place].numpy(),
        found.method,
        f"{found.targets[place]}{against}",
        float(found.scores[place]),
        found.against is not None,
        float(found.probabilities[place]),
        found.layers,
        float(found.prefix_mass[place]),
        found.certificate,
    )


def images_to_score(subject: Subject, asked: int | None) -> int:
    """Decide how many images faithfulness is measured on; 0: none, for it would take too long unasked."""
    if asked is not None:
        return asked
    if not subject.flops:
        return 0
    count = int(_AFFORDABLE / (subject.flops * _PASSES))
    return min(count, _MOST) if count >= _FEWEST else 0


def scored(subject: Subject, data: Any, count: int, **how: Any) -> Faithfulness | str:
    """Measure how faithful the maps are on so many images; or say why not."""
    if not count:
        return (
            "How faithful the maps are was not measured: of a model of this size it takes more than a "
            "minute. Ask for it with --score 64, or with vitral explain MODEL DATA --score."
        )
    try:
        return Inside(subject.classifier).faithfulness(
            data, methods=list(_SCORED), images=count, fill=("drop",), **how
        )
    except VitralError as error:
        return f"How faithful the maps are was not measured: {error}."
