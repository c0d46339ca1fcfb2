"""Writing all that a resume needs, while the run goes on: steps wait only until a copy is made."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from vitral.checkpoints.folder import description
from vitral.training.events import CheckpointWritten
from vitral.training.run import Run
from vitral.training.sharding import mapped, on_host, whole
from vitral.training.state import Saved
from vitral.training.validation import refuse_lost

# Bytes of a state from which the processes of a sharded run write their pieces each; less is one file.
LARGE = 4 << 30


def save(run: Run) -> None:
    """Write the run's state in the background, unless its loss is lost. Every process asks."""
    refuse_lost(run)
    with run.clock.of("saving"):
        run.complete_average()
        tensors = run.tensors()
        if run.sharded and _bytes_of(tensors) > LARGE:
            run.files.save_pieces(saved_of(run, mapped(on_host, tensors)), run.averaged_checkpoint)
        else:
            run.files.save(saved_of(run, gathered(run, tensors)), run.averaged_checkpoint)
        run.files.note_damaged(run.damage.reasons)


def tell_written(run: Run) -> None:
    """Tell of the states that came to be on disk since this was asked last."""
    for step in run.files.newly_written():
        run.tell(CheckpointWritten(step))


def saved_of(run: Run, tensors: dict[str, Any]) -> Saved:
    """The run's state as it is now, whatever further steps change."""
    record = run.files.record
    run.state.loss_watch, run.state.time = run.loss_watch.state_dict(), dict(run.clock.seconds)
    # Of the average: a model that is divided is of a class that FSDP2 makes.
    described = description(replace(run.checkpoint, model=run.average))
    return Saved(replace(run.state), tensors, described, record.id if record else None)


def gathered(run: Run, tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of all tensors in the CPU's memory, whole, in the first process. Every process asks."""

    def kept(tensor: Tensor) -> Tensor | None:
        all_of_it = whole(tensor)
        return on_host(all_of_it) if run.world.is_first else None

    return mapped(kept, tree)


def _bytes_of(tree: dict[str, Any]) -> int:
    sizes: list[int] = []
    mapped(lambda tensor: sizes.append(tensor.numel() * tensor.element_size()), tree)
    return sum(sizes)
