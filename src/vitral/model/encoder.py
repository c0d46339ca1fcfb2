"""The encoder's layers (the paper, eq. 2 and 3): attention and MLP. Axes are those of `embedding`."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitral.model.attention import MultiHeadAttention
from vitral.model.config import FeedForwardOptions, LayerOptions, Norm, Order
from vitral.model.positions.relation import NO_RELATION, Relation


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), what OpenAI's CLIP was trained with; its weights lose accuracy under GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Gated(nn.Module):
    """activation(gate) * value of the halves of the last axis: (..., 2 H) -> (..., H)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return self.activation(gate) * value


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


class FeedForward(nn.Module):
    """The MLP of the paper's eq. 3, two linear maps around a GELU: (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
        options: FeedForwardOptions = FeedForwardOptions(),
        norm: Norm = Norm(),
    ) -> None:
        super().__init__()
        # Gate and value in one product, the gate first.
        self.expand = nn.Linear(embed_dim, hidden_dim * (1 + options.gated), bias=options.bias)
        activation = ACTIVATIONS[options.activation]()
        self.activation = Gated(activation) if options.gated else activation
        self.norm = norm.build(hidden_dim) if options.norm else nn.Identity()
        self.contract = nn.Linear(hidden_dim, embed_dim, bias=options.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        hidden = self.norm(self.dropout(self.activation(self.expand(tokens_BTD))))
        return self.dropout(self.contract(hidden))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (CaiT, arXiv:2103.17239, eq. 4)."""

    def __init__(self, embed_dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.empty(embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class EncoderLayer(nn.Module):
    """The paper's layer, attention and MLP, each with a norm and a residual: (B, T, D) -> (B, T, D).

    Args:
        embed_dim: D.
        num_heads: A.
        hidden_dim: width of the MLP.
        dropout: probability after each dense layer but the q, k, v projection.
        options: scales, and what attention and MLP are; its order is this class's (`encoder_layer` chooses).
        norm: the kind of the norms.
        drop_path: stochastic depth (arXiv:1603.09382), the share of the images that skip a residual
            branch in training.

    Raises:
        ValueError: if the heads do not divide the width, or the order is another class's.
    """

    order: ClassVar[Order] = "pre"
    has_two_norms: ClassVar[bool] = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        *,
        options: LayerOptions = LayerOptions(),
        norm: Norm = Norm(),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if options.order != self.order:
            raise ValueError(
                f"{type(self).__name__} has the order {self.order!r}; options.order is {options.order!r}; "
                "encoder_layer(...) builds the layer of any order"
            )

        def scale() -> nn.Module:
            start = options.layer_scale
            return nn.Identity() if start is None else LayerScale(embed_dim, start)

        self.attention_norm = norm.build(embed_dim)
        self.attention = MultiHeadAttention(embed_dim, num_heads, dropout, options.attention, norm)
        self.attention_scale = scale()
        self.feed_forward_norm = norm.build(embed_dim) if self.has_two_norms else nn.Identity()
        self.feed_forward = FeedForward(embed_dim, hidden_dim, dropout, options.feed_forward, norm)
        self.feed_forward_scale = scale() if self.has_two_norms else nn.Identity()
        self.drop_path = drop_path

    def forward(self, z_BTD: Tensor, relation: Relation = NO_RELATION) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, Q, D) for the queries that the relation asks for, or merged.

        Raises:
            ValueError: if attention depends on places, and the relation does not give them.
        """
        z_BTD = self.residual(z_BTD, lambda z: self.msa(self.attention_norm(z), relation))  # eq. 2
        z_BTD = relation.merged(z_BTD)
        return self.residual(z_BTD, lambda z: self.mlp(self.feed_forward_norm(z)))  # eq. 3

    def msa(self, z_BTD: Tensor, relation: Relation) -> Tensor:
        """Computes multi-head self-attention for the queries: (B, T, D) -> (B, Q, D)."""
        return self.attention_scale(self.attention(relation.queries(z_BTD), z_BTD, relation))

    def mlp(self, z_BTD: Tensor) -> Tensor:
        return self.feed_forward_scale(self.feed_forward(z_BTD))

    def residual(self, z_BTD: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Computes branch(z) + z; in training for some of the images only (stochastic depth by subset).

        Only a random share `1 - drop_path` of the images goes through the branch, as in DINOv2's code. Its
        output is scaled up, so that the expected value stays the same.
        """
        if not (self.training and self.drop_path):
            branch_BQD = branch(z_BTD)
            return (z_BTD[:, : branch_BQD.shape[1]] + branch_BQD).to(z_BTD.dtype)
        batch = z_BTD.shape[0]
        kept = torch.randperm(batch, device=z_BTD.device)[: max(round(batch * (1 - self.drop_path)), 1)]
        branch_SQD = branch(z_BTD[kept])
        z_BQD = z_BTD[:, : branch_SQD.shape[1]]
        return z_BQD.index_add(0, kept, branch_SQD.to(z_BTD.dtype), alpha=batch / len(kept))


class PostNormLayer(EncoderLayer):
    """norm(z + f(z)), the 2017 Transformer's."""

    order = "post"

    def forward(self, z_BTD: Tensor, relation: Relation = NO_RELATION) -> Tensor:
        z_BTD = self.attention_norm(self.residual(z_BTD, lambda z: self.msa(z, relation)))
        z_BTD = relation.merged(z_BTD)
        return self.feed_forward_norm(self.residual(z_BTD, self.mlp))


class ResidualPostNormLayer(EncoderLayer):
    """z + norm(f(z)), that of Swin v2 (arXiv:2111.09883) and EVA-02 E."""

    order = "residual_post"

    def forward(self, z_BTD: Tensor, relation: Relation = NO_RELATION) -> Tensor:
        z_BTD = relation.merged(self.residual(z_BTD, lambda z: self.msa(z, relation)))
        return self.residual(z_BTD, self.mlp)

    def msa(self, z_BTD: Tensor, relation: Relation) -> Tensor:
        mixed_BQD = self.attention(relation.queries(z_BTD), z_BTD, relation)
        return self.attention_scale(self.attention_norm(mixed_BQD))

    def mlp(self, z_BTD: Tensor) -> Tensor:
        return self.feed_forward_scale(self.feed_forward_norm(self.feed_forward(z_BTD)))


class ParallelLayer(EncoderLayer):
    """z + attention(norm(z)) + mlp(norm(z)), one norm for both (arXiv:2302.05442, §2.1)."""

    order = "parallel"
    has_two_norms = False

    def forward(self, z_BTD: Tensor, relation: Relation = NO_RELATION) -> Tensor:
        def both(z_BTD: Tensor) -> Tensor:
            z_BTD = self.attention_norm(z_BTD)
            asking_BQD = relation.queries(z_BTD)
            mixed_BQD = self.attention(asking_BQD, z_BTD, relation)
            return self.attention_scale(mixed_BQD + self.feed_forward(asking_BQD))

        return self.residual(z_BTD, both)


_KINDS = EncoderLayer, PostNormLayer, ResidualPostNormLayer, ParallelLayer
_LAYERS: dict[Order, type[EncoderLayer]] = {kind.order: kind for kind in _KINDS}


def encoder_layer(
    embed_dim: int,
    num_heads: int,
    hidden_dim: int,
    dropout: float,
    *,
    options: LayerOptions,
    norm: Norm,
    drop_path: float,
) -> EncoderLayer:
    """Builds the layer whose order the options say, with the arguments of `EncoderLayer`."""
    layer = _LAYERS[options.order]
    return layer(embed_dim, num_heads, hidden_dim, dropout, options=options, norm=norm, drop_path=drop_path)
