"""How a model computes fastest on a device: choices that are made when it is placed there.

A new model has the portable choices, which work on any device, and with `torch.export` and quantization.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Kernels:
    """Choices of speed; the defaults are portable.

    The first three each name one of two computations of the same function. `stream` also rounds the tokens.
    """

    patches: Literal["convolution", "product"] = "convolution"
    attention: Literal["fused", "explicit"] = "fused"
    relative_bias: Literal["index", "products"] = "index"
    # Type of the residual stream in training; None: as the embedding gives it.
    stream: torch.dtype | None = None


PORTABLE = Kernels()


def fastest(device: torch.device, precision: torch.dtype, *, training: bool = False) -> Kernels:
    """The kernels that were faster where products compute in `precision` (docs/log.md, 2026-11-22 and 26).

    Args:
        device: where the model computes.
        precision: what its matrix products compute in.
        training: keeps the tokens between layers in `precision` too. Casts and norms of float32 tokens cost
            a tenth of a step on a CPU, a twentieth on a GPU. Weights and their gradients are float32 in any
            case; so are, on a GPU, the tokens that a post-norm layer's norms give.
    """
    bfloat16 = precision == torch.bfloat16
    return Kernels(
        patches="product" if bfloat16 and device.type in ("cpu", "cuda") else "convolution",
        attention="explicit" if bfloat16 and device.type == "cpu" else "fused",
        # The gradient of an index adds in any order on a GPU, or sorts first.
        relative_bias="products" if device.type == "cuda" else "index",
        stream=precision if training else None,
    )


class HasKernels(nn.Module):
    """A module that computes by one of two kernels."""

    kernels: Kernels = PORTABLE


def set_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Lets every module under `model` compute by these kernels."""
    for module in model.modules():
        if isinstance(module, HasKernels):
            module.kernels = kernels
