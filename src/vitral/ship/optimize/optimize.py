"""`optimize`: the fastest form of a model on this machine that loses no more accuracy than it may."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from vitral.artifacts.assemble import Draft, assemble
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.folder import save_checkpoint
from vitral.data.image_data import DataSource
from vitral.data.split import Split
from vitral.evaluation.task import task_of
from vitral.inference.classifier import Classifier, load
from vitral.inference.engine import ClassifierEngine
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.extras import need
from vitral.runtime.files import new_folder, refuse_filled, write_atomically
from vitral.runtime.machine import describe_machine
from vitral.runtime.plainjson import to_json
from vitral.ship.export.export import about_of, name_of, refuse_without_answers
from vitral.ship.optimize.frontier import frontier
from vitral.ship.optimize.images import (
    CALIBRATING,
    Images,
    Pixels,
    choose_images,
    most_that_fit,
    write_pixels,
)
from vitral.ship.optimize.judge import least_images
from vitral.ship.optimize.lab import Contender, Lab
from vitral.ship.optimize.ledger import LEDGER_FILE, Goal, Ledger, Row
from vitral.ship.optimize.processor import Processor
from vitral.ship.optimize.search import Search, Subject

FRONTIER_FILE = "frontier.png"
_LIBRARIES = ("openvino", "nncf", "onnx", "onnxscript", "onnxruntime", "matplotlib")


@dataclass(frozen=True)
class Optimized:
    """What a search found."""

    ledger: Ledger
    folder: Path | None  # the artifact; None: the eager model stays, and nothing was written

    @property
    def chosen(self) -> Row | None:
        """The form that was taken; None: the eager model stays."""
        return self.ledger.chosen


@dataclass(frozen=True)
class Listener:
    """Who is told of a search's course."""

    warn: Callable[[str], None] = lambda _: None  # damaged images, doubts about the data, the machine
    tell: Callable[[str], None] = lambda _: None  # what is being done, in a few words
    on_images: Callable[[int, int], None] = lambda *_: None  # how many images are done, of how many


def optimize(
    model: str | PathLike | Classifier,
    data: DataSource,
    out: str | PathLike | None = None,
    *,
    max_drop: float = 0.5,
    goal: Goal = "latency",
    minutes: float = 10.0,
    judge_all: bool = False,
    listener: Listener = Listener(),
) -> Optimized:
    """Finds the fastest form of a model on this machine's processor, and writes it as an artifact.

    Every form is timed in turns with the others, each in a process of its own. Then the fastest is judged on
    held-out images beside the eager model in float32, image by image, and the first is taken whose loss of
    accuracy is at most `max_drop` by the upper bound of its 95 % interval (Agresti and Min, 2005). An int8
    form's temperature is fitted anew, on images that it is not judged by. No form is taken that is slower
    than the eager model. Of several labels an image, an answer is right if all of its labels are.

    Args:
        model: a run or any checkpoint, or a `Classifier`; it stays as it is.
        data: as `open_data` takes it, best that of its training: ranges of int8 are measured on training
            images, forms are judged on test images, else on those that training held out.
        out: a new folder for the artifact; None: nothing is written.
        max_drop: points of accuracy that a form may lose, in 0..100.
        goal: "latency", one image at a time, or "throughput".
        minutes: that the search may take.
        judge_all: whether every form is judged, for the ledger, and not only until one fits.
        listener: who is told of its course.

    Raises:
        VitralError: if the model, the data or an option cannot be used, or a library is missing.
    """
    ends = time.monotonic() + 60 * minutes
    _refuse(max_drop, goal, minutes)
    if out is not None:
        refuse_filled(Path(out))
    classifier = _classifier(model)
    images = choose_images(classifier, data, listener.warn)
    name = name_of(model)
    with tempfile.TemporaryDirectory(prefix="vitral-optimize-") as scratch:
        folder, processor = Path(scratch), Processor.here()
        checkpoint = folder / "checkpoint"
        save_checkpoint(checkpoint, _checkpoint(classifier))
        calibration, calibrating, subject = _subject(classifier, images, folder, max_drop, listener)
        lab = Lab(folder, checkpoint, calibration, calibrating, goal, processor)
        search = Search(lab, subject, ends, minutes, judge_all, listener.tell, listener.on_images)
        with lab:
            taken = search.run()
            ledger = _ledger(name, data, images.judging_name, calibrating, search)
            if taken is None or out is None:
                return Optimized(ledger, None)
            listener.tell("writing the artifact")
            _write(Path(out), lab, taken, ledger, checkpoint)
    return Optimized(ledger, Path(out))


def _ledger(name: str, data: DataSource, split: str, calibrating: int, search: Search) -> Ledger:
    """Write down what a search found."""
    subject, processor, judged = search.subject, search.lab.processor, len(search.judging)
    placement = Placement(torch.device("cpu"), torch.float32)
    max_drop = 100 * subject.max_drop
    return Ledger(
        model=name,
        data=_called(data),
        split=split,
        goal=search.lab.goal,
        max_drop=max_drop,
        images={"calibrating": calibrating, "fitting": len(subject.fitting), "judging": judged},
        score_name=subject.task.score_name,
        machine={**describe_machine(placement), **asdict(processor)},
        notes=(*processor.notes(), *_doubts(judged, max_drop)),
        rows=tuple(search.rows.values()),
    )


def _refuse(max_drop: float, goal: str, minutes: float) -> None:
    """Raises VitralError if an option or a library is no good."""
    if not 0 < max_drop <= 100:
        raise VitralError(f"max_drop={max_drop}: it is points of accuracy, more than 0 and at most 100")
    if goal not in get_args(Goal):
        raise VitralError(f"goal={goal}: it must be one of {', '.join(get_args(Goal))}")
    if not 0 < minutes <= 24 * 60:
        raise VitralError(f"minutes={minutes}: it must be more than 0, and at most a day's")
    need("optimizing", *_LIBRARIES, extra="export")


def _classifier(model: str | PathLike | Classifier) -> Classifier:
    """The model in float32 on the CPU. Raises VitralError if its forms could not be judged."""
    given = model if isinstance(model, Classifier) else load(model, device="cpu", precision="float32")
    given.refuse_others("optimized forms")
    given.refuse_merged("optimized forms")
    refuse_without_answers(given)
    return given


def _checkpoint(classifier: Classifier) -> Checkpoint:
    return Checkpoint(
        classifier.model,
        classifier.preprocess,
        classifier.labels,
        classifier.metadata,
        classifier.temperature,
        classifier.multi_label,
    )


def _subject(
    classifier: Classifier, images: Images, folder: Path, max_drop: float, listener: Listener
) -> tuple[Pixels, int, Subject]:
    """Read the images; gives those that ranges are measured on, how many of them, and the rest."""

    def read(split: Split, name: str) -> Pixels:
        listener.tell(f"reading images for {name}")
        file = folder / f"{name}.npy"
        return write_pixels(split, classifier.preprocess, file, listener.warn, listener.on_images)

    training = read(images.training, "calibrating")
    calibrating = min(CALIBRATING, -(-3 * len(training) // 4))
    trying = folder / "trying.npy"
    np.save(trying, np.load(training.file, mmap_mode="r")[calibrating:])
    config = classifier.model.config
    subject = Subject(
        task=task_of(classifier),
        classes=classifier.labels,
        temperature=classifier.temperature,
        patches=math.prod(classifier.model.embedding.grid_size),
        layers=config.num_layers,
        trying=Pixels(trying, training.labels[calibrating:]),
        fitting=read(images.fitting, "fitting"),
        judging=read(_shuffled(images.judging, most_that_fit(classifier.preprocess)), "judging"),
        max_drop=max_drop / 100,
    )
    return training, calibrating, subject


def _shuffled(split: Split, at_most: int) -> Split:
    """The images in a random order, of which any first part is a sample."""
    return split.take(np.random.default_rng(0).permutation(len(split))[:at_most])


def _called(data: DataSource) -> str:
    """The last part of a path: where data lies on this machine is nobody's business."""
    return Path(data).name if isinstance(data, str | PathLike) else type(data).__name__


def _doubts(judged: int, max_drop: float) -> tuple[str, ...]:
    least = least_images(max_drop / 100)
    if judged >= least:
        return ()
    return (
        f"{judged:,} held-out images cannot show that a form loses less than {max_drop:g} points, even if it "
        f"answers all of them alike; {least:,} could. Only forms with the same numbers are taken",
    )


def _write(out: Path, lab: Lab, taken: Contender, ledger: Ledger, checkpoint: Path) -> None:
    """Write the artifact: the form, what it must answer, the ledger and its picture."""
    assert ledger.chosen is not None
    assert ledger.chosen.judgement is not None
    assert taken.candidate.kind is not None
    reference = load(checkpoint, device="cpu", precision="float32", merge=taken.candidate.merge or None)
    about = replace(about_of(reference, ledger.model), temperature=ledger.chosen.judgement.temperature)
    with new_folder(out) as folder:
        values = {"candidate": asdict(taken.candidate), "folder": str(taken.folder), "out": str(folder)}
        files = lab.build("finish", None, **values, about=about.to_json())
        draft = Draft(
            taken.candidate.kind,
            files,
            taken.candidate.precision,
            lab.options(taken.candidate),
            {**ledger.machine, "engine": taken.engine},
        )
        write_atomically(folder / LEDGER_FILE, (to_json(ledger.to_dict(), indent=1) + "\n").encode())
        write_atomically(folder / FRONTIER_FILE, frontier(ledger))
        assemble(folder, about, [draft], ClassifierEngine(reference), extra=(LEDGER_FILE, FRONTIER_FILE))
