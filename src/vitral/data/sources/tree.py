"""Walks folders of images, each real folder once, and counts what stands there and is no image.

Which files count as images, `images/files.py` decides.
"""

import glob
import heapq
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitral.data.names import Names
from vitral.data.split import shortened
from vitral.images.files import (
    HEIC,
    HEIF_ADVICE,
    IMAGE,
    is_overlooked,
    kind_of_content,
    kind_of_file,
    why_not_list,
)
from vitral.runtime.errors import VitralError


@dataclass
class Folder:
    """A folder, the names of its own pictures, and its folders by name."""

    path: Path
    pictures: Sequence[str] = ()  # sorted
    folders: dict[str, "Folder"] = field(default_factory=dict)
    heic: int = 0  # pictures that need a package that is not installed

    def below(self) -> "Iterator[Folder]":
        """This folder and all in it, however deep."""
        waiting: list[Folder] = [self]
        while waiting:
            folder = waiting.pop()
            yield folder
            waiting += folder.folders.values()

    def all_pictures(self) -> Iterator[str]:
        """The paths of all pictures from this folder on, in the order of their parts."""
        waiting = [self._entries("")]
        while waiting:
            within, entries = waiting[-1]
            name, inner = next(entries, ("", None))
            if not name:
                waiting.pop()
            elif inner is None:
                yield within + name
            else:
                waiting.append(inner._entries(f"{within}{name}/"))

    def _entries(self, within: str) -> "tuple[str, Iterator[tuple[str, Folder | None]]]":
        pictures = ((name, None) for name in self.pictures)
        return within, heapq.merge(pictures, sorted(self.folders.items(), key=_first), key=_first)

    @property
    def count(self) -> int:
        """How many pictures there are, however deep."""
        return sum(len(folder.pictures) for folder in self.below())

    @property
    def holds_pictures(self) -> bool:
        return any(folder.pictures for folder in self.below())


def _first(entry: tuple[str, Any]) -> str:
    return entry[0]


@dataclass
class Passed:
    """What was passed over on a way through folders."""

    kinds: Counter[str] = field(default_factory=Counter)  # files, by suffix or kind
    links: list[str] = field(default_factory=list)  # folders that stand elsewhere too
    closed: list[str] = field(default_factory=list)  # folders that cannot be listed, with the reason

    def notes(self) -> list[str]:
        """A line for each kind of thing but `closed`."""
        notes = []
        if self.kinds:
            parts = [f"{count:,} {kind}" for kind, count in self.kinds.most_common()]
            advice = f"; to open HEIC, {HEIF_ADVICE}" if self.kinds[HEIC] else ""
            notes.append(f"skipped files that are not images: {shortened(parts)}{advice}")
        if self.links:
            notes.append(f"skipped links to folders that are elsewhere too: {shortened(self.links)}")
        return notes

    def closed_note(self) -> str:
        """A line on the folders that cannot be listed."""
        return "; ".join(self.closed[:3] + [f"and {len(self.closed) - 3:,} more"] * (len(self.closed) > 3))


def read_tree(root: Path) -> tuple[Folder, Passed]:
    """All pictures below `root`.

    The upper folders come first, and of neighbours those that are no links, so that a folder is found at
    its own place rather than by a link into it.
    """
    tree, passed = Folder(root), Passed()
    seen = {_identity(parent) for parent in (root.resolve(), *root.resolve().parents)}
    level = [tree]
    while level:
        inner: list[tuple[bool, Path, Folder]] = []
        for folder in level:
            inner += [(linked, path, folder) for linked, path in _list(folder, passed)]
        level = []
        for _, path, parent in sorted(inner, key=lambda item: item[:2]):
            if (identity := _identity(path)) in seen:
                passed.links.append(str(path))
                continue
            seen.add(identity)
            parent.folders[path.name] = Folder(path)
            level.append(parent.folders[path.name])
    return tree, passed


def _identity(path: Path) -> tuple[int, int] | str:
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return status.st_dev, status.st_ino


def _list(folder: Folder, passed: Passed) -> list[tuple[bool, Path]]:
    """Takes up a folder's pictures; gives the folders in it, and whether each is a link."""
    inner = []
    try:
        with os.scandir(folder.path) as entries:
            visible = [entry for entry in entries if not is_overlooked(entry.name)]
    except OSError as error:
        passed.closed.append(f"{folder.path} {why_not_list(error)}")
        return []
    pictures = []
    for entry in visible:
        kind = _kind(entry)
        if kind == "folder":
            inner.append((entry.is_symlink(), folder.path / entry.name))
        elif kind == IMAGE:
            pictures.append(entry.name)
        else:
            folder.heic += kind == HEIC
            passed.kinds[kind] += 1
    folder.pictures = Names.of(sorted(pictures))
    return inner


def _kind(entry: os.DirEntry) -> str:
    """Folder, image, or what it is instead, as a message names it."""
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return _irregular(entry)
    except OSError:  # links in a circle
        return "link to nowhere"
    return kind_of_content(entry.path)


def _irregular(entry: os.DirEntry) -> str:
    try:
        return kind_of_file(entry.stat().st_mode).removeprefix("a ")
    except OSError:
        return "link to nowhere"


# --- Pictures to predict ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundImages:
    """Files to be opened, and what was not found."""

    files: Sequence[str]
    notes: tuple[str, ...] = ()  # on what was passed over
    failures: tuple[str, ...] = ()  # folders that cannot be listed, with the reason

    def summary(self, unreadable: int) -> str:
        """A line on what failed, `unreadable` of the files included."""
        parts = []
        if unreadable:
            parts.append(f"{unreadable} of {len(self.files)} images could not be read")
        if self.failures:
            parts.append(f"{len(self.failures)} folders could not be listed")
        return "; ".join(parts)


def find_images(words: Sequence[str]) -> FoundImages:
    """Image files named by paths, folders (searched through) and patterns, in the order given.

    A path that does not exist stays among them: whoever opens it says so.

    Raises:
        VitralError: if a folder or pattern holds no images.
    """
    parts: list[Sequence[str]] = []
    total = Passed()
    for word in words:
        found, passed = _found(word)
        if not len(found):
            reasons = [*passed.notes(), *([passed.closed_note()] if passed.closed else [])]
            raise VitralError("; ".join([f"{word} holds no images", *reasons]))
        parts.append(found)
        total.kinds += passed.kinds
        total.links += passed.links
        total.closed += passed.closed
    files = parts[0] if len(parts) == 1 else Names.of(file for part in parts for file in part)
    return FoundImages(files, tuple(total.notes()), tuple(total.closed))


def _found(word: str) -> tuple[Sequence[str], Passed]:
    if os.path.isdir(word):
        tree, passed = read_tree(Path(word))
        return Names.of(os.path.join(tree.path, name) for name in tree.all_pictures()), passed
    passed = Passed()
    if not glob.has_magic(word) or os.path.lexists(word):
        return [word], passed
    files = []
    for file in sorted(glob.glob(word, recursive=True)):
        kind = _kind_of_match(file)
        if kind == IMAGE:
            files.append(file)
        elif kind != "folder":
            passed.kinds[kind] += 1
    return files, passed


def _kind_of_match(file: str) -> str:
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return "link to nowhere"
    if stat.S_ISDIR(mode):
        return "folder"
    return kind_of_content(file) if stat.S_ISREG(mode) else kind_of_file(mode).removeprefix("a ")
