"""What follows the last step: calibration, the one look at the test images, and the summary."""

from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from vitral.data.batches import Batch
from vitral.data.subsets import sample_rows
from vitral.evaluation.calibration import CALIBRATION_IMAGES, Calibration, calibrate
from vitral.evaluation.task import outputs
from vitral.runtime.stopping import Stopped, StopSignal
from vitral.training.run import Run
from vitral.training.saving import saved_of
from vitral.training.state import Summary
from vitral.training.validation import EVALUATION_BATCH, evaluate_split, keep_if_best


def conclude(run: Run, stop: StopSignal) -> Summary:
    """Calibrate and judge the best weights; taken up again by a resume if it is stopped or killed."""

    def on_batch(batch: Batch) -> None:
        run.damage.add(batch)
        stop.check()

    try:
        if run.state.best_merit < 0:  # it was lost
            keep_if_best(run, evaluate_split(run, "val", on_batch=on_batch))
        best = run.files.best()
        run.average = run.placement.place(best.model).eval()
        with run.clock.of("evaluating"):
            calibration = _calibrate(run, on_batch)
        temperature = calibration.temperature if calibration else 1.0
        run.files.save_best(replace(best, temperature=temperature))
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
        run.files.drop_optimizer(saved_of(run, {"model": run.model.state_dict()}))
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
    loader = run.loader("val")
    rows = sample_rows(loader.split.take(run.validated), CALIBRATION_IMAGES, run.recipe.course.seed)
    batches = loader.evaluation_batches(EVALUATION_BATCH, rows)
    answers = outputs(run.average, batches, run.placement, on_batch)
    return calibrate(*(torch.cat(parts) for parts in zip(*answers, strict=True)))
