"""How far, how widely and at what heads look: attention distance, entropy, and the mass on prefix tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitral.explain.figures.drawing import Drawing, Reach, Row
from vitral.explain.figures.house import Look, layers_axis, legend_above
from vitral.explain.observe import SeenAttention
from vitral.model.config import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERS = 2**20  # probabilities at a time: no more, for what leaves the cache takes thrice as long


@dataclass(frozen=True)
class HeadNumbers(Drawing):
    """One number a head: a dot each over the layers, and a line through their means."""

    unit: ClassVar[str]  # of the axis
    column: ClassVar[str]  # of the table

    values_LA: np.ndarray

    def rows(self) -> Iterator[Row]:
        for (layer, head), value in np.ndenumerate(self.values_LA):
            yield {"layer": layer, "head": head, self.column: value}

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:
        axes = canvas.add_subplot()
        depth, heads = self.values_LA.shape
        layers = np.arange(depth)
        # Side by side, so that heads of one value do not hide each other.
        places = layers[:, None] + np.linspace(-0.18, 0.18, heads) if heads > 1 else layers[:, None]
        axes.plot(places.ravel(), self.values_LA.ravel(), "o", color=look.first, markersize=4.5, alpha=0.75,
                  markeredgewidth=0, label="a head")  # fmt: skip
        axes.plot(layers, self.values_LA.mean(axis=1), "-", color=look.second, label="mean of the layer")
        self._reference(axes, look)
        low, high = reach["value"]
        axes.set_ylim(low, high + 0.04 * (high - low))
        axes.set_ylabel(self.unit)
        axes.grid(axis="y")
        legend_above(axes, ncols=3)
        layers_axis(axes, depth)

    def _reference(self, axes: "Axes", look: Look) -> None:
        """Draws what the numbers are to be compared with."""

    def _extremes(self) -> tuple[str, str]:
        """Names the heads of the lowest and the highest number."""
        places = (np.unravel_index(f(self.values_LA), self.values_LA.shape) for f in (np.argmin, np.argmax))
        low, high = (f"head {head} of layer {layer}" for layer, head in places)
        return low, high


@dataclass(frozen=True)
class AttentionDistance(HeadNumbers):
    """How far from a patch lie, on average, the patches that it attends to."""

    name = "attention_distance"
    title = "How far heads look (attention distance)"
    unit = "attention distance, pixels"
    column = "distance_pixels"
    see = (
        "A dot is a head: the average distance, in pixels, between a patch and what it attends to. In "
        "trained ViTs the lower layers have both local heads and heads that see the whole image, and "
        "with depth all heads look far; dots at the dashed line are as far as attention to everything "
        "alike."
    )
    recipe = (
        "The paper, fig. 7 right and 11, by its authors' code (google-research/vision_transformer, "
        "issue 162): Euclidean distance of two patches on the grid times the patch's size, weighted by "
        "the attention of patches to patches, then the mean over queries and over images. Their weights "
        "are not renormalised after the class token is left out, so attention to it counts as distance "
        "0; `renormalise` divides by what is left."
    )

    renormalised: bool
    uniform: float  # pixels: of attention to all tokens alike

    def finding(self) -> str:
        means, (low, high) = self.values_LA.mean(axis=1), self._extremes()
        shares = (
            "renormalised over the patches" if self.renormalised else "not renormalised, as the authors did"
        )
        return (
            f"The mean goes from {means[0]:.3g} px in the first layer to {means[-1]:.3g} px in the last; "
            f"heads from {self.values_LA.min():.3g} ({low}) to {self.values_LA.max():.3g} ({high}), uniform "
            f"attention {self.uniform:.3g}; {shares}."
        )

    def reach(self) -> Reach:
        return {"value": (0, max(float(self.values_LA.max()), self.uniform))}

    def _reference(self, axes: "Axes", look: Look) -> None:
        axes.axhline(self.uniform, color=look.muted, linestyle="--", linewidth=1.2, label="uniform")


@dataclass(frozen=True)
class AttentionEntropy(HeadNumbers):
    """How many tokens a query shares its attention out to, as bits."""

    name = "attention_entropy"
    title = "How widely heads look (attention entropy)"
    unit = "entropy, bits"
    column = "entropy_bits"
    see = (
        "A dot is a head: 0 bits is attention to a single token, the dashed line is attention to all "
        "alike; each bit less halves the number of tokens. Heads far below the others have specialised, "
        "and a layer whose heads are all at the line only averages."
    )
    recipe = (
        "Ours, a usual measure: -sum of A log2 A over all tokens, prefix tokens too, mean over all "
        "queries and images; at most log2 T for T tokens."
    )

    most: float  # log2 T

    def finding(self) -> str:
        means = self.values_LA.mean(axis=1)
        low, _ = self._extremes()
        return (
            f"Of at most {self.most:.1f} bits the layers' means go from {means.min():.1f} to "
            f"{means.max():.1f}; the narrowest is {low}, {self.values_LA.min():.1f} bits, as of "
            f"{2 ** self.values_LA.min():.2g} tokens alike."
        )

    def reach(self) -> Reach:
        return {"value": (0, self.most)}

    def _reference(self, axes: "Axes", look: Look) -> None:
        axes.axhline(self.most, color=look.muted, linestyle="--", linewidth=1.2, label="uniform, log2 T")


@dataclass(frozen=True)
class PrefixMass(HeadNumbers):
    """Which share of the patches' attention goes to class, distillation and register tokens."""

    name = "prefix_mass"
    title = "How much attention goes to prefix tokens"
    unit = "share of attention, %"
    column = "prefix_share"
    see = (
        "A dot is a head: the share of the patches' attention that the tokens before the patches "
        "(class, distillation, registers) take. Much mass there is attention that no picture of patches "
        "can show, often a head with nothing to do that parks it."
    )
    recipe = (
        "Ours: the sum of A over the prefix tokens, mean over patch queries and images; what attention "
        "distance leaves out, and attention maps hide."
    )

    num_prefix_tokens: int
    uniform: float  # share

    def finding(self) -> str:
        _, high = self._extremes()
        plural = "s take" if self.num_prefix_tokens > 1 else " takes"
        return (
            f"{self.num_prefix_tokens} prefix token{plural} {self.values_LA.mean():.1%} of the patches' "
            f"attention on average, at most {self.values_LA.max():.1%} ({high}); uniform attention would "
            f"give {self.uniform:.1%}."
        )

    def reach(self) -> Reach:
        return {"value": (0, 100 * max(float(self.values_LA.max()), self.uniform))}

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:
        percents = PrefixMass(100 * self.values_LA, self.num_prefix_tokens, 100 * self.uniform)
        HeadNumbers.draw(percents, canvas, look, reach)

    def _reference(self, axes: "Axes", look: Look) -> None:
        axes.axhline(self.uniform, color=look.muted, linestyle="--", linewidth=1.2, label="uniform")


class AttentionMeter:
    """Gathers three numbers an image and head; of the probabilities themselves nothing is kept.

    Args:
        shape: layers and heads.
        num_prefix_tokens: before the patches.
        grid: of the patches.
        patch_size: pixels.
        renormalised: whether the weights that distances get are divided by their sum over the patches.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        num_prefix_tokens: int,
        grid: Grid,
        patch_size: int,
        *,
        renormalised: bool,
    ) -> None:
        self._prefix, self._renormalised = num_prefix_tokens, renormalised
        self._pixels_NN = patch_distances(grid, patch_size)
        self._sums = np.zeros((3, *shape))  # over images and queries: distance, entropy, mass
        self._images = 0

    def layer(self, layer: int, seen: SeenAttention) -> None:
        """Takes what one layer's attention computed for a batch, a few rows of one head at a time."""
        count, tokens = len(seen.q_BAQK), seen.q_BAQK.shape[2]
        self._images += count * (layer == 0)
        rows = max(_NUMBERS // (count * tokens), 1)
        sums_A3 = [
            torch.stack(
                [
                    self._summed(seen.weights(head, slice(first, first + rows))[:, 0], first)
                    for first in range(0, tokens, rows)
                ]
            ).sum(0)
            for head in seen.each_head()
        ]
        # Once a layer, for each copy from a GPU waits for it.
        self._sums[:, layer] += torch.stack(sums_A3, dim=1).cpu().numpy()

    def _summed(self, weights_BQT: Tensor, first: int) -> Tensor:
        """Sums over images and the queries from `first` on; distance and mass are of patches' queries."""
        before = max(self._prefix - first, 0)  # queries that are no patches
        of_patches = weights_BQT[:, before:]
        patch = first + before - self._prefix
        pixels_NN = self._pixels_NN = self._pixels_NN.to(weights_BQT.device)
        distances_BQ = attention_distance(
            of_patches[..., self._prefix :],
            pixels_NN[patch : patch + of_patches.shape[1]],
            renormalised=self._renormalised,
        )
        mass_BQ = of_patches[..., : self._prefix].sum(-1)
        entropies_BQ = attention_entropy(weights_BQT)
        return torch.stack([numbers.sum() for numbers in (distances_BQ, entropies_BQ, mass_BQ)])

    def drawings(self) -> Iterator[Drawing]:
        patches = len(self._pixels_NN)
        tokens = patches + self._prefix
        queries = np.array([patches, tokens, patches])[:, None, None]
        distance, entropy, mass = self._sums / (self._images * queries)
        share = 1.0 if self._renormalised else patches / tokens
        uniform = share * float(self._pixels_NN.mean())
        yield AttentionDistance(distance, self._renormalised, uniform)
        yield AttentionEntropy(entropy, float(np.log2(tokens)))
        if self._prefix:
            yield PrefixMass(mass, self._prefix, self._prefix / tokens)


def patch_distances(grid: Grid, patch_size: int) -> Tensor:
    """Gives the Euclidean distances of the patches' places in pixels, (N, N)."""
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in grid)
    places_N2 = torch.cartesian_prod(rows, columns)
    return patch_size * torch.cdist(places_N2, places_N2, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(weights_BQN: Tensor, pixels_QN: Tensor, *, renormalised: bool = False) -> Tensor:
    """Gives the distance in pixels that the attention of each query goes, (B, Q).

    Args:
        weights_BQN: probabilities of patches for patches; those for other tokens may be missing from the sum.
        pixels_QN: of `patch_distances`, the rows of these queries.
        renormalised: whether the weights of each query are made to sum to 1 first.
    """
    distances_BQ = (weights_BQN * pixels_QN).sum(-1)
    return distances_BQ / weights_BQN.sum(-1).clamp_min(1e-30) if renormalised else distances_BQ


def attention_entropy(weights_BQT: Tensor) -> Tensor:
    """Gives -sum A log2 A of each query, in bits, (B, Q)."""
    return torch.special.entr(weights_BQT).sum(-1) / np.log(2)
