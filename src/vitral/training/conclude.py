"""What follows the last step: calibration, the one look at the test images, and the summary."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from vitral.data.batches import Batch
from vitral.data.subsets import sample_rows
from vitral.evaluation.calibration import CALIBRATION_IMAGES, Calibration, calibrate
from vitral.evaluation.task import outputs
from vitral.runtime.stopping import Stopped, StopSignal
from vitral.training.run import Run
from vitral.training.saving import gathered, saved_of
from vitral.training.state import Summary
from vitral.training.validation import EVALUATION_BATCH, damage_of, evaluate_split, keep_if_best


def conclude(run: Run, stop: StopSignal) -> Summary:
    """Calibrate and judge the best weights; taken up again by a resume if it is stopped or killed."""

    def on_batch(_: Batch) -> None:
        stop.check()

    try:
        if run.state.best_merit < 0:  # it was lost
            keep_if_best(run, evaluate_split(run, "val", on_batch=on_batch))
        best = run.best()
        run.average = run.placement.place(copy.deepcopy(best.model)).eval()
        with run.clock.of("evaluating"):
            calibration = _calibrate(run, on_batch)
        temperature = calibration.temperature if calibration else 1.0
        run.files.save_best(lambda: replace(best, temperature=temperature))
        test = None
        if "test" in run.data.splits:
            # The one look at the test split, with the weights and the temperature that validation chose.
            test = evaluate_split(run, "test", temperature, on_batch).to_dict()
    except Stopped:
        return unfinished(run)
    summary = replace(
        unfinished(run), finished=True, test=test, calibration=asdict(calibration) if calibration else None
    )
    run.files.conclude(summary)
    if not run.recipe.course.keep_state:
        run.files.drop_optimizer(saved_of(run, gathered(run, {"model": run.model.state_dict()})))
    return summary


def unfinished(run: Run) -> Summary:
    """The summary of a run that is to be taken up again."""
    state = run.state
    return Summary(
        finished=False,
        steps=state.step,
        epochs=run.budget.epoch,
        seconds=state.seconds,
        best_step=state.best_step,
        test=None,
        time=run.clock.record(),
        **run.task.summary_fields(state.best_score),
    )


def _calibrate(run: Run, on_batch: Callable[[Batch], None]) -> Calibration | None:
    """Of the averaged weights, on the validation images; for softmax's probabilities only."""
    if not run.task.calibrates:
        return None
    loader, world = run.loader("val"), run.world
    rows = sample_rows(loader.split.take(run.validated), CALIBRATION_IMAGES, run.recipe.course.seed)
    batches = loader.evaluation_batches(EVALUATION_BATCH, rows, slice(world.rank, None, world.size))
    with damage_of(run, on_batch) as note:
        shares = world.gathered(lambda: _answers(run, batches, note))
    return world.from_first(lambda: _calibrated(shares))


def _answers(
    run: Run, batches: Iterable[Batch], on_batch: Callable[[Batch], None]
) -> list[tuple[np.ndarray, Tensor, Tensor]]:
    """Rows, logits (B, L) and labels of each batch of this process."""
    rows: list[np.ndarray] = []

    def note(batch: Batch) -> None:
        on_batch(batch)
        if len(batch.labels):
            rows.append(batch.rows)

    answers = outputs(run.average, batches, run.placement, note, some=run.world.alone)
    return [(rows[-1], logits_BL.cpu(), labels.cpu()) for logits_BL, labels in answers]


def _calibrated(shares: list[list[tuple[np.ndarray, Tensor, Tensor]]]) -> Calibration | None:
    found = sorted((answer for share in shares for answer in share), key=lambda answer: answer[0][0])
    if not found:
        return None
    _, logits, labels = zip(*found, strict=True)
    return calibrate(torch.cat(logits), torch.cat(labels))
