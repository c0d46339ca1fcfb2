"""Attention on demand: rows of A (eq. 6) for the layers, heads and queries that are asked for.

Axes are those of `model/embedding.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitral.explain.maps import AttentionMaps
from vitral.explain.observe import SeenAttention, observe
from vitral.inference.classifier import Classifier
from vitral.inference.features import layer_index
from vitral.model.config import Grid
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

# "class": the class token. "mean": all patches alike. (row, column): one patch.
Query = str | tuple[int, int]


class Rows(NamedTuple):
    """Rows of one layer's attention, and what certifies them."""

    weights_BAQT: Tensor  # on the CPU, in float32
    certificate: float  # the largest |A V - O|


@dataclass(frozen=True)
class Look:
    """Who looks, in which layers and heads: known to exist."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    queries: dict[str, int | None]  # name -> token; None for the mean of the patches
    num_prefix_tokens: int

    def rows(self, classifier: Classifier, images_BCHW: Tensor) -> dict[int, Rows]:
        """Runs the model, and computes the rows of each layer while it runs."""
        model = classifier.model
        read = model.num_tokens_read or 0
        with classifier.placement.autocast():
            seen = observe(
                model,
                images_BCHW,
                lambda _, seen: self._rows_of_layer(seen),
                layers=self.layers,
                all_queries=any(token is None or token >= read for token in self.queries.values()),
                keep_outputs=False,
            )
        return seen.taken

    def maps(self, parts: Sequence[dict[int, Rows]], grid: Grid) -> AttentionMaps:
        """Joins the rows of several batches, as maps over the grid."""
        by_layer = [torch.cat([part[layer].weights_BAQT for part in parts]) for layer in self.layers]
        values_BLAQT = torch.stack(by_layer, dim=1)
        return AttentionMaps(
            values=values_BLAQT[..., self.num_prefix_tokens :].unflatten(-1, grid),
            prefix=values_BLAQT[..., : self.num_prefix_tokens],
            layers=self.layers,
            heads=self.heads,
            queries=tuple(self.queries),
            grid=grid,
            certificate=tuple(max(part[layer].certificate for part in parts) for layer in self.layers),
        )

    def _rows_of_layer(self, seen: SeenAttention) -> Rows:
        of_queries = [
            self._mean_row(seen) if token is None else self._row(seen, token)
            for token in self.queries.values()
        ]
        rows_BAQT = torch.cat([row for row, _ in of_queries], dim=2).cpu()
        return Rows(rows_BAQT, float(torch.stack([difference for _, difference in of_queries]).max()))

    def _row(self, seen: SeenAttention, token: int) -> tuple[Tensor, Tensor]:
        """One token's row, of all heads at once."""
        every = self.heads == tuple(range(seen.num_heads))
        heads = slice(None) if every else list(self.heads)  # a slice copies no keys
        queries = slice(token, token + 1)
        row_BA1T = seen.weights(heads, queries)
        return row_BA1T, seen.difference(row_BA1T, heads, queries)

    def _mean_row(self, seen: SeenAttention) -> tuple[Tensor, Tensor]:
        """The mean of the patches' rows, head by head, so that one (T, T) an image is alive."""
        rows, differences = [], []
        for head in self.heads:
            patches = slice(self.num_prefix_tokens, None)
            weights_B1NT = seen.weights([head], patches)
            differences.append(seen.difference(weights_B1NT, [head], patches))
            rows.append(weights_B1NT.mean(dim=2, keepdim=True))
        return torch.cat(rows, dim=1), torch.stack(differences).max()


def look(
    model: VisionTransformer,
    grid: Grid,
    layers: Sequence[int] = (-1,),
    heads: Sequence[int] | None = None,
    queries: Sequence[Query] | None = None,
) -> Look:
    """Decides who looks; the arguments are those of `Inside.attention`.

    Raises:
        VitralError: if the model has no such layer, head or token.
    """
    if queries is None:
        queries = ["class" if model.config.class_token else "mean"]
    return Look(
        layers=tuple(layer_index(layer, len(model.layers)) for layer in layers),
        heads=_heads(heads, model.config.num_heads),
        queries=dict(_query(query, model, grid) for query in queries),
        num_prefix_tokens=model.config.num_prefix_tokens,
    )


def _heads(heads: Sequence[int] | None, count: int) -> tuple[int, ...]:
    wanted = tuple(range(count) if heads is None else heads)
    for head in wanted:
        if not 0 <= head < count:
            raise VitralError(f"there is no head {head}; this model has 0 to {count - 1}")
    if not wanted:
        raise VitralError(f"no heads are asked for; this model has 0 to {count - 1}")
    return wanted


def _query(query: Query, model: VisionTransformer, grid: Grid) -> tuple[str, int | None]:
    """The name, and the token."""
    if query == "class":
        if not model.config.class_token:
            raise VitralError('this model has no class token; ask for queries=["mean"], or patches')
        return "class", 0
    if query == "mean":
        return "mean", None
    if isinstance(query, str):
        raise VitralError(f'queries={query!r}: it must be "class", "mean" or (row, column) of a patch')
    row, column = query
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise VitralError(
            f"there is no patch {query}; rows are 0 to {grid[0] - 1}, columns 0 to {grid[1] - 1}"
        )
    return f"{row},{column}", model.config.num_prefix_tokens + row * grid[1] + column
