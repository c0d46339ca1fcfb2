"""What attention is told of the places of two tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Angles that queries and keys turn by; (T, K), or (A, T, K) where heads differ."""

    cos: Tensor
    sin: Tensor
    halves: bool  # channel c turns with c + K/2, else with its neighbour


class Relation(NamedTuple):
    """What attention knows of the places of two tokens."""

    rotation: Rotation | None = None
    bias_ATT: Tensor | None = None


def rotate(x_BATK: Tensor, rotation: Rotation) -> Tensor:
    """Turns pairs of channels; in the angles' float32, answered in the type of `x`."""
    if rotation.halves:
        first, second = x_BATK.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x_BATK[..., 1::2], x_BATK[..., ::2]], dim=-1).flatten(-2)
    return (x_BATK * rotation.cos + turned * rotation.sin).to(x_BATK.dtype)
