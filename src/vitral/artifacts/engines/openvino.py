"""OpenVINO runs ``model.xml``: one compiled model for each size of a batch, for dynamic ones are slower."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitral.artifacts.about import About
from vitral.artifacts.engine import Answers, in_sizes, refuse_overflow
from vitral.artifacts.engines.onnx import embedded_about
from vitral.runtime.errors import VitralError
from vitral.runtime.threads import cpu_count

if TYPE_CHECKING:
    from vitral.artifacts.manifest import Form

METADATA_PATH = ["vitral", "about"]  # in the model's runtime information
BATCH_SIZES = (1, 2, 4, 8)
# What products compute in; the library takes bfloat16 unasked where a processor has it.
_HINTS = {"float32": "f32", "int8": "f32", "bfloat16": "bf16"}


class OpenVinoEngine:
    """Compiles a size when it is first asked for."""

    def __init__(self, path: Path, form: "Form") -> None:
        import openvino

        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(path)
        except Exception as error:
            raise VitralError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}") from error
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[form.precision],
            "INFERENCE_NUM_THREADS": form.options.get("threads") or cpu_count(),
            "ENABLE_CPU_PINNING": False,  # else every process computes on the same cores
            "PERFORMANCE_HINT": form.options.get("hint", "LATENCY"),
        }
        self._compiled: dict[int, Any] = {}
        self.name = f"openvino {openvino.__version__.partition('-')[0]}, {form.precision}"
        self.batch_sizes = tuple(form.options.get("batch_sizes", BATCH_SIZES))

    @property
    def embedded(self) -> str | None:
        if not self._model.has_rt_info(METADATA_PATH):
            return None
        return self._model.get_rt_info(METADATA_PATH).astype(str)

    def __call__(self, pixels_BHWC: np.ndarray) -> Answers:
        return refuse_overflow(in_sizes(pixels_BHWC, self.batch_sizes, self._run))

    def _run(self, pixels_BHWC: np.ndarray) -> Answers:
        found = self._of_size(pixels_BHWC.shape)({"pixels": pixels_BHWC})
        return Answers(found["logits"].copy(), found["probabilities"].copy())

    def _of_size(self, shape: tuple[int, ...]) -> Any:
        if shape[0] not in self._compiled:
            model = self._model.clone()
            model.reshape(list(shape))
            self._compiled[shape[0]] = self._core.compile_model(model, "CPU", self._settings)
        return self._compiled[shape[0]]


def open_engine(folder: Path, form: "Form", *, trusted: bool = False) -> tuple[OpenVinoEngine, About]:  # noqa: ARG001
    path = folder / form.model_file
    engine = OpenVinoEngine(path, form)
    return engine, embedded_about(engine.embedded, path)
