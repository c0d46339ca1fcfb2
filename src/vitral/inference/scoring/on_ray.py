"""Scores parts on Ray Data: one row of the dataset is the number of a part, and actors write the parts.

Ray may run a part twice, or lose the record of one that was written. Since a part's name and rows follow from
its number, and it appears whole or not at all, that changes nothing: each image is scored once in effect,
with no help from Ray.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vitral.data.sources import Unlabelled
from vitral.inference.scoring.asking import Asking
from vitral.inference.scoring.parts import score_parts
from vitral.inference.scoring.results import Job, Results
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import signals_kept
from vitral.runtime.streams import standard_error_hidden
from vitral.runtime.telemetry import without_reports
from vitral.runtime.threads import computing_threads, cpu_count

# Ray keeps a block's record in its driver, and repeats a block as a whole.
_MOST_BLOCKS = 1000
# Through its store go numbers of parts and, once, the images' names.
_STORE_BYTES = 256 * 2**20


def score_on_ray(
    asking: Asking, found: Unlabelled, job: Job, results: Results, parts: Sequence[int], actors: int | None
) -> Iterator[int]:
    """Score parts on a cluster that `RAY_ADDRESS` names, or on this machine; give the images of each.

    Raises:
        VitralError: if Ray is not installed, or an actor cannot use the model or the images.
    """
    with _ray() as ray:
        from ray.exceptions import RayError

        share = _share(ray, asking, actors)
        work = ray.put((asking, found, job, results))
        numbers = ray.data.from_items(
            [{"part": part} for part in parts], override_num_blocks=min(len(parts), _MOST_BLOCKS)
        )
        counts = numbers.map_batches(
            _Scorer,
            fn_constructor_args=(work, share["num_cpus"]),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=share.pop("actors")),
            **share,
        )
        try:
            for row in counts.iter_rows():
                yield int(row["images"])
        except RayError as error:
            raise VitralError(_reason(error)) from error


def _share(ray: Any, asking: Asking, actors: int | None) -> dict[str, Any]:
    """How many actors there are, and what each has of the cluster."""
    there = ray.cluster_resources()
    gpus = 0 if asking.device == "cpu" else int(there.get("GPU", 0))
    cpus = int(there.get("CPU", 1))
    count = actors or gpus or cpus
    return {"actors": count, "num_cpus": max(cpus // count, 1), "num_gpus": min(gpus / count, 1)}


class _Scorer:
    """An actor: holds the model, and writes the parts whose numbers it is given."""

    def __init__(self, work: Any, threads: int) -> None:
        import ray

        self.threads = threads
        self.asking, self.found, self.job, self.results = ray.get(work)
        self.predictor = self.asking.predictor()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        images = []
        for part in batch["part"].tolist():
            # Done by one that was killed before it could say so.
            if not self.results.is_whole(self.job, part):
                with computing_threads(self.threads):
                    list(score_parts(self.predictor, self.found, self.job, self.results, [part]))
            images.append(len(self.job.span(part)))
        return {"images": images}


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray, begun here if it is not running; quiet, and reporting to nobody."""
    # Of its core's errors the driver is told as exceptions.
    with without_reports(RAY_BACKEND_LOG_LEVEL="fatal"), signals_kept():
        try:
            import ray
            import ray.data
        except ImportError:
            raise VitralError("--engine ray needs the 'ray' extra: pip install 'vitral[ray]'") from None
        ours = not ray.is_initialized()
        if ours:
            _begin(ray)
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _begin(ray: Any) -> None:
    # The first line that Ray's core writes says that it writes no others.
    with standard_error_hidden():
        _begin_quietly(ray)


def _begin_quietly(ray: Any) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(num_cpus=cpu_count(), object_store_memory=_STORE_BYTES, include_dashboard=False, **quiet)


def _reason(error: Exception) -> str:
    """What went wrong in an actor, in a line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, VitralError):
            return str(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return f"Ray could not go on: {last}; go on with the same command"
