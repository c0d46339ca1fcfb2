"""Training: `train` runs a recipe on data into a folder that evaluates, predicts and resumes.

Nothing random is kept between steps: dropout, stochastic depth and mixing are drawn from a generator
seeded by (seed, step), images by (seed, epoch, index). A checkpoint is therefore weights, optimizer,
averages and a step number, and a resumed run ends with the bits of one that was never stopped.
"""

import copy
import io
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral import config
from vitral.adapt import choose_trained, merged
from vitral.augment import batch_mixer, training_transform
from vitral.blocks import ConvStem
from vitral.calibrate import CALIBRATION_IMAGES, Calibration, calibrate
from vitral.checkpoints import Checkpoint, load_checkpoint, save_checkpoint, write_atomically
from vitral.classifier import Classifier
from vitral.data import (
    Batch,
    DamageCount,
    Draw,
    ImageData,
    KeptImages,
    Split,
    evaluation_batches,
    few_shot,
    fingerprint,
    sample,
    seeded,
    thinned,
    training_batches,
)
from vitral.devices import Placement, compiles, cpu_count
from vitral.errors import VitralError
from vitral.evaluate import Evaluation, answered, evaluate, evaluate_multi_label
from vitral.held import HeldImages, can_be_held
from vitral.memory import MemoryNeed, advice_when_out_of_memory, memory_need
from vitral.model import VisionTransformer
from vitral.multilabel import MultiLabelEvaluation
from vitral.objective import build_objective
from vitral.optim import (
    Group,
    build_optimizer,
    learning_rate_at,
    parameter_groups,
    peak_learning_rate,
    set_learning_rate,
)
from vitral.preprocess import Preprocess, open_image
from vitral.probe import fitted_head
from vitral.process import keep_freed_memory
from vitral.recipe import Recipe, resolve, start
from vitral.recipes import RUN_FILE
from vitral.stopping import StopSignal, stop_signal

EVALUATION_BATCH = 256
# Of the images that a stem's first filters are computed from: a patch has 27 numbers for each.
_WHITENING_PIXELS = 1_000_000
# To open more takes more than a second.
_TOLD_IMAGES = 5000
# For the head of a model that is fine-tuned; a part of an epoch.
_PROBED_IMAGES = 2000
# Settings that may change when a run is taken up again, for they do not change what it computes.
_CHANGEABLE = {
    "epochs", "steps", "minutes", "checkpoint_steps", "workers", "device", "accumulate", "checkpoint_layers",
}  # fmt: skip


class Reporter:
    """Told of a run's course; this one says nothing."""

    def message(self, text: str) -> None: ...
    def begin(self, run: "Run") -> None: ...
    def step(self, run: "Run") -> None: ...
    def epoch(self, run: "Run", evaluation: Evaluation | MultiLabelEvaluation) -> None: ...
    def end(self) -> None: ...


@dataclass
class RunState:
    """Where a run stands; with the tensors beside it, all that a resume needs."""

    step: int = 0
    seconds: float = 0.0  # spent so far, earlier sessions included
    best_top1: float = -1.0  # the score; of multi-label data, the mean average precision
    best_merit: float = -1.0  # what chose it
    best_loss: float = float("inf")  # decides between equal accuracies
    best_step: int = 0
    data: str = ""  # fingerprint of the training images


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    finished: bool  # False: stopped by a signal, and ready to resume
    steps: int
    epochs: float
    seconds: float
    best_step: int
    val_top1: float | None  # None: multi-label
    test: dict[str, Any] | None  # the evaluation of the test split, if there is one
    calibration: dict[str, Any] | None = None  # `Calibration`, on the validation images; None: too few
    val_mean_average_precision: float | None = None  # of multi-label data


@dataclass
class Run:
    """Everything a step touches."""

    recipe: Recipe
    folder: Path
    data: ImageData
    checkpoint: Checkpoint
    placement: Placement
    reporter: Reporter
    state: RunState = field(default_factory=RunState)
    memory: MemoryNeed | None = None  # known once the run begins

    def __post_init__(self) -> None:
        assert self.recipe.batch_size is not None
        labels = self.checkpoint.labels
        self.model: VisionTransformer = self.placement.place(self.checkpoint.model).train()
        choose_trained(self.model, self.recipe)
        self.model.checkpoint_layers = self.recipe.checkpoint_layers
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.forward = self._forward()
        self.optimizer = build_optimizer(self.model, self.recipe)
        self.objective = build_objective(
            self.recipe, self.data.split("train"), self.checkpoint.preprocess, labels, self.placement
        )
        assert self.recipe.cutmix is not None
        self._mix = batch_mixer(self.recipe.mixup, self.recipe.cutmix, len(labels))
        self._leave = batch_mixer(0.0, 0.0, len(labels))
        self.steps_per_epoch = len(self.data.split("train")) // self.recipe.batch_size
        self.damage = DamageCount(
            sum(map(len, self.data.splits.values())), self.recipe.max_damaged, self.reporter.message
        )
        self.recent = RunningMean()
        self._held: dict[str, HeldImages] = {}
        self._resumed_at, self._earlier_seconds = time.monotonic(), self.state.seconds

    def _forward(self) -> Callable[[Tensor], list[Tensor]]:
        """Logits of each head of the model that is trained, compiled where that is faster.

        Not compiled are parts of a size that damaged images left, for each size takes half a minute.
        """
        plain = self.model.heads
        if not compiles(self.recipe.device, wanted=self.recipe.compile):
            return plain
        options = self.placement.compile_options(replays=self.recipe.accumulate == 1)
        compiled = torch.compile(plain, **options)
        assert self.recipe.batch_size is not None
        usual = self.images_at_a_time, self.recipe.batch_size % self.images_at_a_time
        return lambda images_BCHW: (compiled if len(images_BCHW) in usual else plain)(images_BCHW)

    @property
    def steps_between_evaluations(self) -> int:
        return self.recipe.eval_epochs * self.steps_per_epoch

    @property
    def epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    @property
    def images_at_a_time(self) -> int:
        assert self.recipe.batch_size is not None
        return math.ceil(self.recipe.batch_size / self.recipe.accumulate)

    def held(self, name: str) -> HeldImages | None:
        """The images of a split in memory, opened when first asked for; None if they are large or many."""
        split, preprocess = self.data.split(name), self.checkpoint.preprocess
        if not can_be_held(split, preprocess):
            return None
        if name not in self._held:
            if len(split) > _TOLD_IMAGES:
                self.reporter.message(f"opening {len(split):,} images")
            device, workers = self.placement.device, self.recipe.workers or 0
            self._held[name] = HeldImages.open(split, preprocess, device, workers)
        return self._held[name]

    def parts(self, tensor_B: Tensor) -> tuple[Tensor, ...]:
        """A batch in pieces of `images_at_a_time` or less."""
        return tensor_B.split(self.images_at_a_time)

    def sized(self, images_BCHW: Tensor) -> Tensor:
        """The images, in whole patches from half their size to the whole while `small_images` passes.

        Detail teaches little at first, and a step on a quarter of the patches takes half the time.
        """
        assert self.recipe.small_images is not None
        if self.progress >= self.recipe.small_images:
            return images_BCHW
        share = 0.5 + 0.5 * self.progress / self.recipe.small_images
        patch = self.model.config.patch_size
        sides = [max(round(share * side / patch), 1) * patch for side in images_BCHW.shape[2:]]
        return F.interpolate(images_BCHW, sides, mode="bilinear", antialias=True)

    def mixed(self, images_BCHW: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets (B, L) after mixup or CutMix, the likelier the more often an image was seen.

        The first passes learn more from images as they are; later ones would learn them by heart.
        """
        passes = self.recipe.mix_passes
        if passes and float(torch.rand(())) >= self.epoch / passes:
            return self._leave(images_BCHW, labels)
        return self._mix(images_BCHW, labels)

    @property
    def total_steps(self) -> int | None:
        """The budget in steps; None if only time limits it."""
        limits = [self.recipe.steps] if self.recipe.steps else []
        if self.recipe.epochs:
            limits.append(max(round(self.recipe.epochs * self.steps_per_epoch), 1))
        return min(limits, default=None)

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        shares = []
        if self.total_steps:
            shares.append(self.state.step / self.total_steps)
        if self.recipe.minutes:
            shares.append(self.state.seconds / (60 * self.recipe.minutes))
        return min(max(shares), 1.0)

    def tick(self) -> None:
        self.state.seconds = self._earlier_seconds + time.monotonic() - self._resumed_at


# --- The run -------------------------------------------------------------------------------------


def train(
    data: ImageData,
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Summary:
    """Trains `recipe` on `data` into `folder`.

    Args:
        data: with a "train" and a "val" split; a "test" split is evaluated once, at the end.
        folder: becomes a model folder with the best weights, and all that a resume needs.
        recipe: settings; those that are None are chosen from the data.
        resume: go on with the run in `folder`, with the recipe that it began with.
        reporter: told of the run's course.

    Raises:
        VitralError: if the settings, the data or the folder cannot be used, the loss is lost, or
            torchrun started several processes.
    """
    _refuse_several_processes()
    keep_freed_memory()
    run = _open_run(data, folder, recipe, reporter or Reporter(), resume=resume)
    if resume and run.progress >= 1:
        raise VitralError(f"{folder} is finished; name a larger budget to go on, for example epochs=")
    with _deterministic(), stop_signal() as stop, advice_when_out_of_memory(run.images_at_a_time):
        run.memory = memory_need(run.model, run.images_at_a_time, run.placement)
        run.reporter.begin(run)
        for note in run.checkpoint.notes:
            run.reporter.message(note)
        try:
            if run.recipe.probe_head and not run.state.step:
                _probe_head(run)
            finished = _loop(run, stop)
        finally:
            run.reporter.end()
    return _conclude(run, finished=finished)


def _probe_head(run: Run) -> None:
    """A drawn head's first gradients spoil what the layers below have learnt (arXiv:2202.10054, §3)."""
    images = few_shot(
        run.data.split("train"), max(_PROBED_IMAGES // len(run.data.classes), 1), run.recipe.seed
    )
    classifier = Classifier(run.model, run.checkpoint.preprocess, run.data.classes, run.placement)
    head, held_out_top1 = fitted_head(classifier, images, run.recipe.seed)
    for model in (run.model.train(), run.average):
        head.put_into(model)
    judged = f", right on {held_out_top1:.1%} of those held out" if held_out_top1 is not None else ""
    run.reporter.message(f"the head begins as a linear probe of {len(images):,} images{judged}")


def _loop(run: Run, stop: StopSignal) -> bool:
    """Steps until the budget is spent (True) or a signal comes (False)."""
    with closing(_training_batches(run)) as batches:
        for batch in batches:
            run.damage.add(batch)
            if len(batch.labels):
                step(run, batch)
            run.state.step += 1
            run.tick()
            run.reporter.step(run)
            done = run.progress >= 1
            if done or run.state.step % run.steps_between_evaluations == 0:
                _finish_epoch(run)
            if done or stop.requested or _checkpoint_is_due(run):
                save(run)
            if done or stop.requested:
                return done
    raise AssertionError("training batches never end")


def step(run: Run, batch: Batch) -> None:
    """One update: forward, loss, backward for each part of the batch; clip, optimizer, averaged weights."""
    with seeded(run.recipe.seed, run.state.step, device=run.placement.device):
        images_BCHW = run.sized(run.placement.put(batch.images))
        images_BCHW, targets_BL = run.mixed(images_BCHW, run.placement.put(batch.labels))
        for images_PCHW, targets_PL in zip(run.parts(images_BCHW), run.parts(targets_BL), strict=True):
            with run.placement.autocast():
                heads = run.forward(images_PCHW)
            loss = run.objective(heads, targets_PL, images_PCHW)
            (loss * (len(images_PCHW) / len(images_BCHW))).backward()
            run.recent.add(loss.detach(), _hits(run, heads[0], targets_PL), len(targets_PL))
    if run.recipe.clip_norm:
        nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip_norm)
    set_learning_rate(run.optimizer, learning_rate_at(run.progress, run.recipe))
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_average(run)


def _hits(run: Run, logits_PL: Tensor, targets_PL: Tensor) -> Tensor:
    """How many images' likeliest class is the target's; of multi-label data, one that the image shows.

    An image of no class is never among them.
    """
    likeliest_P = logits_PL.argmax(1)
    if run.data.multi_label:
        return (targets_PL.gather(1, likeliest_P[:, None]) > 0).sum()
    return (likeliest_P == targets_PL.argmax(1)).sum()


def _finish_epoch(run: Run) -> None:
    """Evaluates the averaged weights and keeps them if they are the best so far."""
    _refuse_lost(run)
    _take_optimizers_average(run)
    evaluation = _evaluate_split(run, "val")
    if (evaluation.merit, -evaluation.loss) > (run.state.best_merit, -run.state.best_loss):
        run.state.best_top1, run.state.best_loss = evaluation.score, evaluation.loss
        run.state.best_merit = evaluation.merit
        run.state.best_step = run.state.step
        save_checkpoint(run.folder, _averaged_checkpoint(run))
    _append_metrics(run, evaluation)
    run.reporter.epoch(run, evaluation)
    run.recent = RunningMean()


def _refuse_lost(run: Run) -> None:
    """Raises VitralError if the loss is no number any more."""
    if not math.isfinite(run.recent.loss):
        raise VitralError(
            f"the loss is {run.recent.loss} after step {run.state.step}; lower learning_rate "
            f"(it is {run.recipe.learning_rate}) or set precision=float32, and start again"
        )


def _conclude(run: Run, *, finished: bool) -> Summary:
    test = calibration = None
    if finished:
        best = load_checkpoint(run.folder)
        run.average = run.placement.place(best.model).eval()
        calibration = _calibrate(run)
        temperature = calibration.temperature if calibration else 1.0
        save_checkpoint(run.folder, replace(best, temperature=temperature))
        if "test" in run.data.splits:
            # The one look at the test split, with the weights and the temperature that validation chose.
            test = _evaluate_split(run, "test", temperature).to_dict()
    summary = Summary(
        finished,
        run.state.step,
        run.epoch,
        run.state.seconds,
        run.state.best_step,
        None if run.data.multi_label else run.state.best_top1,
        test,
        asdict(calibration) if calibration else None,
        run.state.best_top1 if run.data.multi_label else None,
    )
    if finished:
        content = json.dumps(asdict(summary), indent=1) + "\n"
        write_atomically(run.folder / "summary.json", content.encode())
    return summary


def _evaluate_split(run: Run, name: str, temperature: float = 1.0) -> Evaluation | MultiLabelEvaluation:
    # The test images are looked at once.
    held = run.held(name) if name == "val" else None
    if held:
        batches = held.evaluation_batches(EVALUATION_BATCH)
    else:
        batches = _evaluation_batches(run, run.data.split(name))
    if run.data.multi_label:
        return evaluate_multi_label(run.average, batches, run.data.classes, run.placement, run.damage.add)
    return evaluate(
        run.average, batches, run.data.classes, run.placement, run.damage.add, temperature=temperature
    )


def _calibrate(run: Run) -> Calibration | None:
    """Of the averaged weights, on the validation images; for softmax's probabilities only."""
    if run.data.multi_label:
        return None
    images = sample(run.data.split("val"), CALIBRATION_IMAGES, run.recipe.seed)
    answers = answered(run.average, _evaluation_batches(run, images), run.placement, run.damage.add)
    return calibrate(*(torch.cat(parts) for parts in zip(*answers, strict=True)))


def _evaluation_batches(run: Run, split: Split) -> Generator[Batch]:
    return evaluation_batches(
        split, run.checkpoint.preprocess, batch_size=EVALUATION_BATCH, workers=run.recipe.workers or 0
    )


def _training_batches(run: Run) -> Generator[Batch]:
    recipe = run.recipe
    assert recipe.batch_size is not None
    draw = Draw(balanced=recipe.sampling == "balanced", repeats=recipe.repeats)
    if recipe.augmentation.only_moves and (held := run.held("train")):
        return held.training_batches(
            recipe.augmentation,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            first_step=run.state.step,
            draw=draw,
        )
    split = run.data.split("train")
    if not recipe.workers:  # each of them would keep images of its own
        split = replace(split, images=KeptImages(split.images, open_image))
    return training_batches(
        split,
        training_transform(run.checkpoint.preprocess, recipe.augmentation),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        first_step=run.state.step,
        draw=draw,
        workers=recipe.workers or 0,
        pin_memory=run.placement.device.type == "cuda",
    )


def groups_of(recipe: Recipe, data: ImageData) -> tuple[list[Group], list[str]]:
    """The parameter groups of a run that is not begun, and the names of what it would not train.

    Raises:
        VitralError: as `train`.
    """
    recipe = resolve(recipe, data, cpu_count())
    model = start(recipe, data.classes).model
    choose_trained(model, recipe)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    rate = peak_learning_rate(recipe)
    return [{**group, "lr": rate * group["scale"]} for group in parameter_groups(model, recipe)], frozen


# --- Averages --------------------------------------------------------------------------------


@torch.no_grad()
def update_average(run: Run) -> None:
    """An exponential moving average with a memory that starts short, so that early weights fade."""
    if run.recipe.optimizer == "schedule_free":  # see `_take_optimizers_average`
        return
    assert run.recipe.ema_decay is not None
    decay = min(run.recipe.ema_decay, (1 + run.state.step) / (10 + run.state.step))
    averages: list[Tensor] = list(run.average.parameters())
    currents: list[Tensor] = list(run.model.parameters())
    torch._foreach_lerp_(averages, currents, 1 - decay)


@torch.no_grad()
def _take_optimizers_average(run: Run) -> None:
    """A schedule-free optimizer keeps the average itself; the weights are left to the bit as they were."""
    if run.recipe.optimizer != "schedule_free":
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

    def add(self, mean_loss: Tensor, correct: Tensor, samples: int) -> None:
        self._loss = self._loss + mean_loss * samples
        self._correct = self._correct + correct
        self._samples += samples

    @property
    def loss(self) -> float:
        return float(self._loss) / max(self._samples, 1)

    @property
    def accuracy(self) -> float:
        return float(self._correct) / max(self._samples, 1)


# --- The run on disk -----------------------------------------------------------------------------


def _open_run(data: ImageData, folder: Path, recipe: Recipe, reporter: Reporter, *, resume: bool) -> Run:
    if (folder / RUN_FILE).exists() and not resume:
        raise VitralError(f"{folder} already holds a run; go on with --resume, or choose another --out")
    if "val" not in data.splits:
        raise VitralError(f"{data.source} has no validation images; give a val folder, or val_fraction=0.2")
    recipe = resumed_recipe(folder, recipe) if resume else resolve(recipe, data, cpu_count())
    placement = Placement.choose(recipe.device, recipe.precision)
    last = folder / "last"
    if resume and _state_file(folder).exists():
        run = Run(recipe, folder, data, load_checkpoint(last), placement, reporter)
        _restore(run)
        _write_recipe(folder, recipe, data)  # a larger budget holds for the next resume too
        return run
    _truncate_metrics(folder / "metrics.jsonl", 0)
    with seeded(recipe.seed):
        checkpoint = start(recipe, data.classes)
    if recipe.whiten and isinstance(checkpoint.model.embedding.stem, ConvStem):
        _whiten(checkpoint.model.embedding.stem, data, checkpoint.preprocess)
    split: dict[str, Any] = {"val_fraction": recipe.val_fraction, "seed": recipe.seed}
    if data.held_out:
        split["held_out"] = fingerprint(data.split("val"))
    metadata = {**checkpoint.metadata, "data": data.source, **split}
    checkpoint = replace(checkpoint, metadata=metadata, multi_label=data.multi_label)
    _write_recipe(folder, recipe, data)
    state = RunState(data=fingerprint(data.split("train")))
    return Run(recipe, folder, data, checkpoint, placement, reporter, state)


def _whiten(stem: ConvStem, data: ImageData, preprocess: Preprocess) -> None:
    """By training images; where none can be read, the run will say so."""
    count = -(-_WHITENING_PIXELS // math.prod(preprocess.img_size))
    images = thinned(data.split("train"), count)
    batches = list(evaluation_batches(images, preprocess, batch_size=EVALUATION_BATCH))
    readable = [batch.images for batch in batches if len(batch.labels)]
    if readable:
        stem.whiten(torch.cat(readable))


def resumed_recipe(folder: Path, asked: Recipe) -> Recipe:
    """The recipe that the run in `folder` began with, and what of `asked` may change it.

    Raises:
        VitralError: if there is no run, or `asked` would change what it computes.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise VitralError(f"{file.parent} holds no run to resume; leave out --resume to begin one")
    saved = config.build(Recipe, config.read_toml(file))
    changes = {name: value for name, value in vars(asked).items() if value != getattr(Recipe(), name)}
    fixed = sorted(name for name in changes.keys() - _CHANGEABLE if changes[name] != getattr(saved, name))
    if fixed:
        raise VitralError(
            f"{fixed[0]} cannot change in a resumed run; what can: {', '.join(sorted(_CHANGEABLE))}"
        )
    return replace(saved, **changes)


def _write_recipe(folder: Path, recipe: Recipe, data: ImageData) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(
        ["vitral", "train", data.source, "--out", "NEW_DIR", "--recipe", str(folder / RUN_FILE)]
    )
    header = f"Run again with: {command}"
    write_atomically(folder / RUN_FILE, config.to_toml(recipe, header).encode())


def _averaged_checkpoint(run: Run) -> Checkpoint:
    return replace(run.checkpoint, model=merged(run.average))


def _state_file(folder: Path) -> Path:
    return folder / "checkpoints" / "state.pt"


def _checkpoint_is_due(run: Run) -> bool:
    return run.state.step % (run.recipe.checkpoint_steps or run.steps_per_epoch) == 0


def save(run: Run) -> None:
    """Writes all that a resume needs; one file, so that it is never half of one step and half of another."""
    _refuse_lost(run)
    _take_optimizers_average(run)
    save_checkpoint(run.folder / "last", _averaged_checkpoint(run))
    content = io.BytesIO()
    torch.save(
        {
            "model": run.model.state_dict(),
            "average": run.average.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "state": asdict(run.state),
        },
        content,
    )
    _state_file(run.folder).parent.mkdir(exist_ok=True)
    write_atomically(_state_file(run.folder), content.getvalue())


def _restore(run: Run) -> None:
    file = _state_file(run.folder)
    try:
        saved = torch.load(file, map_location=run.placement.device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a damaged file
        raise VitralError(f"{file} is damaged and cannot be resumed: {error}") from error
    run.state = RunState(**saved["state"])
    if run.state.data != fingerprint(run.data.split("train")):
        raise VitralError(
            f"{run.data.source} no longer holds the training images that {run.folder} began with"
        )
    run.model.load_state_dict(saved["model"])
    run.average.load_state_dict(saved["average"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run._earlier_seconds = run.state.seconds
    _truncate_metrics(run.folder / "metrics.jsonl", run.state.step)


def _append_metrics(run: Run, evaluation: Evaluation | MultiLabelEvaluation) -> None:
    record = {
        "step": run.state.step,
        "epoch": run.epoch,
        "seconds": round(run.state.seconds, 3),
        "train_loss": run.recent.loss,
        "train_accuracy": run.recent.accuracy,
        "val_loss": evaluation.loss,
        **{f"val_{name}": value for name, value in evaluation.metrics.items()},
        "learning_rate": learning_rate_at(run.progress, run.recipe),
    }
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def _truncate_metrics(file: Path, step: int) -> None:
    """Drops what a killed run wrote after the checkpoint that it resumes from."""
    if file.exists():
        kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
        write_atomically(file, "".join(f"{line}\n" for line in kept).encode())


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
    """The same seed gives the same bits on a GPU too, where some kernels otherwise add in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic  # an attribute that type checkers do not see
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every tensor would be filled before it is written, against bugs that the tests of resuming would show.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
