"""Everything random about images, as functions of (seed, epoch, image): nothing needs to be restored.

A run can be taken up at any step; whether images are kept in memory, and how many workers load them,
changes nothing.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vitral.data.blocks import Blocks
from vitral.data.subsets import rows_by_class

# Marks the numbers of images among other sequences of the same seed; numpy pads short ones with 0.
_OF_IMAGES = 1


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Makes torch's generators a function of `key` alone; afterwards the CPU's is as it was.

    Args:
        key: any numbers.
        device: a GPU whose generator is to be seeded too.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if device is not None and device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


class Step(NamedTuple):
    """The images of one training step."""

    epoch: int
    rows: np.ndarray  # (B,) of the split
    copies: np.ndarray  # (B,) which copy of its image each is, from 0

    def part(self, part: int, parts: int) -> "Step":
        """Gives one of the equal parts of the step's images, neighbours in its order."""
        size = len(self.rows) // parts
        place = slice(part * size, (part + 1) * size)
        return Step(self.epoch, self.rows[place], self.copies[place])


@dataclass(frozen=True)
class Sampling:
    """How an epoch goes through the images; it is as long as there are images in any case."""

    balanced: bool = False  # every class as often as another, rather than every image once
    repeats: int = 1  # times that an image comes in a row, each time altered anew
    blocks: Blocks | None = None  # those that are read one after the other; None: any image may be next

    def order(self, labels: np.ndarray, generator: np.random.Generator, batch_size: int = 1) -> np.ndarray:
        """Draws rows (n,) before repeats; by blocks, as many as fill batches.

        Balanced, images of a rare class come again and some of a frequent one are left out. Of several
        classes per image, each class draws its share from all that show it, and no class draws one too; a
        class that accompanies others is then seen more often than its share.
        """
        if self.blocks is not None:
            return self.blocks.order(batch_size, generator)
        if not self.balanced:
            return generator.permutation(len(labels))
        groups = rows_by_class(labels)
        share = -(-len(labels) // len(groups))
        drawn = [_repeated(members, share, generator) for members in groups]
        return generator.permutation(np.concatenate(drawn))[: len(labels)]

    def steps(self, labels: np.ndarray, batch_size: int, seed: int, first_step: int) -> Iterator[Step]:
        """Gives each step from the first on, without end.

        An epoch's remainder is left out. With `repeats` above 1, each image of the epoch's order comes that
        many times in a row, altered anew each time, and the epoch is as long as before: it sees a part of
        the images (repeated augmentation, arXiv:1901.09335, as in DeiT, arXiv:2012.12877, §6).
        """
        steps_per_epoch = len(labels) // batch_size
        epoch, step = divmod(first_step, steps_per_epoch)
        while True:
            order = self.order(labels, np.random.default_rng([seed, epoch]), batch_size)
            for first in range(step * batch_size, steps_per_epoch * batch_size, batch_size):
                places, copies = np.divmod(np.arange(first, first + batch_size), self.repeats)
                yield Step(epoch, order[places], copies)
            epoch, step = epoch + 1, 0


def _repeated(members: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` of them in a random order, none twice before all have come once."""
    rounds = -(-count // len(members))
    return np.concatenate([generator.permutation(members) for _ in range(rounds)])[:count]


class ImageNumbers:
    """Random numbers from 0 to 1 of each copy of each image in each epoch.

    Those of a whole epoch are drawn at once, for to seed a generator for each image takes longer than to
    move it.
    """

    def __init__(self, images: int, numbers: int, seed: int) -> None:
        self._shape, self._seed = (images, numbers), seed
        self._epoch, self._of_copy = -1, dict[int, np.ndarray]()

    def of(self, step: Step) -> np.ndarray:
        """Gives (B, numbers) of the images of a step."""
        if step.epoch != self._epoch:
            self._epoch, self._of_copy = step.epoch, {}
        found = np.empty((len(step.rows), self._shape[1]))
        for copy in np.unique(step.copies).tolist():
            if copy not in self._of_copy:
                key = [self._seed, step.epoch, copy, _OF_IMAGES]
                self._of_copy[copy] = np.random.default_rng(key).random(self._shape)
            places = step.copies == copy
            found[places] = self._of_copy[copy][step.rows[places]]
        return found
