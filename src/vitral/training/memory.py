"""What a training step needs of memory, told before it begins; and advice where it was too much."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitral.runtime import memory
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

# Kernels' own workspace, gradients in flight and fragmentation, on top of what autograd keeps: with it the
# measured peaks of five runs were 0.9 to 1.4 of the estimate (docs/log.md, 2026-11-25).
_MARGIN = 1.5
# Of so many times the images there is room for any batch that one might want.
_PLENTY = 4

ADVICE = (
    "set accumulate=2 or more (the same step, computed in parts) or checkpoint_layers=true (a third more "
    "to compute), "
    "with --resume too; or begin again with a smaller batch_size, img_size or model"
)


_ADVICE_ON_WEIGHTS = (
    "the weights, their average, gradients and the optimizer's state alone take more; take a smaller model "
    "or, of one that is trained, its head alone (trained=head) or adapters (trained=lora)"
)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a training step, estimated."""

    fixed: int  # weights, their average, gradients, optimizer state
    per_image: int  # what the forward pass keeps for the backward pass
    images: int  # computed at a time
    available: int  # on the device, now

    @property
    def total(self) -> int:
        return self.fixed + self.images * self.per_image

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def most_images(self) -> int:
        """As many at a time as would fit."""
        return max((self.available - self.fixed) // self.per_image, 0)

    def __str__(self) -> str:
        needed, free = (f"{value / 2**30:,.2f}" for value in (self.total, self.available))
        line = f"memory: about {needed} of {free} GiB free; {self.images:,} images at a time"
        if self.most_images >= _PLENTY * self.images:
            return line
        line += f", room for {self.most_images:,}"
        if self.fits:
            return line
        return (
            f"{line}. That may be too much: {ADVICE if self.fixed < self.available else _ADVICE_ON_WEIGHTS}"
        )


def memory_need(
    model: nn.Module, image_shape: tuple[int, ...], images_at_a_time: int, placement: Placement
) -> MemoryNeed:
    """Counts what one image leaves for the backward pass, by running it forward once.

    Args:
        model: on the placement's device, in training mode; its buffers stay as they are.
        image_shape: channels, height and width.
        images_at_a_time: the batch, or its parts where gradients are accumulated.
        placement: device and precision.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    everything = sum(p.numel() * p.element_size() for p in parameters)
    # Weights and their average; gradients and two moments of what is trained.
    fixed = 2 * everything + 3 * trained
    kept = saved_bytes(model, image_shape, placement) + _bytes_computed_again(model, image_shape, placement)
    per_image = int(_MARGIN * kept)
    return MemoryNeed(fixed, max(per_image, 1), images_at_a_time, available_bytes(placement.device))


def saved_bytes(model: nn.Module, image_shape: tuple[int, ...], placement: Placement) -> int:
    """Bytes that autograd keeps of one image, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the count is done, so that no address serves twice

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        # Not the tensor itself: a result that its own node keeps would keep the graph alive for good, and on
        # a GPU the stream that it ran on with it, to which no CUDA graph may be tied.
        return tensor.detach()

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # a batch norm's change
    # Three images less two: what does not grow with the batch, such as weights cast by autocast, drops out.
    # Not one, of which a batch norm can have no variance.
    totals = []
    for images in (2, 3):
        sizes.clear()
        with (
            torch.random.fork_rng(devices=[]),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            placement.autocast(),
        ):
            model(torch.zeros(images, *image_shape, device=placement.device))
        totals.append(sum(sizes.values()))
        kept.clear()
    for buffer, before in buffers:
        buffer.copy_(before)
    return totals[1] - totals[0]


def _bytes_computed_again(model: nn.Module, image_shape: tuple[int, ...], placement: Placement) -> int:
    """What the backward pass of a checkpointed model holds beside: the activations of one layer."""
    if not getattr(model, "checkpoint_layers", False):
        return 0
    model.checkpoint_layers = False  # pyrefly: ignore
    try:
        return saved_bytes(model, image_shape, placement) // len(model.layers)  # pyrefly: ignore
    finally:
        model.checkpoint_layers = True  # pyrefly: ignore


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory.available_bytes()


@contextmanager
def advice_when_out_of_memory(images_at_a_time: int) -> Iterator[None]:
    """Turns the device's refusal into one line that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise VitralError(f"out of memory with {images_at_a_time} images at a time; {ADVICE}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused; the CPU's allocator raises a plain RuntimeError."""
    refused = any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or refused
