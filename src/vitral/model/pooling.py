"""From tokens to one vector by attention. Axes are those of `embedding`."""

import torch
from torch import Tensor, nn

from vitral.model import initialize
from vitral.model.attention import attend, attention_weights, split_heads
from vitral.model.config import Activation, FeedForwardOptions, Norm
from vitral.model.encoder import FeedForward
from vitral.model.kernels import HasKernels


def mean(tokens_BTD: Tensor, sizes_BT: Tensor | None = None) -> Tensor:
    """The mean token, each counted as often as it stands for patches: (B, T, D) -> (B, D)."""
    if sizes_BT is None:
        return tokens_BTD.mean(dim=1)
    shares_BT1 = (sizes_BT / sizes_BT.sum(dim=1, keepdim=True))[:, :, None]
    return (shares_BT1.to(tokens_BTD.dtype) * tokens_BTD).sum(dim=1)


class AttentionPool(HasKernels):
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

    def forward(self, tokens_BTD: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
        q_BA1K, k_BATK, v_BATK = self.query_keys_values(tokens_BTD)
        mixed_BA1K = attend(q_BA1K, k_BATK, v_BATK, bias_B11T, self.kernels.attention)
        pooled_B1D = self.out(mixed_BA1K.transpose(1, 2).flatten(2))
        return (pooled_B1D + self.feed_forward(self.norm(pooled_B1D)))[:, 0]

    def weights(self, tokens_BTD: Tensor) -> Tensor:
        """How much the query takes of each token, by head: (B, A, 1, T), rows sum to 1."""
        q_BA1K, k_BATK, _ = self.query_keys_values(tokens_BTD)
        return attention_weights(q_BA1K.float(), k_BATK.float())

    def query_keys_values(self, tokens_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The one query (B, A, 1, K), keys and values (B, A, T, K) of each head."""
        q_1A1K, _, _ = split_heads(self.qkv(self.query), self.num_heads)
        _, k_BATK, v_BATK = split_heads(self.qkv(tokens_BTD), self.num_heads)
        return q_1A1K.expand(k_BATK.shape[0], -1, -1, -1), k_BATK, v_BATK
