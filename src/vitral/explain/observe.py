"""One pass through a model that shows what its attention computed, the kernels staying as they are.

A layer's A of eq. 6 is never kept: it is computed again from the queries and keys that the layer itself used,
for the heads and queries that are wanted, while the layer runs. Its gradient needs no second pass either: as
O = A V for each head, the gradient of A is that of O times V^T. Axes are those of `model/embedding.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitral.model.attention import attention_weights
from vitral.model.config import Grid
from vitral.model.positions.relation import Relation
from vitral.model.vit import VisionTransformer

Heads = slice | list[int]


class SeenAttention(NamedTuple):
    """What one layer's attention computed for a batch: queries, keys, values and the values they mixed."""

    q_BAQK: Tensor
    k_BATK: Tensor
    v_BATK: Tensor
    mixed_BAQK: Tensor  # O = A V, the output of the kernel; part of the graph if there is one
    bias_ATT: Tensor | None  # (A, T, T), or (B, A, T, T)

    @property
    def num_heads(self) -> int:
        return self.q_BAQK.shape[1]

    def weights(self, heads: Heads = slice(None), queries: slice = slice(None)) -> Tensor:
        """Computes A of eq. 6 in float32 for some heads and queries: (B, A', Q', T), rows sum to 1."""
        q, k = self.q_BAQK[:, heads, queries], self.k_BATK[:, heads]
        bias = self.bias_ATT
        if bias is not None:
            bias = bias[..., heads, : self.q_BAQK.shape[2], :][..., queries, :].float()
        return attention_weights(q.detach().float(), k.detach().float(), bias)

    def gradient(
        self, of_mixed_BAQK: Tensor, heads: Heads = slice(None), queries: slice = slice(None)
    ) -> Tensor:
        """The gradient of A, that of O times V^T: (B, A', Q', T) in float32.

        Args:
            of_mixed_BAQK: the gradient of `mixed_BAQK`.
            heads: which heads.
            queries: which queries.
        """
        v = self.v_BATK[:, heads].detach().float()
        return of_mixed_BAQK[:, heads, queries].float() @ v.transpose(-2, -1)

    def difference(
        self, weights_BAQT: Tensor, heads: Heads = slice(None), queries: slice = slice(None)
    ) -> Tensor:
        """The largest |A V - O|, which certifies that these are the weights that the kernel mixed by."""
        mixed = self.mixed_BAQK[:, heads, queries].detach().float()
        return (weights_BAQT @ self.v_BATK[:, heads].detach().float() - mixed).abs().max()

    def each_head(self) -> Iterator[slice]:
        """Heads one by one, so that one (T, T) an image is alive."""
        return (slice(head, head + 1) for head in range(self.num_heads))


@dataclass(frozen=True)
class Pass:
    """What one pass through the model gave."""

    grid: Grid
    embedded_BTD: Tensor  # what entered the first layer; a leaf of the graph if there is one
    outputs: list[Tensor]  # what left each layer, (B, T, D), if kept; the last may have fewer tokens
    encoded_BTD: Tensor  # after the final norm
    logits_BL: Tensor
    taken: dict[int, Any]  # layer -> what `take` gave


def observe(
    model: VisionTransformer,
    images_BCHW: Tensor,
    take: Callable[[int, SeenAttention], Any] = lambda _, seen: seen,
    *,
    layers: Sequence[int] | None = None,
    all_queries: bool = True,
    patches: Tensor | None = None,
    keep_outputs: bool = True,
) -> Pass:
    """Runs the model, and calls `take(layer, seen)` with what the attention of each layer computed.

    Gradients flow if the caller has them enabled: from the logits back to the embedded tokens, through which
    weights need none (`frozen`).

    Args:
        model: in evaluation mode.
        images_BCHW: preprocessed, on the model's device.
        take: what to keep of a layer; it is called while the layer runs.
        layers: which to look at, from 0; None: all of them.
        all_queries: whether the last layer computes all tokens, or only those that the head reads.
        patches: indices (B, N') of the patches to run, at their own places; the others are left out, as if
            the image had no such patches. None: all.
        keep_outputs: whether to keep what leaves each layer, (B, T, D) each.

    Raises:
        ValueError: if the images do not fit the model.
    """
    grid = model.embedding.grid_of(images_BCHW)
    tokens_BTD = model.embedding(images_BCHW)
    relations = model.relations_of_layers(tokens_BTD, grid)
    if patches is not None:
        kept_BT = with_prefix(patches, model.config.num_prefix_tokens)
        tokens_BTD = tokens_BTD.gather(1, kept_BT[:, :, None].expand(-1, -1, tokens_BTD.shape[2]))
        relations = of_tokens(relations, kept_BT)
    if torch.is_grad_enabled():
        tokens_BTD = tokens_BTD.detach().requires_grad_()
    taken: dict[int, Any] = {}
    shown = range(len(relations)) if layers is None else layers
    relations = [
        relation._replace(observer=_observer(take, taken, index, relation)) if index in shown else relation
        for index, relation in enumerate(relations)
    ]
    if not all_queries:
        relations[-1] = relations[-1]._replace(num_queries=model.num_tokens_read)
    outputs: list[Tensor] | None = [] if keep_outputs else None
    encoded_BTD = model.encode(tokens_BTD, grid, relations=relations, outputs=outputs)
    return Pass(grid, tokens_BTD, outputs or [], encoded_BTD, model.classify(encoded_BTD), taken)


def with_prefix(patches_BN: Tensor, num_prefix_tokens: int) -> Tensor:
    """Indices of tokens, the prefix tokens before these patches: (B, N') -> (B, T')."""
    prefix_P = torch.arange(num_prefix_tokens, device=patches_BN.device)
    return torch.cat([prefix_P.expand(len(patches_BN), -1), patches_BN + num_prefix_tokens], dim=1)


def of_tokens(relations: Sequence[Relation], kept_BT: Tensor) -> list[Relation]:
    """Gives the relations of some tokens; what all layers share, as in most models, is indexed once."""
    made = {id(relation): relation.of_tokens(kept_BT) for relation in relations}
    return [made[id(relation)] for relation in relations]


def _observer(
    take: Callable[[int, SeenAttention], Any], taken: dict[int, Any], index: int, relation: Relation
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    def observer(q_BAQK: Tensor, k_BATK: Tensor, v_BATK: Tensor, mixed_BAQK: Tensor) -> None:
        # The layer may run under autocast; products of what was seen are float32 in any case.
        with torch.autocast(q_BAQK.device.type, enabled=False):
            taken[index] = take(index, SeenAttention(q_BAQK, k_BATK, v_BATK, mixed_BAQK, relation.bias_ATT))

    return observer


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Lets no gradient flow into the weights of a model, which is in evaluation mode, for a while.

    A learned bias that needs a gradient would also put the explicit kernel in the place of the fused one.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()
        model.train(was_training)


def start_row(model: VisionTransformer, seen: Pass) -> Tensor:
    """How much the head reads of each token, after the last layer: (B, T), rows sum to 1.

    The class token alone; with a distillation token half of each; for "mean" each patch alike; for
    "class_mean" half and half; for "map" the attention of the pool, mean over its heads.
    """
    encoded_BTD = seen.encoded_BTD
    batch, count = seen.embedded_BTD.shape[:2]
    others = slice(0 if model.config.head.pool_prefix else model.config.num_prefix_tokens, count)
    row_BT = encoded_BTD.new_zeros(batch, count, dtype=torch.float32)
    match model.config.pooling:
        case "class":
            row_BT[:, : model.num_tokens_read] = 1
        case "mean":
            row_BT[:, others] = 1
        case "class_mean":
            row_BT[:, others] = 1 / (others.stop - others.start)
            row_BT[:, 0] += 1
        case "map":
            assert model.attention_pool is not None
            row_BT[:, others] = (
                model.attention_pool.weights(encoded_BTD[:, others]).mean(dim=1)[:, 0].detach()
            )
    return row_BT / row_BT.sum(dim=1, keepdim=True)
