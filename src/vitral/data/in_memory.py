"""Small images held in memory, on the device that computes: a batch of them is one indexing.

To cut, mirror and stack images of 32 pixels one by one took an eighth of a step on two cores, and would
keep a GPU waiting (docs/log.md, 2026-11-26).
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vitral.data.dataset import (
    KEPT_BYTES,
    SMALL_PIXELS,
    Batch,
    Draw,
    Split,
    endless_order,
    evaluation_batches,
    seeded,
)
from vitral.data.workers import Loading
from vitral.images.augment import Augmentation, moved
from vitral.images.preprocess import Preprocess
from vitral.runtime.devices import put


def can_be_held(split: Split, preprocess: Preprocess) -> bool:
    """Whether the images, at the model's size, are small and few enough."""
    height, width = preprocess.img_size
    return height * width <= SMALL_PIXELS and 3 * height * width * len(split) <= KEPT_BYTES


@dataclass(frozen=True)
class HeldImages:
    """The images of a split as the model's preprocessing fits them, opened once."""

    pixels_NHWC: Tensor  # bytes, on the device; nought where an image is damaged
    labels: Tensor  # on the device, as a `Batch` has them
    damaged: dict[int, tuple[str, str]]  # by index: the image's name and the reason
    preprocess: Preprocess
    split: Split

    @classmethod
    def open(
        cls,
        split: Split,
        preprocess: Preprocess,
        device: torch.device,
        loading: Loading | None = None,
        on_images: Callable[[int, int], None] = lambda *_: None,
    ) -> Self:
        """Reads every image of a split that `can_be_held`.

        Args:
            split: the images.
            preprocess: how they are fitted.
            device: where they are held.
            loading: how they are read.
            on_images: told how many are done, of how many.
        """
        pixels_NHWC = torch.zeros(len(split), *preprocess.img_size, 3, dtype=torch.uint8)
        damaged: dict[int, tuple[str, str]] = {}
        first = 0
        batches = evaluation_batches(split, partial(_pixels, preprocess), batch_size=512, loading=loading)
        for batch in batches:
            reasons = dict(batch.damaged)
            rows = range(first, first + len(batch.labels) + len(reasons))
            damaged |= {row: (name, reasons[name]) for row in rows if (name := split.names[row]) in reasons}
            if sound := [row for row in rows if row not in damaged]:
                pixels_NHWC[sound] = batch.images
            first = rows.stop
            on_images(first, len(split))
        labels = torch.tensor(split.labels, dtype=torch.float32 if split.multi_label else torch.int64)
        return cls(pixels_NHWC.to(device), labels.to(device), damaged, preprocess, split)

    def training_batches(
        self,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        draw: Draw,
    ) -> Generator[Batch]:
        """As `data.training_batches`; each batch is moved by one draw, a function of (seed, step).

        Args:
            augmentation: one that `only_moves` pixels.
            batch_size: images, damaged ones counted.
            seed: of the order and of the moves.
            first_step: where to begin.
            draw: how an epoch goes through the images.
        """
        order = endless_order(self.split.labels, batch_size, seed, first_step, draw)
        for step, (_, rows, _) in enumerate(order, first_step):
            sound = self._on_device(self._sound(rows))
            with seeded(seed, step, -1):  # an image's own key has no negative number
                moved_BHWC = moved(self.pixels_NHWC, sound, augmentation)
            yield self._batch(rows, sound, moved_BHWC)

    def evaluation_batches(self, batch_size: int) -> Generator[Batch]:
        """Every image once, in order and as it is."""
        for first in range(0, len(self.split), batch_size):
            rows = np.arange(first, min(first + batch_size, len(self.split)))
            sound = self._on_device(self._sound(rows))
            yield self._batch(rows, sound, self.pixels_NHWC[sound])

    def _sound(self, rows: np.ndarray) -> np.ndarray:
        return rows[[row not in self.damaged for row in rows]] if self.damaged else rows

    def _on_device(self, values: np.ndarray) -> Tensor:
        return put(torch.from_numpy(values), self.labels.device)

    def _batch(self, rows: np.ndarray, sound: Tensor, pixels_BHWC: Tensor) -> Batch:
        # Laid out as loaded images: a convolution in float32 adds those of another layout in another order.
        images_BCHW = self.preprocess.normalize_pixels(pixels_BHWC).contiguous()
        damaged = tuple(self.damaged[row] for row in rows if row in self.damaged)
        return Batch(images_BCHW, self.labels[sound], damaged)


def _pixels(preprocess: Preprocess, source: Any) -> Tensor:
    return torch.from_numpy(np.array(preprocess.fit(preprocess.open(source))))
