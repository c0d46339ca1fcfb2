"""One update of the weights: forward, loss, backward, clipping, optimizer, averages; on a GPU one CUDA graph.

A step of a small model is hundreds of kernels of a few microseconds each, which Python launches more slowly
than a GPU runs them. So a step asks the host nothing, and what changes from step to step, the batch, the rate
and the average's share, stands in tensors: recorded once as a CUDA graph, it is one launch from then on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from vitral.runtime.devices import Placement
from vitral.runtime.world import ALONE, World
from vitral.training.distributed import gradients_of
from vitral.training.optimizers import ChainedOptimizer
from vitral.training.sharding import local, total_norm

# Steps before a graph is recorded: compilers run in them, kernels are chosen, optimizers make their state.
_WARM_UP = 3


class Objective(Protocol):
    """The mean loss of a batch: of each head's logits (B, L), for targets (B, L), of images (B, C, H, W)."""

    def __call__(self, heads: Sequence[Tensor], targets_BL: Tensor, images_BCHW: Tensor, /) -> Tensor: ...


Hits = Callable[[Tensor, Tensor], Tensor]  # logits (B, L), targets (B, L) -> how many images are right


@dataclass(frozen=True)
class Computation:
    """How a step is computed; it changes results by rounding at most."""

    batch_size: int
    accumulate: int = 1  # pieces that a part is computed in, one after the other, to fit the memory
    compiled: bool = False
    captured: bool = False  # recorded as a CUDA graph; the optimizer has to be capturable
    parts: int = 1  # of a batch, each with random numbers of its own
    world: World = ALONE  # the processes that share the parts
    sharded: bool = False  # whether they share the weights too (`sharding.shard`)

    @property
    def part_size(self) -> int:
        return self.batch_size // self.parts

    @property
    def images_at_a_time(self) -> int:
        return -(-self.part_size // self.accumulate)

    @property
    def passes(self) -> int:
        """Of a part that has all its images."""
        return -(-self.part_size // self.images_at_a_time)


@dataclass(frozen=True)
class StepResult:
    """Of one part of a batch, on the device; a captured step overwrites them at its next call."""

    loss: Tensor  # mean over the images
    hits: Tensor  # how many images were right


class RunningMean:
    """Loss and accuracy since the last evaluation, of this process's parts; reads the device only when asked.

    Args:
        parts: of each batch.
    """

    def __init__(self, parts: int = 1) -> None:
        self._losses: list[Tensor | float] = [0.0] * parts
        self._correct: list[Tensor | int] = [0] * parts
        self._samples = [0] * parts

    def add(self, result: StepResult, samples: int, part: int = 0) -> None:
        self._losses[part] = self._losses[part] + result.loss * samples
        self._correct[part] = self._correct[part] + result.hits
        self._samples[part] += samples

    def over(self, world: World) -> Self:
        """Of all processes' parts. Every process asks."""
        if world.alone:
            return self
        found = type(self)(len(self._samples))
        columns = (self._losses, self._correct, self._samples)
        # Others have 0 where one has a number, so that each comes through to the bit.
        sums = world.sum(*(float(value) for column in columns for value in column))
        parts = len(self._samples)
        found._losses = [*sums[:parts]]
        found._correct = [int(hits) for hits in sums[parts : 2 * parts]]
        found._samples = [int(count) for count in sums[2 * parts :]]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Give what it holds, part by part; of all processes' parts, if it is `over` them."""
        columns = {"losses": self._losses, "correct": self._correct, "samples": self._samples}
        return {name: [float(value) for value in column] for name, column in columns.items()}

    def load_state_dict(self, state: dict[str, Any], mine: range) -> Self:
        """Go on where another left off with the parts of this process, to the bit; from nothing, anew."""
        for part in mine if state else ():
            self._losses[part] = state["losses"][part]
            self._correct[part] = int(state["correct"][part])
            self._samples[part] = int(state["samples"][part])
        return self

    @property
    def loss(self) -> float:
        return sum(map(float, self._losses)) / max(sum(self._samples), 1)

    @property
    def accuracy(self) -> float:
        return sum(map(float, self._correct)) / max(sum(self._samples), 1)


class Step:
    """Takes steps of one model.

    Args:
        model: in training mode; called as a module. With two heads it gives their logits as (2, B, L).
        averages: follow the model's parameters, one each; none if there is no average.
        objective: what is minimized.
        hits: counts the images that were right.
        optimizer: of the model's parameters.
        computation: how.
        placement: of the model.
        clip_norm: largest norm of all gradients together; 0: no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        averages: Sequence[Tensor],
        objective: Objective,
        hits: Hits,
        optimizer: ChainedOptimizer,
        computation: Computation,
        placement: Placement,
        clip_norm: float = 0.0,
    ) -> None:
        self.model, self.objective, self.hits = model, objective, hits
        self.optimizer, self.computation, self.placement = optimizer, computation, placement
        self.clip_norm = clip_norm
        self._weights: list[Tensor] = list(model.parameters())
        self._averages = list(averages)
        module: Any = self._compile() if computation.compiled else model
        self._gradients = gradients_of(
            model, module, computation.world, computation.parts, sharded=computation.sharded
        )
        # A stream of its own from the first step on: what autograd keeps of a step would tie a graph that is
        # recorded on another to this one.
        self._stream = torch.cuda.Stream() if computation.captured else None
        self._captured: _CapturedStep | None = None
        self._taken: Counter[torch.Size] = Counter()  # steps, by the shape of their images

    def _compile(self) -> Callable[[Tensor], Tensor]:
        """The model, compiled for pieces of the usual size.

        Not compiled are pieces of a size that damaged images left, for each size takes half a minute. Of a
        batch in parts the layers are compiled one by one, whether one process computes them or several, for
        one that is compiled as a whole rounds otherwise.
        """
        how = self.computation
        if how.parts > 1:
            for layer in getattr(self.model, "layers", [self.model]):
                layer.compile(**self.placement.compile_options(replays=False))
            return self.model
        # A graph of the whole step leaves nothing to graphs of its pieces.
        options = self.placement.compile_options(replays=how.accumulate == 1 and not how.captured)
        compiled: Callable[[Tensor], Tensor] = torch.compile(self.model, **options)
        usual = how.images_at_a_time, how.batch_size % how.images_at_a_time
        return lambda images_BCHW: (compiled if len(images_BCHW) in usual else self.model)(images_BCHW)

    def __call__(self, images_BCHW: Tensor, targets_BL: Tensor, rate: float, share: float) -> StepResult:
        """One update, on a batch of one part.

        Args:
            images_BCHW: on the device.
            targets_BL: probabilities of the classes, on the device.
            rate: the learning rate.
            share: of the new weights in the average; 0 leaves it alone.
        """
        known = self._captured is not None and self._captured.takes(images_BCHW, targets_BL)
        if self._stream is not None and not known and self._is_warm(images_BCHW):
            self._captured, known = None, True  # the memory of one for another shape is free first
            self._captured = _CapturedStep(self._update, images_BCHW, targets_BL, self._stream)
        if self._captured is not None and known:
            return self._captured(images_BCHW, targets_BL, rate, share)
        self._taken[images_BCHW.shape] += 1
        return self._at_once(images_BCHW, targets_BL, rate, share)

    def _is_warm(self, images_BCHW: Tensor) -> bool:
        """Whether enough steps of this shape were taken; batches that lack damaged images never are."""
        whole = len(images_BCHW) == self.computation.batch_size
        return whole and self._taken[images_BCHW.shape] >= _WARM_UP

    def _at_once(self, images_BCHW: Tensor, targets_BL: Tensor, rate: float, share: float) -> StepResult:
        """A step that is not a graph's; with the very kernels that one would record, where it could be."""
        if not self.optimizer.capturable:
            return self._update(images_BCHW, targets_BL, rate, share)
        device = images_BCHW.device
        numbers = (torch.full((), value, device=device) for value in (rate, share))
        if self._stream is None:
            return self._update(images_BCHW, targets_BL, *numbers)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._update(images_BCHW, targets_BL, *numbers)
        current.wait_stream(self._stream)
        return result

    def _update(
        self, images_BCHW: Tensor, targets_BL: Tensor, rate: float | Tensor, share: float | Tensor
    ) -> StepResult:
        result = self.learn(images_BCHW, targets_BL)
        self.update(rate, share)
        return result

    def learn(
        self,
        images_PCHW: Tensor,
        targets_PL: Tensor,
        weight: float = 1.0,
        part: int = 0,
        *,
        last: bool = True,
    ) -> StepResult:
        """Computes the gradients of one part of a batch, in pieces that fit the memory.

        Args:
            images_PCHW: on the device.
            targets_PL: probabilities of the classes, on the device.
            weight: the part's share of the batch's images.
            part: its place in the batch.
            last: whether it is the last of this process; the gradients are those of the batch then.
        """
        device = images_PCHW.device
        mean_loss, hits = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64)
        size = self.computation.images_at_a_time
        pieces = list(zip(images_PCHW.split(size), targets_PL.split(size), strict=True))
        sound = len(pieces)
        if self.computation.sharded:  # in every pass all processes gather weights: they take as many
            pieces += [(images_PCHW[:1], targets_PL[:1])] * (self.computation.passes - sound)
        for place, (images_QCHW, targets_QL) in enumerate(pieces):
            with self._gradients.passing(last=last and place == len(pieces) - 1):
                with self.placement.autocast():
                    logits = self._gradients.module(images_QCHW)
                heads = logits.unbind() if logits.ndim == 3 else [logits]
                loss = self.objective(heads, targets_QL, images_QCHW)
                share = len(images_QCHW) / len(images_PCHW) if place < sound else 0.0
                (loss * (share * weight)).backward()
            mean_loss += share * loss.detach()
            if place < sound:
                hits += self.hits(heads[0], targets_QL)
        self._gradients.take(part, last=last)
        return StepResult(mean_loss, hits)

    def update(self, rate: float | Tensor, share: float | Tensor) -> None:
        """Changes the weights by the gradients, and the average by the weights."""
        if self.clip_norm:
            clip(self._weights, self.clip_norm)
        self.optimizer.set_learning_rate(rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._averages:
            update_average(self._averages, self._weights, share)


Update = Callable[[Tensor, Tensor, Tensor, Tensor], StepResult]


class _CapturedStep:
    """A step as a CUDA graph, for batches of one shape.

    Its random numbers are those of the device's generator as it stands at each call.
    """

    def __init__(
        self, update: Update, images_BCHW: Tensor, targets_BL: Tensor, stream: torch.cuda.Stream
    ) -> None:
        self._images, self._targets = images_BCHW.clone(), targets_BL.clone()
        self._rate, self._share = torch.zeros(2, device=images_BCHW.device).unbind()
        self._graph = torch.cuda.CUDAGraph()
        # Records, and computes nothing. Other threads may load images meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = update(self._images, self._targets, self._rate, self._share)

    def takes(self, images_BCHW: Tensor, targets_BL: Tensor) -> bool:
        return images_BCHW.shape == self._images.shape and targets_BL.shape == self._targets.shape

    def __call__(self, images_BCHW: Tensor, targets_BL: Tensor, rate: float, share: float) -> StepResult:
        self._images.copy_(images_BCHW)
        self._targets.copy_(targets_BL)
        self._rate.fill_(rate)
        self._share.fill_(share)
        self._graph.replay()
        return self._result


def clip(parameters: Sequence[Tensor], limit: float) -> None:
    """Scale all gradients down to a norm of `limit` together, where it is larger."""
    norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


@torch.no_grad()
def update_average(averages: list[Tensor], weights: list[Tensor], share: float | Tensor) -> None:
    """Average + share * (weight - average), of each pair; on a GPU the share may be a scalar there."""
    averages, weights = [*map(local, averages)], [*map(local, weights)]
    if not isinstance(share, Tensor):
        torch._foreach_lerp_(averages, weights, share)
        return
    differences = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(differences, share)
    torch._foreach_add_(averages, differences)


def average_share(step: int, decay: float) -> float:
    """Of the weights after step `step` (from 0) in their exponential moving average.

    Its memory starts short, so that early weights fade.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
