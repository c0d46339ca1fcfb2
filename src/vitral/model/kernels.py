"""Which of two equal computations is faster."""

import torch
from torch import Tensor


def prefers_linear_patches(images_BCHW: Tensor) -> bool:
    """Patches by one matrix product rather than a convolution; measured in docs/log.md, 2026-11-22 and 26."""
    return images_BCHW.device.type in ("cpu", "cuda") and _compute_dtype(images_BCHW) == torch.bfloat16


def prefers_explicit_attention(q_BATK: Tensor) -> bool:
    """Two batched products rather than the fused kernel; measured in docs/log.md, 2026-11-22."""
    return q_BATK.device.type == "cpu" and _compute_dtype(q_BATK) == torch.bfloat16


def stream_dtype(x_BTD: Tensor) -> torch.dtype:
    """What the sum that runs through the layers is kept in while training: that of the products.

    Casts and norms of float32 tokens cost a tenth of a step on a CPU, a twentieth on a GPU (docs/log.md,
    2026-11-25 and 26). Weights and their gradients are float32 in any case; so are, on a GPU, the tokens that
    a post-norm layer's norms give.
    """
    return _compute_dtype(x_BTD)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` computes in, which autocast may have lowered."""
    device = x.device.type
    if device == "meta":  # autocast does not know it
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
