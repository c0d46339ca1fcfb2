"""What a scoring writes: a folder of parquet parts, each whole or not there, and what they are the scores of.

- ``_scores.json``: the `Job`. Readers of a folder of parquet files pass over names that begin with ``_``.
- ``part-000000.parquet``, ...: a row an image, in the order of the source. Which rows a part has
  is a function of the job, so that a part is written again to the same rows, whoever writes it.
- ``.lock``: while a process works on it.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitral.artifacts.prediction import Prediction
from vitral.runtime.errors import VitralError
from vitral.runtime.files import remove_leftovers, write_atomically
from vitral.runtime.lock import LockedError, locked

_JOB_FILE = "_scores.json"
_VERSION = 1
# A part is what a stop or a kill loses at most, and a folder of more files is slow to list.
_LEAST_ROWS, _MOST_PARTS = 1024, 10_000
_WORDS = {"weights": "another model", "names": "other images", "images": "other images"}


@dataclass(frozen=True)
class Job:
    """What is scored, how, and in which parts; two jobs are one exactly if all of it is equal."""

    model: str
    weights: str  # digest of the model
    source: str
    images: int
    names: str  # digest of the images' names, in their order
    top: int
    batch_size: int
    tta: str
    merge: str | None
    precision: str

    @property
    def rows(self) -> int:
        """Images in each part but the last: whole batches, so that a restart batches them alike."""
        least = max(_LEAST_ROWS, math.ceil(self.images / _MOST_PARTS))
        return math.ceil(least / self.batch_size) * self.batch_size

    @property
    def parts(self) -> int:
        return math.ceil(self.images / self.rows)

    def span(self, part: int) -> range:
        """The rows of a part."""
        return range(part * self.rows, min((part + 1) * self.rows, self.images))


@dataclass(frozen=True)
class Count:
    """How many images a scoring has, and how many of them could not be read."""

    images: int
    failed: int


class Results:
    """The folder of a scoring, new or begun.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def part_file(self, part: int) -> Path:
        return self.path / f"part-{part:06}.parquet"

    @contextmanager
    def claimed(self, job: Job) -> Iterator[None]:
        """No other process writes a job inside; the folder is made, and its job written down.

        Raises:
            VitralError: if another process does, the folder is of another job, or cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path / ".lock"))
                self._take_up(job)
            except LockedError as error:
                raise VitralError(
                    f"{self.path} is in use: {error.who} scores there; wait for it, or choose another --out"
                ) from None
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def _unwritable(self, error: OSError) -> VitralError:
        why = error.strerror or str(error)
        return VitralError(
            f"--out {self.path}: scores cannot be written there: {why}; mend that, and give the same command"
        )

    def _take_up(self, job: Job) -> None:
        file = self.path / _JOB_FILE
        remove_leftovers(self.path, {_JOB_FILE, *(self.part_file(part).name for part in range(job.parts))})
        if not file.exists():
            if any(self.path.glob("*.parquet")):
                raise VitralError(f"{self.path} holds parquet files of something else; choose another --out")
            content = {"vitral_scores": _VERSION, **asdict(job)}
            write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
            return
        begun = _read_job(file)
        for name, value in asdict(job).items():
            if begun.get(name) == value or name in ("model", "source"):
                continue  # the digests tell, wherever they lie now
            what = _WORDS.get(name, f"{name}={begun.get(name)}")
            raise VitralError(
                f"{self.path} holds scores of {what}; choose another --out, or remove it to begin again"
            )

    def missing(self, job: Job) -> list[int]:
        """The parts that are still to be written; one that is not whole counts as such."""
        there = {entry.name for entry in os.scandir(self.path)}
        return [
            part
            for part in range(job.parts)
            if self.part_file(part).name not in there or not self.is_whole(job, part)
        ]

    def is_whole(self, job: Job, part: int) -> bool:
        """Whether a part is there, with as many rows as it should have."""
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(self.part_file(part)).num_rows == len(job.span(part))
        except Exception:  # Arrow raises a dozen kinds on damaged files
            return False

    def write(self, job: Job, part: int, names: Sequence[str], said: Sequence[Prediction], by: str) -> None:
        """Write a part: `said` of the images called `names`, computed by what `by` names."""
        import pyarrow.parquet as pq

        table = _table(job.span(part), names, said).replace_schema_metadata({"computed_by": by})
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd")
        try:
            write_atomically(self.part_file(part), content.getvalue())
        except OSError as error:
            raise self._unwritable(error) from error

    def checked(self, job: Job) -> Count:
        """Count what all parts hold, part by part.

        Raises:
            VitralError: if they do not hold every row of the job once.
        """
        import pyarrow.parquet as pq

        images = failed = 0
        for part in range(job.parts):
            table = pq.read_table(self.part_file(part), columns=["row", "error"])
            if table["row"].to_pylist() != list(job.span(part)):
                raise VitralError(
                    f"{self.part_file(part)} does not hold rows {job.span(part).start:,} and on; remove it, "
                    "and give the same command"
                )
            images += len(table)
            failed += len(table) - table["error"].null_count
        return Count(images, failed)


def _read_job(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise VitralError(f"{file} is damaged: {error}; choose another --out") from error
    if not isinstance(content, dict) or content.get("vitral_scores") != _VERSION:
        raise VitralError(f"{file} is not of this version of Vitral; choose another --out")
    return content


def _table(rows: range, names: Sequence[str], said: Sequence[Prediction]) -> Any:
    """The table of a part, a row an image."""
    import pyarrow as pa

    top = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))
    likeliest = [one.top[0] if one.top else (None, None) for one in said]
    columns = {
        "row": pa.array(rows, pa.int64()),
        "image": pa.array(map(_as_unicode, names), pa.string()),
        "label": pa.array([label for label, _ in likeliest], pa.string()),
        "probability": pa.array([value for _, value in likeliest], pa.float32()),
        "top": pa.array([_pairs(one) for one in said], top),
        "abstained": pa.array([one.abstained for one in said], pa.bool_()),
        "error": pa.array([one.error for one in said], pa.string()),
    }
    return pa.table(columns)


def _pairs(one: Prediction) -> list[dict[str, Any]] | None:
    if one.error is not None:
        return None
    return [{"label": label, "probability": value} for label, value in one.top]


def _as_unicode(name: str) -> str:
    """A file's name may be of any bytes, and Arrow's text is not."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
