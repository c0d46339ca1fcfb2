"""A head fitted to frozen features, for training to begin with."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vitral.data.batches import DamageCount
from vitral.data.split import Split
from vitral.data.subsets import in_turns
from vitral.data.workers import Loading
from vitral.evaluation.probing.choosing import Labelled, Method
from vitral.evaluation.probing.linear import LINEAR, PENALTIES, LinearHead, fit_linear
from vitral.inference.classifier import Classifier
from vitral.inference.features import extract
from vitral.model.config import Pooling
from vitral.runtime.files import cache_folder

# Of the time for a head's start; the rest is for fitting.
_LOOKING_SHARE = 0.75


@dataclass(frozen=True)
class HeadStart:
    """A head fitted to frozen features, for training to begin with."""

    head: LinearHead
    images: int  # that it was fitted to
    held_out_top1: float | None  # of images held out meanwhile; None: none were


def fitted_head(
    classifier: Classifier,
    split: Split,
    seed: int,
    *,
    seconds: float | None = None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    loading: Loading | None = None,
) -> HeadStart | None:
    """The linear probe of what the model's own head sees; None if `seconds` reach for no image of some class.

    Args:
        classifier: the model; its head plays no part.
        split: labelled images, one class each. Of those that `seconds` reach for, each class has as many.
        seed: of their order and of what is held out.
        seconds: time to spend at most, about. Where it is short, fewer images are looked at and fewer
            penalties tried. None: all of them.
        on_images: told how many images are done, of how many.
        loading: how images are loaded; None: by as many workers as the machine suits.
    """
    begun = time.monotonic()
    end = math.inf if seconds is None else begun + seconds
    ordered = split.take(in_turns(split, seed))
    features = extract(
        classifier,
        ordered,
        (-1,),
        cache_folder("features"),
        damage=DamageCount(len(split), 1.0, _ignore),
        on_images=on_images,
        loading=loading,
        until=math.inf if seconds is None else begun + _LOOKING_SHARE * seconds,
    )
    if not np.bincount(features.labels, minlength=len(classifier.labels)).all():
        return None
    labelled = Labelled([features], classifier.labels, seed)
    kind = classifier.model.config.pooling
    choice, head = fit_linear(labelled, kind, (-1,), _affordable(labelled, kind, end))
    return HeadStart(head, len(labelled.labels), choice.held_out_top1)


def _affordable(labelled: Labelled, kind: Pooling, end: float) -> Method:
    """The linear method with the penalties, and over the folds, that can be tried until `end`."""
    if end == math.inf:
        return LINEAR
    import sklearn.linear_model  # noqa: F401 - its import is not the fit's time

    begun = time.monotonic()
    LinearHead.fit(labelled.vectors(-1, kind), labelled.labels, labelled.num_classes, LINEAR.default)
    now = time.monotonic()
    fits = int((end - now) / (now - begun)) - 1  # the last is to all images
    if fits < len(PENALTIES) * len(labelled.folds):
        labelled.folds = labelled.folds[:1]
    if fits >= len(PENALTIES):
        return LINEAR
    if fits < 2:
        return replace(LINEAR, settings=(LINEAR.default,))
    chosen = np.linspace(0, len(PENALTIES) - 1, fits).round().astype(int)
    return replace(LINEAR, settings=tuple(PENALTIES[index] for index in chosen))


def _ignore(_: str) -> None: ...
