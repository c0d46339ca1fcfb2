"""Pooled vectors of images, computed once: kept on disk by what the model, the image and the layer are.

An image is known by the digest of its bytes, so a few-shot draw, a renamed folder and a larger part of
the same data all find what an earlier run computed. Every `SHARD_IMAGES` images are a file of their own,
written atomically: a killed run loses at most that many, an interrupted one none.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitral.data.batches import Batch, DamageCount
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.data.workers import Loading, worker_count
from vitral.inference.classifier import Classifier
from vitral.model.config import Pooling
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.files import write_atomically

SHARD_IMAGES = 1024
_BATCH_SIZE = 64
_FORMAT = 1  # raised whenever the same key would stand for other numbers
_DIGEST_BYTES = 16
_HEADS = ("head.", "distillation_head.", "hidden.")


@dataclass(frozen=True)
class PooledFeatures:
    """Vectors of n images, those that could be read, in their split's order."""

    labels: np.ndarray  # (n,)
    vectors: dict[int, dict[Pooling, Tensor]]  # layer as asked for -> pooling -> (n, D)
    cached: int  # images whose vectors were on disk
    rows: np.ndarray  # (n,) of the split

    def of(self, layer: int, pooling: Pooling) -> Tensor:
        """The vectors (n, D) of one pooling, (n, 2 D) of "class_mean"."""
        parts = self.vectors[layer]
        if pooling == "class_mean":
            return torch.cat([parts["class"], parts["mean"]], dim=1)
        return parts[pooling]


def poolings(model: VisionTransformer, layer: int) -> tuple[Pooling, ...]:
    """The vectors that a layer's tokens give: attention pooling was learned for the last layer only."""
    found: list[Pooling] = ["class"] if model.config.class_token else []
    found.append("mean")
    if model.attention_pool is not None and layer % len(model.layers) == len(model.layers) - 1:
        found.append("map")
    return tuple(found)


@torch.inference_mode()
def pooled(model: VisionTransformer, images_BCHW: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The vectors (B, P D) of each layer, its P `poolings` side by side.

    The final norm is applied whatever the layer, as DINOv2's evaluation does (arXiv:2304.07193, `norm=True`
    of its `get_intermediate_layers`).
    """
    outputs = model.features(images_BCHW, layers).layers
    vectors = {}
    for layer in layers:
        tokens_BTD = model.norm(outputs[layer])
        vectors[layer] = torch.cat([model.pool(tokens_BTD, kind) for kind in poolings(model, layer)], dim=1)
    return vectors


def layer_index(layer: int, depth: int) -> int:
    """Counts a layer from 0; negative ones count from the end. Raises VitralError if there is none."""
    if not -depth <= layer < depth:
        raise VitralError(f"there is no layer {layer}; this model has 0 to {depth - 1}, or -1 for the last")
    return layer % depth


def extract(
    classifier: Classifier,
    split: Split,
    layers: Sequence[int],
    cache: Path,
    *,
    damage: DamageCount,
    on_images: Callable[[int, int], None] = lambda *_: None,
    loading: Loading | None = None,
    until: float = math.inf,
) -> PooledFeatures:
    """The pooled vectors of a split's images, from the cache where it has them.

    Args:
        classifier: the model and its preprocessing; labels and head play no part.
        split: the images.
        layers: whose output to pool; negative ones count from the end.
        cache: folder of all models' vectors; made if need be, and safe to delete.
        damage: told of unreadable images, which are left out.
        on_images: told how many images are done, of how many.
        loading: how they are loaded; None: by as many workers as the machine suits.
        until: the time on `time.monotonic` after which no further batch is begun; images that are not
            done by then are left out.

    Raises:
        VitralError: if the model has no such layer, or too many images are damaged.
    """
    loading = loading or Loading(worker_count(), damage.warn)
    classifier.refuse_others("features")
    for layer in layers:
        layer_index(layer, len(classifier.model.layers))
    digests = _digests(split, (time.monotonic() + until) / 2)
    split = split.take(np.arange(len(digests)))
    stores = {layer: _Store(cache / key) for layer, key in _keys(classifier, layers).items()}
    wanted = set(digests)
    known = {layer: store.read(wanted, damage.warn) for layer, store in stores.items()}
    complete = set.intersection(*(set(rows) for rows in known.values()))
    missing = np.array([row for row, digest in enumerate(digests) if digest not in complete], dtype=np.int64)
    done = len(split) - len(missing)
    on_images(done, len(split))
    try:
        for batch, vectors, rows in _computed(classifier, split.take(missing), layers, loading):
            damage.add(batch)
            of_batch = [digests[missing[row]] for row in rows]
            for layer, vectors_BP in vectors.items():
                known[layer] |= zip(of_batch, vectors_BP, strict=True)
                stores[layer].add(of_batch, vectors_BP)
            done += batch.asked
            on_images(done, len(split))
            if time.monotonic() > until:
                break
    finally:
        for store in stores.values():
            store.flush()
    return _assembled(classifier.model, split, digests, known, len(split) - len(missing))


def _computed(
    classifier: Classifier, split: Split, layers: Sequence[int], loading: Loading
) -> Iterator[tuple[Batch, dict[int, Tensor], list[int]]]:
    """Each batch, its vectors by layer, and the rows of the split that they are of."""
    model, placement = classifier.model.eval(), classifier.placement
    loader = Loader(split, classifier.preprocess, loading)
    with closing(loader.evaluation_batches(_BATCH_SIZE)) as batches:
        for batch in batches:
            vectors: dict[int, Tensor] = {}
            if len(batch.rows):
                with placement.autocast():
                    found = pooled(model, placement.put(batch.images), layers)
                vectors = {layer: vectors_BP.float().cpu() for layer, vectors_BP in found.items()}
            yield batch, vectors, batch.rows.tolist()


def _assembled(
    model: VisionTransformer,
    split: Split,
    digests: Sequence[bytes],
    known: dict[int, dict[bytes, Tensor]],
    cached: int,
) -> PooledFeatures:
    readable = [row for row, digest in enumerate(digests) if all(digest in of for of in known.values())]
    if not readable:
        raise VitralError("none of the images could be read, so there are no features")
    vectors: dict[int, dict[Pooling, Tensor]] = {}
    for layer, of in known.items():
        names = poolings(model, layer)
        parts = torch.stack([of[digests[row]] for row in readable]).chunk(len(names), dim=1)
        vectors[layer] = dict(zip(names, parts, strict=True))
    return PooledFeatures(split.labels[readable], vectors, cached, np.array(readable))


# --- What the same key stands for --------------------------------------------------------------------


def _keys(classifier: Classifier, layers: Sequence[int]) -> dict[int, str]:
    """Of each layer: a digest of the weights below the head, the config, the preprocessing, the precision."""
    model = classifier.model
    config = replace(model.config, num_classes=0, dropout=0.0, drop_path=0.0)
    about = [_FORMAT, asdict(config), classifier.preprocess.record(), str(classifier.placement.precision)]
    about += [model.merge] if any(model.merge) else []
    digest = hashlib.sha256(json.dumps(about).encode())
    below = {name: of for name, of in model.state_dict().items() if not name.startswith(_HEADS)}
    update_with_weights(digest, below)
    return {layer: f"{digest.hexdigest()[:32]}-layer{layer % len(model.layers)}" for layer in layers}


def update_with_weights(digest: Any, weights: Mapping[str, Tensor]) -> None:
    """Feeds tensors to a digest of hashlib, with their names, types and shapes."""
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _digests(split: Split, until: float) -> list[bytes]:
    """Of all images, or of the first that are read until then: of large photographs that takes its time."""
    digests = []
    for row in range(len(split)):
        digests.append(image_digest(split, row))
        if time.monotonic() > until and len(digests) >= _BATCH_SIZE:
            break
    return digests


def image_digest(split: Split, row: int) -> bytes:
    """Gives a digest of an image's bytes; of one that cannot be read, another each time."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    try:
        image = split.images[row]
        if isinstance(image, Image.Image):
            digest.update(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
        else:
            digest.update(image if isinstance(image, bytes) else image.read_bytes())
    except (OSError, ImageError):
        # Whoever loads it says why it cannot be read; no image has this digest.
        return os.urandom(_DIGEST_BYTES)
    return digest.digest()


class _Store:
    """Vectors of one model's layer by image, in the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: list[bytes] = []
        self._vectors: list[Tensor] = []

    def read(self, wanted: set[bytes], warn: Callable[[str], None]) -> dict[bytes, Tensor]:
        """The vectors of the images that are wanted and there; a damaged file is named and passed over."""
        found: dict[bytes, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    digests = [row.tobytes() for row in tensors.get_tensor("digests").numpy()]
                    rows = [row for row, digest in enumerate(digests) if digest in wanted]
                    if rows:
                        vectors = tensors.get_tensor("vectors")[rows]
                        found |= zip((digests[row] for row in rows), vectors, strict=True)
            except (SafetensorError, OSError, ValueError, IndexError) as error:
                warn(f"{file} is damaged ({error}); its features are computed again, and it can be deleted")
        return found

    def add(self, digests: Sequence[bytes], vectors: Tensor) -> None:
        self._digests += digests
        self._vectors.append(vectors)
        if len(self._digests) >= SHARD_IMAGES:
            self.flush()

    def flush(self) -> None:
        if not self._digests:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = b"".join(self._digests)
        digests = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, _DIGEST_BYTES)
        tensors = {"digests": digests, "vectors": torch.cat(self._vectors)}
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        write_atomically(self.folder / name, safetensors.torch.save(tensors))
        self._digests, self._vectors = [], []
