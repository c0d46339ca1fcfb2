"""Multi-head self-attention (the paper, appendix A, eq. 5 to 8). Axes are those of `embedding`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model.config import AttentionOptions, Norm
from vitral.model.kernels import HasKernels
from vitral.model.positions.relation import NO_RELATION, Relation, rotate


class MultiHeadAttention(HasKernels):
    """Mixes tokens for queries, by several heads (eq. 5 to 8): (B, Q, D), (B, T, D) -> (B, Q, D).

    In self-attention the queries are the tokens: `attention(tokens, tokens)`. Dropout follows the output
    projection only, as in the paper (appendix B.1), not the weights.

    Args:
        embed_dim: D.
        num_heads: A.
        dropout: probability, after the output projection.
        options: biases, norms, and whether attention depends on places.
        norm: the kind of the norms.

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
            raise ValueError(f"num_heads is {num_heads}; it must divide embed_dim {embed_dim}")
        self.num_heads = num_heads
        self.needs_places = options.rotary is not None or options.relative_bias != "none"
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

    def forward(self, queries_BQD: Tensor, tokens_BTD: Tensor, relation: Relation = NO_RELATION) -> Tensor:
        """Mixes the tokens' values for each query.

        Args:
            queries_BQD: what asks: the tokens themselves, or the first Q of them.
            tokens_BTD: what is asked.
            relation: what attention knows of the places of both.

        Raises:
            ValueError: if attention depends on places, and the relation does not give them.
        """
        q_BAQK, k_BATK, v_BATK = self.queries_keys_values(queries_BQD, tokens_BTD, relation)  # eq. 5
        mixed_BAQK = attend(q_BAQK, k_BATK, v_BATK, relation.bias_ATT, self.kernels.attention)  # eq. 6, 7
        if relation.observer is not None:
            relation.observer(q_BAQK, k_BATK, v_BATK, mixed_BAQK)
        return self.dropout(self.out(self.norm(mixed_BAQK.transpose(1, 2).flatten(2))))  # eq. 8

    def weights(self, queries_BQD: Tensor, tokens_BTD: Tensor, relation: Relation = NO_RELATION) -> Tensor:
        """Computes eq. 6, the weights by which `forward` mixes values: (B, A, Q, T), rows sum to 1."""
        q_BAQK, k_BATK, _ = self.queries_keys_values(queries_BQD, tokens_BTD, relation)
        return attention_weights(q_BAQK, k_BATK, relation.bias_ATT)

    def queries_keys_values(
        self, queries_BQD: Tensor, tokens_BTD: Tensor, relation: Relation = NO_RELATION
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[q, k, v] of eq. 5, for each head and turned by rotary positions: (B, A, Q or T, K) each."""
        if self.needs_places and relation.rotation is None and relation.bias_ATT is None:
            raise ValueError(
                "this layer's attention depends on where tokens stand (rotary or relative positions): pass "
                "model.relations_of_layers(tokens)[i] to layer i, or use model.features(images, layers=[i])"
            )
        q, k, v = self._project(tokens_BTD)
        if queries_BQD is not tokens_BTD:
            q, _, _ = self._project(queries_BQD)
        q, k = self.q_norm(q), self.k_norm(k)
        if relation.merge is not None:
            relation.merge.see(k)
        if relation.rotation is not None:
            q, k = rotate(q, relation.rotation), rotate(k, relation.rotation)
        return q, k, v

    def _project(self, tokens_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_BTD3 = self.qkv(tokens_BTD)
        if self.qv_bias is not None:
            q_D, v_D = self.qv_bias.chunk(2)
            qkv_BTD3 = qkv_BTD3 + torch.cat([q_D, torch.zeros_like(q_D), v_D])
        return split_heads(qkv_BTD3, self.num_heads)


def split_heads(qkv_BTD3: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of each head: (B, T, 3 D) -> three of (B, A, T, K)."""
    q, k, v = qkv_BTD3.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def attention_weights(q_BAQK: Tensor, k_BATK: Tensor, bias_ATT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias), the 2017 Transformer's eq. 1 and the paper's eq. 6: (B, A, Q, T)."""
    scaled_q_BAQK = q_BAQK * q_BAQK.shape[-1] ** -0.5
    logits_BAQT = scaled_q_BAQK @ k_BATK.transpose(-2, -1)
    return (logits_BAQT if bias_ATT is None else logits_BAQT + _of_queries(bias_ATT, q_BAQK)).softmax(dim=-1)


def attend(
    q_BAQK: Tensor, k_BATK: Tensor, v_BATK: Tensor, bias_ATT: Tensor | None = None, kernel: str = "fused"
) -> Tensor:
    """Computes eq. 7, values mixed by the attention weights: (B, A, Q, K)."""
    # The fused kernels have no gradient for a bias: torch would fall back to a slower explicit form.
    learned_bias = bias_ATT is not None and bias_ATT.requires_grad
    if learned_bias or kernel == "explicit":
        return attention_weights(q_BAQK, k_BATK, bias_ATT).to(v_BATK.dtype) @ v_BATK
    mask_AQT = None if bias_ATT is None else _of_queries(bias_ATT, q_BAQK).to(q_BAQK.dtype)
    return F.scaled_dot_product_attention(q_BAQK, k_BATK, v_BATK, mask_AQT)


def _of_queries(bias_ATT: Tensor, q_BAQK: Tensor) -> Tensor:
    return bias_ATT[..., : q_BAQK.shape[2], :]
