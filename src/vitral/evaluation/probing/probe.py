"""What a model's features are worth: a linear probe and weighted nearest neighbours, the model left as it is.

Every choice (the layer, the strength of the L2 penalty, the number of neighbours) is made on labelled
images that were held out from the fit; then the probe is fitted to all labelled images and judged, once,
on others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from vitral.checkpoints.folder import save_checkpoint
from vitral.data.batches import DamageCount
from vitral.data.image_data import DataSource, ImageData, open_data
from vitral.data.split import Split
from vitral.data.subsets import few_shot, sample
from vitral.data.workers import Loading, worker_count
from vitral.evaluation.probing.as_model import metadata_of, refuse_unwritable, with_head
from vitral.evaluation.probing.choosing import Labelled, choose
from vitral.evaluation.probing.linear import LINEAR, LinearResult, fit_linear, judge_linear
from vitral.evaluation.probing.neighbours import NEAREST, NeighboursResult, judge_neighbours
from vitral.evaluation.probing.usual import check_features, usual_features
from vitral.evaluation.task import SINGLE_LABEL, task_of
from vitral.inference.classifier import Classifier, loaded
from vitral.inference.features import PooledFeatures, extract
from vitral.model.config import Pooling
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.files import cache_folder
from vitral.runtime.ranges import Images, Layer, Seed, Whole, Workers
from vitral.runtime.settings import build, check

_INSTEAD = "train a head on it instead: vitral train DATA --out RUN model=MODEL trained=head"


@dataclass(frozen=True)
class ProbeOptions:
    """What to probe, and on how much."""

    features: Pooling | None = None  # None: as the field does with such a model (`usual_features`)
    layers: tuple[Layer, ...] = (-1,)  # the better of these is taken
    per_class: Images | None = None  # labelled images of each class; None: all
    limit: Images | None = None  # of any split at most, even over classes; with per_class, of the judge
    seed: Seed = 0  # of what is held out and drawn
    max_damaged: Whole = 0.01  # share of unreadable images past which to give up
    workers: Workers | None = None  # processes that load images; None: as many as suit the machine

    def __post_init__(self) -> None:
        check(self)
        if not self.layers:
            raise VitralError("no layer is named; -1 is the last")


@dataclass(frozen=True)
class ProbeResult:
    split: str  # the part of the data that the probe was judged on
    labelled: int  # images that were fitted to
    linear: LinearResult
    neighbours: NeighboursResult

    def to_dict(self) -> dict[str, Any]:
        linear = {**vars(self.linear), "evaluation": self.linear.evaluation.to_dict()}
        return {**vars(self), "linear": linear, "neighbours": vars(self.neighbours)}


def probe(
    model: str | PathLike | Classifier,
    data: DataSource,
    *,
    cache: Path | None = None,
    out: Path | None = None,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    **settings: Any,
) -> ProbeResult:
    """Measure what a model's features are worth on labelled images.

    Args:
        model: any model, or where it lies; its head plays no part.
        data: as `open_data` takes it. Judged on the test images, else on a fifth held out.
        cache: folder to keep features in (`runtime.files.cache_folder`).
        out: a new model folder to write, with the linear probe as its head.
        warn: told of damaged images, and of what came from the cache.
        on_images: told how many images of a split are done, of how many.
        settings: fields of `ProbeOptions`, such as ``layers=(-1, 5)``.

    Raises:
        VitralError: if a setting, the data or the features asked for cannot be had, or `out` not written.
    """
    options = build(ProbeOptions, settings)
    classifier = loaded(model)
    classifier.refuse_others("features")
    kinds = _kinds(classifier.model, options)
    if out is not None:
        refuse_unwritable(out, classifier.model, kinds[0], options.layers)
    opened = _open(data, options.seed, warn)
    judged_name, parts = _parts(opened, options)
    damage = DamageCount(sum(map(len, parts)), options.max_damaged, warn)
    folder, loading = cache_folder("features", cache), Loading(worker_count(options.workers), warn)
    how: dict[str, Any] = {"damage": damage, "on_images": on_images, "loading": loading}

    def features_of(split: Split) -> PooledFeatures:
        found = extract(classifier, split, options.layers, folder, **how)
        if found.cached:
            warn(f"the features of {found.cached:,} of {len(split):,} images were in {folder}")
        return found

    labelled = Labelled([*map(features_of, parts[:-1])], opened.classes, options.seed)
    linear, head = fit_linear(labelled, kinds[0], options.layers, LINEAR)
    neighbours = choose(labelled, kinds[1], options.layers, NEAREST)
    judged = features_of(parts[-1])
    if out is not None:
        about = metadata_of(classifier, opened, options.seed)
        save_checkpoint(out, with_head(classifier, head, linear, opened.classes, about))
    return ProbeResult(
        judged_name,
        len(labelled.labels),
        judge_linear(linear, head, judged, opened.classes),
        judge_neighbours(neighbours, labelled, judged, opened.classes),
    )


def _kinds(model: VisionTransformer, options: ProbeOptions) -> tuple[Pooling, Pooling]:
    """The vectors for the linear probe and for the neighbours."""
    kinds = usual_features(model, options.layers) if options.features is None else (options.features,) * 2
    for kind in kinds:
        check_features(model, kind, options.layers)
    return kinds


def _open(source: DataSource, seed: int, warn: Callable[[str], None]) -> ImageData:
    data = open_data(source, seed=seed).told(warn)
    if task_of(data) is not SINGLE_LABEL:
        raise VitralError(
            f"a probe takes one class per image, and {data.source} has lists of labels; {_INSTEAD}"
        )
    return data


def _parts(data: ImageData, options: ProbeOptions) -> tuple[str, list[Split]]:
    """The name of the split to judge on; the labelled splits, and that one last."""
    judged = "test" if "test" in data.splits else "val"
    names = ["train", "val", "test"] if judged == "test" else ["train", "val"]
    parts = [data.split(name) for name in names]
    if options.limit is not None:
        parts = [sample(part, options.limit, options.seed) for part in parts]
    if options.per_class is not None:
        parts = [few_shot(data.split("train"), options.per_class, options.seed), parts[-1]]
    return judged, parts
