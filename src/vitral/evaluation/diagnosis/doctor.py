"""What wrong settings cost a classifier, measured on labelled images, and which setting looks wrong.

Each setting is changed alone, on the same images, and judged by paired tests: McNemar's on the images that
turn from wrong to right or back, Student's on the losses where the first is silent.
"""

from collections.abc import Callable
from dataclasses import replace
from os import PathLike

from vitral.data.batches import Batch, DamageCount
from vitral.data.image_data import DataSource
from vitral.data.loader import Loader
from vitral.data.subsets import sample
from vitral.data.workers import Loading, worker_count
from vitral.evaluation.diagnosis.changes import changes_to_try
from vitral.evaluation.diagnosis.decoding import decoding_costs
from vitral.evaluation.diagnosis.judge import conclude
from vitral.evaluation.diagnosis.measure import Views, measure
from vitral.evaluation.diagnosis.report import Diagnosis
from vitral.evaluation.evaluate import choose_split
from vitral.evaluation.task import SINGLE_LABEL, task_of
from vitral.inference.classifier import Classifier, loaded
from vitral.runtime.errors import VitralError
from vitral.runtime.limits import IMAGES, SEED
from vitral.runtime.ranges import refuse_beyond

_BATCH_SIZE = 32  # images at a time, each held as bytes in about ten fittings


def diagnose(
    model: str | PathLike | Classifier,
    data: DataSource,
    *,
    split: str | None = None,
    limit: int = 400,
    seed: int = 0,
    workers: int | None = None,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
) -> Diagnosis:
    """Measure a classifier as it is, and with each of its settings changed; leaves it as it was.

    Each image is decoded once and goes through the model once for each change, about 20 times.

    Args:
        model: a model with labels, or where it lies.
        data: as `open_data` takes it.
        split: as `evaluate_classifier` takes it.
        limit: images at most, as many of each class as of any other while they last.
        seed: of the choice of images.
        workers: processes that load images; None: as many as suit the machine.
        warn: told of each damaged image, which is left out, and of doubts about the split.
        on_images: told how many images are done, of how many.

    Raises:
        VitralError: if the model has no labels or is multi-label, the data cannot be used or has classes
            that the model lacks, or no image can be read.
    """
    classifier = loaded(model)
    if not classifier.labels:
        raise VitralError(
            "doctor needs a classifier, and this model has no labels; train a head on a few labelled images "
            "first: vitral train DATA --out RUN model=MODEL"
        )
    if task_of(classifier) is not SINGLE_LABEL:
        raise VitralError("doctor examines models of one class per image, and this one is multi-label")
    refuse_beyond("limit", limit, IMAGES)
    refuse_beyond("seed", seed, SEED)
    name, images = choose_split(classifier, data, split, warn)
    images = sample(images, limit, seed)
    damage = DamageCount(len(images), 1.0, warn)
    done = 0

    def on_batch(batch: Batch) -> None:
        nonlocal done
        damage.add(batch)
        done += batch.asked
        on_images(done, len(images))

    changes = changes_to_try(classifier)
    views = Views(tuple(dict.fromkeys(change.view for change in changes)))
    loading = Loading(worker_count(workers), warn)
    batches = Loader(images, views, loading).evaluation_batches(_BATCH_SIZE)
    answers = measure(classifier, changes, views, batches, on_batch)
    diagnosis = conclude(name, len(damage.reasons), changes, answers)
    return replace(diagnosis, decodings=decoding_costs(classifier, images))
