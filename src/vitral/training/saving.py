"""Writing all that a resume needs."""

from typing import Any

from vitral.checkpoints.folder import description
from vitral.training.events import CheckpointWritten
from vitral.training.run import Run
from vitral.training.state import Saved
from vitral.training.validation import refuse_lost


def save(run: Run) -> None:
    """Write the run's state, unless its loss is lost."""
    refuse_lost(run)
    with run.clock.of("saving"):
        run.complete_average()
        tensors = {
            "model": run.model.state_dict(),
            "average": run.average.state_dict(),
            "optimizer": run.optimizer.state_dict(),
        }
        run.files.save(saved_of(run, tensors), run.averaged_checkpoint)
        run.files.note_damaged(run.damage.reasons)
    run.tell(CheckpointWritten(run.state.step))


def saved_of(run: Run, tensors: dict[str, Any]) -> Saved:
    record = run.files.record
    run.state.loss_watch, run.state.time = run.loss_watch.state_dict(), dict(run.clock.seconds)
    return Saved(run.state, tensors, description(run.checkpoint), record.id if record else None)
