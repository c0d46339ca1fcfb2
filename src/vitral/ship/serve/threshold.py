"""From which probability on a server answers: the least that keeps errors as rare as one asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitral.runtime.errors import VitralError

if TYPE_CHECKING:
    from vitral.inference.classifier import Classifier


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold of confidence, and what is known of it."""

    probability: float
    assured: bool  # with an assurance of 95 % on new images of the same kind
    line: str  # how it was chosen, for people


def threshold_from(
    classifier: "Classifier",
    data: str,
    max_error: float,
    *,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
) -> ChosenThreshold:
    """Chooses the threshold of abstention by held-out images: an assured one where there is one.

    Args:
        classifier: the model.
        data: labelled images, as `open_data` takes them.
        max_error: the largest share of wrong answers among those that are given, in 0..1.
        warn: told of damaged images and doubts.
        on_images: told how many images are done, of how many.

    Raises:
        VitralError: if no threshold serves, or an image shows several labels.
    """
    from vitral.evaluation.analysis.abstention import threshold_for
    from vitral.evaluation.analysis.answers import answers_of

    answers = answers_of(classifier, data, warn=warn, on_images=on_images)
    found = threshold_for(answers, 1 - max_error)
    if found is None:
        raise VitralError("--max-error is for models of one label an image; give --abstain-below")
    if answers.held_out is False:
        warn(f"the model learnt from some of these images ({answers.split_name}); on new ones it errs more")
    wished, images = f"{max_error:.3g}", f"{len(answers):,} images"
    if found.assured_confidence is not None:
        line = (
            f"answers from {found.assured_confidence:.3f} on: at most {wished} of them wrong on new images "
            f"of the same kind, with an assurance of 95 % ({images}, {found.assured_coverage:.0%} answered)"
        )
        return ChosenThreshold(found.assured_confidence, assured=True, line=line)
    if found.confidence is None or found.accuracy.value is None:
        raise VitralError(
            f"no threshold keeps errors to {wished} on these {images}: even the surest answers are wrong "
            "more often; allow more errors, or train the model further"
        )
    line = (
        f"answers from {found.confidence:.3f} on: {1 - found.accuracy.value:.1%} of them wrong on the "
        f"half of {images} that did not choose it, {found.coverage.value:.0%} answered; "
        "too few images to assure more"
    )
    return ChosenThreshold(found.confidence, assured=False, line=line)
