"""Decides in which types weights are read and stored.

Weights are floating-point numbers of 16, 32 or 64 bits; others, such as a quantized model's, are refused.
What is loaded keeps its source's type, and so does what is saved. Two things change it: `store_as`, for
``vitral convert --dtype``, and Google's ``.npz``, which is float32, for NumPy has no bfloat16. A run stores
what it trains, which is float32. In which type a model computes is no matter of files: see `Placement`.
"""

import torch

from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STORABLE = ("float32", "float16", "bfloat16")


def store_as(model: VisionTransformer, dtype: str) -> None:
    """Rounds the model's weights to `dtype`, one of `STORABLE`.

    Raises:
        VitralError: if there is no such type, or a weight is too large for it.
    """
    if dtype not in STORABLE:
        raise VitralError(f"there is no type {dtype!r} of weights; there are {', '.join(STORABLE)}")
    model.to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise VitralError(f"{name} has numbers too large for {dtype}")
