"""Training: `train` runs a recipe on data into a folder that evaluates, predicts and resumes.

Nothing random is kept between steps: dropout, stochastic depth and mixing are drawn from a generator
seeded by (seed, step), images by (seed, epoch, index). A checkpoint is therefore weights, optimizer,
averages and a step number, and a resumed run ends with the bits of one that was never stopped.
"""

from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from vitral.data.batches import Batch
from vitral.data.image_data import ImageData
from vitral.data.randomness import Sampling
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import Stopped, StopSignal, stop_signal
from vitral.runtime.threads import computing_threads, thread_count
from vitral.runtime.world import World, joined
from vitral.training.adapt import put_into
from vitral.training.begin import begin, resumed, threads_of
from vitral.training.bounds import TellsBound
from vitral.training.changes import changed
from vitral.training.clock import LOADING
from vitral.training.conclude import conclude, unfinished
from vitral.training.determinism import deterministic
from vitral.training.events import Evaluated, Event, Listener, RunBegins, RunEnds, StepDone
from vitral.training.listeners import Listeners
from vitral.training.memory import advice_when_out_of_memory
from vitral.training.parts import OURS, Parts
from vitral.training.run import Run
from vitral.training.run_folder import RunFolder
from vitral.training.saving import save, tell_written
from vitral.training.start import start_tuning
from vitral.training.state import Summary
from vitral.training.tracking.tracking import tracking
from vitral.training.validation import validate

# Of the learning rate, where the loss rose.
_LOWERED = 0.3


def train(
    data: ImageData,
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    parts: Parts = OURS,
    spent: float = 0.0,
    world: World | None = None,
) -> Summary:
    """Train a model on `data` into `folder`.

    Under torchrun every process calls it alike; the first of them writes, and tells the listeners.

    Args:
        data: with a "train" and a "val" split; a "test" split is evaluated once, at the end.
        folder: becomes a model folder with the best weights, and all that a resume needs.
        recipe: settings; those that are not given are chosen from the data.
        resume: go on with the run in `folder`, with the recipe that it began with.
        listeners: told of the run's course, each event by a call.
        parts: what takes the place of the run's own.
        spent: seconds of a new run's budget that are gone already.
        world: the processes that share the run; None: those that torchrun started.

    Raises:
        VitralError: if the settings, the data or the folder cannot be used, or the loss is lost.
    """
    if "val" not in data.splits:
        raise VitralError(f"{data.source} has no validation images; give a val folder, or val_fraction=0.2")
    with joined() if world is None else nullcontext(world) as together:
        return _train(data, folder, recipe, resume, listeners, parts, spent, together)


def _train(
    data: ImageData,
    folder: Path,
    recipe: Recipe,
    resume: bool,  # noqa: FBT001
    listeners: Sequence[Listener],
    parts: Parts,
    spent: float,
    world: World,
) -> Summary:
    listening = Listeners(*(listeners if world.is_first else ()))
    files = RunFolder(folder, listening.message, parts.model, world)
    with deterministic(), stop_signal() as stop, files.claimed(), tracking(listening, stop) as trackers:
        told_of = (trackers, TellsBound(), *listening.all) if world.is_first else ()
        tell = Listeners(_metrics_writer(files), *told_of)
        if not resume:
            files.refuse_to_begin(data, recipe)
            with computing_threads(thread_count(recipe.get("threads"))):
                run = begin(data, files, recipe, tell, parts)
                run.budget.spend(spent)
                run.clock.add("choosing", spent)
                return _carry_out_new(run, stop)
        saved_recipe = files.recipe()
        settled = changed(saved_recipe, recipe)
        with computing_threads(threads_of(settled, files)):
            run = resumed(data, files, settled, saved_recipe, tell, parts)
            return _carry_out(run, stop)


def _carry_out_new(run: Run, stop: StopSignal) -> Summary:
    """Nothing of a new run is left if it fails before its first step."""
    try:
        run.files.begin(run.recipe, run.data, thread_count())
        return _carry_out(run, stop)
    except Exception:
        if not run.state.step:
            run.files.withdraw()
        raise


def _carry_out(run: Run, stop: StopSignal) -> Summary:
    try:
        return _carried_out(run, stop)
    finally:
        run.files.finish_writing()
        tell_written(run)


def _carried_out(run: Run, stop: StopSignal) -> Summary:
    with advice_when_out_of_memory(run.images_at_a_time):
        run.tell(RunBegins(run))
        for note in (*run.checkpoint.notes, *run.objective.notes):
            run.tell.message(note)
        try:
            start_tuning(run, stop)
            if not run.world.alone:
                run.tick()  # by one clock from the first step on, which the rate may follow
            # A new run takes one step at least, however long its start took.
            spent = (run.state.step > 0 and run.budget.is_spent) or _loop(run, stop)
        except Stopped:  # before the first step, or while a batch was waited for
            spent = False
            run.tick()
            save(run)
        finally:
            run.tell(RunEnds(run.state.step))
            run.files.note_damaged(run.damage.reasons)
        run.files.settle()
        summary = conclude(run, stop) if spent else unfinished(run)
        return replace(summary, stopped_by=stop.number)


def _loop(run: Run, stop: StopSignal) -> bool:
    """Take steps until the budget is spent (True) or a signal comes (False)."""
    with closing(training_batches(run, stop)) as batches:
        while True:
            with run.clock.of("waiting"):
                parts = list(islice(batches, len(run.mine)))
            sound = run.meet(parts, stop)
            if sound is None:
                save(run)
                return False
            if sound:
                with run.clock.of("stepping"):
                    _watch(run, run.step(*parts, sound=sound))
            for batch in parts:
                for part, seconds in zip(LOADING, batch.seconds, strict=True):
                    run.clock.add(part, seconds)
            run.count_step()
            _tell_step(run)
            spent = run.budget.is_spent
            _mind_the_loss(run)
            if spent or run.budget.evaluation_is_due:
                validate(run)
            if spent or run.budget.checkpoint_is_due:
                save(run)
            if spent:
                return True


def _tell_step(run: Run) -> None:
    state, budget = run.state, run.budget
    run.tell(StepDone(state.step, budget.epoch, budget.progress, state.seconds, run.recent))
    tell_written(run)


def _metrics_writer(files: RunFolder) -> Listener:
    """Makes each evaluation a line of ``metrics.jsonl``."""

    def write(event: Event) -> None:
        if isinstance(event, Evaluated):
            files.add_metrics(event.record())

    return write


def training_batches(run: Run, stop: StopSignal | None = None) -> Generator[Batch]:
    """Give batches without end, or this process's parts of each, one after the other.

    A `stop` that comes while one is waited for raises Stopped.
    """
    recipe = run.recipe
    return run.loader("train", stop).training_batches(
        run.parts.transform or recipe.alteration.augmentation,
        batch_size=recipe.batches.batch_size,
        seed=recipe.course.seed,
        first_step=run.state.step,
        sampling=_sampling(run),
        parts=recipe.batches.parts,
        mine=run.mine,
    )


def _sampling(run: Run) -> Sampling:
    wanted = run.recipe.images
    blocks = run.data.split("train").blocks if wanted.sampling == "blocks" else None
    return Sampling(balanced=wanted.sampling == "balanced", repeats=wanted.repeats, blocks=blocks)


def _watch(run: Run, losses: list[Tensor]) -> None:
    """Takes a step's loss, part by part, where it means the same from step to step."""
    recipe = run.recipe
    grows = recipe.mixing.mix_passes or recipe.batches.small_images
    if run.is_tuning and not grows and not run.optimizer.keeps_average:
        run.loss_watch.add(*losses)


def _mind_the_loss(run: Run) -> None:
    """Lowers the rate of a run from trained weights whose loss rises, and goes back to the best weights."""
    watch = run.loss_watch
    if not watch.is_full or not watch.rose():
        return
    assert watch.lowest is not None
    assert watch.latest is not None
    if run.budget.progress < run.recipe.rate.warmup or run.state.best_merit < 0:
        return
    run.state.rate_share *= _LOWERED
    best = run.placement.place(run.best().model)
    for model in (run.model, run.average):
        put_into(model, best)
    run.follow_average()
    run.optimizer.forget()
    run.tell.message(
        f"the loss rose from {watch.lowest.mean:.2f} to {watch.latest.mean:.2f} in {watch.window} steps: "
        f"back to the weights of step {run.state.best_step}, at {run.state.rate_share:.2g} of the rate"
    )
