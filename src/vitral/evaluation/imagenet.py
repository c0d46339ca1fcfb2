"""ImageNet-1k's folders: which class each of their names, WordNet's ids such as n01440764, stands for."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from vitral.checkpoints.layouts.labels import imagenet_labels

# The order of the classes is that of the ids, as in every release of ILSVRC.
_FILE = Path(__file__).with_name("imagenet_wnids.txt")
# Alone, or before a name, as in "n02085620-Chihuahua".
_WNID = re.compile(r"(n\d{8})(?:[-_ .].*)?", re.DOTALL)
# Libraries name a few classes differently, such as one of the two cranes.
_LEAST_ALIKE = 900


def class_indices(folders: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """The model's class of each folder, if all folders are named by ids and the labels are ImageNet-1k's."""
    matches = [_WNID.fullmatch(folder) for folder in folders]
    indices = [_index().get(match[1]) if match else None for match in matches]
    if None in indices or not _are_imagenets(labels):
        return None
    return [index for index in indices if index is not None]


@cache
def _index() -> dict[str, int]:
    return {wnid: index for index, wnid in enumerate(_FILE.read_text(encoding="ascii").split())}


def _are_imagenets(labels: Sequence[str]) -> bool:
    if len(labels) != len(_index()):
        return False
    pairs = zip(labels, imagenet_labels(), strict=True)
    return sum(_first(ours) == _first(theirs) for ours, theirs in pairs) >= _LEAST_ALIKE


def _first(label: str) -> str:
    """Of "tench, Tinca tinca" the first name."""
    return label.split(",")[0].strip().lower().replace("_", " ")
