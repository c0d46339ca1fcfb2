"""The encoder's layers (the paper, eq. 2 and 3): attention and MLP. Axes are those of `embedding`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vitral.model.attention import MultiHeadAttention
from vitral.model.config import FeedForwardOptions, LayerOptions, Norm
from vitral.model.positions.relation import Relation


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
    """Attention and MLP, each with a norm and a residual: (B, T, D) -> (B, T, D).

    Args:
        embed_dim: D.
        num_heads: A.
        hidden_dim: width of the MLP.
        dropout: probability after each dense layer but the q, k, v projection.
        options: the order of norms and residuals, scales, and what attention and MLP are.
        norm: the kind of the norms.
        drop_path: stochastic depth (arXiv:1603.09382), the share of the images that skip a residual
            branch in training.
    """

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
        self.order = options.order
        one_norm = self.order == "parallel"
        self.attention_norm = norm.build(embed_dim)
        self.attention = MultiHeadAttention(embed_dim, num_heads, dropout, options.attention, norm)
        self.attention_scale = _scale(embed_dim, options.layer_scale)
        self.feed_forward_norm = nn.Identity() if one_norm else norm.build(embed_dim)
        self.feed_forward = FeedForward(embed_dim, hidden_dim, dropout, options.feed_forward, norm)
        self.feed_forward_scale = nn.Identity() if one_norm else _scale(embed_dim, options.layer_scale)
        self.drop_path = drop_path

    def forward(self, x_BTD: Tensor, relation: Relation | None = None, first: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, first, D): as many of the first tokens as are read."""

        def attention(x_BTD: Tensor) -> Tensor:
            return self.attention(x_BTD, relation, first)

        attention_norm, feed_forward_norm = self.attention_norm, self.feed_forward_norm
        match self.order:
            case "pre":
                x_BTD = self.residual(x_BTD, attention_norm, attention, self.attention_scale)
                return self.residual(x_BTD, feed_forward_norm, self.feed_forward, self.feed_forward_scale)
            case "post":
                x_BTD = attention_norm(self.residual(x_BTD, attention, self.attention_scale))
                return feed_forward_norm(self.residual(x_BTD, self.feed_forward, self.feed_forward_scale))
            case "residual_post":
                x_BTD = self.residual(x_BTD, attention, attention_norm, self.attention_scale)
                return self.residual(x_BTD, self.feed_forward, feed_forward_norm, self.feed_forward_scale)

        def both(x_BTD: Tensor) -> Tensor:
            return attention(x_BTD) + self.feed_forward(x_BTD[:, :first])

        return self.residual(x_BTD, attention_norm, both, self.attention_scale)

    def residual(self, x_BTD: Tensor, *branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum x + branch(x), in training for some of the images only: stochastic depth by subset.

        A random share `1 - drop_path` of the batch goes through the branch and counts for all, as in
        DINOv2's code: the same mean as dropping image by image, and what is dropped is not computed.
        """
        if not (self.training and self.drop_path):
            branch_BTD = _chain(branch, x_BTD)
            return (x_BTD[:, : branch_BTD.shape[1]] + branch_BTD).to(x_BTD.dtype)
        batch = x_BTD.shape[0]
        kept = torch.randperm(batch, device=x_BTD.device)[: max(round(batch * (1 - self.drop_path)), 1)]
        branch_KTD = _chain(branch, x_BTD[kept])
        x_BTD = x_BTD[:, : branch_KTD.shape[1]]
        return x_BTD.index_add(0, kept, branch_KTD.to(x_BTD.dtype), alpha=batch / len(kept))


def _chain(functions: tuple[Callable[[Tensor], Tensor], ...], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def _scale(embed_dim: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(embed_dim, start)
