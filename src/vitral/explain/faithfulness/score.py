"""Scores methods of attribution on labelled images: all on the same images, block by block, kept on disk."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vitral.data.batches import DamageCount
from vitral.data.image_data import DataSource
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.data.subsets import in_turns, thinned
from vitral.data.workers import Loading, worker_count
from vitral.evaluation.evaluate import SplitName, choose_split
from vitral.explain.attribution.method import Method, Settings
from vitral.explain.attribution.methods import DEFAULT, METHODS, find
from vitral.explain.faithfulness.block import Block, Redrawn
from vitral.explain.faithfulness.curves import STEPS, removed_counts
from vitral.explain.faithfulness.perturb import Curves
from vitral.explain.faithfulness.record import Faithfulness
from vitral.explain.faithfulness.redrawn import STAGES, rank_correlation
from vitral.explain.faithfulness.removal import Fill, can_be_empty
from vitral.explain.faithfulness.store import Store
from vitral.explain.faithfulness.summary import Found, summarize
from vitral.inference.classifier import Classifier
from vitral.inference.features import image_digest
from vitral.model.config import ViTConfig
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.files import cache_folder
from vitral.runtime.ranges import Count, Images, Seed, Workers
from vitral.runtime.settings import build, check

# Images that are computed together and kept as one file; a killed run loses one method's work on so many. The
# first block's are those of the randomization check.
_BLOCK = 32


# Forward passes an image beyond which a method is only scored if it is named: they would take longer than all
# that is done with the maps of three others.
_SLOW = 100


@dataclass(frozen=True)
class ScoreOptions:
    """On which images methods are scored, and how."""

    images: Images = 400  # at most, even over classes
    fill: tuple[Fill, ...] = get_args(Fill)  # what is where patches were; methods are ordered by the first
    steps: Count = STEPS  # of a curve
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
    methods: Sequence[Method],
    *,
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
        data: as `open_data` takes it; its labels serve only to draw images evenly.
        methods: rows of `attribution.methods.METHODS`; the controls are added.
        cache: folder to keep scores in; None: ``faithfulness`` in $VITRAL_CACHE, else in ``~/.cache/vitral``.
        warn: told of damaged images, which are left out, and of doubts about the split.
        on_images: told how many images are done, of how many.
        settings: fields of `ScoreOptions`, such as ``images=400``.

    Raises:
        VitralError: if the model has no classes, no method is named, or the data or an option cannot be used.
    """
    options = build(ScoreOptions, settings)
    _refuse(classifier, methods)
    name, images = choose_split(classifier, data, options.split, warn)
    images = _drawn(images, options)
    damage = DamageCount(len(images), 1.0, warn)
    store = Store(cache_folder("faithfulness", cache), classifier, warn)
    controls = [method for method in METHODS.values() if method.is_control]
    rows = {method.name: method for method in [*methods, *controls]}
    course = _Course(rows, options, len(images), on_images)
    for block in _blocks(classifier, images, options, store, damage):
        course.add(block)
    if store.read:
        warn(f"{store.read:,} of the parts were in {store.folder}")
    if not course.done:
        raise VitralError("none of the images could be read, so there is nothing to score")
    about: dict[str, Any] = {"split": name, "damaged": len(damage.reasons), "default": DEFAULT}
    return course.record(**about, notes=tuple(_notes(classifier.model)))


def methods_to_score(names: Sequence[str] | None, config: ViTConfig) -> list[Method]:
    """Finds methods by name; None: all but the controls, and but those that are slow on such a model.

    Raises:
        VitralError: if there is no such method.
    """
    if names is not None:
        return [find(name) for name in names]
    return [
        method
        for method in METHODS.values()
        if not method.is_control and method.cost(config, Settings()) <= _SLOW
    ]


def _refuse(classifier: Classifier, methods: Sequence[Method]) -> None:
    classifier.refuse_others("faithfulness scores")
    classifier.refuse_merged("faithfulness scores")
    if not classifier.model.config.num_classes:
        raise VitralError(
            "faithfulness is about a class's logit, and this model has no classes; train a head first: "
            "vitral train DATA --out RUN model=MODEL"
        )
    if all(method.is_control for method in methods):
        raise VitralError("no method is named, but controls")


def _drawn(images: Split, options: ScoreOptions) -> Split:
    """The first of an order that is even over classes, so that more images add to those of a smaller run."""
    if images.multi_label:
        return thinned(images, options.images)
    return images.take(in_turns(images, options.seed)[: options.images])


def _blocks(
    classifier: Classifier, images: Split, options: ScoreOptions, store: Store, damage: DamageCount
) -> Iterator[Block]:
    """The images that can be read, some at a time."""
    loader = Loader(images, classifier.preprocess, Loading(worker_count(options.workers), damage.warn))
    with closing(loader.evaluation_batches(_BLOCK)) as batches:
        for batch in batches:
            damage.add(batch)
            if len(batch.rows):
                digests = [image_digest(images, row) for row in batch.rows.tolist()]
                images_BCHW = classifier.placement.put(batch.images)
                yield Block(classifier, images_BCHW, digests, store, steps=options.steps, seed=options.seed)


def _notes(model: VisionTransformer) -> Iterator[str]:
    if model.config.pooling != "class":
        yield "the head pools patches: of an image with dropped ones it pools those that are left"
    if not can_be_empty(model):
        yield "with all patches dropped nothing is left to read; that point of the curves is the mean fill's"
    if model.config.stem:
        yield (
            "the stem's convolutions see across patches: dropped ones are filled there too, and every image "
            "is embedded anew for each set of patches, which costs time"
        )


@dataclass
class _Course:
    """What was found so far."""

    methods: dict[str, Method]
    options: ScoreOptions
    total: int
    on_images: Callable[[int, int], None]
    done: int = 0
    num_patches: int = 0
    redrawn_images: int = 0
    curves: dict[tuple[Fill, str], list[Curves]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[tuple[Fill, str], float] = field(default_factory=lambda: defaultdict(float))
    saco: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    correlations: dict[str, dict[str, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def saco_fill(self) -> Fill:
        """The mean fill is its paper's."""
        return "mean" if "mean" in self.options.fill else self.options.fill[0]

    def add(self, block: Block) -> None:
        """Scores all methods on a block of images, the fills in turn."""
        first = not self.done
        parts = len(self.methods) + first * len(STAGES)
        self.num_patches = block.grid[0] * block.grid[1]
        for place, method in enumerate(self.methods.values()):
            for fill in self.options.fill:
                found, seconds = block.curves(method, fill)
                self.curves[fill, method.name].append(found)
                self.seconds[fill, method.name] += seconds
            self.saco[method.name].append(block.saco(method, self.saco_fill))
            self._tell(len(block) * (place + 1) // parts)
        if first:
            self._check(block, parts)
        self.done += len(block)
        self._tell(0)

    def _check(self, block: Block, parts: int) -> None:
        """The randomization check, stage by stage."""
        self.redrawn_images = len(block)
        for place, stage in enumerate(STAGES):
            other = Redrawn(block.classifier, stage, self.options.seed)
            for name, method in self.methods.items():
                if not method.is_control:
                    maps_BN = block.redrawn_maps(method, other)
                    self.correlations[name][stage] = rank_correlation(block.maps(method), maps_BN)
            self._tell(len(block) * (len(self.methods) + place + 1) // parts)

    def _tell(self, more: int) -> None:
        self.on_images(self.done + more, self.total)

    def record(self, **about: Any) -> Faithfulness:
        found = Found(
            {
                fill: {name: _joined(self.curves[fill, name]) for name in self.methods}
                for fill in self.options.fill
            },
            {name: np.concatenate(parts) for name, parts in self.saco.items()},
            self.correlations,
            self.seconds,
        )
        counts = removed_counts(self.num_patches, self.options.steps)
        about |= {"redrawn_images": self.redrawn_images, "saco_fill": self.saco_fill}
        return summarize(self.methods, found, counts, **about)


def _joined(parts: list[Curves]) -> Curves:
    return Curves(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))
