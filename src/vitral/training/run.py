"""`Run`: the model that is trained, with all that its steps touch."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.checkpoints.folder import Checkpoint
from vitral.data.batches import Batch, DamageCount
from vitral.data.image_data import ImageData
from vitral.data.loader import Loader
from vitral.data.randomness import seeded
from vitral.data.split import Split
from vitral.data.subsets import in_turns
from vitral.data.workers import Loading
from vitral.evaluation.task import SINGLE_LABEL, Task, task_of
from vitral.images.augment import batch_mixer
from vitral.model.vit import VisionTransformer
from vitral.recipes.optimizers import OPTIMIZERS
from vitral.recipes.schema import Resolved
from vitral.runtime.devices import Placement, compiles
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import StopSignal
from vitral.training.adapt import choose_trained, merged
from vitral.training.budget import Budget
from vitral.training.clock import Clock
from vitral.training.listeners import Listeners
from vitral.training.loss_watch import LossWatch
from vitral.training.memory import MemoryNeed, advice_when_out_of_memory, memory_need
from vitral.training.muon import Owners, Together
from vitral.training.objective import build_objective
from vitral.training.optimizers import ChainedOptimizer, Group, build_optimizer, parameter_groups
from vitral.training.parts import OURS, Parts, refuse_other_logits
from vitral.training.run_folder import RunFolder
from vitral.training.schedule import Schedule, scaled_rate
from vitral.training.sharding import laid_out_like, shard, whole
from vitral.training.state import RunState
from vitral.training.step import Computation, RunningMean, Step, average_share

# To open more takes more than a second.
_TOLD_IMAGES = 5000


class Run:
    """A model in training.

    Args:
        recipe: every setting.
        data: with a "train" and a "val" split.
        checkpoint: what the run begins with; its model becomes the one that is trained.
        placement: where and in which precision it computes.
        files: where it is kept.
        tell: told of its course.
        parts: what takes the place of its own.
    """

    def __init__(
        self,
        recipe: Resolved,
        data: ImageData,
        checkpoint: Checkpoint,
        placement: Placement,
        files: RunFolder,
        tell: Listeners,
        parts: Parts = OURS,
    ) -> None:
        self.recipe, self.data, self.checkpoint = recipe, data, checkpoint
        self.placement, self.files, self.tell, self.parts = placement, files, tell, parts
        self.world = files.world
        refuse_misfit(recipe, self.world.size)
        self.state = RunState()
        steps_per_epoch = len(data.split("train")) // recipe.batches.batch_size
        self.budget = Budget(recipe.limits, recipe.course, steps_per_epoch, self.state)
        self.sharded = recipe.batches.shard and not self.world.alone
        # A model that is to be divided need not fit the device before.
        waits = torch.device("cpu") if self.sharded and parts.model is None else None
        self.model: VisionTransformer = placement.place(checkpoint.model, training=True, on=waits)
        if parts.model is not None:
            refuse_other_logits(self.model, checkpoint.preprocess, checkpoint.labels, placement)
        self.model.train()
        choose_trained(self.model, recipe.tuning.trained, recipe.tuning.lora_rank, recipe.course.seed)
        if recipe.batches.checkpoint_layers:
            self.model.checkpoint_layers = True
        if parts.prepare:
            parts.prepare(self.model)
        self.world.align(self.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()  # whole in every process
        if self.sharded:
            shard(self.model, placement)
            self.average = self.average.to(placement.device)
        self.schedule = schedule_of(recipe)
        self._build_step()
        num_classes = len(checkpoint.labels)
        self._mix = batch_mixer(recipe.mixing.mixup, recipe.mixing.cutmix, num_classes)
        self._leave = batch_mixer(0.0, 0.0, num_classes)
        images = sum(map(len, data.splits.values()))
        self.damage = DamageCount(images, recipe.images.max_damaged, tell.message)
        self.recent = RunningMean(recipe.batches.parts)
        # What `saving` found and copied of the weights as they are; None: a step was taken since.
        self.settled: RunningMean | None = None
        self.copied: Checkpoint | None = None
        self.loss_watch = LossWatch(steps_per_epoch, placement.device, recipe.batches.parts, self.world)
        self.told_of_chance = False
        self.clock = Clock()
        self.loading = Loading(recipe.machine.workers, tell.message)
        self._loaders: dict[str, Loader] = {}

    def _build_step(self) -> None:
        recipe, how = self.recipe, self.recipe.optimization
        # What steps let follow the weights: the average, or what this process has of it (`complete_average`).
        self._followers: list[Tensor] = list(self.average.parameters())
        if self.sharded:
            self._followers = [weight.detach().clone() for weight in self.model.parameters()]
        groups = groups_by_recipe(self.model, recipe)
        if self.parts.optimizer:
            self.optimizer = ChainedOptimizer([self.parts.optimizer(groups)], self.placement.device)
        else:
            sharing = Owners(self.world) if self.sharded else Together(self.world, recipe.batches.parts)
            self.optimizer = build_optimizer(
                how.optimizer, groups, betas=how.betas, muon_momentum=how.muon_momentum, sharing=sharing
            )
        self.objective = build_objective(
            recipe.criterion,
            self.data.split("train"),
            self.checkpoint.preprocess,
            self.checkpoint.labels,
            self.placement,
        )
        if self.parts.loss:
            self.objective = replace(self.objective, loss=self.parts.loss)
        compiled = compiles(recipe.machine.device, wanted=recipe.machine.compile_wanted)
        # A loss of the user's own may ask the device for a number, which no recording takes; and none takes
        # what processes tell each other.
        simple = self.parts.loss is None and recipe.batches.parts == 1
        captured = compiled and self.optimizer.capturable and simple
        self._update = Step(
            self.model,
            [] if self.optimizer.keeps_average else self._followers,  # see `complete_average`
            self.objective,
            self.task.hits,
            self.optimizer,
            Computation(
                recipe.batches.batch_size,
                recipe.batches.accumulate,
                compiled,
                captured,
                recipe.batches.parts,
                self.world,
                self.sharded,
            ),
            self.placement,
            how.clip_norm,
        )

    # --- What it is ----------------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        return task_of(self.data)

    @property
    def is_tuning(self) -> bool:
        """Whether the run begins from trained weights."""
        return "base" in self.checkpoint.metadata

    @property
    def images_at_a_time(self) -> int:
        return self._update.computation.images_at_a_time

    @cached_property
    def memory(self) -> MemoryNeed:
        with advice_when_out_of_memory(self.images_at_a_time):
            preprocess = self.checkpoint.preprocess
            shape = preprocess.channels, *preprocess.img_size
            if not self.sharded:
                return memory_need(self.model, shape, self.images_at_a_time, self.placement)
            return self._memory_of_shard(shape)

    def _memory_of_shard(self, image_shape: tuple[int, ...]) -> MemoryNeed:
        """Counted on the average, which this process has as a whole and can run alone."""
        model = self.average.train()
        for average, weight in zip(model.parameters(), self.model.parameters(), strict=True):
            average.requires_grad_(weight.requires_grad)
        try:
            need = memory_need(model, image_shape, self.images_at_a_time, self.placement)
        finally:
            model.requires_grad_(False).eval()
        average = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        return replace(need, fixed=need.fixed // self.world.size + average)

    @property
    def averaged_checkpoint(self) -> Checkpoint:
        """What is evaluated and kept."""
        adapted = self.recipe.tuning.trained == "lora"
        return replace(self.checkpoint, model=merged(self.average) if adapted else self.average)

    # --- Its images ----------------------------------------------------------------------------------

    def loader(self, name: str, stop: StopSignal | None = None) -> Loader:
        """Of a split's batches; few and small images are read into memory when it is first asked for.

        Not the test images, which are looked at once, nor what is altered by more than `Moves`.
        """
        if name in self._loaders:
            return self._loaders[name]
        stop = stop if self.world.alone else None  # several stop together, between steps
        trained = name == "train"
        keeps = self._moves_alone if trained else name == "val"
        preprocess, device = self.checkpoint.preprocess, self.placement.device
        self._loaders[name] = loader = Loader(
            self._validation if name == "val" else self.data.split(name),
            replace(preprocess, decoding=self.recipe.images.decoding) if trained else preprocess,
            replace(self.loading, stop=stop, pin_memory=device.type == "cuda") if trained else self.loading,
            keep_on=device if keeps else None,
            device=device,
            again=name != "test",
        )
        if loader.in_memory and len(loader.split) > _TOLD_IMAGES:
            self.tell.message(f"opening {len(loader.split):,} images")
        with self.clock.of("opening"):
            return loader.open(partial(self.tell.preparing, "opening"))

    @property
    def _moves_alone(self) -> bool:
        """Whether training does no more to an image than shift and mirror it."""
        return self.parts.transform is None and self.recipe.alteration.augmentation.only_moves

    @property
    def _validation(self) -> Split:
        """The validation images; where time is the budget, or was, in turns of the classes.

        Any first part is even over the classes then.
        """
        split = self.data.split("val")
        if not self.recipe.limits.timed and not self.state.val_images:
            return split
        if self.task is not SINGLE_LABEL:
            return split.take(np.random.default_rng(self.recipe.course.seed).permutation(len(split)))
        return split.take(in_turns(split, self.recipe.course.seed))

    @property
    def validated(self) -> np.ndarray:
        """The rows of `loader("val")` to evaluate: where time is the budget, as many as it first allowed."""
        return np.arange(self.state.val_images or len(self.data.split("val")))

    # --- A step --------------------------------------------------------------------------------------

    @property
    def mine(self) -> range:
        """The parts of each batch that this process computes."""
        return self.world.share(self.recipe.batches.parts)

    def meet(self, batches: Iterable[Batch], stop: StopSignal) -> int | None:
        """Say before a step all that the processes need to know of each other; they talk once a step.

        They learn whether anybody wants the run to stop, the first one's time, which images cannot be read,
        and how many can: the answer, or None if the run is to stop. Every process asks.

        Raises:
            VitralError: if too many cannot be read.
        """
        found = [(len(batch.labels), batch.damaged) for batch in batches]
        fresh = [image for _, images in found for image in images if image[0] not in self.damage.reasons]
        seconds = self.budget.clock() if self.world.is_first else 0.0
        asked, seconds, sound, damaged = self.world.sum(
            float(stop.requested), seconds, sum(count for count, _ in found), len(fresh)
        )
        self.budget.tick(seconds)
        if damaged:
            for images in self.world.exchanged(fresh):
                self.damage.note(images)
        return None if asked else int(sound)

    def step(self, *batches: Batch, sound: int | None = None) -> list[Tensor]:
        """Take one update on a batch; gives its mean loss, on the device, as the sum of one for each part.

        Args:
            batches: the parts of the batch that are this process's.
            sound: how many images of all its parts can be read; None: these are all.
        """
        self.settled = self.copied = None
        sound = sound or sum(len(batch.labels) for batch in batches)
        share = average_share(self.state.step, self.recipe.optimization.ema_decay)
        losses = []
        for part, batch in zip(self.mine, batches, strict=True):
            with seeded(*self._key(part), device=self.placement.device):
                images_BCHW, targets_BL = self._learnt_from(batch)
                if self.recipe.batches.parts == 1:
                    result, weight = self._update(images_BCHW, targets_BL, self.learning_rate, share), 1.0
                else:
                    weight, last = len(batch.labels) / sound, part == self.mine[-1]
                    result = self._update.learn(images_BCHW, targets_BL, weight, part, last=last)
            if len(batch.labels):
                self.recent.add(result, len(batch.labels), part)
            losses.append(result.loss * weight)
        if self.recipe.batches.parts > 1:
            self._update.update(self.learning_rate, share)
        return losses

    def _key(self, part: int) -> tuple[int, ...]:
        """What all that is random in a part of this step follows from."""
        key = self.recipe.course.seed, self.state.step
        return key if self.recipe.batches.parts == 1 else (*key, part)

    def _learnt_from(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images and targets (B, L) of a part; where none can be read, an image of nothing.

        It weighs nothing, and its gradients are 0: the processes do the same in every step.
        """
        if not len(batch.labels):
            preprocess = self.checkpoint.preprocess
            shape = 1, preprocess.channels, *preprocess.img_size
            device, labels = self.placement.device, len(self.checkpoint.labels)
            return torch.zeros(shape, device=device), torch.full((1, labels), 1 / labels, device=device)
        images_BCHW = self.sized(self.placement.put(batch.images))
        return self.mixed(images_BCHW, self.placement.put(batch.labels))

    @property
    def learning_rate(self) -> float:
        """Of this step."""
        return self.state.rate_share * self.schedule.at(self.budget.progress)

    def sized(self, images_BCHW: Tensor) -> Tensor:
        """Reduce images, in whole patches: from half their size to the whole while `small_images` passes.

        Detail teaches little at first, and a step on a quarter of the patches takes half the time.
        """
        small, progress = self.recipe.batches.small_images, self.budget.progress
        if progress >= small:
            return images_BCHW
        share = 0.5 + 0.5 * progress / small
        patch = self.model.config.patch_size
        sides = [max(round(share * side / patch), 1) * patch for side in images_BCHW.shape[2:]]
        return F.interpolate(images_BCHW, sides, mode="bilinear", antialias=True)

    def mixed(self, images_BCHW: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images and targets (B, L) by mixup or CutMix, the likelier the more often an image was seen.

        The first passes learn more from images as they are; later ones would learn them by heart.
        """
        passes = self.recipe.mixing.mix_passes
        if passes and float(torch.rand(())) >= self.budget.epoch / passes:
            return self._leave(images_BCHW, labels)
        return self._mix(images_BCHW, labels)

    def count_step(self) -> None:
        """Count a step that was taken. Several processes go by the time that they learnt in `meet`."""
        self.state.step += 1
        if self.world.alone:
            self.budget.tick()

    def tick(self) -> None:
        """Look at the first process's clock. Every process asks."""
        self.budget.tick(self.world.first(self.budget.clock()))

    def best(self) -> Checkpoint:
        """The model of the best weights. Every process asks, and the first reads it."""
        found = [] if self.world.is_first else [copy.deepcopy(self.averaged_checkpoint)]
        self.world.from_first(lambda: found.append(self.files.best()))
        self.world.align(found[0].model)
        return found[0]

    @torch.no_grad()
    def complete_average(self) -> None:
        """Copy what steps leave out of the average: buffers, such as a batch norm's statistics.

        And the average that an optimizer keeps itself; the weights stay to the bit. Of a sharded run, whose
        steps change each process's piece of the average, all of it. Every process asks.
        """
        for average, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            average.copy_(buffer)
        if not self.optimizer.keeps_average:
            if self.sharded:
                self._gather(self._followers)
            return
        weights: list[Tensor] = list(self.model.parameters())
        before = [weight.clone() for weight in weights]
        self.optimizer.average(on=True)
        self._gather(weights)
        self.optimizer.average(on=False)
        for weight, was in zip(weights, before, strict=True):
            weight.copy_(was)

    def _gather(self, weights: list[Tensor]) -> None:
        for average, weight in zip(self.average.parameters(), weights, strict=True):
            average.copy_(whole(weight))

    @torch.no_grad()
    def follow_average(self) -> None:
        """Let steps go on from what `average` is now."""
        if self.sharded:
            for follower, average in zip(self._followers, self.average.parameters(), strict=True):
                follower.copy_(laid_out_like(follower, average))

    def tensors(self) -> dict[str, Any]:
        """All that further steps need, as state dictionaries; divided where the run is sharded.

        The average is what `complete_average` left.
        """
        average = self.average.state_dict()
        if self.sharded and not self.optimizer.keeps_average:
            names = [name for name, _ in self.average.named_parameters()]
            average.update(zip(names, self._followers, strict=True))
        return {
            "model": self.model.state_dict(),
            "average": average,
            "optimizer": self.optimizer.state_dict(),
        }


def refuse_misfit(recipe: Resolved, processes: int) -> None:
    """Raises VitralError if batches cannot be divided as the recipe says, or shared by so many processes."""
    size, parts = recipe.batches.batch_size, recipe.batches.parts
    if size % parts:
        below = size - size % parts
        nearest = f"{below} or {below + parts}" if below else f"{parts}"
        raise VitralError(
            f"batch_size={size} cannot be divided into parts={parts}; take batch_size={nearest}"
        )
    if recipe.batches.shard and parts % processes:
        raise VitralError(
            f"shard=true needs as many parts in every process, and parts={parts} cannot be shared so by "
            f"{processes}; start as many processes as divide {parts}, or begin a run with parts={processes}"
        )
    if processes > parts:
        raise VitralError(
            f"{processes} processes cannot share batches in parts={parts}; start {parts} at most, or begin a "
            f"run with parts={processes}"
        )


def groups_by_recipe(model: VisionTransformer, recipe: Resolved) -> list[Group]:
    return parameter_groups(
        model,
        layer_decay=recipe.optimization.layer_decay,
        weight_decay=recipe.optimization.weight_decay,
        orthogonal=OPTIMIZERS[recipe.optimization.optimizer].takes_matrices,
    )


def schedule_of(recipe: Resolved) -> Schedule:
    rate = recipe.rate
    peak = scaled_rate(rate.learning_rate, recipe.batches.batch_size, rate.learning_rate_batch)
    return Schedule(rate.schedule, peak, rate.warmup, rate.decay, rate.final_share)
