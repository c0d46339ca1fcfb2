"""Attention and attribution as maps over the grid of patches, with what vouches for them."""

from dataclasses import dataclass

from torch import Tensor

from vitral.model.config import Grid


@dataclass(frozen=True)
class AttentionMaps:
    """Attention probabilities of chosen layers, heads and queries (A of eq. 6), on the CPU in float32."""

    values: Tensor  # (B, layers, heads, queries, rows, columns): from each query to each patch
    prefix: Tensor  # (B, layers, heads, queries, P): to class, distillation and register tokens
    layers: tuple[int, ...]  # from 0
    heads: tuple[int, ...]
    queries: tuple[str, ...]  # "class", "mean", or "3,4" for the patch in row 3 and column 4
    grid: Grid
    certificate: tuple[float, ...]  # of each layer, the largest |A V - O| against the kernel's output

    def __repr__(self) -> str:
        rows, columns = self.grid
        return (
            f"<AttentionMaps of {len(self.values)} images, {rows}x{columns} patches: layers {self.layers}, "
            f"heads {self.heads}, queries {', '.join(self.queries)}; certificate {max(self.certificate):.1e}>"
        )


@dataclass(frozen=True)
class Relevance:
    """How much each patch counts for a score of each image, by one method, on the CPU in float32."""

    values: Tensor  # (B, rows, columns)
    prefix_mass: Tensor  # (B,): the share of the map that fell on tokens that are no patches; 0 if none can
    method: str
    targets: tuple[str, ...]  # the class explained, an image each; "" for a method that knows of none
    against: tuple[str, ...] | None  # the class that it was set against
    scores: Tensor  # (B,): the score explained, a logit or a difference of two; NaN without classes
    probabilities: Tensor  # (B,): of the target; NaN without classes
    # The largest |A V - O| of the attention used. Of integrated gradients, the largest difference between the
    # sum of a map and what it is to sum up to. 0 where nothing vouches.
    certificate: float
    images: tuple[int, ...]  # the image of each map, from 0; there are more maps where each label has one
    layers: str = "all"  # which the map is of: all, last, or none, but what goes in and what comes out

    def __repr__(self) -> str:
        rows, columns = self.values.shape[1:]
        return (
            f"<Relevance of {len(self.values)} images by {self.method}, {rows}x{columns} patches; "
            f"certificate {self.certificate:.1e}>"
        )
