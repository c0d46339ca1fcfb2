"""The images of any source, whether they have labels or not."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitral.data.columns import FOUND, Columns
from vitral.data.names import Names
from vitral.data.sources.chosen import choose
from vitral.data.sources.digits import read_digits
from vitral.data.sources.files import Files
from vitral.data.sources.hub import files_on_hub
from vitral.data.sources.kinds import kind_of
from vitral.data.sources.parquet import ParquetFile
from vitral.data.sources.rows import TableFile, files_of, joined_images, joined_names
from vitral.data.sources.shards import shard_images
from vitral.data.sources.table import open_table
from vitral.data.sources.tree import find_images
from vitral.data.split import Images


@dataclass(frozen=True)
class Unlabelled:
    """The images of a source, what each is called, and what was passed over, a line each."""

    images: Images
    names: Sequence[str]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def find_unlabelled(source: str, columns: Columns = FOUND) -> Unlabelled:
    """Gives all images of a source, those of every split one after the other; no labels are asked for.

    Args:
        source: as the command line's DATA; of a folder all pictures in it, however deep; also a picture's
            file, or a pattern of such files.
        columns: what a user says of a table's columns; `image` and `image_root` matter here.

    Raises:
        VitralError: if there is none.
    """
    match kind_of(source):
        case "digits":
            digits = read_digits().splits["train"]
            return Unlabelled(digits.images, digits.names)
        case "table":
            return _of_rows(source, files_of(source, of_any=True), columns, open_table)
        case "parquet":
            return _of_rows(source, files_of(source, of_any=True), columns, ParquetFile)
        case "hub":
            files, open_file = files_on_hub(source)
            return _of_rows(source, files, columns, open_file)
        case "shards":
            return Unlabelled(*shard_images(source, columns))
        case "folder":
            return _of_pictures(source)


def _of_pictures(source: str) -> Unlabelled:
    found = find_images([source])
    names = found.files if isinstance(found.files, Names) else Names.of(found.files)
    return Unlabelled(Files("", names), names, (*found.notes, *found.failures))


def _of_rows(
    source: str, files_by_split: dict[str, list[str]], columns: Columns, open_file: Callable[[str], TableFile]
) -> Unlabelled:
    files = [open_file(path) for paths in files_by_split.values() for path in paths]
    chosen = [choose(file.path, file.names, columns, lambda _: False, labelled=False) for file in files]
    images = [file.images(of_file.image, columns) for file, of_file in zip(files, chosen, strict=True)]
    notes = tuple(dict.fromkeys(of_file.note for of_file in chosen if of_file.note))
    return Unlabelled(joined_images(images), joined_names(images, f"{os.path.basename(source)} row"), notes)
