"""What attention is told of the places of queries and tokens. Axes are those of `embedding`."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Angles that queries and keys turn by; (T, K), or (A, T, K) where heads differ."""

    cos: Tensor
    sin: Tensor
    halves: bool  # channel c turns with c + K/2, else with its neighbour


class Relation(NamedTuple):
    """What attention knows of the places of tokens, and which of them ask."""

    rotation: Rotation | None = None
    bias_ATT: Tensor | None = None
    num_queries: int | None = None  # so many of the first tokens ask, those that a head reads; None: all

    def queries(self, tokens_BTD: Tensor) -> Tensor:
        """The tokens that ask: (B, T, D) -> (B, Q, D)."""
        return tokens_BTD if self.num_queries is None else tokens_BTD[:, : self.num_queries]


NO_RELATION = Relation()


def rotate(x_BATK: Tensor, rotation: Rotation) -> Tensor:
    """Turns pairs of channels of the first tokens, in the angles' float32; gives the type of `x`."""
    if rotation.halves:
        first, second = x_BATK.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x_BATK[..., 1::2], x_BATK[..., ::2]], dim=-1).flatten(-2)
    count = x_BATK.shape[-2]
    cos, sin = rotation.cos[..., :count, :], rotation.sin[..., :count, :]
    return (x_BATK * cos + turned * sin).to(x_BATK.dtype)
