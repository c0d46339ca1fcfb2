"""Images with labels, from a folder, parquet files or scikit-learn's digits, and their batches.

`open_data` finds the images and splits them; `training_batches` and `evaluation_batches` load them
through a callable that turns an encoded image into a tensor. All randomness is a function of the
seed, the epoch and the image's index, so a run can be taken up at any step with nothing to restore.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitral.data.sources import SPLITS, Images, Split, find, shortened
from vitral.data.sources.doubles import note_on_doubles
from vitral.data.workers import Loading
from vitral.images.files import opened
from vitral.runtime.errors import ImageError, VitralError

Transform = Callable[[Any], Tensor]

# A validation set larger than this tells no more about the best epoch, and costs time and images.
_MAX_VAL_BESIDE_TEST = 2500
# Of larger images, opening is a small part of all that a step does with them.
SMALL_PIXELS = 64 * 64
KEPT_BYTES = 512 * 2**20  # of a split


# --- What there is -------------------------------------------------------------------------------


class KeptImages:
    """Opened images by index; small ones are opened once and kept, up to half a GiB in all.

    To open a JPEG of 32 pixels a side takes as long as all else that is done to load it (docs/log.md,
    2026-11-26).
    """

    def __init__(self, images: Images, open_image: Callable[[Any], Image.Image]) -> None:
        self._images, self._open = images, open_image
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        if index in self._kept:
            return Image.fromarray(self._kept[index])
        image = self._open(self._images[index])
        size = 3 * image.width * image.height
        if image.width * image.height <= SMALL_PIXELS and size <= self._room:
            self._room -= size
            self._kept[index] = np.asarray(image)
        return image


@dataclass(frozen=True)
class ImageData:
    """Every split of a data source over one list of classes."""

    source: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    held_out: bool = False  # whether "val" was cut from the images by us
    mirror_safe: bool = True  # whether a mirrored image keeps its label (digits do not)
    notes: tuple[str, ...] = ()  # what was passed over or looks wrong, a line each

    @property
    def multi_label(self) -> bool:
        """Whether an image shows any number of classes, none included, rather than one."""
        return any(split.multi_label for split in self.splits.values())

    def split(self, name: str) -> Split:
        """Raises VitralError if there is no such split."""
        if name not in self.splits:
            raise VitralError(
                f"{self.source} has no {name!r} split; it has {', '.join(map(repr, self.splits))}"
            )
        return self.splits[name]

    def told(self, warn: Callable[[str], None]) -> "ImageData":
        """Itself, after `warn` is given each note."""
        for note in self.notes:
            warn(note)
        return self

    def describe(self) -> str:
        """What was found, in lines for people."""
        counts = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        total = sum(map(len, self.splits.values()))
        labels = self.splits["train"].labels
        per_class = class_counts(labels, len(self.classes))
        several = f", {labels.sum(1).mean():.1f} an image" if self.multi_label else ""
        sides = image_sizes(self.splits["train"])
        (h0, w0), (h, w), (h1, w1) = sides.min(0), np.median(sides, 0).astype(int), sides.max(0)
        size = f"{h}x{w}" if (h0, w0) == (h1, w1) else f"{h}x{w} (from {h0}x{w0} to {h1}x{w1})"
        how = ", val held out by class" if self.held_out else ""
        lines = (
            f"{self.source}: {total:,} images in {len(self.classes)} classes{several} "
            f"({shortened(self.classes)})\n"
            f"splits: {counts}{how}\n"
            f"        training images a class: {per_class.min():,} to {per_class.max():,}; "
            f"typical size {size}"
        )
        return "\n".join([lines, *self.notes])


def open_data(source: str, *, val_fraction: float = 0.2, seed: int = 0) -> ImageData:
    """Finds the images of an image folder, parquet files or ``digits``.

    An image folder holds one folder a class, or ``train/`` with ``val/`` or ``test/`` that do, by any
    of their usual names. A parquet source is a file, a pattern, or either with ``{split}`` in it, in the
    Hugging Face layout (columns ``image`` and ``label`` or ``labels``); lists of labels, or vectors of 0
    and 1, make it multi-label. Where
    there is no validation split, one is held out of the training images, the same share of each class:
    `val_fraction`, or half that share (at most 2,500 images) where there is a test split to be the judge.

    Args:
        source: as the command line's DATA.
        val_fraction: share of the images to hold out; 0 for none.
        seed: of that choice; the same seed holds out the same images.

    Raises:
        VitralError: if there is nothing usable there.
    """
    found = find(source)
    classes, splits = found.classes, dict(found.splits)
    _check(source, classes, splits)
    held_out = "val" not in splits and val_fraction > 0
    if held_out:
        train = splits.pop("train")
        fraction = val_fraction
        if "test" in splits:
            fraction = min(val_fraction / 2, _MAX_VAL_BESIDE_TEST / len(train))
        kept, held = _hold_out(train, fraction, seed)
        splits = {"train": kept, "val": held, **splits}
    ordered = {name: splits[name] for name in SPLITS if name in splits}
    notes = (*found.notes, *note_on_doubles(ordered))
    return ImageData(source, classes, ordered, held_out, mirror_safe=source != "digits", notes=notes)


def _hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Stratified. Images are ranked by a hash of their name, so that adding some moves few others.

    With several classes an image, the images of the rarest class are divided first, and those of each
    further class as far as they are not divided yet (iterative stratification, Sechidis et al., 2011).
    """
    ranks = np.array([hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest()[:8] for name in split.names])
    held, divided = np.zeros(len(split), dtype=bool), np.zeros(len(split), dtype=bool)
    groups = _by_class(split.labels)
    for members in groups:
        wanted = min(max(round(len(members) * fraction), 1), len(members) - 1)
        left = members[~divided[members]]
        count = max(wanted - held[members].sum(), 0)
        held[left[np.argsort(ranks[left], kind="stable")[:count]]] = True
        divided[members] = True
    for members in groups:
        if held[members].all():  # by its companions' shares; there must be something to learn from
            held[members[np.argmax(ranks[members])]] = False
    if not held.any():
        raise VitralError(
            "no image can be held out to validate on; give a val folder, or more images a class"
        )
    return split.take(np.flatnonzero(~held)), split.take(np.flatnonzero(held))


def _by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The images of each class that there is.

    With several classes an image, from the rarest class on; images of no class count as one more.
    """
    if labels.ndim == 1:
        # One sort, for a comparison with each class takes the square of many.
        order = np.argsort(labels, kind="stable")
        return np.split(order, np.unique(labels[order], return_index=True)[1][1:])
    shown = np.column_stack([labels, ~labels.any(1)])
    groups = [np.flatnonzero(column) for column in shown.T]
    return sorted((members for members in groups if len(members)), key=len)


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images show each class, (L,)."""
    return np.bincount(labels, minlength=num_classes) if labels.ndim == 1 else labels.sum(0)


def fingerprint(split: Split) -> str:
    """A digest of which images a split holds, to tell later whether they are still the same."""
    return hashlib.sha256(os.fsencode("\n".join(sorted(split.names)))).hexdigest()


def sample(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` images, drawn evenly over the classes, in the split's order; a function of the seed.

    One class an image, here, in `in_turns` and in `few_shot`.
    """
    return split.take(np.sort(in_turns(split, seed)[:limit]))


def in_turns(split: Split, seed: int) -> np.ndarray:
    """The images' indices, one of each class after another: any first part is even over the classes."""
    order, turns = _turns(split, seed)
    return order[np.argsort(turns[order], kind="stable")]


def few_shot(split: Split, per_class: int, seed: int) -> Split:
    """At most `per_class` images of each class; a larger number adds to the images of a smaller one."""
    _, turns = _turns(split, seed)
    return split.take(np.flatnonzero(turns < per_class))


def _turns(split: Split, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random order of the images, and of each image how many of its class come before it there."""
    order = np.random.default_rng(seed).permutation(len(split))
    turns = np.empty(len(split), dtype=np.int64)
    by_class = order[np.argsort(split.labels[order], kind="stable")]
    _, firsts, counts = np.unique(split.labels[by_class], return_index=True, return_counts=True)
    turns[by_class] = np.arange(len(split)) - np.repeat(firsts, counts)
    return order, turns


def thinned(split: Split, at_most: int) -> Split:
    """At most so many of the images, evenly over the split's order."""
    return split.take(np.linspace(0, len(split) - 1, min(at_most, len(split)), dtype=int))


def image_sizes(split: Split, at_most: int = 200) -> np.ndarray:
    """(height, width) of evenly chosen images, (n, 2); unreadable ones are passed over."""
    sizes = []
    images = thinned(split, at_most).images
    for index in range(len(images)):
        try:
            image = images[index]
            with nullcontext(image) if isinstance(image, Image.Image) else opened(image) as picture:
                sizes.append((picture.height, picture.width))
        except Exception:  # Pillow raises many kinds on damaged bytes; loading the image says which
            continue
    if not sizes:
        raise VitralError(f"not one of the images could be read, for example {split.names[0]}")
    return np.array(sizes)


def _check(source: str, classes: tuple[str, ...], splits: dict[str, Split]) -> None:
    if not any(map(len, splits.values())):
        raise VitralError(f"{source} holds no images")
    if not classes:
        raise VitralError(f"{source}: not one image has a label; the lists of labels are all empty")
    if len(classes) < 2:
        raise VitralError(
            f"{source} has one class only, {classes[0]!r}; a classifier needs two or more folders"
        )
    for name, split in splits.items():
        missing = np.flatnonzero(class_counts(split.labels, len(classes)) == 0)
        if len(missing):
            empty = shortened([classes[index] for index in missing])
            raise VitralError(
                f"{source}: no images of {empty} in {name!r}; add some, or remove the empty class"
            )


# --- Batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) with labels: indices (B,), or 0 and 1 for each class, (B, L) in float32.

    Damaged images are left out, and named with the reason.
    """

    images: Tensor
    labels: Tensor
    damaged: tuple[tuple[str, str], ...]

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.damaged)

    def share_memory(self) -> "Batch":
        """In memory that other processes see."""
        return Batch(self.images.share_memory_(), self.labels.share_memory_(), self.damaged)


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch's generators are a function of `key` alone; outside, the CPU's is as it was.

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


class _Images(Dataset):
    """Loads one image; its key is (epoch, index), or (epoch, index, copy) from the second copy on.

    A damaged image gives its name and the reason.
    """

    def __init__(self, split: Split, transform: Transform, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: tuple[int, ...]) -> tuple[Tensor, np.ndarray] | tuple[str, str]:
        row = index[1]
        try:
            with seeded(self.seed, *index):
                return self.transform(self.split.images[row]), self.split.labels[row]
        except ImageError as error:
            return self.split.names[row], str(error)


@dataclass(frozen=True)
class Draw:
    """How an epoch goes through the images; it is as long as there are images in any case."""

    balanced: bool = False  # every class as often as another, rather than every image once
    repeats: int = 1  # times that an image comes in a row, each time altered anew

    def order(self, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Indices (n,) before repeats.

        Balanced, images of a rare class come again and some of a frequent one are left out. Of several
        classes an image, each class draws its share from all that show it, and no class draws one too; a
        class that accompanies others is then seen more often than its share.
        """
        if not self.balanced:
            return generator.permutation(len(labels))
        groups = _by_class(labels)
        share = -(-len(labels) // len(groups))
        drawn = [_repeated(members, share, generator) for members in groups]
        return generator.permutation(np.concatenate(drawn))[: len(labels)]


def _repeated(members: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` of them in a random order, none twice before all have come once."""
    rounds = -(-count // len(members))
    return np.concatenate([generator.permutation(members) for _ in range(rounds)])[:count]


def endless_order(
    labels: np.ndarray, batch_size: int, seed: int, first_step: int, draw: Draw
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each step from the first on, without end: its epoch, its images, and which copy of each it takes.

    An epoch's remainder is left out. With `draw.repeats` above 1, each image of the epoch's order comes that
    many times in a row, altered anew each time, and the epoch is as long as before: it sees a part of the
    images (repeated augmentation, arXiv:1901.09335, as in DeiT, arXiv:2012.12877, §6).
    """
    steps_per_epoch = len(labels) // batch_size
    epoch, step = divmod(first_step, steps_per_epoch)
    while True:
        order = draw.order(labels, np.random.default_rng([seed, epoch]))
        for first in range(step * batch_size, steps_per_epoch * batch_size, batch_size):
            places, copies = np.divmod(np.arange(first, first + batch_size), draw.repeats)
            yield epoch, order[places], copies
        epoch, step = epoch + 1, 0


def _key(epoch: int, row: int, copy: int) -> tuple[int, ...]:
    return (epoch, row, copy) if copy else (epoch, row)


def training_batches(
    split: Split,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    draw: Draw = Draw(),
    loading: Loading | None = None,
) -> Generator[Batch]:
    """Shuffled batches without end, the same for the same seed whatever the step it starts from."""
    batches = (
        [_key(epoch, *place) for place in zip(rows.tolist(), copies.tolist(), strict=True)]
        for epoch, rows, copies in endless_order(split.labels, batch_size, seed, first_step, draw)
    )
    return (loading or Loading()).batches(_Images(split, transform, seed), batches, _collate)


def evaluation_batches(
    split: Split, transform: Transform, *, batch_size: int, loading: Loading | None = None
) -> Generator[Batch]:
    """Every image once, in order."""
    keys = [(0, index) for index in range(len(split))]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return (loading or Loading()).batches(_Images(split, transform, 0), batches, _collate)


def _collate(items: list) -> Batch:
    good = [item for item in items if isinstance(item[0], Tensor)]
    damaged = tuple(item for item in items if not isinstance(item[0], Tensor))
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    labels = torch.from_numpy(np.array([label for _, label in good]))
    return Batch(images, labels.to(torch.float32 if labels.ndim == 2 else torch.int64), damaged)


class DamageCount:
    """Names each damaged image once, and stops a run that meets too many."""

    def __init__(self, total: int, limit: float, warn: Callable[[str], None]) -> None:
        if not 0 <= limit <= 1:
            raise VitralError(f"max_damaged={limit}: it is a share of the images, from 0 to 1")
        self.total, self.limit, self.warn = total, limit, warn
        self.reasons: dict[str, str] = {}

    def add(self, batch: Batch) -> None:
        """Raises VitralError when more than `limit` of `total` images are damaged."""
        for name, reason in batch.damaged:
            if name not in self.reasons:
                self.reasons[name] = reason
                self.warn(f"skipped damaged image {name}: {reason}")
        if len(self.reasons) > self.limit * self.total:
            listed = shortened(list(self.reasons))
            raise VitralError(
                f"{len(self.reasons)} of {self.total:,} images are damaged, more than the limit of "
                f"{self.limit:.1%}: {listed}. Mend or remove them, or raise max_damaged"
            )
