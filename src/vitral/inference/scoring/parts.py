"""Scores parts one after the other: what one process does, on whichever machine."""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from vitral.artifacts.prediction import Prediction, predicted
from vitral.artifacts.predictor import Predictor
from vitral.data.sources import Unlabelled
from vitral.inference.scoring.results import Job, Results


def score_parts(
    predictor: Predictor, found: Unlabelled, job: Job, results: Results, parts: Sequence[int]
) -> Iterator[int]:
    """Score parts while the images that follow are being read; give the number of images of each batch.

    No batch is of two parts: all parts but the last of a job are of whole batches.
    """
    rows = (row for part in parts for row in job.span(part))
    said = predicted(
        rows,  # pyrefly: ignore[bad-argument-type] - the reader makes images of them
        _reader(predictor, found),
        job.batch_size,
        lambda pixels: predictor.answers(np.stack(pixels)).probabilities,
        lambda name, probabilities_L: predictor.prediction(name, probabilities_L, job.top),
    )
    for part in parts:
        span = job.span(part)
        of_part: list[Prediction] = []
        while len(of_part) < len(span):
            batch = list(islice(said, min(job.batch_size, len(span) - len(of_part))))
            of_part += batch
            if len(of_part) == len(span):
                names = [found.names[row] for row in span]
                results.write(job, part, names, of_part, predictor.engine.name)
            yield len(batch)


def _reader(predictor: Predictor, found: Unlabelled) -> Callable[[Any], np.ndarray]:
    """Row -> what the model sees; images are fetched one at a time, and decoded several at a time."""
    fetching = threading.Lock()

    def read(row: int) -> np.ndarray:
        with fetching:
            image = found.images[row]
        return predictor.pixels(image)

    return read
