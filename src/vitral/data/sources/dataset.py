"""Torch Datasets of (image, label), such as torchvision's, with a length."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from vitral.data.split import Found, Split, evenly, shortened
from vitral.images.picture import open_image
from vitral.runtime.errors import VitralError

_COMPARED = 8  # items, whose labels are compared with those that the dataset lists
_CHANNELS = (1, 2, 3, 4)


def read_datasets(datasets: Mapping[str, Dataset], classes: Sequence[str] | None = None) -> tuple[str, Found]:
    """Gives a name for messages, and the classes and splits of datasets of (image, label).

    Raises:
        VitralError: if one has no length or gives something else, or a label is of no class.
    """
    name = type(_innermost(datasets["train"])).__name__
    labels = {split: _labels(dataset, split) for split, dataset in datasets.items()}
    named = classes if classes is not None else getattr(_innermost(datasets["train"]), "classes", None)
    names, index = _index(labels, named)
    splits = {
        split: Split(
            _DatasetImages(dataset),
            _indices(labels[split], names, index, split),
            [f"{split} item {index}" for index in range(len(labels[split]))],
        )
        for split, dataset in datasets.items()
    }
    return name, Found(names, splits)


@dataclass(frozen=True)
class _DatasetImages:
    """The pictures of a dataset."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image:
        image = self.dataset[index][0]
        if isinstance(image, Image.Image):
            return image
        return open_image(_channels_last(np.asarray(image)))


def _channels_last(array: np.ndarray) -> np.ndarray:
    """(H, W, C) of (C, H, W) too; the shorter of both ends are the channels."""
    if array.ndim == 3 and array.shape[0] in _CHANNELS and array.shape[0] < array.shape[2]:
        return np.moveaxis(array, 0, -1)
    return array


def _innermost(dataset: Any) -> Any:
    """The dataset that subsets and concatenations are of."""
    while isinstance(dataset, Subset | ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    return dataset


# --- Labels ------------------------------------------------------------------------------------------


def _labels(dataset: Any, split: str) -> list[Any]:
    """The label of each item: a number, a name, or a tuple of 0 and 1."""
    try:
        count = len(dataset)
    except TypeError:
        raise VitralError(
            f"the {split} dataset, a {type(dataset).__name__}, has no length; give a dataset that has "
            "__len__ and __getitem__"
        ) from None
    if not count:
        return []
    item = dataset[0]
    if not isinstance(item, tuple | list) or len(item) != 2 or not _is_picture(item[0]):
        raise VitralError(
            f"the {split} dataset gives {_described(item)}; give (image, label), the image being a PIL "
            "picture, or a uint8 array or tensor (H, W, C) or (C, H, W)"
        )
    listed = _listed(dataset)
    if listed is not None and len(listed) == count:
        found = [_plain(label) for label in listed]
        if all(found[row] == _plain(dataset[row][1]) for row in evenly(count, _COMPARED).tolist()):
            return found
    return [_plain(dataset[row][1]) for row in range(count)]


def _listed(dataset: Any) -> Sequence | None:
    """The labels that torchvision's datasets keep beside their images; to ask each item would decode it."""
    if isinstance(dataset, Subset):
        inner = _listed(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_listed(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [x for part in parts for x in part or ()]
    found = getattr(dataset, "targets", None)
    return getattr(dataset, "labels", None) if found is None else found


def _plain(label: Any) -> Any:
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.tolist()
    return tuple(label) if isinstance(label, list) else label


def _is_picture(image: Any) -> bool:
    return isinstance(image, Image.Image | np.ndarray | Tensor)


def _described(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"({', '.join(type(part).__name__ for part in item)})"
    return f"a {type(item).__name__}"


def _index(
    labels: Mapping[str, list[Any]], classes: Iterable[Any] | None
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The classes, and which of them each label stands for; where they are named, a number is a place."""
    if classes is not None:
        names = tuple(map(str, classes))
        return names, {label: place for place, name in enumerate(names) for label in (place, name)}
    every = {label for of_split in labels.values() for label in of_split}
    if every and all(isinstance(label, tuple) for label in every):
        return tuple(map(str, range(len(labels["train"][0])))), {}
    kinds = {"name" if isinstance(label, str) else "number" for label in every}
    odd = [label for label in every if not isinstance(label, str | int)]
    if odd or len(kinds) > 1:
        shown = shortened([repr(label) for label in odd]) if odd else "numbers and names"
        raise VitralError(f"the labels are {shown}; give the number or the name of a class for each image")
    return tuple(map(str, sorted(every))), {label: place for place, label in enumerate(sorted(every))}


def _indices(labels: list[Any], names: tuple[str, ...], index: dict[Any, int], split: str) -> np.ndarray:
    """As a `Split` has them."""
    if labels and all(isinstance(label, tuple) for label in labels):
        if any(len(label) != len(names) or not set(label) <= {0, 1} for label in labels):
            raise VitralError(
                f"{split!r} has label vectors that are not {len(names)} numbers 0 or 1, one per class"
            )
        return np.array(labels, dtype=bool)
    unknown = {label for label in labels if label not in index}
    if unknown:
        raise VitralError(
            f"{split!r} has labels that the classes lack: {shortened(sorted(map(str, unknown)))}; there are "
            f"{len(names)} classes, {shortened(names)}"
        )
    return np.array([index[label] for label in labels], dtype=np.int64)
