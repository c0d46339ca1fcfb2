"""One pass over the images, of which every figure takes its numbers while a layer runs."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vitral.data.batches import Batch, DamageCount
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.data.workers import Loading, worker_count
from vitral.explain import target
from vitral.explain.attribution.attribute import attribute, joined
from vitral.explain.attribution.method import Settings
from vitral.explain.attribution.methods import METHODS
from vitral.explain.figures.attention import AttentionMeter
from vitral.explain.figures.colours import FeatureColours, RolloutOverlays
from vitral.explain.figures.drawing import Drawing, NotDrawn
from vitral.explain.figures.filters import FilterComponents
from vitral.explain.figures.positions import position_drawings
from vitral.explain.figures.sample import Shown, shown
from vitral.explain.figures.similarity import FEWEST, LayerSimilarity, SimilarityMeter
from vitral.explain.figures.tokens import TokenMeter
from vitral.explain.observe import SeenAttention, frozen, observe
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer

_MOST_IMAGES = 32  # of a batch
_LAYERS_BYTES = 2**30  # what leaves all layers for a batch, in float32; of ViT-L/14 at 518 pixels, 8 images


@dataclass(frozen=True)
class Measured:
    """What was measured of one model on images."""

    drawings: tuple[Drawing | NotDrawn, ...]
    similarity: SimilarityMeter  # to be set against another model's
    rows: tuple[int, ...]  # of the images that could be read


def of_weights(model: VisionTransformer) -> list[Drawing | NotDrawn]:
    """Gives the figures that need no images."""
    return [FilterComponents.of(model), *position_drawings(model)]


def batch_size_for(model: VisionTransformer) -> int:
    """Gives the images of a batch: as many as fit, for few make a poor estimate of CKA."""
    config = model.config
    rows, columns = config.grid_size
    tokens = rows * columns + config.num_prefix_tokens
    image = 4 * config.num_layers * config.embed_dim * tokens
    return int(np.clip(_LAYERS_BYTES // image, FEWEST, _MOST_IMAGES))


class _Meters:
    """All that one batch after another is measured with."""

    def __init__(self, classifier: Classifier, *, renormalise: bool) -> None:
        self.model = model = classifier.model
        config = model.config
        height, width = classifier.preprocess.img_size
        grid = height // config.patch_size, width // config.patch_size
        shape = config.num_layers, config.num_heads
        prefix = config.num_prefix_tokens
        self.attention = AttentionMeter(shape, prefix, grid, config.patch_size, renormalised=renormalise)
        self.tokens, self.similarity = TokenMeter(prefix), SimilarityMeter()

    def add(self, images_BCHW: Tensor) -> None:
        seen = observe(self.model, images_BCHW, self._take)
        self.tokens.begin(seen.embedded_BTD)
        self.similarity.begin()
        for tokens_BTD in seen.outputs:
            self.tokens.layer(tokens_BTD)
            self.similarity.layer(tokens_BTD)

    def _take(self, layer: int, seen: SeenAttention) -> None:
        self.attention.layer(layer, seen)

    def drawings(self) -> Iterator[Drawing | NotDrawn]:
        yield from self.attention.drawings()
        yield from self.tokens.drawings()
        if self.similarity.grams_LB:
            yield LayerSimilarity.of(self.similarity)
        else:
            yield NotDrawn(LayerSimilarity.title, f"it needs a batch of {FEWEST} images or more")


@torch.inference_mode()
def of_images(
    classifier: Classifier,
    split: Split,
    batch_size: int,
    damage: DamageCount,
    on_images: Callable[[int, int], None],
    *,
    renormalise: bool = False,
) -> Measured:
    """Gives the figures that need images; of a batch, a few rows of one head's attention are alive.

    Args:
        classifier: the model and its preprocessing.
        split: the images.
        batch_size: images at a time.
        damage: told of unreadable images, which are left out.
        on_images: told how many images are done, of how many.
        renormalise: whether attention distance divides by what prefix tokens leave.

    Raises:
        VitralError: if too many images are damaged.
    """
    meters = _Meters(classifier, renormalise=renormalise)
    loader = Loader(split, classifier.preprocess, Loading(worker_count(), damage.warn))
    rows: list[int] = []
    done = 0
    with frozen(classifier.model), closing(loader.evaluation_batches(batch_size)) as batches:
        for batch in batches:
            damage.add(batch)
            if len(batch.rows):
                _add(meters, classifier, batch)
            rows += batch.rows.tolist()
            done += batch.asked
            on_images(done, len(split))
    return Measured(tuple(meters.drawings()) if rows else (), meters.similarity, tuple(rows))


def _add(meters: _Meters, classifier: Classifier, batch: Batch) -> None:
    with classifier.placement.autocast():
        meters.add(classifier.placement.put(batch.images))


@torch.inference_mode()
def of_pictures(classifier: Classifier, split: Split, count: int) -> list[Drawing | NotDrawn]:
    """Gives the figures that show some of the images themselves."""
    pictures = shown(split, classifier.preprocess, count)
    if pictures is None:
        return []
    images_BCHW = torch.stack([classifier.preprocess.normalize(image) for image in pictures.images_BHW3])
    return [_feature_colours(classifier, pictures, images_BCHW), _rollout(classifier, pictures, images_BCHW)]


def _rollout(classifier: Classifier, pictures: Shown, images_BCHW: Tensor) -> Drawing:
    ask = partial(target.ask, labels=classifier.labels)
    # One by one, for a row of the product needs every layer's attention from the last to the first.
    maps = joined(
        [
            attribute(classifier, classifier.placement.put(one_1CHW), METHODS["rollout"], ask, Settings())
            for one_1CHW in images_BCHW.split(1)
        ]
    )
    return RolloutOverlays(
        pictures.images_BHW3, pictures.names_B, maps.values.numpy(), maps.prefix_mass.numpy()
    )


def _feature_colours(classifier: Classifier, pictures: Shown, images_BCHW: Tensor) -> Drawing:
    parts = []
    for few_BCHW in images_BCHW.split(FEWEST):
        with classifier.placement.autocast():
            found = classifier.model.features(classifier.placement.put(few_BCHW))
        parts.append(found.patch_tokens.unflatten(1, found.grid).float().cpu().numpy())
    return FeatureColours(pictures.images_BHW3, pictures.names_B, np.concatenate(parts))
