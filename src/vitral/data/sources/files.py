"""Pictures in files, of which the names alone are kept, and each is looked for when it is read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitral.data.split import evenly
from vitral.images.files import USUAL_SUFFIXES, has_image_suffix
from vitral.runtime.errors import ImageError, VitralError

_LOOKED_FOR = 20


@dataclass(frozen=True)
class Files:
    """Pictures by their paths below a folder, or from the root of all."""

    root: str
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return Path(self.root, self.names[int(index)])


@dataclass(frozen=True)
class NamedFiles:
    """Pictures as a table names them: from a folder on, absolute, or from ``~``, with a suffix or without.

    Args:
        root: the folder.
        names: of the pictures, with forward slashes.
        suffixes: that are tried where a name has none, the likeliest first.
    """

    root: str
    names: Sequence[str]
    suffixes: tuple[str, ...] = USUAL_SUFFIXES

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        name = self.names[int(index)]
        if not name:
            raise ImageError("its cell is empty")
        path = os.path.join(self.root, os.path.expanduser(name))
        if has_image_suffix(path) or os.path.isfile(path):
            return Path(path)
        there = (path + suffix for suffix in self.suffixes if os.path.isfile(path + suffix))
        return Path(next(there, path))

    def checked(self, table: str, advice: str) -> "NamedFiles":
        """Gives itself, with the suffix first that the pictures have.

        Args:
            table: for messages.
            advice: what to do if there are none.

        Raises:
            VitralError: if a name is an address, or of some looked for not one is there.
        """
        looked = evenly(len(self), _LOOKED_FOR).tolist()
        for row in looked:
            if "://" in self.names[row]:
                raise VitralError(
                    f"{table}: the image {self.names[row]} is an address; "
                    "store the images as files, and name those"
                )
            path = str(self[row])
            if os.path.isfile(path):
                added = path.removeprefix(os.path.join(self.root, os.path.expanduser(self.names[row])))
                others = (suffix for suffix in self.suffixes if suffix != added)
                return NamedFiles(self.root, self.names, (added, *others)) if added else self
        if looked:
            raise VitralError(
                f"{table}: not one of {len(looked)} images looked for is there, such as "
                f"{self[looked[0]]}; {advice}"
            )
        return self
