"""Where the members of a tar shard lie: read once, member by member, and kept beside the shard.

An index is a parquet file of a row a sample. It is as good as the shard's size and time; where the shard's
folder cannot be written, it lies in the cache.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitral.data.split import shortened
from vitral.images.files import HEIC, IMAGE, kind_of_content
from vitral.runtime.errors import VitralError
from vitral.runtime.files import cache_folder, write_atomically

_VERSION = "1"
# What a member's name says: the sample's key up to the first dot of the file's name, folders included, and
# after it the field, in lower case (webdataset's tariterators).
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
# Last parts of fields that may say the label.
_TEXTS = ("cls", "txt", "text", "label", "class", "id", "json")
_MOST_TEXT = 2**20  # bytes of one
_MOST_FIELDS = 32
_INDEXED_AS, _OFFSET, _SIZE = "name", "offset", "size"


@dataclass
class Samples:
    """The samples of a shard, a value a sample in each column; None where a sample lacks the field."""

    count: int = 0
    places: dict[str, list[tuple[str, int, int] | None]] = field(default_factory=dict)  # of images
    texts: dict[str, list[bytes | None]] = field(default_factory=dict)

    def begin(self) -> None:
        """Adds a sample that has nothing yet."""
        self.count += 1
        for column in (*self.places.values(), *self.texts.values()):
            column.append(None)

    def put(self, columns: dict[str, list], name: str, value: Any) -> bool:
        """Gives the last sample a field; False if it has it already."""
        column = columns.setdefault(name, [None] * self.count)
        if column[-1] is not None:
            return False
        column[-1] = value
        return True


def index_of(shard: Path, identity: str, content: Path | None = None) -> Any:
    """Gives the index of a shard as a table, from where it is kept or by reading the shard.

    Args:
        shard: its path; or what names it, if `content` is given.
        identity: what an index must have been made of.
        content: the file, if it is not `shard`.

    Raises:
        VitralError: if the shard cannot be read, or is no tar file of samples.
    """
    import pyarrow.parquet as pq

    expected = {b"vitral": f"{_VERSION} {identity}".encode()}
    places = _places(shard, beside=content is None)
    for place in places:
        try:
            if (pq.read_schema(place).metadata or {}).get(b"vitral") == expected[b"vitral"]:
                return pq.read_table(place, partitioning=None)
        except Exception:  # not there, or damaged in any way: made anew
            continue
    table = _as_table(scan(content or shard, str(shard))).replace_schema_metadata(expected)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, buffer.getvalue())
        except OSError:  # the next place, and without any the shard is read again the next time
            continue
        break
    return table


def _places(shard: Path, *, beside: bool) -> list[Path]:
    """Where an index may lie."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(shard) if beside else str(shard))).hexdigest()[:32]
    cached = cache_folder("shards") / f"{digest}.index"
    return [shard.parent / f".{shard.name}.index", cached] if beside else [cached]


def _as_table(samples: Samples) -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for name, places in samples.places.items():
        parts = list(zip(*((None, None, None) if place is None else place for place in places), strict=True))
        columns[f"{_INDEXED_AS}:{name}"] = pa.array(map(_encoded, parts[0]), pa.binary())
        columns[f"{_OFFSET}:{name}"] = pa.array(parts[1], pa.int64())
        columns[f"{_SIZE}:{name}"] = pa.array(parts[2], pa.int64())
    for name, texts in samples.texts.items():
        columns[f"text:{name}"] = pa.array(texts, pa.binary())
    return pa.table(columns)


def _encoded(name: str | None) -> bytes | None:
    return None if name is None else os.fsencode(name)


def image_fields(table: Any) -> list[str]:
    """Gives the fields of an index that hold images."""
    return [name.removeprefix("size:") for name in table.schema.names if name.startswith("size:")]


def text_fields(table: Any) -> list[str]:
    """Gives the fields of an index that may say the label."""
    return [name.removeprefix("text:") for name in table.schema.names if name.startswith("text:")]


# --- Reading a shard ---------------------------------------------------------------------------------


def scan(file: Path, shown: str) -> Samples:
    """Reads the headers of a tar file, and the small texts in it.

    Neighbours of one key are a sample. Members without a field, hidden ones and those whose name begins and
    ends with two underscores say nothing of one.

    Raises:
        VitralError: if it cannot be read, or is no tar file of samples; `shown` names it.
    """
    samples, key = Samples(), None
    for member, archive in _members(file, shown):
        found = _NAME.fullmatch(member.name.removeprefix("./"))
        if not found or _is_meta(found[1]):
            continue
        if found[1] != key:
            key = found[1]
            samples.begin()
        name = found[2].lower()
        if not _take(samples, name, member, archive):
            raise VitralError(
                f"{shown}: the sample {key} has two members {name!r}; a sample is made of neighbours of one "
                "name up to its first dot"
            )
        if len(samples.places) > _MOST_FIELDS:
            raise VitralError(
                f"{shown}: the names have fields such as {shortened(list(samples.places))}; a field is all "
                "after the first dot of a name, so that a name without its ending must have no dots"
            )
    return samples


def _is_meta(key: str) -> bool:
    name = key.rsplit("/", 1)[-1]
    return name.startswith("__") and name.endswith("__")


def _take(samples: Samples, name: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> bool:
    kind = kind_of_content(f"x.{name}")
    if kind in (IMAGE, HEIC):
        place = (member.name.removeprefix("./"), member.offset_data, member.size)
        return samples.put(samples.places, name, place)
    if name.rsplit(".", 1)[-1] not in _TEXTS or member.size > _MOST_TEXT:
        return True
    content = archive.extractfile(member)
    return samples.put(samples.texts, name, b"" if content is None else content.read())


def _members(file: Path, shown: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The regular files of an archive that is not compressed."""
    name = "its first"
    try:
        with file.open("rb") as opened:
            if opened.read(2) == b"\x1f\x8b":
                raise VitralError(
                    f"{shown} is compressed, so that no image in it can be found without reading all before "
                    "it; unpack it with gunzip (images hardly shrink)"
                )
            opened.seek(0)
            size = os.fstat(opened.fileno()).st_size
            with tarfile.open(fileobj=opened, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # pyrefly: ignore[missing-attribute] - it would keep a list of all
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("the file ends before it")
                    name = member.name
                    if member.isreg() and not member.issparse():
                        yield member, archive
                if archive.offset < size and not _ends_in_zeros(opened, archive.offset):
                    raise tarfile.ReadError("what follows is no header")
    except VitralError:
        raise
    except (tarfile.TarError, EOFError) as error:
        raise VitralError(
            f"{shown} is no tar file, or is damaged or cut off after {name}: {error}; fetch it again"
        ) from error
    except OSError as error:
        raise VitralError(f"{shown} cannot be read: {error.strerror or error}") from error


def _ends_in_zeros(file: Any, offset: int) -> bool:
    """Whether an archive's end is where it was taken to be; tarfile takes a damaged header for one too."""
    file.seek(offset)
    return not file.read(tarfile.BLOCKSIZE).strip(b"\0")
