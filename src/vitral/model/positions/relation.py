"""What attention is told of the places of queries and tokens. Axes are those of `embedding`."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Angles that queries and keys turn by: (T, K), (A, T, K) where heads differ, or (B, A, T, K)."""

    cos: Tensor
    sin: Tensor
    halves: bool  # channel c turns with c + K/2, else with its neighbour


# Called by attention with q (B, A, Q, K), k and v (B, A, T, K), and the mixed values of eq. 7, (B, A, Q, K).
Observer = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Merge(Protocol):
    """What makes fewer tokens of a layer's between its attention and its MLP (`model/merging.py`)."""

    def see(self, k_BATK: Tensor) -> None: ...
    def __call__(self, z_BTD: Tensor) -> Tensor: ...


class Relation(NamedTuple):
    """What attention knows of the places of tokens, which of them ask, and who is shown what it computes."""

    rotation: Rotation | None = None
    bias_ATT: Tensor | None = None  # (A, T, T), or (B, A, T, T) where images differ; axes may be 1
    num_queries: int | None = None  # so many of the first tokens ask, those that a head reads; None: all
    observer: Observer | None = None
    merge: Merge | None = None  # is shown the keys, not turned

    def queries(self, tokens_BTD: Tensor) -> Tensor:
        """The tokens that ask: (B, T, D) -> (B, Q, D)."""
        return tokens_BTD if self.num_queries is None else tokens_BTD[:, : self.num_queries]

    def merged(self, z_BTD: Tensor) -> Tensor:
        """The tokens that go on to the MLP: (B, T, D) -> (B, T', D)."""
        return z_BTD if self.merge is None else self.merge(z_BTD)

    def of_tokens(self, kept_BT: Tensor) -> "Relation":
        """The same for some of the tokens, each at its own place: indices (B, T'), the rest is left out."""
        rotation, bias_ATT = self.rotation, self.bias_ATT
        if rotation is not None:
            cos, sin = (_taken(angles, kept_BT) for angles in (rotation.cos, rotation.sin))
            rotation = Rotation(cos, sin, rotation.halves)
        if bias_ATT is not None:
            images_B11 = torch.arange(len(kept_BT), device=kept_BT.device)[:, None, None]
            bias_BATT = bias_ATT.expand(len(kept_BT), *bias_ATT.shape[-3:])
            bias_ATT = bias_BATT.permute(0, 2, 3, 1)[images_B11, kept_BT[:, :, None], kept_BT[:, None]]
            bias_ATT = bias_ATT.permute(0, 3, 1, 2)
        return self._replace(rotation=rotation, bias_ATT=bias_ATT)


NO_RELATION = Relation()


def _taken(angles_TK: Tensor, kept_BT: Tensor) -> Tensor:
    """(T, K) or (A, T, K) -> (B, 1 or A, T', K)."""
    angles_ATK = angles_TK if angles_TK.ndim == 3 else angles_TK[None]
    return angles_ATK[:, kept_BT].transpose(0, 1)


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
