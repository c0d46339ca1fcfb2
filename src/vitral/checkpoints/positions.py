"""Learned position tables at another grid of patches."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.model import ViTConfig


def resize_table(table_TD: Tensor, old: ViTConfig, new: ViTConfig) -> Tensor:
    """The table (T, D) of `old` for the image size of `new`: bicubic, antialiased, as in timm.

    The class token's row is no place in the image and stays as it is.
    """
    prefix = int(old.pooling == "class")
    class_TD, patches_ND = table_TD[:prefix], table_TD[prefix:]
    if old.grid == new.grid:
        return table_TD
    image_1DHW = patches_ND.float().unflatten(0, old.grid).permute(2, 0, 1)[None]
    resized_1DHW = F.interpolate(image_1DHW, new.grid, mode="bicubic", antialias=True)
    resized_ND = resized_1DHW[0].flatten(1).T.to(table_TD.dtype)
    return torch.cat([class_TD, resized_ND]).contiguous()
