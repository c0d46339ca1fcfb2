"""`ImageAnswer`: an image with truth and answer; which are the most doubtful, which the worst errors."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.mistakes import named
from vitral.evaluation.multi_label import THRESHOLD

_LIKELIEST = 5


@dataclass(frozen=True)
class ImageAnswer:
    """What a model says of one image; of any number of classes an image, truth and answer are tuples."""

    position: int  # among the images that were judged: a row of `Answers.log_probabilities`
    row: int  # of `Answers.split`, whose images[row] is the picture
    name: str  # by which the source knows it
    truth: str | tuple[str, ...]
    answer: str | tuple[str, ...]
    right: bool
    probabilities: tuple[tuple[str, float], ...]  # of the five likeliest classes, likeliest first
    # How far the answer is from another one: the likeliest class's probability minus the next one's; of any
    # number of classes, the least distance of a class's probability from the threshold of 0.5.
    margin: float


def most_doubtful(answers: Answers, most: int) -> tuple[ImageAnswer, ...]:
    """Find the images with the smallest margins, the smallest first."""
    margins = margins_of(answers.probabilities, multi_label=answers.multi_label)
    return image_answers(answers, np.argsort(margins, kind="stable")[:most])


def worst_errors(answers: Answers, most: int) -> tuple[ImageAnswer, ...]:
    """Find the wrong answers, the surest first, in the order of `Mistakes`."""
    positions = {int(row): position for position, row in enumerate(answers.rows)}
    worst = answers.mistakes.rows[:most]
    return image_answers(answers, [positions[mistake.index] for mistake in worst])


def image_answers(answers: Answers, positions: Iterable[int]) -> tuple[ImageAnswer, ...]:
    """Describe some of the images that were judged, in this order."""
    places = np.array(list(positions), dtype=np.int64)
    wrong, answered = answers.outcomes.wrong, answers.outcomes.answers
    margins = margins_of(answers.probabilities[places], multi_label=answers.multi_label)
    return tuple(
        ImageAnswer(
            int(position),
            int(answers.rows[position]),
            answers.name(position),
            named(answers.labels[position], answers.classes),
            named(answered[position], answers.classes),
            bool(not wrong[position]),
            _likeliest(answers, position),
            float(margin),
        )
        for position, margin in zip(places, margins, strict=True)
    )


def margins_of(probabilities: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Compute the margin of each answer (n,) from probabilities (n, L), as `ImageAnswer.margin`."""
    if multi_label:
        return np.abs(probabilities - THRESHOLD).min(1)
    if probabilities.shape[1] < 2:
        return np.ones(len(probabilities))
    top = np.partition(probabilities, -2, axis=1)
    return top[:, -1] - top[:, -2]


def _likeliest(answers: Answers, position: int) -> tuple[tuple[str, float], ...]:
    probabilities = answers.probabilities[position]
    order = np.argsort(-probabilities, kind="stable")[:_LIKELIEST]
    return tuple((answers.classes[place], float(probabilities[place])) for place in order)
