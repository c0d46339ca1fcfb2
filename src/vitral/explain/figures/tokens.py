"""Norms of tokens with the registers' check, and how much each layer changes its tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitral.explain.figures.drawing import Drawing, Reach, Row
from vitral.explain.figures.house import Look, layers_axis, legend_above

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MADS = 6
_NORMAL_SHARE = 2.6e-5  # of a normal distribution, beyond its median + 6 MAD: P(z > 6 * 0.6745)
_BINS = 80


@dataclass(frozen=True)
class TokenNorms(Drawing):
    """Lengths of patch tokens after each layer, and which of them stand out."""

    name = "token_norms"
    title = "Token norms: does the model need registers?"
    see = (
        "Above, how long the patch tokens are after each layer; below, the share that is longer than "
        "the dashed line. A second band far above the first, and a share of percents in the later "
        "layers, are the high-norm tokens in which a model without registers keeps what it knows of the "
        "whole image: attention maps point at them, though nothing is to be seen there."
    )
    recipe = (
        "Vision Transformers Need Registers (Darcet et al., arXiv:2309.16588), fig. 3 and 4: norms of "
        "the patch tokens as layers leave them, before the final norm. They cut at 150 by eye for one "
        "model; here an outlier is a norm beyond the layer's median + 6 MAD (median absolute "
        "deviations), of which a normal distribution has 0.003 %."
    )

    norms_LM: np.ndarray  # of M patch tokens, over layers and images
    prefix_L: np.ndarray  # median of the tokens before the patches; NaN without any

    @property
    def height(self) -> float:
        return 4.2

    @cached_property
    def thresholds_L(self) -> np.ndarray:
        medians = np.median(self.norms_LM, axis=1)
        deviations = np.median(np.abs(self.norms_LM - medians[:, None]), axis=1)
        return medians + _MADS * deviations

    @cached_property
    def shares_L(self) -> np.ndarray:
        """Of outliers."""
        return (self.norms_LM > self.thresholds_L[:, None]).mean(axis=1)

    def finding(self) -> str:
        worst = int(self.shares_L.argmax())
        last, longest = self.norms_LM[-1], self.norms_LM.max(axis=1)
        times = longest[worst] / np.median(self.norms_LM[worst])
        return (
            f"After the last layer {self.shares_L[-1]:.2%} of the patch tokens are outliers (median norm "
            f"{np.median(last):.1f}, longest {last.max():.1f}); most after layer {worst}, "
            f"{self.shares_L[worst]:.2%}, the longest {times:.1f} times the median."
        )

    def rows(self) -> Iterator[Row]:
        for layer, norms in enumerate(self.norms_LM):
            low, q1, median, q3, high = np.quantile(norms, [0, 0.25, 0.5, 0.75, 1])
            yield {
                "layer": layer, "tokens": len(norms), "smallest": low, "quartile_1": q1, "median": median,
                "quartile_3": q3, "largest": high, "outlier_threshold": self.thresholds_L[layer],
                "outlier_share": self.shares_L[layer], "prefix_median": self.prefix_L[layer],
            }  # fmt: skip

    def reach(self) -> Reach:
        lengths = self.norms_LM[self.norms_LM > 0]
        low, high = (lengths.min(), lengths.max()) if len(lengths) else (0.1, 1)
        return {"norm": (float(low), float(high)), "share": (0, max(float(self.shares_L.max()), 1e-3))}

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

        above, below = canvas.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        depth, layers = len(self.norms_LM), np.arange(len(self.norms_LM))
        low, high = reach["norm"]
        edges = np.geomspace(low * 0.9, high * 1.1, _BINS + 1)
        shares = np.stack([np.histogram(norms, edges)[0] / len(norms) for norms in self.norms_LM])
        colours = LogNorm(1e-5, 1)
        image = above.pcolormesh(
            np.arange(depth + 1) - 0.5,
            edges,
            np.where(shares > 0, shares, np.nan).T,
            norm=colours,
            rasterized=True,
        )
        steps = np.arange(depth + 1) - 0.5
        above.stairs(
            self.thresholds_L, steps, baseline=None, color=look.second, linestyle="--", label="median + 6 MAD"
        )
        if np.isfinite(self.prefix_L).all():
            above.plot(
                layers, self.prefix_L, "D", color=look.ink, markersize=3.5, label="prefix tokens, median"
            )
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        above.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        above.yaxis.set_minor_locator(NullLocator())
        above.set_ylabel("norm of a patch token")
        legend_above(above, ncols=2)
        bar = canvas.colorbar(image, ax=[above, below], fraction=0.04, pad=0.02, aspect=35)
        bar.set_label("share of tokens")
        bar.outline.set_visible(False)  # pyrefly: ignore[not-callable]
        below.bar(layers, 100 * self.shares_L, width=0.7, color=look.second)
        below.set_ylim(0, 110 * reach["share"][1])
        below.set_ylabel("outliers, %")
        layers_axis(below, depth)


@dataclass(frozen=True)
class StreamChange(Drawing):
    """How much each layer adds to what passes through."""

    name = "stream_change"
    title = "How much each layer changes its tokens"
    see = (
        "At 0 a layer passes its tokens on as they came, at 1 it adds as much as was there. Early "
        "layers usually change most, and the class token is often written late, when the patches have "
        "been read."
    )
    recipe = (
        "After Raghu et al. (arXiv:2108.08810), fig. 8, who divide the norm of the skip by that of each "
        "branch; here both branches together, and the other way up, so that 0 is no change: the median "
        "over tokens of |z_l - z_(l-1)| / |z_(l-1)|."
    )

    patches_L: np.ndarray
    prefix_L: np.ndarray  # NaN without any

    def finding(self) -> str:
        most, least = int(self.patches_L.argmax()), int(self.patches_L.argmin())
        return (
            f"Patches change most in layer {most} ({self.patches_L[most]:.2f}) and least in layer {least} "
            f"({self.patches_L[least]:.2f})."
        )

    def rows(self) -> Iterator[Row]:
        for layer, (patches, prefix) in enumerate(zip(self.patches_L, self.prefix_L, strict=True)):
            yield {"layer": layer, "patch_tokens": patches, "prefix_tokens": prefix}

    def reach(self) -> Reach:
        return {"change": (0, float(np.nanmax([self.patches_L, self.prefix_L])))}

    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:
        axes = canvas.add_subplot()
        layers = np.arange(len(self.patches_L))
        axes.plot(layers, self.patches_L, "o-", color=look.first, markersize=5, label="patches")
        if np.isfinite(self.prefix_L).all():
            axes.plot(layers, self.prefix_L, "D--", color=look.second, markersize=4.5, label="prefix tokens")
        axes.set_ylim(0, 1.08 * reach["change"][1])
        axes.grid(axis="y")
        axes.set_ylabel("|change| / |token|")
        legend_above(axes, ncols=2)
        layers_axis(axes, len(layers))


class TokenMeter:
    """Gathers norms and changes of tokens, a number a token and layer."""

    def __init__(self, num_prefix_tokens: int) -> None:
        self._prefix = num_prefix_tokens
        self._norms: list[list[np.ndarray]] = []  # by batch, by layer: (B, T)
        self._changes: list[list[np.ndarray]] = []
        self._before: Tensor = torch.empty(0)

    def begin(self, tokens_BTD: Tensor) -> None:
        """Takes what enters the first layer."""
        self._before = tokens_BTD.float()
        self._norms.append([])
        self._changes.append([])

    def layer(self, tokens_BTD: Tensor) -> None:
        """Takes what leaves the next layer."""
        tokens = tokens_BTD.float()
        change = (tokens - self._before).norm(dim=-1) / self._before.norm(dim=-1).clamp_min(1e-12)
        self._norms[-1].append(tokens.norm(dim=-1).cpu().numpy())
        self._changes[-1].append(change.cpu().numpy())
        self._before = tokens

    def drawings(self) -> tuple[TokenNorms, StreamChange]:
        norms, changes = (
            np.stack([np.concatenate(layer) for layer in zip(*batches, strict=True)])
            for batches in (self._norms, self._changes)
        )
        prefix, patches = np.split(norms, [self._prefix], axis=2)
        return (
            TokenNorms(patches.reshape(len(patches), -1), _medians(prefix)),
            StreamChange(_medians(changes[:, :, self._prefix :]), _medians(changes[:, :, : self._prefix])),
        )


def _medians(values_LBT: np.ndarray) -> np.ndarray:
    if not values_LBT.size:
        return np.full(len(values_LBT), np.nan)
    return np.median(values_LBT.reshape(len(values_LBT), -1), axis=1)
