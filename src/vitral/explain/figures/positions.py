"""What a model knows of places: how alike positions are to it (the paper, fig. 7 centre)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch

from vitral.explain.figures.drawing import Drawing, NotDrawn, Reach, Row, in_words
from vitral.explain.figures.house import Look, Mosaic, colour_bar, mosaic, mosaic_height
from vitral.model.config import Grid
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.rotary import RotaryPositions
from vitral.model.positions.tables import LearnedPositions, PositionalEncoding2d, SinusoidalPositions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vitral.model.vit import VisionTransformer

_SIDE = 7  # tiles a side: all of the paper's L/32, an even choice of larger grids
_MOST_LAYERS, _MOST_HEADS = 12, 8  # drawn of tiles a layer and head


@dataclass(frozen=True)
class PositionSimilarity(Drawing):
    """Cosine similarity of each place with all places, a tile a place."""

    name = "positions"
    title = "How alike positions are"
    see = (
        "The tile at a row and column shows how like that place's position is to every place of the "
        "grid, itself the brightest. Trained positions are like their neighbours, and often like their "
        "whole row and column: the model found out that the sequence is a picture."
    )
    recipe = (
        "The paper, fig. 7 centre: cosine similarity of position vectors, without the class token. Of a "
        "grid beyond 7 a side, 7 rows and columns are drawn, evenly chosen."
    )

    cosines_NN: np.ndarray
    grid: Grid
    kind: str  # what the positions are

    @classmethod
    def of(cls, vectors_NF: "Tensor", grid: Grid, kind: str) -> Self:
        return cls(cosine_similarity(vectors_NF), grid, kind)

    @property
    def height(self) -> float:
        return mosaic_height(self._mosaic)

    def finding(self) -> str:
        apart = [
            np.abs(axis[:, None] - axis) for axis in np.divmod(np.arange(len(self.cosines_NN)), self.grid[1])
        ]
        beside = apart[0] + apart[1] == 1
        in_line = (np.minimum(*apart) == 0) & (np.maximum(*apart) > 1)
        elsewhere = np.minimum(*apart) > 0
        parts = [
            f"{self.cosines_NN[where].mean():.2f} {words}"
            for where, words in (
                (beside, "for next neighbours"),
                (in_line, "further along a row or column"),
                (elsewhere, "elsewhere"),
            )
            if where.any()
        ]
        return (
            f"{self.kind}. Mean similarity: {in_words(parts)}." if parts else f"{self.kind}: one place only."
        )

    @property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = (np.linspace(0, side - 1, min(side, _SIDE)).round().astype(int) for side in self.grid)
        return rows, columns

    def _tiles(self) -> np.ndarray:
        rows, columns = self._chosen
        maps = self.cosines_NN.reshape(*self.grid, *self.grid)
        return maps[rows[:, None], columns]

    def rows(self) -> Iterator[Row]:
        rows, columns = self._chosen
        for (row, column, other_row, other_column), value in np.ndenumerate(self._tiles()):
            yield {
                "row": rows[row], "column": columns[column], "other_row": other_row,
                "other_column": other_column, "cosine": value,
            }  # fmt: skip

    @cached_property
    def _mosaic(self) -> Mosaic:
        return mosaic(self._tiles())

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:  # noqa: ARG002 - always -1 to 1
        axes = canvas.add_subplot()
        image = axes.imshow(self._mosaic.pixels, vmin=-1, vmax=1)
        self._mosaic.label(axes, *self._chosen)
        axes.set_xlabel("column of the patch")
        axes.set_ylabel("row of the patch")
        colour_bar(canvas, image, axes, "cosine similarity")


@dataclass(frozen=True)
class RotarySimilarity(PositionSimilarity):
    """The same of rotary positions, whose vectors are the cosines and sines of their angles."""

    name = "positions_rotary"
    title = "How alike rotary positions are"
    see = (
        "The tile at a row and column shows how far a query there and an equal key at every place agree "
        "after both were turned by their positions, averaged over all pairs of channels. The bright "
        "cross or spot is the locality that the angles alone bring; what heads make of it is learned."
    )
    recipe = (
        "Ours; the paper has no rotary positions. The vector of a place is the cosine and sine of each "
        "of its angles, so that the similarity of two places is the mean of cos(difference of angles)."
    )


@dataclass(frozen=True)
class HeadMaps(Drawing):
    """What each head is told of every place by the patch in the middle, a tile a layer and head."""

    unit: ClassVar[str]

    values_LARC: np.ndarray  # over layers (or one for all), heads, rows and columns of patches

    @property
    def height(self) -> float:
        return mosaic_height(self._mosaic)

    @property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray]:
        most = zip(self.values_LARC.shape, (_MOST_LAYERS, _MOST_HEADS), strict=False)
        layers, heads = (np.linspace(0, n - 1, min(n, at_most)).round().astype(int) for n, at_most in most)
        return layers, heads

    def rows(self) -> Iterator[Row]:
        for (layer, head, row, column), value in np.ndenumerate(self.values_LARC):
            yield {"layer": layer, "head": head, "row": row, "column": column, "value": value}

    @cached_property
    def _mosaic(self) -> Mosaic:
        layers, heads = self._chosen
        return mosaic(self.values_LARC[layers[:, None], heads])

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:  # noqa: ARG002
        axes = canvas.add_subplot()
        low, high = reach["value"]
        cmap = "viridis" if low == -high == -1 else "PuOr_r"
        image = axes.imshow(self._mosaic.pixels, vmin=low, vmax=high, cmap=cmap)
        layers, heads = self._chosen
        self._mosaic.label(axes, layers if len(self.values_LARC) > 1 else ["all"], heads)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        colour_bar(canvas, image, axes, self.unit)


class RelativeBiases(HeadMaps):
    """Relative biases, added to the logits of attention."""

    name = "positions_relative"
    title = "What relative positions add to attention"
    unit = "added to the logit"
    see = (
        "Each tile is a head: what it adds to the attention of the patch in the middle to every place "
        "of the grid. A bright spot is a head that looks nearby, a spot beside the middle one that "
        "looks in a direction."
    )
    recipe = (
        "Ours, after the paper's fig. 7 centre: of a table of relative biases (BEiT) no cosine makes "
        "sense, so the biases themselves are drawn, for the query in the middle of the grid. Beyond 12 "
        "layers and 8 heads an even choice is drawn; the table has all."
    )

    def reach(self) -> Reach:
        most = float(np.abs(self.values_LARC).max()) or 1.0
        return {"value": (-most, most)}

    def finding(self) -> str:
        flat = self.values_LARC.reshape(*self.values_LARC.shape[:2], -1)
        spread = flat.max(-1) - flat.min(-1)
        layer, head = np.unravel_index(spread.argmax(), spread.shape)
        where = f"head {head} of layer {layer}" if len(spread) > 1 else f"head {head}"
        return (
            f"Biases go from {flat.min():.2f} to {flat.max():.2f}, within a head by "
            f"{np.median(spread):.2f} (median) and at most {spread.max():.2f} ({where})."
        )


class MixedRotary(HeadMaps):
    """Rotary positions whose frequencies each head learned."""

    name = "positions_rotary"
    title = "How alike rotary positions are, by head"
    unit = "cosine similarity"
    see = (
        "Each tile is a head: how far a query in the middle and an equal key at every place agree after "
        "both were turned by their positions. A small spot is a head whose angles keep it local, "
        "stripes one that learned a direction."
    )
    recipe = RotarySimilarity.recipe + (
        " Each head learned its own angles (RoPE-ViT), so a tile is a head, for the query in the middle."
    )

    def reach(self) -> Reach:
        return {"value": (-1.0, 1.0)}

    def finding(self) -> str:
        flat = self.values_LARC.reshape(*self.values_LARC.shape[:2], -1)
        wide = (flat > 0.5).mean(-1)
        return (
            f"The share of places with a similarity above 0.5 goes from {wide.min():.0%} to "
            f"{wide.max():.0%} between heads; median {np.median(wide):.0%}."
        )


@torch.no_grad()
def position_drawings(model: "VisionTransformer") -> list[Drawing | NotDrawn]:
    """Gives the figures of every way in which the model knows of places; a `NotDrawn` if there is none."""
    found: list[Drawing | NotDrawn] = []
    prefix, grid = model.config.num_prefix_tokens, model.config.grid_size
    match model.embedding.positions:
        case LearnedPositions() as of:
            found.append(PositionSimilarity.of(of.table[of.num_prefix_tokens :], of.grid, "Learned table"))
        case SinusoidalPositions() as of:
            vectors = of.table[prefix : prefix + grid[0] * grid[1]]
            found.append(
                PositionSimilarity.of(vectors, grid, "Fixed sines and cosines of the patch's number")
            )
        case PositionalEncoding2d() as of:
            kind = "Fixed sines and cosines of row and column"
            found.append(PositionSimilarity.of(of.table, of.grid, kind))
    relations = list(model.relations)
    if relations and isinstance(relations[0], RelativeBias):
        maps = [
            _middle_biases(relation, grid) for relation in relations if isinstance(relation, RelativeBias)
        ]
        found.append(RelativeBiases(np.stack(maps)))
    if relations and isinstance(relations[0], RotaryPositions):
        found.append(_rotary([r for r in relations if isinstance(r, RotaryPositions)], grid))
    nowhere = "the model has no positions: to it an image is a set of patches, in no order"
    return found or [NotDrawn(PositionSimilarity.title, nowhere)]


def _middle_biases(relation: RelativeBias, grid: Grid) -> np.ndarray:
    """Of the query in the middle, (A, R, C)."""
    bias_ATT = relation(grid, relation.table.device).bias_ATT
    return bias_ATT[:, 1 + _middle(grid), 1:].float().cpu().numpy().reshape(-1, *grid)


def _rotary(relations: list[RotaryPositions], grid: Grid) -> Drawing:
    prefix = relations[0].num_prefix_tokens
    vectors = []
    for relation in relations:
        device = torch.device("cpu") if relation.frequencies is None else relation.frequencies.device
        cos, sin, _ = relation(grid, device).rotation
        vectors.append(torch.cat([cos, sin], dim=-1)[..., prefix:, :])
    if vectors[0].ndim == 2:
        return RotarySimilarity.of(vectors[0], grid, "Rotary positions, the same for every head")
    maps = [
        [cosine_similarity(of_head)[_middle(grid)].reshape(grid) for of_head in layer] for layer in vectors
    ]
    return MixedRotary(np.array(maps))


def _middle(grid: Grid) -> int:
    return grid[0] // 2 * grid[1] + grid[1] // 2


def cosine_similarity(vectors_NF: "Tensor") -> np.ndarray:
    """Gives the cosine of each vector's angle with every other, (N, N); of a vector of zeros, 0."""
    vectors = vectors_NF.detach().double().cpu().numpy()
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, 1e-30)
    return (unit @ unit.T).astype(np.float32)
