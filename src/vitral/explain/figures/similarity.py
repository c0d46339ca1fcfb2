"""How alike layers are in what they say of images: CKA, within one model and across two."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from torch import Tensor

from vitral.explain.figures.drawing import Drawing, Reach, Row
from vitral.explain.figures.house import Look, colour_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 4  # images of a batch that the unbiased estimate needs


@dataclass(frozen=True)
class LayerSimilarity(Drawing):
    """CKA of every pair of layers."""

    name = "cka"
    title = "How alike layers are (CKA)"
    see = (
        "A bright cell is a pair of layers that see the same images as alike, 1 on the diagonal. Plain "
        "ViTs are bright over wide areas, for the residual stream carries early features far up; a dark "
        "border is a depth at which the representation turns into another."
    )
    recipe = (
        "Linear CKA (Kornblith et al., arXiv:1905.00414) with the unbiased HSIC of minibatches, "
        "averaged over batches before dividing (Nguyen et al., arXiv:2010.15327), as Raghu et al. "
        "(arXiv:2108.08810) used it on ViTs. They do not say of which tokens; here of all tokens of an "
        "image, side by side."
    )

    cka_LM: np.ndarray
    axes_names: ClassVar[tuple[str, str]] = ("layer", "layer")

    @property
    def height(self) -> float:
        rows, columns = self.cka_LM.shape
        return float(np.clip(4.0 * rows / columns + 1.1, 1.8, 8))

    @classmethod
    def of(cls, one: "SimilarityMeter", other: "SimilarityMeter | None" = None) -> Self:
        return cls(cka(one.grams_LB, (other or one).grams_LB))

    def finding(self) -> str:
        next_ones, first_last = np.diagonal(self.cka_LM, 1), self.cka_LM[0, -1]
        if not len(next_ones):
            return "The model has one layer only."
        turn = int(next_ones.argmin())
        return (
            f"The first and the last layer agree to {first_last:.2f}; the sharpest turn is between layers "
            f"{turn} and {turn + 1} ({next_ones[turn]:.2f})."
        )

    def rows(self) -> Iterator[Row]:
        for (layer, other), value in np.ndenumerate(self.cka_LM):
            yield {"layer": layer, "other_layer": other, "cka": value}

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:  # noqa: ARG002 - always 0 to 1
        from matplotlib.ticker import MaxNLocator

        axes = canvas.add_subplot()
        image = axes.imshow(self.cka_LM, origin="lower", vmin=0, vmax=1, cmap="cividis")
        for axis, name in zip((axes.yaxis, axes.xaxis), self.axes_names, strict=True):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
            axis.set_label_text(name)
        axes.spines[:].set_visible(False)
        colour_bar(canvas, image, axes, "CKA")


@dataclass(frozen=True)
class ModelSimilarity(LayerSimilarity):
    """CKA of every layer of one model with every layer of another."""

    name = "cka_across"
    title = "How alike the two models' layers are (CKA)"
    see = (
        "A bright diagonal means that a layer of one model says of the images what the same layer of "
        "the other says. After fine-tuning it usually stays bright at the bottom and fades towards the "
        "top: there the training changed the model."
    )
    recipe = LayerSimilarity.recipe + " Both models see the same images in the same batches."

    axes_names = ("layer of the first model", "layer of the second model")

    def finding(self) -> str:
        same = np.diagonal(self.cka_LM)
        least = int(same.argmin())
        return (
            f"Layers of the same number agree to {same.mean():.2f} on average, least in layer {least} "
            f"({same[least]:.2f}); the last layers to {self.cka_LM[-1, -1]:.2f}."
        )


class SimilarityMeter:
    """Gathers of each batch the images' similarities, by layer: nothing else of their tokens is kept."""

    def __init__(self) -> None:
        self._grams: list[list[np.ndarray]] = []  # by batch, by layer: (B, B)

    def begin(self) -> None:
        self._grams.append([])

    def layer(self, tokens_BTD: Tensor) -> None:
        flat_BF = tokens_BTD.float().flatten(1)
        # A few common directions are far longer than what tells images apart; without the mean they would
        # take float32's digits. The estimate does not depend on it.
        flat_BF = flat_BF - flat_BF.mean(dim=0)
        self._grams[-1].append((flat_BF @ flat_BF.T).double().cpu().numpy())

    @property
    def grams_LB(self) -> list[list[np.ndarray]]:
        """By layer, by batch of four images and more, (B, B) each."""
        batches = [batch for batch in self._grams if len(batch[0]) >= FEWEST]
        return [list(layer) for layer in zip(*batches, strict=True)]


def cka(ones_LB: list[list[np.ndarray]], others_MB: list[list[np.ndarray]]) -> np.ndarray:
    """Gives linear CKA of every pair of layers, (L, M), of the similarities of images in each batch.

    HSIC of each batch by the unbiased estimate, its mean over batches, then divided (Nguyen et al.,
    arXiv:2010.15327, eq. 2 and 3).
    """
    ones, others = _centred(ones_LB), _centred(others_MB)
    # Products of batches of one size at once; HSIC of two is the sum of their entries' products.
    between = ones @ others.T
    own, theirs = (np.einsum("lf,lf->l", side, side) for side in (ones, others))
    return between / np.sqrt(np.maximum(np.outer(own, theirs), 1e-300))


def _centred(grams_LB: list[list[np.ndarray]]) -> np.ndarray:
    """U-centred similarities of all batches in one row a layer, whose dot products are summed HSICs.

    Székely and Rizzo (2014): the estimate of Song et al. (2012) is the inner product of matrices centred so,
    over n (n - 3).
    """
    return np.array([np.concatenate([_u_centred(gram) for gram in layer]) for layer in grams_LB])


def _u_centred(gram_BB: np.ndarray) -> np.ndarray:
    n = len(gram_BB)
    gram = gram_BB.copy()
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=1)
    centred = gram - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0)
    return centred.ravel() / np.sqrt(n * (n - 3))
