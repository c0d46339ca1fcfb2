"""ONNX Runtime runs ``model.onnx``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitral.artifacts.about import About, about_from
from vitral.artifacts.engine import Answers, in_sizes, refuse_overflow, unusable
from vitral.runtime.errors import VitralError
from vitral.runtime.telemetry import import_silently
from vitral.runtime.threads import engine_threads

if TYPE_CHECKING:
    from vitral.artifacts.manifest import Form

METADATA_KEY = "vitral"  # in the file's metadata_props


class OnnxEngine:
    """One session; `session.run` may be called by any thread."""

    def __init__(self, path: Path, form: "Form") -> None:
        onnxruntime = import_silently("onnxruntime")

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = form.options.get("threads") or engine_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise unusable(path, error) from error
        self.name = f"onnxruntime {onnxruntime.__version__}, {form.precision}"
        self.batch_sizes = tuple(form.options.get("batch_sizes", ()))

    @property
    def embedded(self) -> str | None:
        return self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)

    def __call__(self, pixels_BHWC: np.ndarray) -> Answers:
        if self.batch_sizes:
            return refuse_overflow(in_sizes(pixels_BHWC, self.batch_sizes, self._run))
        return refuse_overflow(self._run(pixels_BHWC))

    def _run(self, pixels_BHWC: np.ndarray) -> Answers:
        found = self._session.run(["logits", "probabilities"], {"pixels": pixels_BHWC})
        return Answers(*(np.asarray(answer) for answer in found))


def run_on_picture(path: Path, picture_HWC: np.ndarray) -> list[np.ndarray]:
    """The outputs of a graph that takes any picture: ``image.onnx`` or ``preprocess.onnx``.

    Raises:
        VitralError: if it cannot be used.
    """
    onnxruntime = import_silently("onnxruntime")

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return [np.asarray(output) for output in session.run(None, {"picture": picture_HWC})]
    except Exception as error:
        raise unusable(path, error) from error


def open_engine(folder: Path, form: "Form", *, trusted: bool = False) -> tuple[OnnxEngine, About]:  # noqa: ARG001
    path = folder / form.model_file
    engine = OnnxEngine(path, form)
    return engine, embedded_about(engine.embedded, path)


def embedded_about(text: str | None, path: Path) -> About:
    """The description within a model's file. Raises VitralError if there is none."""
    try:
        return about_from(json.loads(text or ""), str(path))
    except ValueError as error:
        raise VitralError(f"{path} was not written by `vitral export`: it describes no model") from error
