"""Image folders: one folder per class, or folders of splits that hold those."""

import os
import re
from pathlib import Path

import numpy as np

from vitral.data.names import Names
from vitral.data.sources.files import Files
from vitral.data.sources.kinds import kind_of
from vitral.data.sources.roles import role, without_role
from vitral.data.sources.tree import Folder, read_tree
from vitral.data.split import SPLITS, Found, Split, shortened
from vitral.images.files import HEIF_ADVICE
from vitral.runtime import limits
from vitral.runtime.errors import VitralError

_PART = re.compile(r"\d+-of-\d+")  # as the Hub numbers the files of a split


def read_folder(root: Path) -> Found:
    """The classes and splits of an image folder, by what its folders hold as much as by their names.

    Raises:
        VitralError: if there are none, or if what stands there may be read in two ways.
    """
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise VitralError(f"{root} {what}; DATA is {limits.DATA}")
    tree, passed = read_tree(root)
    if passed.closed:
        raise VitralError(f"{passed.closed_note()}; grant the permission, or remove them")
    notes = passed.notes()
    folders = _splits_of(_without_wrapping(tree), notes)
    classes = _without_empty({name: _class_folders(folder) for name, folder in folders.items()}, notes)
    loose = sum(len(folder.pictures) for folder in {id(f): f for f in (tree, *folders.values())}.values())
    if loose:
        notes.append(f"left out {loose:,} images that are in no class folder")
    names = tuple(classes["train"])
    for name, found in classes.items():
        if tuple(found) != names:
            alone = shortened(sorted(set(names) - set(found))) or "none"
            extra = shortened(sorted(set(found) - set(names))) or "none"
            raise VitralError(
                f"the classes of {folders['train'].path} and {folders[name].path} differ: only in the first: "
                f"{alone}; only in the second: {extra}"
            )
    splits = {name: _split(root, found) for name, found in classes.items()}
    return Found(names, splits, tuple(notes))


def _without_wrapping(folder: Folder) -> Folder:
    """The folder that the classes or splits stand in: archives often pack it into others of no meaning."""
    while not folder.pictures and len(inner := _filled(folder)) == 1 and _filled(inner[0]):
        folder = inner[0]
    return folder


def _filled(folder: Folder) -> list[Folder]:
    """Its folders with pictures in them, by name."""
    return sorted((inner for inner in folder.folders.values() if inner.holds_pictures), key=_name)


def _name(folder: Folder) -> str:
    return folder.path.name


def _role(folder: Folder) -> str | None:
    return role(_name(folder))


def _splits_of(root: Folder, notes: list[str]) -> dict[str, Folder]:
    """The folder of each split; of a folder without splits, itself as "train"."""
    filled = _filled(root)
    by_role = {split: [inner for inner in filled if _role(inner) == split] for split in SPLITS}
    # A class may be called train: its pictures lie in it, and those of a split in folders within.
    splits = {split: [inner for inner in found if _filled(inner)] for split, found in by_role.items()}
    if not splits["train"]:
        _refuse_alike(root, filled)
        return {"train": root}
    for split, found in splits.items():
        if len(found) > 1:
            raise VitralError(
                f"{root.path}: which is the {split} split, {shortened([*map(_name, found)])}? Rename or "
                "remove the others"
            )
    train = _without_repetition(splits["train"][0])
    others = [_name(inner) for inner in filled if _role(inner) is None]
    if others and not by_role["val"] and not by_role["test"]:
        raise VitralError(
            f"{root.path}: is {_name(train)} a split or a class? Beside it lies {shortened(others)}; give "
            f"{train.path} as DATA, or rename it"
        )
    if others:
        notes.append(f"skipped folders that are not a split: {shortened(others)}")
    chosen = {"train": train}
    for split in ("val", "test"):
        for inner in map(_without_repetition, by_role[split]):
            if _is_labelled(inner, train):
                chosen[split] = inner
            else:
                count = inner.count
                notes.append(f"left out {_name(inner)}: its {count:,} images are in no class folder")
    return chosen


def _without_repetition(split: Folder) -> Folder:
    """Of ``seg_train/seg_train/`` the inner one."""
    while not split.pictures and len(inner := _filled(split)) == 1 and _role(inner[0]) == _role(split):
        split = inner[0]
    return split


def _is_labelled(split: Folder, train: Folder) -> bool:
    """Whether pictures lie in folders of classes, rather than loose or in one folder for them all."""
    inner = _filled(split)
    return len(inner) > 1 or any(folder.path.name in train.folders for folder in inner)


def _refuse_alike(root: Folder, filled: list[Folder]) -> None:
    """Folders that hold the same folders are no classes: they may be splits, or pictures and their masks."""
    inner = [tuple(map(_name, _filled(folder))) for folder in filled]
    if len(inner) > 1 and len(set(inner)) == 1 and len(inner[0]) > 1 and not any(f.pictures for f in filled):
        raise VitralError(
            f"{root.path}: what are {shortened([*map(_name, filled)])}? Each holds the folders "
            f"{shortened(inner[0])}; name splits train, val and test, give one of them as DATA, or put each "
            "class's pictures into its folder itself"
        )


def _without_empty(splits: dict[str, dict[str, Folder]], notes: list[str]) -> dict:
    """Without folders that hold no pictures, but for those of a class that has some in "train"."""
    known = {name for name, folder in splits["train"].items() if folder.holds_pictures}
    kept, empty = {}, set()
    for split, classes in splits.items():
        kept[split] = {
            name: folder for name, folder in classes.items() if folder.holds_pictures or name in known
        }
        empty |= classes.keys() - kept[split].keys()
    if empty:
        notes.append(f"skipped folders without images: {shortened(sorted(empty))}")
    return kept


def _tables_and_shards(folder: Path) -> list[str]:
    """Files that are DATA themselves, or a pattern of them, where a person names the folder they lie in."""
    alike: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and kind_of(str(file)) != "folder":
            name = without_role(file.name)
            name = _PART.sub("*", name) if file.suffix == ".parquet" else name
            alike.setdefault(str(folder / name), []).append(str(file))
    return [pattern if len(files) > 1 else files[0] for pattern, files in alike.items()]


def _class_folders(split: Folder) -> dict[str, Folder]:
    """The folder of each class by name, empty ones too."""
    classes = {name: split.folders[name] for name in sorted(split.folders)}
    if not any(folder.holds_pictures for folder in classes.values()):
        heic = sum(folder.heic for folder in split.below())
        reason = f"; its {heic:,} HEIC images are skipped: {HEIF_ADVICE}" if heic else ""
        if data := _tables_and_shards(split.path):
            reason += f"; or give as DATA what lies there: {shortened(data)}"
        raise VitralError(
            f"{split.path} holds no images in class folders; put each class's images in a folder of its name"
            f"{reason}"
        )
    for of_class in classes.values():
        heic = sum(folder.heic for folder in of_class.below())
        if heic and not of_class.holds_pictures:
            raise VitralError(f"all images of {of_class.path} are HEIC; to open them, {HEIF_ADVICE}")
    return classes


def _split(root: Path, classes: dict[str, Folder]) -> Split:
    labels = np.repeat(np.arange(len(classes)), [folder.count for folder in classes.values()])
    places = ((folder.path.relative_to(root).as_posix(), folder) for folder in classes.values())
    names = Names.of(f"{place}/{name}" for place, folder in places for name in folder.all_pictures())
    return Split(Files(str(root), names), labels, names)
