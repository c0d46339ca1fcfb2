"""Our own two routes of patches and of attention, forward alone and with backward."""

from collections.abc import Callable
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.bench.report import Report, Row, describe_machine
from vitral.bench.rounds import Call, Settings, interleaved, synchronizer
from vitral.model.attention import attention_weights
from vitral.model.embedding import PatchEmbedding
from vitral.runtime.devices import Placement

# Batch, image side, patch, width: ViT-Ti/4 on small images, ViT-S/16, ViT-B/16, ViT-L/14.
_PATCH_TASKS = ((256, 32, 4, 192), (16, 224, 16, 384), (16, 224, 16, 768), (4, 224, 14, 1024))
# Batch, heads, tokens, head width: the same models, and B/16 at 384 and S/14 at 448 pixels.
_ATTENTION_TASKS = ((256, 3, 65, 64), (16, 6, 197, 64), (16, 12, 197, 64), (4, 12, 577, 64), (2, 6, 1025, 64))


def kernels(settings: Settings) -> Report:
    """Measure a row a task and route."""
    placement = settings.placement
    rows = []
    for backward in (False, True):
        # One after the other, each with its tensors only.
        patches = (_patches(*task, placement, backward=backward) for task in _PATCH_TASKS)
        attention = (_attention(*task, placement, backward=backward) for task in _ATTENTION_TASKS)
        for task, routes in chain(patches, attention):
            seconds = interleaved(routes, settings.rounds, synchronize=synchronizer(placement))
            rows += [Row(task, route, seconds=readings) for route, readings in seconds.items()]
    machine = describe_machine(placement, settings.command)
    return Report("kernels", "two routes to the same result", str(placement), tuple(rows), machine)


def _patches(
    batch: int, side: int, patch: int, width: int, placement: Placement, *, backward: bool
) -> tuple[str, dict[str, Call]]:
    embedding = PatchEmbedding(side, patch, 3, width).to(placement.device)
    images = torch.randn(batch, 3, side, side, device=placement.device)

    def run(route: Literal["convolve", "project"]) -> Callable[[], None]:
        return lambda: _run(lambda: getattr(embedding, route)(images), placement, backward=backward)

    name = f"patches {batch}x3x{side}x{side}, p {patch}, D {width}{_suffix(backward=backward)}"
    return name, {"convolution": run("convolve"), "linear": run("project")}


def _attention(
    batch: int, heads: int, tokens: int, head_width: int, placement: Placement, *, backward: bool
) -> tuple[str, dict[str, Call]]:
    shape = batch, heads, tokens, head_width
    # Under autocast the projections hand attention tensors of the lower precision.
    q, k, v = (
        torch.randn(shape, device=placement.device, dtype=placement.precision, requires_grad=backward)
        for _ in range(3)
    )

    def explicit() -> Tensor:
        return attention_weights(q, k) @ v

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    name = f"attention {batch}x{heads}x{tokens}x{head_width}{_suffix(backward=backward)}"
    return name, {
        "fused": lambda: _run(fused, placement, backward=backward),
        "explicit": lambda: _run(explicit, placement, backward=backward),
    }


def _suffix(*, backward: bool) -> str:
    return ", forward and backward" if backward else ", forward"


def _run(forward: Callable[[], Tensor], placement: Placement, *, backward: bool) -> None:
    with torch.set_grad_enabled(backward), placement.autocast():
        output = forward()
    if backward:
        output.float().sum().backward()
