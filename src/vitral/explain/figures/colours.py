"""Pictures under the model's eyes: patch features as colours, and rollout over the images."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vitral.explain.figures.drawing import Drawing, Reach, Row
from vitral.explain.figures.filters import principal_components
from vitral.explain.figures.house import WIDTH, Look, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Pixels of photographs are smoothed, those of icons stay squares.
_SMOOTH_OR_SQUARE = "antialiased"
_SATURATED = 0.01  # of the patches share the brightest colour, or one that stands out would darken all


@dataclass(frozen=True)
class Pictures(Drawing):
    """Images as the model sees them, each above what is shown of it."""

    photographs = True

    images_BHW3: np.ndarray  # 0 to 255
    names_B: Sequence[str]

    @property
    def _columns(self) -> int:
        """How many stand side by side."""
        return min(len(self.images_BHW3), 3)

    @property
    def height(self) -> float:
        tall = self.images_BHW3.shape[1] / self.images_BHW3.shape[2]
        rows = 2 * -(-len(self.images_BHW3) // self._columns)
        return float(np.clip(rows * WIDTH / self._columns * tall + 0.15, 1.3, 12))

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:  # noqa: ARG002
        canvas.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        columns, count = self._columns, len(self.images_BHW3)
        grid = canvas.subplots(2 * -(-count // columns), columns, squeeze=False)
        for axes in grid.flat:
            bare(axes)
        for place, image in enumerate(self.images_BHW3):
            row, column = divmod(place, columns)
            grid[2 * row, column].imshow(image, interpolation=_SMOOTH_OR_SQUARE)
            self._show(grid[2 * row + 1, column], place, reach)

    @abstractmethod
    def _show(self, axes: "Axes", place: int, reach: Reach) -> None:
        """Draws what is shown of one image."""


@dataclass(frozen=True)
class FeatureColours(Pictures):
    """Patch features of several images, their first three principal components as red, green and blue."""

    name = "feature_colours"
    title = "Patch features as colours (PCA)"
    see = (
        "Below each image, patches of one colour have like features, over all the images. Parts of "
        "objects that share their colour from image to image, apart from the background, are what makes "
        "frozen features useful; patches of a lone glaring colour are often high-norm tokens."
    )
    recipe = (
        "DINOv2 (arXiv:2304.07193), fig. 1: principal components of the patch tokens after the final "
        "norm, of all these images together, the first three as red, green and blue. They leave out the "
        "background by a threshold on the first component; here nothing is left out, colours go from "
        "the 1st to the 99th percentile, and each component's sign makes its largest entry positive. "
        "Colours of two models cannot be compared with each other, places can."
    )

    features_BRCD: np.ndarray

    @cached_property
    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, R, C, 3) and the components' shares of the variance."""
        rows = self.features_BRCD.reshape(-1, self.features_BRCD.shape[-1]).astype(np.float64)
        components, shares = principal_components(rows, 3)
        scores = (rows - rows.mean(axis=0)) @ components.T
        missing = 3 - len(shares)  # of a model narrower than three, or of features that are all alike
        scores, shares = np.pad(scores, ((0, 0), (0, missing))), np.pad(shares, (0, missing))
        return scores.reshape(*self.features_BRCD.shape[:3], 3), shares

    @cached_property
    def colours_BRC3(self) -> np.ndarray:
        """From 0 to 1."""
        scores, _ = self._components
        low, high = np.quantile(scores, [0.01, 0.99], axis=(0, 1, 2))
        return np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)

    def finding(self) -> str:
        _, shares = self._components
        return (
            f"The three components hold {shares.sum():.0%} of the features' variance "
            f"({', '.join(f'{share:.0%}' for share in shares)})."
        )

    def rows(self) -> Iterator[Row]:
        scores, _ = self._components
        for image, row, column in np.ndindex(scores.shape[:3]):
            first, second, third = scores[image, row, column]
            yield {
                "image": self.names_B[image], "row": row, "column": column,
                "component_1": first, "component_2": second, "component_3": third,
            }  # fmt: skip

    def _show(self, axes: "Axes", place: int, reach: Reach) -> None:  # noqa: ARG002
        axes.imshow(self.colours_BRC3[place], extent=_extent(self.images_BHW3[place]))


def _extent(image_HW3: np.ndarray) -> tuple[float, float, float, float]:
    height, width = image_HW3.shape[:2]
    return -0.5, width - 0.5, height - 0.5, -0.5


@dataclass(frozen=True)
class RolloutOverlays(Pictures):
    """Attention rollout over the images."""

    name = "rollout"
    title = "Where attention comes from (rollout)"
    see = (
        "Below each image, bright patches are those that the answer draws on when attention is followed "
        "through all layers down to the input. Rollout does not know which class was answered, and a "
        "lone bright patch on empty background is often a high-norm token: see the token norms."
    )
    recipe = (
        "The paper, fig. 6 and 14 (Abnar and Zuidema, arXiv:2005.00928), by its authors' answer "
        "(google-research/vision_transformer, issue 18): mean over heads, identity added, rows made to "
        "sum to 1, product over all layers. Their pictures are divided by the maximum, blurred by a "
        "patch and laid as light over the image (issue 27); here the numbers are kept, all images share "
        "one scale from 0, on which the brightest hundredth of the patches have one colour, and nothing is "
        "blurred but what lies between patches. What a prefix token keeps of itself is left out."
    )

    maps_BRC: np.ndarray  # shares of the head's reading that come from each patch
    prefix_B: np.ndarray  # shares that stay with the tokens before the patches

    def finding(self) -> str:
        ranked = np.sort(self.maps_BRC.reshape(len(self.maps_BRC), -1), axis=1)[:, ::-1]
        half = (np.cumsum(ranked, axis=1) < 0.5 * ranked.sum(axis=1, keepdims=True)).sum(axis=1) + 1
        return (
            f"Half of what comes from patches comes from {np.median(half / ranked.shape[1]):.0%} of them "
            f"(median of {len(ranked)} images); {self.prefix_B.mean():.0%} stays with tokens before the "
            "patches."
        )

    def rows(self) -> Iterator[Row]:
        for (image, row, column), value in np.ndenumerate(self.maps_BRC):
            yield {"image": self.names_B[image], "row": row, "column": column, "rollout": value}

    def reach(self) -> Reach:
        return {"rollout": (0, float(np.quantile(self.maps_BRC, 1 - _SATURATED)))}

    def _show(self, axes: "Axes", place: int, reach: Reach) -> None:
        from vitral.explain.render import Scale, overlay

        scale, image = Scale(*reach["rollout"]), Image.fromarray(self.images_BHW3[place])
        axes.imshow(overlay(image, self.maps_BRC[place], scale), interpolation=_SMOOTH_OR_SQUARE)
