"""Small images in memory, on the device that computes: a batch of them is one indexing.

To cut, mirror and stack images of 32 pixels one by one took an eighth of a step on two cores, and would
keep a GPU waiting (docs/log.md, 2026-11-26).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vitral.data.batches import Batch, ImageKey, ImageLoading, collate
from vitral.data.kept import Pictures
from vitral.data.split import Split
from vitral.data.workers import Loading
from vitral.images.augmentation import Moves
from vitral.images.picture import Undecoded
from vitral.images.preprocess import Preprocess
from vitral.runtime.devices import put

_READ_TOGETHER = 512
SMALL_PIXELS = 64 * 64
KEPT_BYTES = 512 * 2**20  # of a split


def fits_in_memory(split: Split, preprocess: Preprocess) -> bool:
    """Tells whether the images, at the model's size, are small and few enough."""
    height, width = preprocess.img_size
    return height * width <= SMALL_PIXELS and 3 * height * width * len(split) <= KEPT_BYTES


@dataclass(frozen=True)
class InMemory:
    """The images of a split as the model's preprocessing fits them, read once."""

    pixels_NHWC: Tensor  # bytes, on the device; 0 where an image is damaged
    labels: Tensor  # on the device, as a `Batch` has them
    damaged: dict[int, tuple[str, str]]  # by row: the image's name and the reason
    preprocess: Preprocess

    @classmethod
    def read(
        cls,
        split: Split,
        preprocess: Preprocess,
        device: torch.device,
        loading: Loading,
        on_images: Callable[[int, int], None] = lambda *_: None,
    ) -> Self:
        """Reads every image of a split that `fits_in_memory`.

        Args:
            split: the images.
            preprocess: how they are fitted.
            device: where they are kept.
            loading: how they are read.
            on_images: told how many are done, of how many.
        """
        pixels_NHWC = torch.zeros(len(split), *preprocess.img_size, 3, dtype=torch.uint8)
        damaged: dict[int, tuple[str, str]] = {}
        keys = [ImageKey(0, row) for row in range(len(split))]
        together = [keys[first : first + _READ_TOGETHER] for first in range(0, len(keys), _READ_TOGETHER)]
        done = 0
        loaded = ImageLoading(split, partial(fitted, preprocess), None, Pictures(split.images))
        for batch in loading.batches(loaded, together, collate):
            if len(batch.rows):
                pixels_NHWC[batch.rows] = batch.images
            missing = sorted({*range(done, done + batch.asked)} - {*batch.rows.tolist()})
            damaged |= zip(missing, batch.damaged, strict=True)
            done += batch.asked
            on_images(done, len(split))
        labels = torch.tensor(split.labels, dtype=torch.float32 if split.multi_label else torch.int64)
        return cls(pixels_NHWC.to(device), labels.to(device), damaged, preprocess)

    def batch(
        self, rows: np.ndarray, moves: Moves | None = None, moves_B3: np.ndarray | None = None
    ) -> Batch:
        """Gives the images of these rows, each moved as decided; waits for no device."""
        sound = np.array([row not in self.damaged for row in rows]) if self.damaged else slice(None)
        rows_S, device = rows[sound], self.labels.device
        if moves is None or moves_B3 is None:
            places_S = put(torch.from_numpy(rows_S), device)
            pixels_SHWC = self.pixels_NHWC[places_S]
        else:
            # As one copy to the device.
            table_S4 = put(torch.from_numpy(np.column_stack([rows_S, moves_B3[sound]])), device)
            places_S = table_S4[:, 0]
            pixels_SHWC = moves.many(self.pixels_NHWC, places_S, table_S4[:, 1:])
        # Laid out as loaded images: a convolution in float32 adds those of another layout in another order.
        images_SCHW = self.preprocess.normalize_pixels(pixels_SHWC)
        damaged = tuple(self.damaged[row] for row in rows.tolist() if row in self.damaged)
        return Batch(images_SCHW, self.labels[places_S], damaged, rows_S)


def fitted(preprocess: Preprocess, picture: Undecoded) -> np.ndarray:
    """Give the bytes (H, W, 3) that the model sees."""
    return np.asarray(preprocess.fit(picture))
