"""The other side of `process.Process`: reads what to do, a line of JSON each, and answers with a line."""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vitral.artifacts.engine import Engine
from vitral.artifacts.engines import onnx, openvino
from vitral.artifacts.manifest import Form
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import build
from vitral.runtime.threads import computing_threads, engine_threads
from vitral.ship.optimize.candidates import Candidate


class Worker:
    """What a process can be asked for: to build forms, or to be one of them."""

    def __init__(self) -> None:
        self._kept = ExitStack()
        self._engine: Engine | None = None
        self._builder: Any = None

    # --- A form ------------------------------------------------------------------------------------

    def open(self, folder: str, candidate: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Open a form, and answer once with it.

        Args:
            folder: of the form's files, or of a checkpoint for torch.
            candidate: the fields of `Candidate`.
            options: of its engine.
        """
        import psutil

        begun = time.perf_counter()
        self._engine, img_size = _opened(Path(folder), candidate, options, self._kept)
        self._engine(np.zeros((1, *img_size, 3), np.uint8))
        memory = psutil.Process().memory_info().rss
        return {
            "engine": self._engine.name,
            "load_s": time.perf_counter() - begun,
            "memory_mb": memory / 2**20,
        }

    def seconds(self, pixels: str, batch: int, calls: int) -> float:
        """The seconds of one of so many calls with the first images of a file."""
        pixels_BHWC = np.load(pixels, mmap_mode="r")
        # No copy of a few images where a batch is larger than the file.
        batch_BHWC = np.ascontiguousarray(np.resize(pixels_BHWC[:batch], (batch, *pixels_BHWC.shape[1:])))
        begun = time.perf_counter()
        for _ in range(calls):
            self._of_form(batch_BHWC)
        return (time.perf_counter() - begun) / calls

    def logits(self, pixels: str, first: int, last: int, batch: int, out: str) -> None:
        """Write the logits (B, L) for the images `first` to `last` of a file."""
        pixels_BHWC = np.load(pixels, mmap_mode="r")
        parts = [
            self._of_form(np.ascontiguousarray(pixels_BHWC[place : min(place + batch, last)]))
            for place in range(first, last, batch)
        ]
        np.save(out, np.concatenate(parts))

    def _of_form(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        assert self._engine is not None
        return self._engine(pixels_BHWC).logits

    # --- A builder ---------------------------------------------------------------------------------

    def begin(self, checkpoint: str, calibration: str, calibrating: int) -> None:
        """Become a builder of one model's forms (see `build.Builder`)."""
        from vitral.ship.optimize.build import Builder

        self._kept.enter_context(computing_threads(engine_threads()))
        self._builder = Builder(Path(checkpoint), Path(calibration), calibrating)

    def build(self, candidate: dict[str, Any], folder: str, *, int8: bool) -> list[str]:
        return self._builder.build(_candidate(candidate), Path(folder), int8=int8)

    def finish(self, candidate: dict[str, Any], folder: str, out: str, about: str) -> list[str]:
        return self._builder.finish(_candidate(candidate), Path(folder), Path(out), about)

    def hardest(self, candidate: dict[str, Any]) -> list[tuple[str, float]]:
        return self._builder.hardest(_candidate(candidate))


def _candidate(values: dict[str, Any]) -> Candidate:
    return build(Candidate, values)


def _opened(
    folder: Path, candidate: dict[str, Any], options: dict[str, Any], kept: ExitStack
) -> tuple[Engine, tuple[int, int]]:
    """The engine, and the size of the images that it takes."""
    if candidate["library"] == "torch":
        from vitral.ship.optimize.eager import open_eager

        kept.enter_context(computing_threads(engine_threads()))
        return open_eager(folder, _candidate(candidate))
    of = _candidate(candidate)
    assert of.kind is not None
    module, name = (openvino, "model.xml") if of.kind == "openvino" else (onnx, "model.onnx")
    engine, about = module.open_engine(folder, Form(of.kind, {name: ""}, of.precision, options))
    return engine, about.preprocess.img_size


def main() -> None:
    """Answer until the other side leaves."""
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        name, values = json.loads(line)
        try:
            answer = {"value": getattr(worker, name)(**values)}
        except VitralError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a library that this form cannot be built or run with
            text = " ".join(str(error).split())[:300]
            answer = {"error": f"{type(error).__name__}: {text}" if text else type(error).__name__}
        answers.write(f"{json.dumps(answer)}\n")
        answers.flush()


if __name__ == "__main__":
    main()
