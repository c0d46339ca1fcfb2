"""`score`: any number of images to a folder of parquet parts, in bounded memory, each image once."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from vitral.artifacts.predictor import Predictor
from vitral.data.columns import FOUND, Columns
from vitral.data.sources import Unlabelled, find_unlabelled
from vitral.inference.scoring.asking import Asking
from vitral.inference.scoring.parts import score_parts
from vitral.inference.scoring.results import Job, Results
from vitral.runtime.errors import VitralError

ScoringEngine = Literal["local", "ray"]
_NAMES_AT_A_TIME = 10_000  # that are digested together


@dataclass(frozen=True)
class Scored:
    """What came of a scoring."""

    folder: str
    images: int
    failed: int  # images that could not be read; their rows have the reason
    parts: int
    resumed: int  # images that were scored before


def score(
    model: str | PathLike,
    source: str | Unlabelled,
    out: str | PathLike,
    *,
    columns: Columns = FOUND,
    engine: ScoringEngine = "local",
    actors: int | None = None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    **how: Any,
) -> Scored:
    """Score every image of a source into a folder of parquet files; taken up again where it stopped.

    Args:
        model: as `vitral.load` takes it.
        source: as `vitral predict` takes it; labels are not needed.
        out: the folder, new or of the same scoring.
        columns: which column of a table holds the images.
        engine: "local": this process; "ray": actors of a Ray cluster, or of this machine.
        actors: of Ray; None: one for each GPU, or for each core where there is none.
        on_images: told how many images are done, of how many.
        how: fields of `Asking`: top, batch_size, tta, merge, device, precision, trusted.

    Raises:
        VitralError: if model, source or folder cannot be used, or the folder holds other scores.
    """
    asking = Asking(str(model), **how)
    found = find_unlabelled(source, columns) if isinstance(source, str) else source
    predictor = asking.predictor()
    job = _job(asking, predictor, found, source if isinstance(source, str) else "")
    results = Results(Path(out))
    with results.claimed(job):
        todo = results.missing(job)
        begun = job.images - sum(len(job.span(part)) for part in todo)
        on_images(begun, job.images)
        if todo and engine == "ray":
            from vitral.inference.scoring.on_ray import score_on_ray

            del predictor
            counts: Iterable[int] = score_on_ray(asking, found, job, results, todo, actors)
        else:
            counts = score_parts(predictor, found, job, results, todo)
        done = begun
        for count in counts:
            done += count
            on_images(done, job.images)
        total = results.checked(job)
    if total.failed == total.images:
        raise VitralError(f"not one of the {total.images:,} images could be read; {out} has the reasons")
    return Scored(str(out), total.images, total.failed, job.parts, begun)


def _job(asking: Asking, predictor: Predictor, found: Unlabelled, source: str) -> Job:
    return Job(
        model=asking.model,
        weights=asking.digest(predictor),
        source=source,
        images=len(found.images),
        names=_digest(found.names),
        top=asking.top,
        batch_size=asking.batch_size,
        tta=asking.tta,
        merge=asking.merge,
        precision=asking.precision,
    )


def _digest(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    each = iter(names)
    while some := list(islice(each, _NAMES_AT_A_TIME)):
        digest.update("\0".join([*some, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
