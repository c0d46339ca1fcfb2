"""Writing all that a resume needs, while the run goes on: steps wait only until a copy is made."""

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitral.checkpoints.folder import Checkpoint, description
from vitral.runtime.errors import VitralError
from vitral.training.events import CheckpointWritten
from vitral.training.run import Run
from vitral.training.sharding import mapped, on_host, whole
from vitral.training.state import Saved
from vitral.training.step import RunningMean

# Bytes of a state from which the processes of a sharded run write their pieces each; less is one file.
LARGE = 4 << 30


def settle(run: Run) -> RunningMean:
    """Make what may be judged and saved of the weights as they are; once a step, whoever asks.

    The average becomes whole (`Run.complete_average`). Every process asks, and gets the mean of all since the
    last evaluation.

    Raises:
        VitralError: if the loss is no number any more.
    """
    if run.settled is None:
        with run.clock.of("stepping"):  # a GPU is waited for
            recent = run.recent.over(run.world)
            loss = recent.loss
        if not math.isfinite(loss):
            rounded = run.placement.precision != torch.float32
            raise VitralError(
                f"the loss is {loss} after step {run.state.step}; lower learning_rate "
                f"(it is {run.recipe.rate.learning_rate})"
                f"{' or set precision=float32' if rounded else ''}, and start again"
            )
        with run.clock.of("saving"):
            run.complete_average()
        run.settled, run.copied = recent, None
    return run.settled


def averaged_copy(run: Run) -> Checkpoint:
    """Give the averaged model in the CPU's memory, which nobody changes; it is copied once a step."""
    if run.copied is None:
        checkpoint = run.averaged_checkpoint
        memo: dict[int, Any] = {id(buffer): on_host(buffer) for buffer in checkpoint.model.buffers()}
        for weight in checkpoint.model.parameters():
            memo[id(weight)] = nn.Parameter(on_host(weight), requires_grad=weight.requires_grad)
        run.copied = replace(checkpoint, model=copy.deepcopy(checkpoint.model, memo))
    return run.copied


def save(run: Run) -> None:
    """Write the run's state in the background, unless its loss is lost. Every process asks."""
    run.state.recent = settle(run).state_dict()
    with run.clock.of("saving"):
        tensors, last = run.tensors(), partial(averaged_copy, run)
        if run.sharded and _bytes_of(tensors) > LARGE:
            run.files.save_pieces(saved_of(run, mapped(on_host, tensors)), last)
        else:
            run.files.save(saved_of(run, _whole(run, tensors)), last)
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


def _whole(run: Run, tensors: dict[str, Any]) -> dict[str, Any]:
    """As `gathered`; the average is in every process already, and its copy may be made."""
    if run.recipe.tuning.trained == "lora":  # the copy has no adapters any more
        return gathered(run, tensors)
    average = averaged_copy(run).model.state_dict() if run.world.is_first else {}
    kept = {name: of for name, of in tensors.items() if name != "average"}
    return {**gathered(run, kept), "average": average}


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
