"""Scores methods of attribution on labelled images: all on the same images, block by block, kept on disk."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import monotonic
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vitral.data.batches import DamageCount
from vitral.data.image_data import DataSource
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.data.subsets import in_turns, thinned
from vitral.data.workers import Loading, worker_count
from vitral.evaluation.evaluate import SplitName, choose_split
from vitral.explain.faithfulness import controls, curves
from vitral.explain.faithfulness.perturb import Ends, Perturbed, ends, perturb
from vitral.explain.faithfulness.record import CONTROLS, Faithfulness, Measured
from vitral.explain.faithfulness.redrawn import STAGES, rank_correlation, redrawn
from vitral.explain.faithfulness.removal import Fill, Removal
from vitral.explain.faithfulness.store import Store
from vitral.explain.target import Question
from vitral.inference.classifier import Classifier
from vitral.inference.features import cache_folder, image_digest
from vitral.runtime.errors import VitralError
from vitral.runtime.ranges import Count, Images, Seed, Workers
from vitral.runtime.settings import build, check

# Preprocessed images (B, C, H, W), and what is asked of them -> maps (B, rows, columns).
Mapper = Callable[[Classifier, Tensor, Question], Tensor]

# Images that are computed together and kept as one file; a killed run loses one method's work on so many.
BLOCK = 32
_MAPPED = 8  # images a backward pass


@dataclass(frozen=True)
class ScoreOptions:
    """On which images methods are scored, and how."""

    images: Images = 400  # at most, even over classes
    fill: tuple[Fill, ...] = get_args(Fill)  # what is where patches were
    steps: Count = curves.STEPS  # of a curve
    split: SplitName | None = None  # None: the test images, else those held out, else all
    seed: Seed = 0  # of the choice of images, the random map and the order of equal values
    workers: Workers | None = None  # processes that load images; None: as many as the machine suits

    def __post_init__(self) -> None:
        check(self)
        if not self.fill:
            raise VitralError(f"no fill is named; there are {' and '.join(get_args(Fill))}")


def score(
    classifier: Classifier,
    data: DataSource,
    mappers: Mapping[str, Mapper],
    *,
    default: str = "",
    cache: Path | None = None,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    **settings: Any,
) -> Faithfulness:
    """Measures how faithful maps are to a model: what becomes of the predicted class's logit without patches.

    Every method explains the class that the model predicts, on the same images. What was computed is kept, so
    that a run that was stopped is taken up, and further methods add to it.

    Args:
        classifier: a model of ours with a head.
        data: as `open_data` takes it; labels serve only to draw images evenly.
        mappers: methods by name.
        default: the method that is taken if none is named, for the verdict.
        cache: folder to keep scores in; None: ``faithfulness`` in $VITRAL_CACHE, else in ``~/.cache/vitral``.
        warn: told of damaged images, which are left out, and of doubts about the split.
        on_images: told how many images are done, of how many.
        settings: fields of `ScoreOptions`, such as ``images=400``.

    Raises:
        VitralError: if the model has no classes, or the data or an option cannot be used.
    """
    options = build(ScoreOptions, settings)
    classifier.refuse_others("faithfulness scores")
    if not classifier.model.config.num_classes:
        raise VitralError(
            "faithfulness is about a class's logit, and this model has no classes; train a head first: "
            "vitral train DATA --out RUN model=MODEL"
        )
    name, images = choose_split(classifier, data, options.split, warn)
    images = thinned(images, options.images) if images.multi_label else _drawn(images, options)
    damage = DamageCount(len(images), 1.0, warn)
    store = Store(cache_folder(cache, "faithfulness"), classifier, warn)
    methods = {**mappers, **dict.fromkeys(CONTROLS)}
    measured = Measured(tuple(methods), options.fill)
    for block, done in _blocks(classifier, images, options, store, damage):
        units = len(methods) + (len(mappers) * len(STAGES) if block.first else 0)
        for place, (method, mapper) in enumerate(methods.items()):
            maps = block.maps(method, mapper)
            for fill in options.fill:
                measured.add(method, fill, *block.perturbed(method, maps, fill))
            on_images(done + (place + 1) * len(block) // units, len(images))
        ...
    raise NotImplementedError
