"""The data without what was found: a table of the files that stay, or parquet that holds the images."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitral.checks.findings import Subject
from vitral.checks.look import content_of
from vitral.data.split import class_counts, shortened
from vitral.images.picture import decoded
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.extras import need
from vitral.runtime.files import new_file, write_atomically

COLUMNS = ("image", "label", "split", "group")
# Between several labels in a cell: the first that no class's name holds.
_DELIMITERS = (";", "|", "&&")
# Of a row group, whichever is reached first: whole groups are read at a time, and drawn from together.
_GROUP_BYTES, _GROUP_ROWS = 2**24, 1000

OnImages = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """A file of the images that stay."""

    file: Path
    images: int  # that it lists or holds
    settings: tuple[str, ...]  # that training on it needs, such as label_delimiter=;


def refuse_to_write(file: Path, subject: Subject) -> None:
    """Refuse a file that cannot be made of this data, before its images are looked at.

    Raises:
        VitralError: if it is one of the data's own, or a table is to name images that are no files, or names
            of classes hold each delimiter.
    """
    source = re.sub(r"\{[^{}]*\}", "*", subject.data.source)
    if any(_matches(file.absolute(), Path(part).absolute()) for part in source.split("::")):
        raise VitralError(f"{file} would be part of {subject.data.source}; name a file that is not")
    if _is_parquet(file):
        need("a parquet file", "pyarrow", extra="data")
        return
    try:
        image = subject.split.images[0]
    except ImageError:
        image = None
    if not isinstance(image, Path):
        raise VitralError(
            f"{subject.data.source} holds its images within other files or in memory, and a table names "
            f"files; write the images themselves: --write {file.with_suffix('.parquet').name}"
        )
    _delimiter(subject)


def _matches(file: Path, pattern: Path) -> bool:
    """Whether a pattern means a file; ``*`` stands for no slash."""
    return len(file.parts) == len(pattern.parts) and file.match(str(pattern))


def write_cleaned(
    file: Path,
    subject: Subject,
    without: Mapping[int, str],
    groups: np.ndarray,
    on_images: OnImages = lambda *_: None,
) -> Written:
    """Write what stays, to be trained on where it lies: whole, or not at all.

    Args:
        file: a table (.csv) names the files; one in parquet holds the images as they are stored.
        subject: the images.
        without: rows to leave out.
        groups: (n,) a number for the images of each picture.
        on_images: told how many are written, of how many.

    Raises:
        VitralError: if a class would be left without images, one cannot be read, or the file not be written.
    """
    kept = np.array([row for row in range(len(subject)) if row not in without], dtype=np.int64)
    _refuse_lost_classes(file, subject, kept)
    write = _write_parquet if _is_parquet(file) else _write_table
    try:
        write(file, subject, kept, _together(groups, subject.split.groups), on_images)
    except OSError as error:
        raise VitralError(f"{file} cannot be written: {error.strerror or error}") from error
    return Written(file, len(kept), tuple(_settings(file, subject)))


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _settings(file: Path, subject: Subject) -> Iterator[str]:
    if subject.split.multi_label and not _is_parquet(file):
        yield f"label_delimiter={_delimiter(subject)}"
    if not subject.data.mirror_safe:  # which `train` knows of digits by their name alone
        yield from ("flip=false", "rand_augment=0")


def _refuse_lost_classes(file: Path, subject: Subject, kept: np.ndarray) -> None:
    classes = subject.data.classes
    for place, split in enumerate(subject.splits):
        rows = kept[subject.of[kept] == place]
        lost = np.flatnonzero(class_counts(subject.split.labels[rows], len(classes)) == 0)
        if len(lost) and (len(rows) or split == "train"):
            raise VitralError(
                f"{file} is not written: without what was found {split} has no images of "
                f"{shortened([classes[index] for index in lost])}; add some, or leave the class out"
            )


def _together(groups: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """A number for each image, the same for those of one picture and for those of one patient."""
    if others is None:
        return groups
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    (pictures, of_picture), (users, of_user) = (np.unique(n, return_inverse=True) for n in (groups, others))
    nodes = len(pictures) + len(users)
    edges: Any = coo_array(
        (np.ones(len(groups), np.int8), (of_picture, len(pictures) + of_user)), shape=(nodes, nodes)
    )
    return connected_components(edges, directed=False)[1][of_picture].astype(np.int64)


# --- A table ---------------------------------------------------------------------------------------


def _write_table(file: Path, subject: Subject, kept: np.ndarray, groups: np.ndarray, _: OnImages) -> None:
    """A path is relative to the table where the image lies beside or below it."""
    table, folder, delimiter = io.StringIO(), file.absolute().parent, _delimiter(subject)
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in kept.tolist():
        label = delimiter.join(subject.labels_of(row))
        writer.writerow([_path(subject, row, folder), label, subject.split_of(row), int(groups[row])])
    # Names that are no text go back to the bytes that they are.
    write_atomically(file, table.getvalue().encode(errors="surrogateescape"))


def _delimiter(subject: Subject) -> str:
    if not subject.split.multi_label:
        return ""
    for mark in _DELIMITERS:
        if not any(mark in name for name in subject.data.classes):
            return mark
    raise VitralError(
        f"the names of classes hold {' and '.join(_DELIMITERS)}, so none can part labels in a table; "
        "write a .parquet file"
    )


def _path(subject: Subject, row: int, folder: Path) -> str:
    image = subject.split.images[row]
    if not isinstance(image, Path):
        raise VitralError(f"{subject.split.names[row]} is no file, which a table could name; write .parquet")
    path = Path(os.path.abspath(image))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


# --- Parquet ---------------------------------------------------------------------------------------


def _write_parquet(
    file: Path, subject: Subject, kept: np.ndarray, groups: np.ndarray, on_images: OnImages
) -> None:
    """Rows as the Hugging Face hub has them, a row group at a time in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(subject)
    with (
        new_file(file) as temporary,
        pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=["split"]) as writer,
    ):
        done = 0
        for rows, contents in _row_groups(subject, kept):
            columns = [
                [
                    {"bytes": content, "path": _as_text(subject.split.names[row])}
                    for row, content in zip(rows, contents, strict=True)
                ],
                [_as_numbers(subject.split.labels[row]) for row in rows],
                [subject.split_of(row) for row in rows],
                [int(groups[row]) for row in rows],
            ]
            writer.write_table(pa.table(columns, schema=schema))
            done += len(rows)
            on_images(done, len(kept))


def _schema(subject: Subject) -> Any:
    """With the classes' names and order, as the library `datasets` writes and reads them."""
    import pyarrow as pa

    label: dict[str, Any] = {"names": list(subject.data.classes), "_type": "ClassLabel"}
    kind = pa.int64()
    if subject.split.multi_label:
        label, kind = {"feature": label, "_type": "Sequence"}, pa.list_(kind)
    features = {
        "image": {"_type": "Image"},
        "label": label,
        "split": {"dtype": "string", "_type": "Value"},
        "group": {"dtype": "int64", "_type": "Value"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = zip(COLUMNS, (image, kind, pa.string(), pa.int64()), strict=True)
    return pa.schema(list(columns), metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _row_groups(subject: Subject, kept: np.ndarray) -> Iterator[tuple[list[int], list[bytes]]]:
    """Rows and the images' bytes, a few at a time."""
    rows: list[int] = []
    contents: list[bytes] = []
    size = 0
    for row in kept.tolist():
        contents.append(_encoded(subject, row))
        rows.append(row)
        size += len(contents[-1])
        if size >= _GROUP_BYTES or len(rows) >= _GROUP_ROWS:
            yield rows, contents
            rows, contents, size = [], [], 0
    if rows:
        yield rows, contents


def _encoded(subject: Subject, row: int) -> bytes:
    """The image as it is stored; of one in memory a PNG of what a model is shown.

    Raises:
        VitralError: if it cannot be read, which it could when it was looked at.
    """
    try:
        image = subject.split.images[row]
        if not isinstance(image, Image.Image):
            return content_of(image)
        content = io.BytesIO()
        with decoded(image) as picture:
            picture.save(content, "PNG")
        return content.getvalue()
    except ImageError as error:
        name = subject.split.names[row]
        raise VitralError(f"{name} could be read, and cannot any more: {error}; check again") from error


def _as_numbers(label: np.ndarray) -> int | Sequence[int]:
    return int(label) if label.ndim == 0 else np.flatnonzero(label).tolist()


def _as_text(name: str) -> str:
    """Names that are no text are written with their odd bytes as question marks: they are only to be read."""
    return name.encode(errors="replace").decode()
