"""Judging a run while it trains: evaluations of the averaged weights, and which are the best."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

from vitral.data.batches import Batch
from vitral.evaluation.evaluation import Evaluation
from vitral.training.events import Evaluated
from vitral.training.run import Run
from vitral.training.saving import averaged_copy, settle
from vitral.training.step import RunningMean

EVALUATION_BATCH = 256
# Where the budget is short: its share for one evaluation, and what that needs at least to say something.
_VALIDATION_SHARE = 0.04
_LEAST_VALIDATED = 256
_FIRST_EVALUATION_BATCH = 64
# Of the budget; a model that has learnt nothing by then may learn nothing at all.
_THIRD = 1 / 3
# Standard error of an accuracy above which nobody can tell chance from skill.
_CLEAR = 0.05


def validate(run: Run) -> Evaluation:
    """Evaluate the averaged weights, keep them if they are the best so far, and tell."""
    recent = settle(run)
    evaluation = evaluate_split(run, "val")
    is_best = keep_if_best(run, evaluation)
    step, epoch, seconds, rate = run.state.step, run.budget.epoch, run.state.seconds, run.learning_rate
    time_spent = run.clock.record()
    run.tell(Evaluated(step, epoch, seconds, recent, evaluation, rate, is_best, time=time_spent))
    run.recent = run.settled = RunningMean(run.recipe.batches.parts)
    _tell_if_at_chance(run, evaluation)
    return evaluation


def keep_if_best(run: Run, evaluation: Evaluation) -> bool:
    state = run.state
    is_best = (evaluation.merit, -evaluation.loss) > (state.best_merit, -state.best_loss)
    if is_best:
        state.best_score, state.best_loss = evaluation.score, evaluation.loss
        state.best_merit, state.best_step = evaluation.merit, state.step
        with run.clock.of("saving"):
            run.files.save_best(lambda: averaged_copy(run))
    return is_best


def evaluate_split(
    run: Run, name: str, temperature: float = 1.0, on_batch: Callable[[Batch], None] = lambda _: None
) -> Evaluation:
    """Evaluate the averaged weights on a split, each process on its share of the batches.

    Args:
        run: whose weights.
        name: of the split.
        temperature: probabilities are of logits / temperature.
        on_batch: told of each batch of this process; it may raise Stopped.
    """
    # Scores are compared with the best so far: only the first evaluation may choose how many images.
    is_first = not run.state.val_images and run.state.best_merit < 0
    limited = name == "val" and run.recipe.limits.timed and is_first
    size = _FIRST_EVALUATION_BATCH if limited else EVALUATION_BATCH
    rows, dealt = run.validated if name == "val" else None, slice(run.world.rank, None, run.world.size)
    batches = run.loader(name).evaluation_batches(size, rows, dealt)
    if limited:
        batches = _while_time_allows(run, batches)
    begun = time.monotonic()
    with run.clock.of("evaluating"), damage_of(run, on_batch) as note:
        evaluation = run.task.evaluate(
            run.average,
            batches,
            run.data.classes,
            run.placement,
            note,
            temperature=temperature,
            world=run.world,
        )
    if name == "val":  # judging the test images is no part of training
        run.tick()
        run.budget.evaluation_seconds = run.world.first(time.monotonic() - begun)
        run.budget.evaluated_at = run.state.seconds
    return evaluation


@contextmanager
def damage_of(run: Run, on_batch: Callable[[Batch], None]) -> Iterator[Callable[[Batch], None]]:
    """Gives what is to be told of each batch of this process; in the end all know what was damaged."""
    found: list[tuple[str, str]] = []

    def note(batch: Batch) -> None:
        on_batch(batch)
        found.extend(batch.damaged)
        if run.world.alone:
            run.damage.add(batch)

    yield note
    for images in run.world.exchanged(found):
        run.damage.note(images)


def _while_time_allows(run: Run, batches: Generator[Batch]) -> Generator[Batch]:
    """The first of the batches: as many as a share of the budget takes. Later evaluations take as many.

    Every process takes as many rounds, by the first one's clock, whether it has a batch in the last or not.
    """
    total, done, world = len(run.validated), 0, run.world
    rounds = -(-total // (_FIRST_EVALUATION_BATCH * world.size))
    end = time.monotonic() + 60 * run.recipe.limits.minutes * _VALIDATION_SHARE
    with closing(batches):
        for _ in range(rounds):
            batch = next(batches, None)
            if batch is not None:
                yield batch
            asked, late = world.sum(
                0 if batch is None else batch.asked, float(world.is_first and time.monotonic() > end)
            )
            done += int(asked)
            run.tell.preparing("validating", done, total)
            if late and done >= min(_LEAST_VALIDATED, total):
                break
    run.state.val_images = done
    if done < total:
        run.tell.message(f"time for {done:,} of the {total:,} validation images")


def _tell_if_at_chance(run: Run, evaluation: Evaluation) -> None:
    """Once, after a third of the budget: whoever always names the commonest class does as well."""
    chance, progress = evaluation.chance, run.budget.progress
    if chance is None or run.told_of_chance or progress < _THIRD:
        return
    run.told_of_chance = True
    noise = math.sqrt(chance * (1 - chance) / evaluation.n)
    if noise < _CLEAR and evaluation.score <= chance + 2 * noise:
        run.tell.message(
            f"after {progress:.0%} of the budget the model is no better than chance ({chance:.1%}): see "
            f"that the labels fit the images, give it more time, or lower learning_rate "
            f"(now {run.recipe.rate.learning_rate:g})"
        )
