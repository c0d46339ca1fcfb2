"""What a benchmark times: a step or a forward pass of one contender's model, and what it gives.

Everything here can be sent to another process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.bench.rounds import Call, Elsewhere
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

# Of the forward pass; backward is twice its products.
FLOPS_FACTOR = {"infer": 1, "train": 3}


@dataclass(frozen=True)
class Contender:
    """A library's model in one configuration; it can be sent to another process."""

    library: str
    configuration: str
    detail: str
    make: Callable[[], nn.Module]  # images (B, C, H, W) -> logits (B, L); float32, on the CPU
    compiled: bool = False
    same_weights: bool = True


@dataclass(frozen=True)
class Forward:
    """A forward pass without gradients, in the stored precision where that is no float32, else autocast."""

    images: Tensor
    placement: Placement
    training = False

    def call(self, model: nn.Module) -> Call:
        return lambda: self._logits(model, self.placement)

    def outcome(self, model: nn.Module, placement: Placement) -> dict[str, Tensor]:
        return {"logits": self._logits(model, placement)}

    @torch.inference_mode()
    def _logits(self, model: nn.Module, placement: Placement) -> Tensor:
        stored = next(model.parameters()).dtype
        if stored != torch.float32:
            return model(self.images.to(stored))
        with placement.autocast():
            return model(self.images)


@dataclass(frozen=True)
class TrainingStep:
    """Forward, cross-entropy, backward and a fused AdamW over weights in float32."""

    images: Tensor
    labels: Tensor
    placement: Placement
    training = True

    def call(self, model: nn.Module) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

        def step() -> None:
            self._loss(model, self.placement).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def outcome(self, model: nn.Module, placement: Placement) -> dict[str, Tensor]:
        loss = self._loss(model, placement)
        loss.backward()
        # All libraries that share weights keep the patch projection as a convolution, (D, C, p, p).
        patches = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        found = {"loss": loss.detach()}
        if patches is not None and patches.weight.grad is not None:
            found["gradient"] = patches.weight.grad.clone()
        model.zero_grad()
        return found

    def _loss(self, model: nn.Module, placement: Placement) -> Tensor:
        with placement.autocast():
            return F.cross_entropy(model(self.images), self.labels)


Work = Forward | TrainingStep


@dataclass(frozen=True)
class Task:
    """A benchmark at one batch size, in numbers that another process can make the same images from."""

    benchmark: str
    batch_size: int
    config: ViTConfig
    placement: Placement

    @property
    def name(self) -> str:
        return f"{self.benchmark}, batch {self.batch_size}"

    def work(self) -> Work:
        shape = self.batch_size, self.config.in_channels, *height_and_width(self.config.img_size)
        images = self.placement.put(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        if self.benchmark == "infer":
            return Forward(images, self.placement)
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(self.config.num_classes, (self.batch_size,), generator=generator)
        return TrainingStep(images, self.placement.put(labels), self.placement)


# Makes a contender ready: what is to be timed, and what its first call gave.
Begin = Callable[[Contender], tuple[Call | Elsewhere, dict[str, Tensor]]]


def prepare(contender: Contender, work: Work) -> tuple[Call, dict[str, Tensor]]:
    """Give what is to be timed, after the call of it that compiles, and what that gave."""
    model = work.placement.place(contender.make(), training=work.training).train(work.training)
    if contender.compiled:
        if not work.training:
            model.to(work.placement.precision)
        # In place, so that it stays a module; each batch size is compiled for itself.
        model.compile(**work.placement.compile_options(replays=contender.library == "vitral"))
    outcome = work.outcome(model, work.placement)
    return work.call(model), outcome


def reason(error: Exception) -> str:
    """Say why a contender could not be measured, in a line."""
    if isinstance(error, VitralError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
