"""OpenVINO runs ``model.xml``: one compiled model for each size of a batch, for dynamic ones are slower."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitral.artifacts.about import About
from vitral.artifacts.engine import Answers, in_sizes, refuse_overflow, unusable
from vitral.artifacts.engines.onnx import embedded_about
from vitral.runtime.telemetry import import_silently
from vitral.runtime.threads import engine_threads

if TYPE_CHECKING:
    from vitral.artifacts.manifest import Form

METADATA_PATH = ["vitral", "about"]  # in the model's runtime information
BATCH_SIZES = (1, 2, 4, 8)
# What products compute in; the library takes bfloat16 unasked where a processor has it.
_HINTS = {"float32": "f32", "int8": "f32", "bfloat16": "bf16"}


@cache
def _core() -> Any:
    """The library's core, one for the process.

    Each core's plugin takes a stack for signals when it begins, and gives back the one before at its end.
    Of two that overlap, the one that ends last gives back the other's, whose memory is gone: the next signal,
    such as Ctrl-C, is a segmentation fault (openvino 2026.4; docs/log.md, 2026-11-27).
    """
    openvino: Any = import_silently("openvino")
    return openvino.Core()


@dataclass(frozen=True)
class _Compiled:
    """A model for one size of a batch and of images, and what runs several batches at once."""

    model: Any
    queue: Any  # an AsyncInferQueue


class OpenVinoEngine:
    """Compiles a size when it is first asked for.

    With the hint "LATENCY" all threads compute one batch; with "THROUGHPUT" several batches are computed at
    once, by fewer threads each.
    """

    def __init__(self, path: Path, form: "Form") -> None:
        openvino: Any = import_silently("openvino")
        self._openvino, self._core = openvino, _core()
        try:
            self._model = self._core.read_model(path)
        except Exception as error:
            raise unusable(path, error) from error
        hint = form.options.get("hint", "LATENCY")
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[form.precision],
            "INFERENCE_NUM_THREADS": form.options.get("threads") or engine_threads(),
            "ENABLE_CPU_PINNING": False,  # else every process computes on the same cores
            "PERFORMANCE_HINT": hint,
        }
        self._compiled: dict[tuple[int, ...], _Compiled] = {}
        self.name = f"openvino {openvino.__version__.partition('-')[0]}, {form.precision}"
        self.batch_sizes = tuple(form.options.get("batch_sizes", BATCH_SIZES))
        self._at_once = hint == "THROUGHPUT"

    @property
    def embedded(self) -> str | None:
        if not self._model.has_rt_info(METADATA_PATH):
            return None
        return self._model.get_rt_info(METADATA_PATH).astype(str)

    def __call__(self, pixels_BHWC: np.ndarray) -> Answers:
        if self._at_once and len(pixels_BHWC) > 1:
            return refuse_overflow(self._several_at_once(pixels_BHWC))
        return refuse_overflow(in_sizes(pixels_BHWC, self.batch_sizes, self._run))

    def _run(self, pixels_BHWC: np.ndarray) -> Answers:
        found = self._of_size(pixels_BHWC.shape).model({"pixels": pixels_BHWC})
        return Answers(found["logits"].copy(), found["probabilities"].copy())

    def _several_at_once(self, pixels_BHWC: np.ndarray) -> Answers:
        """Shares the images out among the streams, in batches of one size."""
        count, image = len(pixels_BHWC), pixels_BHWC.shape[1:]
        streams = len(self._of_size((self.batch_sizes[0], *image)).queue)
        share = -(-count // streams)
        size = next((size for size in reversed(self.batch_sizes) if size <= share), self.batch_sizes[0])
        queue = self._of_size((size, *image)).queue
        padding = np.zeros((-count % size, *image), pixels_BHWC.dtype)
        padded_BHWC = np.concatenate([pixels_BHWC, padding]) if len(padding) else pixels_BHWC
        parts: dict[int, Answers] = {}

        def keep(request: Any, first: int) -> None:
            logits, probabilities = (
                request.get_tensor(name).data.copy() for name in ("logits", "probabilities")
            )
            parts[first] = Answers(logits, probabilities)

        queue.set_callback(keep)
        for first in range(0, len(padded_BHWC), size):
            queue.start_async({"pixels": padded_BHWC[first : first + size]}, first)
        queue.wait_all()
        rows = [parts[first] for first in range(0, len(padded_BHWC), size)]
        return Answers(*(np.concatenate(answers)[:count] for answers in zip(*rows, strict=True)))

    def _of_size(self, shape: tuple[int, ...]) -> _Compiled:
        if shape not in self._compiled:
            model = self._model.clone()
            model.reshape(list(shape))
            compiled = self._core.compile_model(model, "CPU", self._settings)
            self._compiled[shape] = _Compiled(compiled, self._openvino.AsyncInferQueue(compiled))
        return self._compiled[shape]


def open_engine(folder: Path, form: "Form", *, trusted: bool = False) -> tuple[OpenVinoEngine, About]:  # noqa: ARG001
    path = folder / form.model_file
    engine = OpenVinoEngine(path, form)
    return engine, embedded_about(engine.embedded, path)
