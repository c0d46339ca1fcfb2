"""Attention against torch's, and a second route."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parts import (
    BATCH,
    DIM,
    HEAD_WIDTH,
    HEADS,
    TOKENS,
    away_from_initial_values,
    close,
)
from vitral.model.attention import MultiHeadAttention
from vitral.model.config import AttentionOptions, RotaryOptions
from vitral.model.kernels import Kernels, set_kernels
from vitral.model.positions.relation import NO_RELATION
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.rotary import RotaryPositions


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM)


@pytest.fixture
def attention() -> MultiHeadAttention:
    return away_from_initial_values(MultiHeadAttention(DIM, HEADS))


def torch_attention(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            "in_proj_weight": state["qkv.weight"],
            "in_proj_bias": state["qkv.bias"],
            "out_proj.weight": state["out.weight"],
            "out_proj.bias": state["out.bias"],
        }
    )
    return theirs


def test_attention_is_torchs(attention: MultiHeadAttention, tokens: Tensor) -> None:
    theirs, _ = torch_attention(attention)(tokens, tokens, tokens)
    close(attention(tokens, tokens), theirs)


def test_attention_weights_are_torchs(attention: MultiHeadAttention, tokens: Tensor) -> None:
    _, theirs = torch_attention(attention)(tokens, tokens, tokens, average_attn_weights=False)
    close(attention.weights(tokens, tokens), theirs)


def test_each_tokens_attention_sums_to_one(attention: MultiHeadAttention, tokens: Tensor) -> None:
    weights = attention.weights(tokens, tokens)
    assert weights.shape == (BATCH, HEADS, TOKENS, TOKENS)
    close(weights.sum(dim=-1), torch.ones(BATCH, HEADS, TOKENS))


def test_mixing_values_with_the_weights_is_the_forward_pass(
    attention: MultiHeadAttention, tokens: Tensor
) -> None:
    values = attention.qkv(tokens)[..., 2 * DIM :].reshape(BATCH, TOKENS, HEADS, HEAD_WIDTH)
    mixed = torch.einsum("batu,buak->btak", attention.weights(tokens, tokens), values)
    close(attention(tokens, tokens), attention.out(mixed.reshape(BATCH, TOKENS, DIM)))


def test_explicit_and_fused_kernels_agree(attention: MultiHeadAttention, tokens: Tensor) -> None:
    fused = attention(tokens, tokens)
    set_kernels(attention, Kernels(attention="explicit"))
    close(attention(tokens, tokens), fused)


@pytest.mark.parametrize("kernel", ["fused", "explicit"])
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(),
        AttentionOptions(biases="qv", qk_norm=True, norm=True),
        AttentionOptions(rotary=RotaryOptions()),
        AttentionOptions(relative_bias="layer"),
    ],
    ids=["paper", "norms", "rotary", "relative"],
)
def test_some_queries_take_what_they_take_among_all(options: AttentionOptions, kernel: Any) -> None:
    attention = away_from_initial_values(MultiHeadAttention(40, HEADS, options=options))
    set_kernels(attention, Kernels(attention=kernel))
    grid, tokens = (3, 4), torch.randn(BATCH, TOKENS, 40)
    relation = NO_RELATION
    if options.rotary:
        relation = RotaryPositions(8, HEADS, 1, options.rotary)(grid, tokens.device)
    if options.relative_bias != "none":
        relation = away_from_initial_values(RelativeBias(grid, HEADS, "bilinear"))(grid, tokens.device)
    first = tokens[:, :2]
    close(attention(first, tokens, relation), attention(tokens, tokens, relation)[:, :2])
    close(attention.weights(first, tokens, relation), attention.weights(tokens, tokens, relation)[:, :, :2])


def test_queries_may_be_other_than_the_tokens(attention: MultiHeadAttention, tokens: Tensor) -> None:
    queries = torch.randn(BATCH, 4, DIM)
    theirs, weights = torch_attention(attention)(queries, tokens, tokens, average_attn_weights=False)
    close(attention(queries, tokens), theirs)
    close(attention.weights(queries, tokens), weights)


def test_attention_ignores_the_order_of_its_tokens(attention: MultiHeadAttention, tokens: Tensor) -> None:
    order = torch.randperm(TOKENS)
    shuffled = tokens[:, order]
    close(attention(shuffled, shuffled), attention(tokens, tokens)[:, order])


def test_attention_drops_outputs_and_not_weights(attention: MultiHeadAttention, tokens: Tensor) -> None:
    kept = attention(tokens, tokens)
    attention.dropout.p = 0.5
    trained = attention.train()(tokens, tokens)
    dropped = trained == 0
    assert dropped.any()
    close(trained[~dropped], 2 * kept[~dropped])


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads is 4; it must divide embed_dim 35"):
        MultiHeadAttention(DIM, 4)
