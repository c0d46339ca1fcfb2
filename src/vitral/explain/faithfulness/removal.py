"""The score of images some of whose patches are taken away: left out of the tokens, or filled with the mean.

Axes are those of `model/embedding.py`; R counts rows, each an image with some patches kept, K of them.
"""

from typing import Literal

import torch
from torch import Tensor

from vitral.explain.observe import of_tokens, with_prefix
from vitral.explain.target import Question
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer

# By "drop" tokens are left out, after positions were added; by "mean" pixels get the mean of the training
# data, which is 0 after normalization.
Fill = Literal["drop", "mean"]

_TOKENS_A_PASS = {"cpu": 2**13, "cuda": 2**18}


class Removal:
    """Images of one batch, embedded once, and their scores without some patches.

    To drop tokens keeps the prefix tokens and the places of all others; rotary angles and relative biases
    are those of the kept. A mean pool then averages over what is left. A filled patch is embedded once for
    all, but under a convolutional stem, which sees across the borders of patches: there pixels are filled
    and embedded anew for each row, before dropping too, or what was removed would show in its neighbours.

    Args:
        classifier: in evaluation mode.
        images_BCHW: preprocessed, on the model's device.
        question: the score of each image.
    """

    def __init__(self, classifier: Classifier, images_BCHW: Tensor, question: Question) -> None:
        self.model: VisionTransformer = classifier.model
        self.placement = classifier.placement
        self.images_BCHW, self.question = images_BCHW, question
        self.grid = self.model.embedding.grid_of(images_BCHW)
        self.prefix = self.model.config.num_prefix_tokens
        self.has_stem = bool(self.model.config.stem)
        with torch.inference_mode(), self.placement.autocast():
            self.tokens_BTD = self.model.embedding(images_BCHW)
            self.blank_1TD = self.model.embedding(torch.zeros_like(images_BCHW[:1]))

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @torch.inference_mode()
    def scores(self, fill: Fill, images_R: Tensor, kept_RK: Tensor) -> Tensor:
        """Computes the scores of some images with some patches kept: (R,), float32 on the CPU.

        Without a patch and a token that the head reads, dropping gives what the mean fill does.

        Args:
            fill: what becomes of the patches that are not kept.
            images_R: which image of the batch each row is of.
            kept_RK: the patches that stay, row by row, as many in each.
        """
        if fill == "drop" and kept_RK.shape[1] == 0 and not can_be_empty(self.model):
            fill = "mean"
        tokens = self.prefix + (kept_RK.shape[1] if fill == "drop" else self.num_patches)
        budget = _TOKENS_A_PASS.get(self.images_BCHW.device.type, _TOKENS_A_PASS["cpu"])
        rows = max(budget // tokens, 1)
        device = self.images_BCHW.device
        # In the order of the picture, so that one set of patches has one score, to the last bit.
        kept_RK = kept_RK.sort(dim=1).values.to(device)
        images_R = images_R.to(device)
        parts = [
            self._scores(fill, *part) for part in zip(images_R.split(rows), kept_RK.split(rows), strict=True)
        ]
        return torch.cat(parts).cpu()

    def _scores(self, fill: Fill, images_R: Tensor, kept_RK: Tensor) -> Tensor:
        with self.placement.autocast():
            relations = self.model.relations_of_layers(self.tokens_BTD, self.grid)
            if fill == "drop":
                kept_RT = with_prefix(kept_RK, self.prefix)
                relations = of_tokens(relations, kept_RT)
                tokens_RTD = self._dropped(images_R, kept_RK, kept_RT)
            else:
                tokens_RTD = self._filled(images_R, kept_RK)
            last = relations[-1]._replace(num_queries=self.model.num_tokens_read)
            encoded_RTD = self.model.encode(tokens_RTD, self.grid, relations=[*relations[:-1], last])
            logits_RL = self.model.classify(encoded_RTD)
        return self.question.take(images_R).scores(logits_RL)

    def _dropped(self, images_R: Tensor, kept_RK: Tensor, kept_RT: Tensor) -> Tensor:
        """The tokens that stay, (R, T', D)."""
        if not self.has_stem:
            return self.tokens_BTD[images_R[:, None], kept_RT]
        tokens_RTD = self._filled(images_R, kept_RK)
        return tokens_RTD.gather(1, kept_RT[:, :, None].expand(-1, -1, tokens_RTD.shape[2]))

    def _filled(self, images_R: Tensor, kept_RK: Tensor) -> Tensor:
        """All tokens, (R, T, D), those of removed patches being what the mean colour embeds to."""
        kept_RN = torch.zeros(len(kept_RK), self.num_patches, dtype=torch.bool, device=kept_RK.device)
        kept_RN.scatter_(1, kept_RK, value=True)
        if self.has_stem:
            side = self.model.config.patch_size
            kept_RHW = kept_RN.unflatten(1, self.grid).repeat_interleave(side, 1).repeat_interleave(side, 2)
            return self.model.embedding(self.images_BCHW[images_R] * kept_RHW[:, None])
        prefix_RP = kept_RN.new_ones(len(kept_RN), self.prefix)
        kept_RT = torch.cat([prefix_RP, kept_RN], dim=1)
        return torch.where(kept_RT[:, :, None], self.tokens_BTD[images_R], self.blank_1TD)


def all_but(order_RN: Tensor, places: slice) -> Tensor:
    """The patches of an order but those at some places: (R, N) -> (R, K)."""
    return torch.cat([order_RN[:, : places.start], order_RN[:, places.stop :]], dim=1)


def can_be_empty(model: VisionTransformer) -> bool:
    """Whether the head reads anything of an image whose every patch is left out."""
    pools_prefix = model.config.head.pool_prefix and model.config.num_prefix_tokens > 0
    return model.config.pooling == "class" or pools_prefix
