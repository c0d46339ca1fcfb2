"""Speed, measured side by side: every contender in one process, in interleaved rounds."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.blocks import PatchEmbedding, attention_weights
from vitral.devices import Placement

ROUNDS = 9


@dataclass(frozen=True)
class Timing:
    """One contender at one task."""

    task: str
    contender: str
    milliseconds: float  # median over the rounds
    spread: float  # (slowest - fastest) / median


def interleaved(
    task: str, contenders: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> list[Timing]:
    """Each contender once a round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            began_at = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began_at)
    timings = []
    for name, all_of_them in seconds.items():
        kept = all_of_them[1:]
        median = statistics.median(kept)
        timings.append(Timing(task, name, 1e3 * median, (max(kept) - min(kept)) / median))
    return timings


# Batch, image side, patch, width: ViT-Ti/4 on small images, ViT-S/16, ViT-B/16, ViT-L/14.
_PATCH_TASKS = ((256, 32, 4, 192), (16, 224, 16, 384), (16, 224, 16, 768), (4, 224, 14, 1024))
# Batch, heads, tokens, head width: the same models, and B/16 at 384 and S/14 at 448 pixels.
_ATTENTION_TASKS = ((256, 3, 65, 64), (16, 6, 197, 64), (16, 12, 197, 64), (4, 12, 577, 64), (2, 6, 1025, 64))


def kernels(placement: Placement) -> list[Timing]:
    """The two routes of `PatchEmbedding` and of attention, forward alone and with backward."""
    timings = []
    for backward in (False, True):
        for task in _PATCH_TASKS:
            timings += _time_patches(*task, placement, backward=backward)
        for task in _ATTENTION_TASKS:
            timings += _time_attention(*task, placement, backward=backward)
    return timings


def _time_patches(
    batch: int, side: int, patch: int, width: int, placement: Placement, *, backward: bool
) -> list[Timing]:
    embedding = PatchEmbedding(side, patch, 3, width).to(placement.device)
    images = torch.randn(batch, 3, side, side, device=placement.device)

    def run(route: Literal["convolve", "project"]) -> Callable[[], None]:
        return lambda: _run(lambda: getattr(embedding, route)(images), placement, backward=backward)

    name = f"patches {batch}x3x{side}x{side}, p {patch}, D {width}{_suffix(backward=backward)}"
    return interleaved(name, {"convolution": run("convolve"), "linear": run("project")})


def _time_attention(
    batch: int, heads: int, tokens: int, head_width: int, placement: Placement, *, backward: bool
) -> list[Timing]:
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
    return interleaved(
        name,
        {
            "fused": lambda: _run(fused, placement, backward=backward),
            "explicit": lambda: _run(explicit, placement, backward=backward),
        },
    )


def _suffix(*, backward: bool) -> str:
    return ", forward and backward" if backward else ", forward"


def _run(forward: Callable[[], Tensor], placement: Placement, *, backward: bool) -> None:
    with torch.set_grad_enabled(backward), placement.autocast():
        output = forward()
    if backward:
        output.float().sum().backward()
    if placement.device.type == "cuda":
        torch.cuda.synchronize()
