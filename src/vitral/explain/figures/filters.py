"""What the first linear map looks for: principal components of the patch filters (the paper, fig. 7 left)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np

from vitral.explain.figures.drawing import Drawing, Reach, Row
from vitral.explain.figures.house import Look, Mosaic, bare, mosaic, mosaic_height
from vitral.model.embedding import ConvStem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitral.model.vit import VisionTransformer

_COUNT = 28  # the paper's
_COLUMNS = 7
_MOST_CHANNELS = 8  # drawn


@dataclass(frozen=True)
class FilterComponents(Drawing):
    """The first 28 principal components of the filters, as pictures."""

    name = "filters"
    title = "What the patch filters look for"
    see = (
        "Each tile is a pattern that many of the filters share, the most common first; trained filters "
        "show smooth edges, stripes and colour contrasts at several frequencies. Noise instead of "
        "patterns means that the filters learnt little, or that the patch is small."
    )
    recipe = (
        "The paper, fig. 7 left: principal components of the kernel (D filters of p x p x C weights). "
        "Its text does not say how they were centred or scaled; here the mean filter is subtracted, "
        "each component is scaled to fill black to white, and its arbitrary sign makes its largest "
        "weight positive."
    )

    components_MChw: np.ndarray  # unit vectors over channel, row and column
    shares_M: np.ndarray  # of the filters' variance
    filters: str  # which they are

    @classmethod
    def of(cls, model: "VisionTransformer") -> Self:
        """Takes the filters that see pixels: a stem's first ones, else the patch projection's."""
        stem = model.embedding.stem
        hybrid = isinstance(stem, ConvStem)
        first = stem.convolutions()[0] if hybrid else model.embedding.patches.projection
        what = "first convolution of the stem" if hybrid else "patch projection"
        weight = first.weight.detach().float().cpu().numpy()
        components_MP, shares_M = principal_components(weight.reshape(len(weight), -1), _COUNT)
        sides = "x".join(map(str, weight.shape[2:]))
        named = f"{len(weight)} filters of the {what}, {sides} pixels"
        return cls(components_MP.reshape(-1, *weight.shape[1:]), shares_M, named)

    @property
    def height(self) -> float:
        return mosaic_height(self._mosaic, beside=0.4, below=0.4)

    def finding(self) -> str:
        count, total = len(self.shares_M), self.shares_M.sum()
        most = self.shares_M[0] if count else 0
        return (
            f"The {self.filters}: the first {count} components hold {total:.0%} of their variance, "
            f"the first alone {most:.0%}."
        )

    def rows(self) -> Iterator[Row]:
        for place, value in np.ndenumerate(self.components_MChw):
            component, channel, row, column = place
            yield {
                "component": component, "share_of_variance": self.shares_M[component], "channel": channel,
                "row": row, "column": column, "weight": value,
            }  # fmt: skip

    @cached_property
    def _mosaic(self) -> Mosaic:
        low, high = (f(self.components_MChw, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
        pictures = (self.components_MChw - low) / np.maximum(high - low, 1e-12)
        channels = pictures.shape[1]
        if channels in (1, 3):
            return mosaic(_in_rows(pictures.transpose(0, 2, 3, 1).repeat(3 // channels, axis=-1)))
        # Of other channels no colours can be made: a row a component, a column a channel.
        return mosaic(pictures[:_COLUMNS, :_MOST_CHANNELS, :, :, None].repeat(3, -1))

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:  # noqa: ARG002
        axes = canvas.add_subplot()
        axes.imshow(self._mosaic.pixels)
        bare(axes)
        if self.components_MChw.shape[1] not in (1, 3):
            axes.set_xlabel("channel")
            axes.set_ylabel("component")


def _in_rows(tiles_MhwC: np.ndarray) -> np.ndarray:
    """Tiles in rows of seven, the last filled up with nothing: (R, 7, h, w, C)."""
    missing = -len(tiles_MhwC) % _COLUMNS
    padding = np.full((missing, *tiles_MhwC.shape[1:]), np.nan)
    return np.concatenate([tiles_MhwC, padding]).reshape(-1, _COLUMNS, *tiles_MhwC.shape[1:])


def principal_components(rows_MP: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives the first components (count, P), of fixed sign, and their shares of the variance.

    The largest entry of each, by magnitude, is positive. There are fewer where the rows span fewer.
    """
    centred = rows_MP - rows_MP.mean(axis=0)
    _, singular, components = np.linalg.svd(centred, full_matrices=False)
    kept = np.flatnonzero(singular > 1e-6 * max(singular[0], 1e-12))[:count]
    components = components[kept]
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
    return components * np.sign(largest), singular[kept] ** 2 / max((singular**2).sum(), 1e-12)
