"""Multi-head self-attention (the paper, appendix A, eq. 5 to 8). Axes are those of `embedding`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model.config import AttentionOptions, Norm
from vitral.model.kernels import prefers_explicit_attention
from vitral.model.positions.relation import Relation, rotate


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention (the paper, appendix A, eq. 5 to 8): (B, T, D) -> (B, T, D).

    Dropout follows the output projection only, as in the paper (appendix B.1), not the weights.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        options: AttentionOptions = AttentionOptions(),
        norm: Norm = Norm(),
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.num_heads = num_heads
        self.needs_relation = options.rotary is not None or options.relative_bias != "none"
        # One product for all three; rows ordered q, k, v and then by head.
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=options.biases == "qkv")
        # The biases of q and v where k has none.
        self.qv_bias = nn.Parameter(torch.empty(2 * embed_dim)) if options.biases == "qv" else None
        head_norm = norm.build if options.qk_norm else lambda _: nn.Identity()
        self.q_norm, self.k_norm = (head_norm(embed_dim // num_heads) for _ in "qk")
        self.norm = norm.build(embed_dim) if options.norm else nn.Identity()
        self.out = nn.Linear(embed_dim, embed_dim, bias=options.out_bias)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.qv_bias is not None:
            nn.init.zeros_(self.qv_bias)

    def forward(
        self, tokens_BTD: Tensor, relation: Relation | None = None, first: int | None = None
    ) -> Tensor:
        """With `first`, what so many of the first tokens take from all: (B, first, D).

        Raises:
            ValueError: if its attention depends on places, and no relation says them.
        """
        relation = self._known(relation)
        q_BATK, k_BATK, v_BATK = self.queries_keys_values(tokens_BTD, relation)
        bias_ATT = relation.bias_ATT
        if first is not None:
            q_BATK = q_BATK[:, :, :first]
            bias_ATT = None if bias_ATT is None else bias_ATT[:, :first]
        mixed_BATK = attend(q_BATK, k_BATK, v_BATK, bias_ATT)
        mixed_BTD = mixed_BATK.transpose(1, 2).flatten(2)
        return self.dropout(self.out(self.norm(mixed_BTD)))

    def _known(self, relation: Relation | None) -> Relation:
        if relation is None and self.needs_relation:
            raise ValueError(
                "this layer's attention depends on where tokens stand (rotary or relative positions): pass "
                "model.relations_of_layers(tokens)[i] to layer i, or use model.features(images, layers=[i])"
            )
        return relation or Relation()

    def weights(self, tokens_BTD: Tensor, relation: Relation | None = None) -> Tensor:
        """The attention probabilities A of eq. 6 that `forward` mixes with: (B, A, T, T), rows sum to 1."""
        relation = self._known(relation)
        q_BATK, k_BATK, _ = self.queries_keys_values(tokens_BTD, relation)
        return attention_weights(q_BATK, k_BATK, relation.bias_ATT)

    def queries_keys_values(
        self, tokens_BTD: Tensor, relation: Relation | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        relation = self._known(relation)
        qkv_BTD3 = self.qkv(tokens_BTD)
        if self.qv_bias is not None:
            q_D, v_D = self.qv_bias.chunk(2)
            qkv_BTD3 = qkv_BTD3 + torch.cat([q_D, torch.zeros_like(q_D), v_D])
        q, k, v = qkv_BTD3.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        if relation.rotation is not None:
            q, k = rotate(q, relation.rotation), rotate(k, relation.rotation)
        return q, k, v


def attention_weights(q_BATK: Tensor, k_BATK: Tensor, bias_ATT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias), the 2017 Transformer's eq. 1 and the paper's eq. 6."""
    scaled_q_BATK = q_BATK * q_BATK.shape[-1] ** -0.5
    logits_BATT = scaled_q_BATK @ k_BATK.transpose(-2, -1)
    return (logits_BATT if bias_ATT is None else logits_BATT + bias_ATT).softmax(dim=-1)


def attend(q_BATK: Tensor, k_BATK: Tensor, v_BATK: Tensor, bias_ATT: Tensor | None = None) -> Tensor:
    """Values mixed by the attention weights, (B, A, T, K), by the kernel that is faster here."""
    # The fused kernels have no gradient for a bias: torch would fall back to a slower explicit form.
    learned_bias = bias_ATT is not None and bias_ATT.requires_grad
    if learned_bias or prefers_explicit_attention(q_BATK):
        return attention_weights(q_BATK, k_BATK, bias_ATT).to(v_BATK.dtype) @ v_BATK
    mask = None if bias_ATT is None else bias_ATT.to(q_BATK.dtype)
    return F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK, mask)
