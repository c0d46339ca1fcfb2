"""From tokens to one vector by attention. Axes are those of `embedding`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model import initialize
from vitral.model.attention import attend
from vitral.model.config import Activation, FeedForwardOptions, Norm
from vitral.model.encoder import FeedForward


class AttentionPool(nn.Module):
    """One vector of all tokens, by a learned query and an MLP: (B, T, D) -> (B, D).

    "MAP", multihead attention pooling, of Scaling ViT (arXiv:2106.04560), §3.2, and SigLIP.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, hidden_dim: int, activation: Activation, norm: Norm
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.norm = norm.build(embed_dim)
        self.feed_forward = FeedForward(embed_dim, hidden_dim, options=FeedForwardOptions(activation))
        initialize.initialize_weights(self)

    def reset_parameters(self) -> None:
        initialize.truncated_normal(self.query)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        width = tokens_BTD.shape[2]
        query_B1D = self.query.expand(tokens_BTD.shape[0], -1, -1)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(query_B1D, weight[:width], bias[:width])
        k, v = F.linear(tokens_BTD, weight[width:], bias[width:]).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        pooled_B1D = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return (pooled_B1D + self.feed_forward(self.norm(pooled_B1D)))[:, 0]
