"""One update of the weights: forward, loss, backward, clipping, optimizer, averages; on a GPU one CUDA graph.

A step of a small model is hundreds of kernels of a few microseconds each, which Python launches more slowly
than a GPU runs them. So a step asks the host nothing, and what changes from step to step, the batch, the rate
and the average's share, stands in tensors: recorded once as a CUDA graph, it is one launch from then on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vitral.runtime.devices import Placement
from vitral.training.optimizers import ChainedOptimizer

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
    parts: int = 1  # that a batch is computed in, one after the other, to fit the memory
    compiled: bool = False
    captured: bool = False  # recorded as a CUDA graph; the optimizer has to be capturable

    @property
    def images_at_a_time(self) -> int:
        return -(-self.batch_size // self.parts)


@dataclass(frozen=True)
class StepResult:
    """Of one batch, on the device; a captured step overwrites them at its next call."""

    loss: Tensor  # mean over the images
    hits: Tensor  # how many images were right


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


class Step:
    """Takes steps of one model.

    Args:
        model: in training mode; called as a module. With two heads it gives their logits as (2, B, L).
        average: a copy of the model that follows it; None if there is none.
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
        average: nn.Module | None,
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
        self._averages: list[Tensor] = list(average.parameters()) if average else []
        self._compiled = self._compile() if computation.compiled else model
        # A stream of its own from the first step on: what autograd keeps of a step would tie a graph that is
        # recorded on another to this one.
        self._stream = torch.cuda.Stream() if computation.captured else None
        self._captured: _CapturedStep | None = None
        self._taken: Counter[torch.Size] = Counter()  # steps, by the shape of their images

    def _compile(self) -> Callable[[Tensor], Tensor]:
        """The model, compiled for parts of the usual size.

        Not compiled are parts of a size that damaged images left, for each size takes half a minute.
        """
        how = self.computation
        # A graph of the whole step leaves nothing to graphs of its parts.
        options = self.placement.compile_options(replays=how.parts == 1 and not how.captured)
        compiled: Callable[[Tensor], Tensor] = torch.compile(self.model, **options)
        usual = how.images_at_a_time, how.batch_size % how.images_at_a_time
        return lambda images_BCHW: (compiled if len(images_BCHW) in usual else self.model)(images_BCHW)

    def __call__(self, images_BCHW: Tensor, targets_BL: Tensor, rate: float, share: float) -> StepResult:
        """One update.

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
        result = self._backward(images_BCHW, targets_BL)
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.set_learning_rate(rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._averages:
            update_average(self._averages, self._weights, share)
        return result

    def _backward(self, images_BCHW: Tensor, targets_BL: Tensor) -> StepResult:
        """Sums the gradients of the batch, part by part."""
        device = images_BCHW.device
        mean_loss, hits = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64)
        size = self.computation.images_at_a_time
        for images_PCHW, targets_PL in zip(images_BCHW.split(size), targets_BL.split(size), strict=True):
            with self.placement.autocast():
                logits = self._compiled(images_PCHW)
            heads = logits.unbind() if logits.ndim == 3 else [logits]
            loss = self.objective(heads, targets_PL, images_PCHW)
            share = len(images_PCHW) / len(images_BCHW)
            (loss * share).backward()
            mean_loss += share * loss.detach()
            hits += self.hits(heads[0], targets_PL)
        return StepResult(mean_loss, hits)


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


@torch.no_grad()
def update_average(averages: list[Tensor], weights: list[Tensor], share: float | Tensor) -> None:
    """Average + share * (weight - average), of each pair; on a GPU the share may be a scalar there."""
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
