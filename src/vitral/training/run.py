"""Training: `train` runs a recipe on data into a folder that evaluates, predicts and resumes.

Nothing random is kept between steps: dropout, stochastic depth and mixing are drawn from a generator
seeded by (seed, step), images by (seed, epoch, index). A checkpoint is therefore weights, optimizer,
averages and a step number, and a resumed run ends with the bits of one that was never stopped.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.checkpoints.folder import Checkpoint, description
from vitral.data.batches import Batch, DamageCount
from vitral.data.contents import Contents
from vitral.data.image_data import ImageData
from vitral.data.loader import Loader
from vitral.data.randomness import Sampling, seeded
from vitral.data.split import Split, fingerprint
from vitral.data.subsets import few_shot, in_turns, sample_rows, thinned
from vitral.data.workers import Loading
from vitral.evaluation.calibration import CALIBRATION_IMAGES, Calibration, calibrate
from vitral.evaluation.evaluation import Evaluation
from vitral.evaluation.probing.head_start import fitted_head
from vitral.evaluation.task import Task, outputs, task_of
from vitral.images.augment import batch_mixer
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.embedding import ConvStem
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base, resolve, start
from vitral.recipes.schema import BUDGET, Resolved
from vitral.runtime.devices import Placement, compiles, computing_threads, cpu_count
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import Stopped, StopSignal, stop_signal
from vitral.training.adapt import choose_trained, merged, put_into
from vitral.training.loss_watch import LossWatch
from vitral.training.memory import MemoryNeed, advice_when_out_of_memory, memory_need
from vitral.training.objective import build_objective
from vitral.training.optimizers import Group, build_optimizer, parameter_groups
from vitral.training.run_folder import Record, RunFolder, RunState, Saved, Summary, changed
from vitral.training.schedule import Schedule, scaled_rate
from vitral.training.step import Computation, Step, StepResult, average_share

EVALUATION_BATCH = 256
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# Of the images that a stem's first filters are computed from: a patch has 27 numbers for each.
_WHITENING_PIXELS = 1_000_000
# To open more takes more than a second.
_TOLD_IMAGES = 5000
# For the head of a model that is fine-tuned; a part of an epoch.
_PROBED_IMAGES = 2000
# Where the budget is short: shares of it for the head's start, for one evaluation, for all of them; and
# what they need at least to say something.
_HEAD_SHARE = 0.15
_VALIDATION_SHARE = 0.04
_EVALUATIONS_SHARE = 0.1
_LEAST_OF_A_CLASS = 10
_LEAST_VALIDATED = 256
_FIRST_EVALUATION_BATCH = 64
# Steps that are no measure of time: models are compiled in them.
_STARTING_STEPS = 3
# Of the budget; a model that has learnt nothing by then may learn nothing at all.
_THIRD = 1 / 3
# Standard error of an accuracy above which nobody can tell chance from skill.
_CLEAR = 0.05
# Of the learning rate, where the loss rose.
_LOWERED = 0.3


class Reporter:
    """Told of a run's course; this one says nothing."""

    def message(self, text: str) -> None: ...
    def preparing(self, what: str, done: int, total: int) -> None: ...
    def begin(self, run: "Run") -> None: ...
    def step(self, run: "Run") -> None: ...
    def epoch(self, run: "Run", evaluation: Evaluation) -> None: ...
    def end(self) -> None: ...


@dataclass
class Run:
    """Everything a step touches."""

    recipe: Resolved
    folder: Path
    data: ImageData
    checkpoint: Checkpoint
    placement: Placement
    reporter: Reporter
    state: RunState = field(default_factory=RunState)
    memory: MemoryNeed | None = None  # known once the run begins

    def __post_init__(self) -> None:
        self.files = RunFolder(self.folder)
        labels = self.checkpoint.labels
        self.model: VisionTransformer = self.placement.place(self.checkpoint.model, training=True).train()
        tuning = self.recipe.tuning
        choose_trained(self.model, tuning.trained, tuning.lora_rank, self.recipe.course.seed)
        self.model.checkpoint_layers = self.recipe.batches.checkpoint_layers
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        groups = groups_by_recipe(self.model, self.recipe)
        self.optimizer = build_optimizer(
            self.recipe.optimization.optimizer,
            groups,
            betas=self.recipe.optimization.betas,
            muon_momentum=self.recipe.optimization.muon_momentum,
        )
        preprocess, train = self.checkpoint.preprocess, self.data.split("train")
        self.objective = build_objective(self.recipe.criterion, train, preprocess, labels, self.placement)
        compiled = compiles(self.recipe.machine.device, wanted=self.recipe.machine.compile_wanted)
        captured = compiled and self.optimizer.capturable
        # A schedule-free optimizer keeps the average itself; see `_take_optimizers_average`.
        follows = self.recipe.optimization.optimizer != "schedule_free"
        self.take = Step(
            self.model,
            self.average if follows else None,
            self.objective,
            self.task.hits,
            self.optimizer,
            Computation(self.recipe.batches.batch_size, self.recipe.batches.accumulate, compiled, captured),
            self.placement,
            self.recipe.optimization.clip_norm,
        )
        self._mix = batch_mixer(self.recipe.mixing.mixup, self.recipe.mixing.cutmix, len(labels))
        self._leave = batch_mixer(0.0, 0.0, len(labels))
        self.steps_per_epoch = len(self.data.split("train")) // self.recipe.batches.batch_size
        self.damage = DamageCount(
            sum(map(len, self.data.splits.values())), self.recipe.images.max_damaged, self.reporter.message
        )
        self.recent = RunningMean()
        self.loss_watch = LossWatch(self.steps_per_epoch, self.placement.device)
        self.evaluation_seconds, self.evaluated_at = 0.0, 0.0
        self.told_of_chance = False
        self._loaders: dict[str, Loader] = {}
        self.loading = Loading(self.recipe.machine.workers, self.reporter.message)
        self._resumed_at, self._earlier_seconds = time.monotonic(), self.state.seconds

    @property
    def steps_between_evaluations(self) -> int:
        return self.recipe.course.eval_epochs * self.steps_per_epoch

    @property
    def epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    @property
    def images_at_a_time(self) -> int:
        return self.take.computation.images_at_a_time

    def loader(self, name: str, stop: StopSignal | None = None) -> Loader:
        """Of a split's batches; few and small images are read into memory when it is first asked for.

        Not the test images, which are looked at once, nor what is altered by more than `Moves`.
        """
        if name in self._loaders:
            return self._loaders[name]
        keeps = self.recipe.alteration.augmentation.only_moves if name == "train" else name == "val"
        split = self._validation if name == "val" else self.data.split(name)
        pin_memory = name == "train" and self.placement.device.type == "cuda"
        self._loaders[name] = loader = Loader(
            split,
            self.checkpoint.preprocess,
            replace(self.loading, stop=stop, pin_memory=pin_memory) if name == "train" else self.loading,
            keep_on=self.placement.device if keeps else None,
        )
        if loader.in_memory and len(split) > _TOLD_IMAGES:
            self.reporter.message(f"opening {len(split):,} images")
        return loader.open(partial(self.reporter.preparing, "opening"))

    def sized(self, images_BCHW: Tensor) -> Tensor:
        """The images, in whole patches from half their size to the whole while `small_images` passes.

        Detail teaches little at first, and a step on a quarter of the patches takes half the time.
        """
        if self.progress >= self.recipe.batches.small_images:
            return images_BCHW
        share = 0.5 + 0.5 * self.progress / self.recipe.batches.small_images
        patch = self.model.config.patch_size
        sides = [max(round(share * side / patch), 1) * patch for side in images_BCHW.shape[2:]]
        return F.interpolate(images_BCHW, sides, mode="bilinear", antialias=True)

    def mixed(self, images_BCHW: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets (B, L) after mixup or CutMix, the likelier the more often an image was seen.

        The first passes learn more from images as they are; later ones would learn them by heart.
        """
        passes = self.recipe.mixing.mix_passes
        if passes and float(torch.rand(())) >= self.epoch / passes:
            return self._leave(images_BCHW, labels)
        return self._mix(images_BCHW, labels)

    @property
    def total_steps(self) -> int | None:
        """The budget in steps; None if only time limits it."""
        limits = self.recipe.limits
        steps = min(limits.steps, limits.epochs * self.steps_per_epoch)
        return max(round(steps), 1) if math.isfinite(steps) else None

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        shares = []
        if self.total_steps:
            shares.append(self.state.step / self.total_steps)
        if self.recipe.limits.timed:
            start = self.state.start_seconds
            shares.append((self.state.seconds - start) / max(60 * self.recipe.limits.minutes - start, 1e-9))
        return min(max(shares), 1.0)

    @property
    def learning_rate(self) -> float:
        """Of this step."""
        return self.state.rate_share * schedule_of(self.recipe).at(self.progress)

    @property
    def task(self) -> Task:
        return task_of(self.data)

    @property
    def is_tuning(self) -> bool:
        """Whether the run begins from trained weights."""
        return "base" in self.checkpoint.metadata

    @property
    def _validation(self) -> Split:
        """The validation images; where time is the budget, in turns of the classes.

        Any first part is even over the classes then.
        """
        split = self.data.split("val")
        if not self.recipe.limits.timed:
            return split
        if split.multi_label:
            return split.take(np.random.default_rng(self.recipe.course.seed).permutation(len(split)))
        return split.take(in_turns(split, self.recipe.course.seed))

    @property
    def validated(self) -> np.ndarray:
        """The rows of `loader("val")` to evaluate: where time is the budget, as many as it allows."""
        return np.arange(self.state.val_images or len(self.data.split("val")))

    def spend(self, seconds: float) -> None:
        """Counts time that was spent on the run before it began."""
        self._earlier_seconds += seconds
        self.tick()

    def tick(self) -> None:
        self.state.seconds = self._earlier_seconds + time.monotonic() - self._resumed_at
        if self.recipe.limits.timed and self.state.step <= _STARTING_STEPS:  # compiling, where there is any
            self.state.start_seconds = min(self.state.seconds, 30 * self.recipe.limits.minutes)

    def watch(self, loss: Tensor) -> None:
        """Takes a step's loss, where it means the same from step to step."""
        recipe = self.recipe
        grows = recipe.mixing.mix_passes or recipe.batches.small_images
        if self.is_tuning and not grows and recipe.optimization.optimizer != "schedule_free":
            self.loss_watch.add(loss)


# --- The run -------------------------------------------------------------------------------------


def train(
    data: ImageData,
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    spent: float = 0.0,
) -> Summary:
    """Trains `recipe` on `data` into `folder`.

    Args:
        data: with a "train" and a "val" split; a "test" split is evaluated once, at the end.
        folder: becomes a model folder with the best weights, and all that a resume needs.
        recipe: settings; those that are None are chosen from the data.
        resume: go on with the run in `folder`, with the recipe that it began with.
        reporter: told of the run's course.
        spent: seconds of a new run's budget that are gone already.

    Raises:
        VitralError: if the settings, the data or the folder cannot be used, the loss is lost, or
            torchrun started several processes.
    """
    _refuse_several_processes()
    if "val" not in data.splits:
        raise VitralError(f"{data.source} has no validation images; give a val folder, or val_fraction=0.2")
    reporter = reporter or Reporter()
    files = RunFolder(folder, reporter.message)
    with _deterministic(), stop_signal() as stop, files.claimed():
        if not resume:
            files.refuse_to_begin(data, recipe)
            with computing_threads(recipe.get("threads") or torch.get_num_threads()):
                run = _begun(data, files, recipe, reporter)
                run.spend(spent)
                return _carry_out_new(run, stop)
        saved_recipe = files.recipe()
        settled = changed(saved_recipe, recipe)
        with computing_threads(_threads(settled, files)):
            run = _resumed(data, files, settled, saved_recipe, reporter)
            return _carry_out(run, stop)


def _carry_out(run: Run, stop: StopSignal) -> Summary:
    with advice_when_out_of_memory(run.images_at_a_time):
        run.reporter.begin(run)
        distillation = run.objective.distillation
        for note in (*run.checkpoint.notes, *(distillation.teacher.classifier.notes if distillation else ())):
            run.reporter.message(note)
        try:
            _start(run, stop)
            # A new run takes one step at least, however long its start took.
            spent = (run.state.step > 0 and run.progress >= 1) or _loop(run, stop)
        except Stopped:  # before the first step, or while a batch was waited for
            spent = False
            run.tick()
            save(run)
        finally:
            run.reporter.end()
            run.files.note_damaged(run.damage.reasons)
        summary = _conclude(run, stop) if spent else _summary(run)
        return replace(summary, stopped_by=stop.number)


# --- The start -----------------------------------------------------------------------------------


def _start(run: Run, stop: StopSignal) -> None:
    """What comes before the first step of tuning: a head, and how well it does. Raises Stopped."""
    if run.state.step or not run.is_tuning:
        return
    with stop.raises():
        if run.recipe.tuning.probe_head:
            _start_head(run)
        _judge_start(run)
    run.tick()


def _start_head(run: Run) -> None:
    """A drawn head's first gradients spoil what the layers below have learnt (arXiv:2202.10054, §3)."""
    train, limits = run.data.split("train"), run.recipe.limits
    # Not the run's own seed, whose first epoch takes images in the same order: those that the head knows
    # would come first, and the loss would seem to rise after them.
    seed = run.recipe.course.seed + 1
    images = few_shot(train, max(_head_images(run) // len(run.data.classes), 1), seed)
    classifier = Classifier(run.model, run.checkpoint.preprocess, run.data.classes, run.placement)
    found = fitted_head(
        classifier,
        images,
        seed,
        seconds=60 * limits.minutes * _HEAD_SHARE if limits.timed else None,
        on_images=lambda done, total: run.reporter.preparing("the head's start", done, total),
        loading=run.loading,
    )
    run.model.train()
    if found is None:
        run.reporter.message("no time for the head to begin as a linear probe: it begins at random")
        return
    for model in (run.model, run.average):
        found.head.put_into(model)
    judged = f", right on {found.held_out_top1:.1%} of those held out" if found.held_out_top1 else ""
    run.reporter.message(f"the head begins as a linear probe of {found.images:,} images{judged}")


def _head_images(run: Run) -> int:
    """How many images a head may begin with: a step looks at an image three times as long."""
    if run.total_steps is None:
        return _PROBED_IMAGES
    affordable = round(3 * _HEAD_SHARE * run.total_steps * (run.recipe.batches.batch_size))
    return min(_PROBED_IMAGES, max(affordable, _LEAST_OF_A_CLASS * len(run.data.classes)))


def _judge_start(run: Run) -> None:
    """The start is the first candidate for the best weights, so that no run ends with worse."""
    evaluation = _evaluate_split(run, "val")
    _keep_if_best(run, evaluation)
    run.files.add_metrics(_metrics(run, evaluation))
    run.reporter.message(
        f"before the first step: val loss {evaluation.loss:.3f} "
        f"{evaluation.score_words} {evaluation.score:.1%}"
    )


# --- Steps ---------------------------------------------------------------------------------------


def _loop(run: Run, stop: StopSignal) -> bool:
    """Steps until the budget is spent (True) or a signal comes (False)."""
    with closing(_training_batches(run, stop)) as batches:
        for batch in batches:
            run.damage.add(batch)
            if len(batch.labels):
                run.watch(step(run, batch))
            run.state.step += 1
            run.tick()
            run.reporter.step(run)
            done = run.progress >= 1
            _mind_the_loss(run)
            if done or _evaluation_is_due(run):
                _finish_epoch(run)
            if done or stop.requested or _checkpoint_is_due(run):
                save(run)
            if done or stop.requested:
                return done
    raise AssertionError("training batches never end")


def step(run: Run, batch: Batch) -> Tensor:
    """One update on a batch; its mean loss, on the device."""
    with seeded(run.recipe.course.seed, run.state.step, device=run.placement.device):
        images_BCHW = run.sized(run.placement.put(batch.images))
        images_BCHW, targets_BL = run.mixed(images_BCHW, run.placement.put(batch.labels))
        share = average_share(run.state.step, run.recipe.optimization.ema_decay)
        result = run.take(images_BCHW, targets_BL, run.learning_rate, share)
    run.recent.add(result, len(targets_BL))
    return result.loss


def _evaluation_is_due(run: Run) -> bool:
    """At the end of an epoch; where time is the budget, evaluations take a tenth of it at most."""
    if run.state.step % run.steps_between_evaluations:
        return False
    since = run.state.seconds - run.evaluated_at
    return not run.recipe.limits.timed or since >= run.evaluation_seconds / _EVALUATIONS_SHARE


def _finish_epoch(run: Run) -> None:
    """Evaluates the averaged weights and keeps them if they are the best so far."""
    _refuse_lost(run)
    _take_optimizers_average(run)
    evaluation = _evaluate_split(run, "val")
    _keep_if_best(run, evaluation)
    run.files.add_metrics(_metrics(run, evaluation))
    run.reporter.epoch(run, evaluation)
    run.recent = RunningMean()
    _tell_if_at_chance(run, evaluation)


def _tell_if_at_chance(run: Run, evaluation: Evaluation) -> None:
    """Once, after a third of the budget: whoever always names the commonest class does as well."""
    chance = evaluation.chance
    if chance is None or run.told_of_chance or run.progress < _THIRD:
        return
    run.told_of_chance = True
    noise = math.sqrt(chance * (1 - chance) / evaluation.n)
    if noise < _CLEAR and evaluation.score <= chance + 2 * noise:
        run.reporter.message(
            f"after {run.progress:.0%} of the budget the model is no better than chance ({chance:.1%}): see "
            f"that the labels fit the images, give it more time, or lower learning_rate "
            f"(now {run.recipe.rate.learning_rate:g})"
        )


def _keep_if_best(run: Run, evaluation: Evaluation) -> None:
    if (evaluation.merit, -evaluation.loss) > (run.state.best_merit, -run.state.best_loss):
        run.state.best_top1, run.state.best_loss = evaluation.score, evaluation.loss
        run.state.best_merit = evaluation.merit
        run.state.best_step = run.state.step
        run.files.save_best(_averaged_checkpoint(run))


def _mind_the_loss(run: Run) -> None:
    """Lowers the rate of a run from trained weights whose loss rises, and goes back to the best weights."""
    watch = run.loss_watch
    if not watch.is_full or not watch.rose():
        return
    assert watch.lowest is not None
    assert watch.latest is not None
    if run.progress < run.recipe.rate.warmup or run.state.best_merit < 0:
        return
    run.state.rate_share *= _LOWERED
    best = run.placement.place(run.files.best().model)
    for model in (run.model, run.average):
        put_into(model, best)
    run.optimizer.forget()
    run.reporter.message(
        f"the loss rose from {watch.lowest.mean:.2f} to {watch.latest.mean:.2f} in {watch.window} steps: "
        f"back to the weights of step {run.state.best_step}, at {run.state.rate_share:.2g} of the rate"
    )


def _refuse_lost(run: Run) -> None:
    """Raises VitralError if the loss is no number any more."""
    if not math.isfinite(run.recent.loss):
        rounded = run.placement.precision != torch.float32
        raise VitralError(
            f"the loss is {run.recent.loss} after step {run.state.step}; lower learning_rate "
            f"(it is {run.recipe.rate.learning_rate})"
            f"{' or set precision=float32' if rounded else ''}, and start again"
        )


def _conclude(run: Run, stop: StopSignal) -> Summary:
    """What follows the last step; taken up again by a resume if it is stopped or killed."""

    def on_batch(batch: Batch) -> None:
        run.damage.add(batch)
        stop.check()

    try:
        if run.state.best_merit < 0:  # it was lost
            _keep_if_best(run, _evaluate_split(run, "val", on_batch=on_batch))
        best = run.files.best()
        run.average = run.placement.place(best.model).eval()
        calibration = _calibrate(run, on_batch)
        temperature = calibration.temperature if calibration else 1.0
        run.files.save_best(replace(best, temperature=temperature))
        test = None
        if "test" in run.data.splits:
            # The one look at the test split, with the weights and the temperature that validation chose.
            test = _evaluate_split(run, "test", temperature, on_batch).to_dict()
    except Stopped:
        return _summary(run)
    summary = replace(
        _summary(run), finished=True, test=test, calibration=asdict(calibration) if calibration else None
    )
    run.files.conclude(summary)
    if not run.recipe.course.keep_state:
        run.files.drop_optimizer(_saved(run, {"model": run.model.state_dict()}))
    return summary


def _summary(run: Run) -> Summary:
    """Of a run that is not finished."""
    state, score = run.state, run.state.best_top1
    return Summary(
        finished=False,
        steps=state.step,
        epochs=run.epoch,
        seconds=state.seconds,
        best_step=state.best_step,
        test=None,
        **run.task.summary_fields(score),
    )


def _evaluate_split(
    run: Run, name: str, temperature: float = 1.0, on_batch: Callable[[Batch], None] | None = None
) -> Evaluation:
    on_batch = on_batch or run.damage.add
    limited = name == "val" and run.recipe.limits.timed and not run.state.val_images
    size = _FIRST_EVALUATION_BATCH if limited else EVALUATION_BATCH
    batches = run.loader(name).evaluation_batches(size, run.validated if name == "val" else None)
    if limited:
        batches = _while_time_allows(run, batches)
    begun = time.monotonic()
    evaluation = run.task.evaluate(
        run.average, batches, run.data.classes, run.placement, on_batch, temperature=temperature
    )
    if name == "val":  # judging the test images is no part of training
        run.tick()
        run.evaluation_seconds, run.evaluated_at = time.monotonic() - begun, run.state.seconds
    return evaluation


def _while_time_allows(run: Run, batches: Generator[Batch]) -> Generator[Batch]:
    """The first of the batches: as many as a share of the budget takes. Later evaluations take as many."""
    total, done = len(run.validated), 0
    end = time.monotonic() + 60 * run.recipe.limits.minutes * _VALIDATION_SHARE
    with closing(batches):
        for batch in batches:
            yield batch
            done += batch.asked
            run.reporter.preparing("validating", done, total)
            if time.monotonic() > end and done >= min(_LEAST_VALIDATED, total):
                break
    run.state.val_images = done
    if done < total:
        run.reporter.message(f"time for {done:,} of the {total:,} validation images")


def _calibrate(run: Run, on_batch: Callable[[Batch], None]) -> Calibration | None:
    """Of the averaged weights, on the validation images; for softmax's probabilities only."""
    if not run.task.calibrates:
        return None
    loader = run.loader("val")
    rows = sample_rows(loader.split.take(run.validated), CALIBRATION_IMAGES, run.recipe.course.seed)
    batches = loader.evaluation_batches(EVALUATION_BATCH, rows)
    answers = outputs(run.average, batches, run.placement, on_batch)
    return calibrate(*(torch.cat(parts) for parts in zip(*answers, strict=True)))


def _training_batches(run: Run, stop: StopSignal | None = None) -> Generator[Batch]:
    """Without end; a `stop` that comes while one is waited for raises Stopped."""
    recipe = run.recipe
    return run.loader("train", stop).training_batches(
        recipe.alteration.augmentation,
        batch_size=recipe.batches.batch_size,
        seed=recipe.course.seed,
        first_step=run.state.step,
        sampling=Sampling(balanced=recipe.images.sampling == "balanced", repeats=recipe.images.repeats),
    )


def groups_of(asked: Recipe, data: ImageData) -> tuple[list[Group], list[str]]:
    """The parameter groups of a run that is not begun, and the names of what it would not train.

    Raises:
        VitralError: as `train`.
    """
    base = load_base(asked)
    recipe = resolve(asked, data, base, cpu_count())
    model = start(recipe, data.classes, base).model
    choose_trained(model, recipe.tuning.trained, recipe.tuning.lora_rank, recipe.course.seed)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    rate = schedule_of(recipe).peak
    return [{**group, "lr": rate * group["scale"]} for group in groups_by_recipe(model, recipe)], frozen


def groups_by_recipe(model: VisionTransformer, recipe: Resolved) -> list[Group]:
    return parameter_groups(
        model,
        layer_decay=recipe.optimization.layer_decay,
        weight_decay=recipe.optimization.weight_decay,
        orthogonal=recipe.optimization.optimizer == "muon",
    )


def schedule_of(recipe: Resolved) -> Schedule:
    rate = recipe.rate
    peak = scaled_rate(rate.learning_rate, recipe.batches.batch_size, rate.learning_rate_batch)
    return Schedule(rate.schedule, peak, rate.warmup, rate.decay, rate.final_share)


# --- Averages --------------------------------------------------------------------------------


@torch.no_grad()
def _take_optimizers_average(run: Run) -> None:
    """A schedule-free optimizer keeps the average itself; the weights are left to the bit as they were."""
    if run.recipe.optimization.optimizer != "schedule_free":
        return
    weights: list[Tensor] = list(run.model.parameters())
    before = [weight.clone() for weight in weights]
    run.optimizer.average(on=True)
    torch._foreach_copy_(list(run.average.parameters()), weights)
    run.optimizer.average(on=False)
    torch._foreach_copy_(weights, before)


class RunningMean:
    """Loss and accuracy since the last evaluation; reads the device only when asked."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | int = 0
        self._samples = 0

    def add(self, result: StepResult, samples: int) -> None:
        self._loss = self._loss + result.loss * samples
        self._correct = self._correct + result.hits
        self._samples += samples

    @property
    def loss(self) -> float:
        return float(self._loss) / max(self._samples, 1)

    @property
    def accuracy(self) -> float:
        return float(self._correct) / max(self._samples, 1)


# --- Beginning, saving and resuming --------------------------------------------------------------


def _begun(data: ImageData, files: RunFolder, recipe: Recipe, reporter: Reporter) -> Run:
    """A new run; nothing is written before all is accepted."""
    base = load_base(recipe)
    resolved = resolve(recipe, data, base, cpu_count())
    run = _opened(data, files, resolved, _first_checkpoint(resolved, data, base), reporter)
    run.state.data = fingerprint(data.split("train"))
    return run


def _carry_out_new(run: Run, stop: StopSignal) -> Summary:
    """Nothing of a new run is left if it fails before its first step."""
    record = Record.of(run.recipe, torch.get_num_threads(), Contents.of(run.data))
    try:
        run.files.begin(record, run.recipe, run.data.source)
        return _carry_out(run, stop)
    except Exception:
        if not run.state.step:
            run.files.withdraw()
        raise


def _resumed(
    data: ImageData, files: RunFolder, recipe: Resolved, saved_recipe: Resolved, reporter: Reporter
) -> Run:
    """A run taken up again; nothing is written before all is accepted."""
    if files.finished and not files.has_state:
        raise _is_finished(files.path)
    steps_per_epoch = _steps_per_epoch(data, recipe)
    device = Placement.choose(recipe.machine.device, recipe.machine.precision).device
    saved = files.saved(recipe.course.checkpoint_steps or steps_per_epoch, device)
    checkpoint = files.checkpoint_of(saved) if saved else None
    if checkpoint is None:
        checkpoint = _first_checkpoint(recipe, data, load_base(Recipe(**recipe.settings())))
    run = _opened(data, files, recipe, checkpoint, reporter)
    contents = Contents.of(data)
    if saved is None:
        reporter.message(f"{files.path} has no checkpoint yet, and begins again")
        run.state.data = fingerprint(data.split("train"))
    else:
        _take_up(run, saved, saved_recipe)
        _tell_changes(run, contents)
    record = files.record or Record.of(recipe, torch.get_num_threads(), contents)
    # A start is made again as a whole.
    files.go_on(replace(record, contents=contents), recipe, data.source, run.state.step or -1)
    if saved and saved.can_go_on:
        files.save_last(_averaged_checkpoint(run))
    return run


def _opened(
    data: ImageData, files: RunFolder, recipe: Resolved, checkpoint: Checkpoint, reporter: Reporter
) -> Run:
    placement = Placement.choose(recipe.machine.device, recipe.machine.precision)
    run = Run(recipe, files.path, data, checkpoint, placement, reporter)
    run.files = files
    with advice_when_out_of_memory(run.images_at_a_time):
        run.memory = memory_need(run.model, run.images_at_a_time, run.placement)
    return run


def _first_checkpoint(recipe: Resolved, data: ImageData, base: Checkpoint | None) -> Checkpoint:
    """What a run begins with."""
    with seeded(recipe.course.seed):
        checkpoint = start(recipe, data.classes, base)
    if recipe.start.whiten and isinstance(checkpoint.model.embedding.stem, ConvStem):
        _whiten(checkpoint.model.embedding.stem, data, checkpoint.preprocess)
    split: dict[str, Any] = {"val_fraction": recipe.images.val_fraction, "seed": recipe.course.seed}
    if data.held_out:
        split["held_out"] = fingerprint(data.split("val"))
    metadata = {**checkpoint.metadata, "data": data.source, **split}
    return replace(checkpoint, metadata=metadata, multi_label=data.multi_label)


def _whiten(stem: ConvStem, data: ImageData, preprocess: Preprocess) -> None:
    """By training images; where none can be read, the run will say so."""
    count = -(-_WHITENING_PIXELS // math.prod(preprocess.img_size))
    images = thinned(data.split("train"), count)
    batches = list(Loader(images, preprocess).evaluation_batches(EVALUATION_BATCH))
    readable = [batch.images for batch in batches if len(batch.labels)]
    if readable:
        stem.whiten(torch.cat(readable))


def _steps_per_epoch(data: ImageData, recipe: Resolved) -> int:
    """Of a run that is resumed."""
    images = len(data.split("train"))
    if recipe.batches.batch_size > images:
        raise VitralError(
            f"{data.source} has only {images} training images now, and the run began with "
            f"batch_size={recipe.batches.batch_size}; put them back"
        )
    return images // recipe.batches.batch_size


def _threads(recipe: Resolved, files: RunFolder) -> int:
    """As many as the run began with, unless the recipe says otherwise or a GPU computes."""
    here = torch.get_num_threads()
    on_cpu = Placement.choose(recipe.machine.device, recipe.machine.precision).device.type == "cpu"
    if recipe.machine.threads or files.record is None or not on_cpu:
        return recipe.machine.threads or here
    began = files.record.threads
    if began != here:
        files.tell(
            f"computes with {began} threads, as {files.path} began, rather than the {here} of this process, "
            f"which would change the bits; threads={here} takes them"
        )
    return began


def _take_up(run: Run, saved: Saved, saved_recipe: Resolved) -> None:
    """Puts a checkpoint into the run.

    Raises:
        VitralError: if there is nothing to go on with.
    """
    run.state, run._earlier_seconds = saved.state, saved.state.seconds
    if run.files.finished and (run.progress >= 1 or not saved.can_go_on):
        raise _is_finished(run.folder, run.recipe if saved.can_go_on else None)
    now, before = vars(run.recipe.limits), vars(saved_recipe.limits)
    changes = [name for name in BUDGET if now[name] != before[name] and math.isfinite(now[name])]
    if run.progress >= 1 and changes:
        asked = f"{changes[0]}={now[changes[0]]:g}"
        raise VitralError(
            f"{run.folder} is at step {run.state.step} already, past {asked}; name a larger budget, or none"
        )
    if saved.tensors:
        try:
            run.model.load_state_dict(saved.tensors["model"])
            if saved.can_go_on:
                run.average.load_state_dict(saved.tensors["average"])
                run.optimizer.load_state_dict(saved.tensors["optimizer"])
                run.loss_watch.load_state_dict(saved.state.loss_watch)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise VitralError(
                f"the state in {run.folder}/checkpoints is not of this run's model; put its own back"
            ) from error
    if run.progress < 1 and not saved.can_go_on:
        raise _is_finished(run.folder)
    if run.state.best_merit >= 0 and not run.files.has_best:
        _replace_best(run, saved)


def _replace_best(run: Run, saved: Saved) -> None:
    lost = f"the best weights in {run.folder}, of step {run.state.best_step}, are gone or damaged"
    if not saved.can_go_on:
        raise VitralError(f"{lost}; what is left of the run are the last weights, {run.folder / 'last'}")
    run.state.forget_best()
    run.reporter.message(f"{lost}; the best of those from here on take their place")


def _is_finished(folder: Path, budget_of: Resolved | None = None) -> VitralError:
    """What to say; a run whose state is there can go on with more than the budget of its recipe."""
    if budget_of is not None:
        # A second limit beside the one that was reached would change nothing.
        had = ", ".join(f"{name}={value:g}" for name, value in budget_of.limits.given())
        return VitralError(f"{folder} is finished; name a larger budget to go on (it had {had})")
    return VitralError(
        f"{folder} is finished, and the optimizer's state was dropped then (keep_state=true keeps it for a "
        f"larger budget); to train on from its weights, begin a new run with model={folder}"
    )


def _tell_changes(run: Run, contents: Contents) -> None:
    """Says what of the data changed that may change. Raises VitralError for all else."""
    record = run.files.record
    if record is not None:
        for change in record.contents.changes(contents, run.data, run.folder, record.damaged):
            run.reporter.message(change)
    elif run.state.data != fingerprint(run.data.split("train")):
        raise VitralError(
            f"{run.data.source} no longer holds the training images that {run.folder} began with"
        )


def _averaged_checkpoint(run: Run) -> Checkpoint:
    return replace(run.checkpoint, model=merged(run.average))


def _checkpoint_is_due(run: Run) -> bool:
    return run.state.step % (run.recipe.course.checkpoint_steps or run.steps_per_epoch) == 0


def save(run: Run) -> None:
    """Writes all that a resume needs."""
    _refuse_lost(run)
    _take_optimizers_average(run)
    tensors = {
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    run.files.save(_saved(run, tensors), _averaged_checkpoint(run))
    run.files.note_damaged(run.damage.reasons)


def _saved(run: Run, tensors: dict[str, Any]) -> Saved:
    record = run.files.record
    run.state.loss_watch = run.loss_watch.state_dict()
    return Saved(run.state, tensors, description(run.checkpoint), record.id if record else None)


def _metrics(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "step": run.state.step,
        "epoch": run.epoch,
        "seconds": round(run.state.seconds, 3),
        "train_loss": run.recent.loss if run.state.step else None,
        "train_accuracy": run.recent.accuracy if run.state.step else None,
        "val_loss": evaluation.loss,
        **{f"val_{name}": value for name, value in evaluation.metrics.items()},
        "learning_rate": run.learning_rate,
    }


# --- The process ---------------------------------------------------------------------------------


def _refuse_several_processes() -> None:
    """Each would train the whole alone, all into one folder."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise VitralError(
            f"WORLD_SIZE={count}: training runs in one process as yet; start it without torchrun, "
            "or with --nproc-per-node 1"
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same seed gives the same bits on a GPU too, where some kernels otherwise add in any order.

    All of it, and a GPU's random numbers, are the caller's again afterwards.
    """
    memory: Any = torch.utils.deterministic  # an attribute that type checkers do not see
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled, workspace = memory.fill_uninitialized_memory, os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every tensor would be filled before it is written, against bugs that the tests of resuming would show.
    memory.fill_uninitialized_memory = False
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
