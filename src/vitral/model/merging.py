"""Token merging: the most similar patches become one, layer by layer (ToMe, arXiv:2210.09461).

A way to compute, not a part of the architecture: the weights are those of the model without it. How many
merge in each layer is known beforehand, so that all shapes are, and a graph can be exported.

Axes are those of `embedding`. The patches that are there are split in turn into even and odd ones: I counts
the even, J the odd, R the even ones that merge, each into an odd one.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.model.positions.relation import Relation
from vitral.model.positions.rotary import RotaryPositions

# How many patches merge: in each layer alike; 8 also as "8"; "16..0": from the first layer's number
# linearly to the last one's; "8,8,4": of each layer by itself, as a sequence too.
Merge = int | str | Sequence[int]


def plan(merge: Merge, num_layers: int) -> tuple[int, ...]:
    """Gives r of each layer, how many of its patches merge into others.

    Raises:
        ValueError: if it says something else, or counts other layers than there are.
    """
    try:
        counts = _counts(merge, num_layers)
    except (TypeError, ValueError):
        counts = None
    if counts is None or any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in counts):
        raise ValueError(
            f"merge is {merge!r}; it must say how many patches merge in a layer: 8, or '16..0' for 16 in the "
            "first layer, falling to none in the last, or a list of whole numbers, one for each layer"
        )
    if len(counts) != num_layers:
        raise ValueError(f"merge lists {len(counts)} layers, and the model has {num_layers}")
    return tuple(counts)


def _counts(merge: Merge, num_layers: int) -> Sequence[int]:
    if isinstance(merge, int):
        return [merge] * num_layers
    if not isinstance(merge, str):
        return list(merge)
    if "," in merge:
        return [int(part) for part in merge.split(",")]
    first, falling, last = merge.partition("..")
    if not falling:
        return [int(merge)] * num_layers
    steps = max(num_layers - 1, 1)
    return [round(int(first) + (int(last) - int(first)) * index / steps) for index in range(num_layers)]


def merging_in(merge: Sequence[int], num_patches: int) -> list[int]:
    """How many patches merge in each layer of an image of so many: at most half of those that are left."""
    found = []
    for wanted in merge:
        found.append(min(wanted, num_patches // 2))
        num_patches -= found[-1]
    return found


# --- Which patches merge ---------------------------------------------------------------------------


class Match(NamedTuple):
    """Which of the even patches merge into which of the odd, and which stay, both in the picture's order."""

    kept_BI: Tensor  # indices of even patches
    merged_BR: Tensor  # indices of even patches
    into_BR: Tensor  # indices of odd patches


def match(metric_BNK: Tensor, count: int) -> Match:
    """Finds each even patch's most similar odd one, and takes the most similar pairs (ToMe, §3).

    Args:
        metric_BNK: what patches are compared by: the cosine of two rows is their similarity.
        count: how many pairs.
    """
    metric_BNK = F.normalize(metric_BNK.float(), dim=-1)
    similarity_BIJ = metric_BNK[:, ::2] @ metric_BNK[:, 1::2].transpose(1, 2)
    best_BI, nearest_BI = similarity_BIJ.max(dim=2)
    order_BI = best_BI.argsort(dim=1, descending=True)
    merged_BR = order_BI[:, :count]
    kept_BI = order_BI[:, count:].sort(dim=1).values
    return Match(kept_BI, merged_BR, nearest_BI.gather(1, merged_BR))


# --- One layer -------------------------------------------------------------------------------------


class LayerMerge:
    """What one layer merges, after its attention: it is shown the keys, then given tokens (B, T, D).

    Args:
        count: R.
        num_prefix_tokens: tokens before the patches, which never merge.
        sizes_BT: how many patches each token stands for; None: one each.
        places_BT2: coordinates of each token, or (T, 2), if attention turns by them.
    """

    def __init__(
        self, count: int, num_prefix_tokens: int, sizes_BT: Tensor | None, places_BT2: Tensor | None
    ) -> None:
        self.count, self.num_prefix_tokens = count, num_prefix_tokens
        self.sizes_BT, self.places_BT2 = sizes_BT, places_BT2
        self.places_BT2_after: Tensor | None = None

    def see(self, k_BATK: Tensor) -> None:
        """Matches patches by their keys, not turned by their places: the mean over heads (ToMe, §3)."""
        with _without_autocast(k_BATK.device):
            # No gradient flows through a choice.
            keys_BNK = k_BATK.detach()[:, :, self.num_prefix_tokens :].float().mean(dim=1)
            self.match = match(keys_BNK, self.count)

    def __call__(self, z_BTD: Tensor) -> Tensor:
        """Merges tokens, each the mean of its patches: (B, T, D) -> (B, T - R, D)."""
        with _without_autocast(z_BTD.device):
            sizes_BT = z_BTD.new_ones(z_BTD.shape[:2]) if self.sizes_BT is None else self.sizes_BT
            self._weigh(sizes_BT.float())
            if self.places_BT2 is not None:
                self.places_BT2_after = self._means(self.places_BT2.expand(z_BTD.shape[0], -1, -1))
            return self._means(z_BTD)

    def _weigh(self, sizes_BT: Tensor) -> None:
        """Computes the sizes after merging, and the share of each patch in what it becomes part of."""
        prefix_BE, even_BI, odd_BJ = self._split(sizes_BT)
        places_J = torch.arange(odd_BJ.shape[1], device=sizes_BT.device)
        chosen_BJR = (places_J[:, None] == self.match.into_BR[:, None]).to(sizes_BT.dtype)
        merged_B1R = even_BI.gather(1, self.match.merged_BR)[:, None]
        # A product in the place of a scattered sum: exact, in the same order on every device and engine.
        whole_BJ = odd_BJ + (chosen_BJR * merged_B1R).sum(dim=2)
        self.odd_shares_BJ1 = (odd_BJ / whole_BJ)[:, :, None]
        self.shares_BJR = chosen_BJR * merged_B1R / whole_BJ[:, :, None]
        kept_BI = even_BI.gather(1, self.match.kept_BI)
        self.sizes_BT_after = torch.cat([prefix_BE, kept_BI, whole_BJ], dim=1)

    def _means(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T - R, D): the tokens before the patches, the even ones that stay, the odd."""
        prefix_BED, even_BID, odd_BJD = self._split(x_BTD)
        merged_BRD = _rows(even_BID, self.match.merged_BR)
        shares_BJR, odd_shares_BJ1 = self.shares_BJR.to(x_BTD.dtype), self.odd_shares_BJ1.to(x_BTD.dtype)
        odd_BJD = odd_shares_BJ1 * odd_BJD + shares_BJR @ merged_BRD
        return torch.cat([prefix_BED, _rows(even_BID, self.match.kept_BI), odd_BJD], dim=1)

    def _split(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.num_prefix_tokens
        return x_BTD[:, :first], x_BTD[:, first::2], x_BTD[:, first + 1 :: 2]

    def before(self, index_BT: Tensor) -> Tensor:
        """Of what each token after merging has, what each had before: (B, T - R) -> (B, T)."""
        first, kept = self.num_prefix_tokens, self.match.kept_BI.shape[1]
        prefix_BE, kept_BI, odd_BJ = index_BT.tensor_split((first, first + kept), dim=1)
        even_BI = torch.cat([kept_BI, odd_BJ.gather(1, self.match.into_BR)], dim=1)
        order_BI = torch.cat([self.match.kept_BI, self.match.merged_BR], dim=1)
        even_BI = torch.zeros_like(even_BI).scatter(1, order_BI, even_BI)
        count = odd_BJ.shape[1]
        pairs_BN = torch.stack([even_BI[:, :count], odd_BJ], dim=2).flatten(1)
        return torch.cat([prefix_BE, pairs_BN, even_BI[:, count:]], dim=1)


def _rows(x_BND: Tensor, index_BR: Tensor) -> Tensor:
    """Copies rows whole, where `gather` takes number by number (docs/log.md, 2026-11-27)."""
    images_B1 = torch.arange(x_BND.shape[0], device=x_BND.device)[:, None]
    return x_BND[images_B1, index_BR]


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Similarities in bfloat16 would be equal by the dozen."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


# --- One pass --------------------------------------------------------------------------------------


class Merging:
    """The tokens of one pass through the layers: what each stands for by now, and where it is.

    Args:
        counts: how many patches merge in each layer.
        num_prefix_tokens: tokens before the patches, which never merge.
        rotaries: of each layer, if attention turns by places. A merged token turns by the mean of the places
            of its patches, which is the mean of their angles.
        places_BT2: coordinates of each token, or (T, 2), if it does.
    """

    def __init__(
        self,
        counts: Sequence[int],
        num_prefix_tokens: int,
        rotaries: Sequence[RotaryPositions] = (),
        places_BT2: Tensor | None = None,
    ) -> None:
        self.counts, self.num_prefix_tokens = counts, num_prefix_tokens
        self.rotaries, self._places_BT2 = rotaries, places_BT2
        self._done: list[LayerMerge] = []

    @property
    def sizes_BT(self) -> Tensor | None:
        """How many patches each token stands for; None: one each."""
        return self._done[-1].sizes_BT_after if self._done else None

    @property
    def places_BT2(self) -> Tensor | None:
        """Coordinates of each token, if attention turns by them."""
        return self._done[-1].places_BT2_after if self._done else self._places_BT2

    def relation(self, layer: int, relation: Relation) -> Relation:
        """What a layer's attention knows of the tokens that are left; the layer merges some of them."""
        sizes_BT, places_BT2 = self.sizes_BT, self.places_BT2
        if sizes_BT is not None:
            relation = relation._replace(bias_ATT=log_sizes(sizes_BT))
            if places_BT2 is not None:
                relation = relation._replace(rotation=self.rotaries[layer].rotation(places_BT2))
        count = self.counts[layer]
        if count:
            self._done.append(LayerMerge(count, self.num_prefix_tokens, sizes_BT, places_BT2))
            relation = relation._replace(merge=self._done[-1])
        return relation

    def unmerged(self, z_BTD: Tensor) -> Tensor:
        """Gives every patch the vector of the token that it is part of: (B, T', D) -> (B, T, D)."""
        if not self._done:
            return z_BTD
        batch, count = z_BTD.shape[:2]
        index_BT = torch.arange(count, device=z_BTD.device).expand(batch, -1)
        for merge in reversed(self._done):
            index_BT = merge.before(index_BT)
        return _rows(z_BTD, index_BT)


def log_sizes(sizes_BT: Tensor) -> Tensor:
    """Proportional attention (ToMe, eq. 1): what is added to the logits of each key, (B, 1, 1, T).

    A key that stands for s patches then counts as s equal keys would.
    """
    return sizes_BT.log()[:, None, None]
