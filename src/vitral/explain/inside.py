"""`Inside`: a classifier that one can look into; no hooks, and nothing to undo afterwards."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from vitral.data.image_data import DataSource
from vitral.explain.attention import Query, look
from vitral.explain.attribution.asking import POSITIVE, asking, each_positive
from vitral.explain.attribution.attribute import attribute, joined
from vitral.explain.attribution.method import Method, Settings
from vitral.explain.attribution.methods import DEFAULT, find
from vitral.explain.faithfulness.record import Faithfulness
from vitral.explain.faithfulness.score import methods_to_score, score
from vitral.explain.maps import AttentionMaps, Relevance
from vitral.explain.target import Target
from vitral.images.picture import ImageSource
from vitral.inference.classifier import Classifier, loaded
from vitral.model.config import Grid

_BATCH_SIZE = 8  # images; attention of one head is (T, T) for each


class Inside:
    """Attention and attribution of any model of ours, whatever its positions, prefix tokens and pooling.

    Args:
        model: a classifier, or what `vitral.load` takes.

    Raises:
        VitralError: if the model is a module of the user's own, whose inside is unknown.
    """

    def __init__(self, model: Classifier | str | PathLike) -> None:
        self.classifier = loaded(model)
        self.classifier.refuse_others("attention maps")
        self.classifier.refuse_merged("attention maps")
        self.model = self.classifier.model

    def __repr__(self) -> str:
        return f"<Inside of {self.classifier!r}>"

    @torch.inference_mode()
    def attention(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        layers: Sequence[int] = (-1,),
        heads: Sequence[int] | None = None,
        queries: Sequence[Query] | None = None,
        batch_size: int = _BATCH_SIZE,
    ) -> AttentionMaps:
        """Computes where queries look: probabilities of eq. 6, as the model's own kernels mixed by them.

        One (T, T) an image is the most that is alive, for "mean" and for the certificate; the rows of a few
        queries cost nearly nothing.

        Args:
            images: as `Classifier.predict` takes them.
            layers: negative ones count from the end.
            heads: which; None: all.
            queries: who looks: "class", "mean" or patches (row, column). None: the class token, or the
                mean of the patches for a model without one.
            batch_size: images a pass.

        Raises:
            ImageError: if an image cannot be read.
            VitralError: if the model has no such layer, head or token.
        """
        looking = look(self.model, self.grid, layers, heads, queries)
        batches = self.classifier.batches(images, batch_size)
        return looking.maps([looking.rows(self.classifier, batch) for batch in batches], self.grid)

    def relevance(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        method: str = DEFAULT,
        target: Target = "predicted",
        against: Target | None = None,
        batch_size: int = _BATCH_SIZE,
        progress: Callable[[float], None] = lambda _: None,
        **settings: Any,
    ) -> Relevance:
        """Computes how much each patch counts: one map an image, of the view that the model sees.

        Test-time augmentation is no part of it: the image itself is explained, not its mirror.

        Args:
            images: as `Classifier.predict` takes them.
            method: a name in `vitral.explain.attribution.methods.METHODS`.
            target: which score: "predicted", a label, its index; of a multi-label model also
                "positive labels", a map for each label that is there.
            against: the score of this class is subtracted: why `target` and not this.
            batch_size: images a pass.
            progress: is told how many images are done, such as 2.4.
            settings: of slow and random methods: `seed`, `steps`, `masks`, `kept` (`Settings`).

        Raises:
            ImageError: if an image cannot be read.
            VitralError: if there is no such method, class or setting, or the method cannot serve this model.
        """
        row, chosen = find(method), Settings.of(settings)
        ask = asking(self.classifier, row, target, against)
        parts: list[Relevance] = []
        done = 0
        with torch.inference_mode(mode=False):  # gradients flow, whatever the caller is in
            for images_BCHW in self.classifier.batches(images, batch_size):
                first, count = done, len(images_BCHW)
                told = replace(
                    chosen, progress=lambda share, first=first, count=count: progress(first + share * count)
                )
                if target == POSITIVE:
                    part = self._of_each_label(images_BCHW, row, told)
                else:
                    part = attribute(self.classifier, images_BCHW, row, ask, told)
                parts.append(replace(part, images=tuple(first + image for image in part.images)))
                done += count
                progress(done)
        return joined(parts)

    def _of_each_label(self, images_BCHW: Tensor, method: Method, settings: Settings) -> Relevance:
        images_M, question = each_positive(self.classifier, images_BCHW)
        part = attribute(self.classifier, images_BCHW[images_M], method, lambda _: question, settings)
        return replace(part, images=tuple(images_M.tolist()))

    def faithfulness(
        self, data: DataSource, methods: Sequence[str] | None = None, **settings: Any
    ) -> Faithfulness:
        """Measures how far to believe the maps of each method, on this model: the best comes first.

        Patches are taken away in the order that a map gives them, and the predicted class's logit is
        watched: deletion and insertion curves, SRG, SaCo, each with 95 % intervals; which methods differ
        beyond chance; and whether a map changes when the weights are redrawn.

        Args:
            data: labelled images, as `open_data` takes them.
            methods: names in `vitral.explain.attribution.methods.METHODS`. None: all that take at most 100
                forward passes an image. The controls are always there.
            settings: as `vitral.explain.faithfulness.score.score` takes them: ``images=400``,
                ``fill=("drop", "mean")``, ``split``, ``seed``, ``steps``, ``workers``, ``cache``, ``warn``,
                ``on_images``.

        Raises:
            VitralError: if the model has no classes, or a method, the data or a setting cannot be used.
        """
        return score(self.classifier, data, methods_to_score(methods, self.model.config), **settings)

    @property
    def grid(self) -> Grid:
        """Rows and columns of the patches of an image."""
        height, width = self.classifier.preprocess.img_size
        patch_size = self.model.config.patch_size
        return height // patch_size, width // patch_size
