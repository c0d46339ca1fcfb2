"""`Loader`: the batches of a split, for training and for evaluation, from memory or from disk.

What a batch holds is a function of the split, the preprocessing, the augmentation, the seed and the step.
Whether the images are kept in memory on a device, kept decoded, or loaded by any number of workers changes
how fast a batch comes, and no bit of it.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitral.data.batches import (
    Batch,
    DecodedImages,
    ImageKey,
    ImageLoading,
    Move,
    Transform,
    collate,
)
from vitral.data.in_memory import InMemory, fits_in_memory
from vitral.data.randomness import ImageNumbers, Sampling, Step
from vitral.data.split import Split
from vitral.data.workers import Loading
from vitral.images.augmentation import Augmentation, Moves
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess


@dataclass
class Loader:
    """Gives the batches of a split.

    Args:
        split: labelled images.
        preprocess: an image of any kind -> the tensor (C, H, W) that the model takes.
        loading: the worker processes.
        keep_on: a device to keep small and few images on, read once; None: images are loaded for each batch.
    """

    split: Split
    preprocess: Preprocess | Transform
    loading: Loading = field(default_factory=Loading)
    keep_on: torch.device | None = None
    _memory: InMemory | None = field(default=None, init=False, repr=False)
    _decoded: DecodedImages | None = field(default=None, init=False, repr=False)

    @property
    def in_memory(self) -> bool:
        """Whether batches come, or will come, from memory."""
        if self.keep_on is None or not isinstance(self.preprocess, Preprocess):
            return False
        return fits_in_memory(self.split, self.preprocess)

    def open(self, on_images: Callable[[int, int], None] = lambda *_: None) -> "Loader":
        """Reads the images now if they are kept in memory; else the first batch would wait for it.

        Args:
            on_images: told how many are done, of how many.
        """
        if self._memory is None and self.in_memory:
            assert self.keep_on is not None
            assert isinstance(self.preprocess, Preprocess)
            self._memory = InMemory.read(self.split, self.preprocess, self.keep_on, self.loading, on_images)
        return self

    def evaluation_batches(
        self, batch_size: int, rows: np.ndarray | None = None, dealt: slice = slice(None)
    ) -> Generator[Batch]:
        """Gives every image once, in order and as it is.

        Args:
            batch_size: images, damaged ones counted.
            rows: of the split, in their order; None: all.
            dealt: which of the batches; the same batches whoever gets which.
        """
        rows = np.arange(len(self.split)) if rows is None else rows
        parts = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)][dealt]
        if (memory := self.open()._memory) is not None:
            return (memory.batch(part) for part in parts)
        keys = ([ImageKey(0, row) for row in part.tolist()] for part in parts)
        loaded = ImageLoading(self.split, self.preprocess, 0)
        return self.loading.batches(loaded, keys, collate)

    def training_batches(
        self,
        alter: Augmentation | Transform,
        *,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        sampling: Sampling = Sampling(),  # noqa: B008
        parts: int = 1,
        mine: range = range(1),
    ) -> Generator[Batch]:
        """Gives shuffled batches without end, the same for a seed whatever the step it starts from.

        Of a batch in several parts, each of those asked for is a batch of its own, one after the other.

        Args:
            alter: how images are altered at random; or a callable, picture -> (C, H, W), whose randomness
                is of torch's global generator.
            batch_size: images, damaged ones counted.
            seed: of the order and of the alterations.
            first_step: where to begin.
            sampling: how an epoch goes through the images.
            parts: that a batch is divided in.
            mine: the parts to give.
        """
        steps = sampling.steps(self.split.labels, batch_size, seed, first_step)
        if parts > 1:
            steps = (step.part(part, parts) for step in steps for part in mine)
        if isinstance(alter, Augmentation) and alter.only_moves:
            return self._moved_batches(steps, alter, seed)
        keys = ([ImageKey(step.epoch, *place) for place in _places(step)] for step in steps)
        loaded = ImageLoading(self._pictures, self._altered(alter), seed, self._decode)
        return self.loading.batches(loaded, keys, collate)

    def _moved_batches(
        self, steps: Iterator[Step], augmentation: Augmentation, seed: int
    ) -> Generator[Batch]:
        """Of an augmentation that can be done to images in memory, many at once, or to each alone."""
        assert isinstance(self.preprocess, Preprocess)
        moves = Moves.of(augmentation, self.preprocess.img_size)
        numbers = ImageNumbers(len(self.split), moves.NUMBERS, seed)
        decided = ((step, moves.decide(numbers.of(step))) for step in steps)
        if (memory := self.open()._memory) is not None:
            return (memory.batch(step.rows, moves, moves_B3) for step, moves_B3 in decided)
        keys = (
            [
                ImageKey(step.epoch, *place, tuple(move))
                for place, move in zip(_places(step), moves_B3.tolist(), strict=True)
            ]
            for step, moves_B3 in decided
        )
        load = partial(_moved, self.preprocess, moves)
        loaded = ImageLoading(self._pictures, load, seed, self._decode)
        return self.loading.batches(loaded, keys, collate)

    def _altered(self, alter: Augmentation | Transform) -> Transform:
        """A picture -> the altered tensor."""
        if isinstance(alter, Augmentation):
            from vitral.images.augment import alteration  # and torchvision, which evaluation spares

            assert isinstance(self.preprocess, Preprocess)
            return alteration(self.preprocess, alter)
        return alter

    @property
    def _decode(self) -> Callable[[Any], Image.Image]:
        """An encoded image -> the picture that is altered."""
        return self.preprocess.open if isinstance(self.preprocess, Preprocess) else open_image

    @property
    def _pictures(self) -> Split:
        """The split, its small images decoded once; each worker would keep images of its own."""
        if self.loading.workers:
            return self.split
        self._decoded = self._decoded or DecodedImages(self.split.images, open_image)
        return Split(self._decoded, self.split.labels, self.split.names)


def _places(step: Step) -> Iterator[tuple[int, int]]:
    return zip(step.rows.tolist(), step.copies.tolist(), strict=True)


def _moved(preprocess: Preprocess, moves: Moves, picture: Image.Image, move: Move) -> Tensor:
    pixels_HWC = np.asarray(preprocess.fit(picture))
    return preprocess.normalize(moves.one(pixels_HWC, move))
