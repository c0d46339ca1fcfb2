"""Sizes that differ in every axis, and weights away from their start, for tests of the model's parts."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.testing import assert_close

Module = TypeVar("Module", bound=nn.Module)

BATCH, CHANNELS, PATCH, ROWS, COLUMNS = 2, 3, 5, 7, 11
HEIGHT, WIDTH, PATCHES = ROWS * PATCH, COLUMNS * PATCH, ROWS * COLUMNS
HEADS, HEAD_WIDTH, HIDDEN, TOKENS = 5, 7, 17, 13
DIM = HEADS * HEAD_WIDTH


@torch.no_grad()
def away_from_initial_values(module: Module) -> Module:
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Parts of our layer -> of torch.nn.TransformerEncoderLayer.
OURS_TO_TORCH = {
    "attention.qkv.": "self_attn.in_proj_",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "norm1",
    "feed_forward_norm": "norm2",
    "feed_forward.expand": "linear1",
    "feed_forward.contract": "linear2",
}
