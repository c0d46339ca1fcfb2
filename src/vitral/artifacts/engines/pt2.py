"""torch runs ``model.pt2``, a program of `torch.export`; it is loaded by pickle, so only if it is trusted."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitral.artifacts.about import About
from vitral.artifacts.engine import Answers, refuse_overflow, unusable
from vitral.artifacts.engines.onnx import embedded_about
from vitral.runtime.errors import VitralError

if TYPE_CHECKING:
    from vitral.artifacts.manifest import Form

UNTRUSTED = (
    "a .pt2 file is loaded by pickle and can execute code; if you trust it, say --trust "
    "(in Python trusted=True)"
)
METADATA_FILE = "vitral_about.json"  # among the program's extra files


class Pt2Engine:
    """The exported program, without Vitral's code."""

    batch_sizes: tuple[int, ...] = ()

    def __init__(self, path: Path, form: "Form") -> None:
        import torch

        extra: dict[str, Any] = {METADATA_FILE: ""}
        try:
            program = torch.export.load(path, extra_files=extra)
        except Exception as error:
            raise unusable(path, error) from error
        self._torch, self._module = torch, program.module()
        content = extra[METADATA_FILE]
        self.embedded = content.decode() if isinstance(content, bytes) else content
        self.name = f"torch {torch.__version__.partition('+')[0]} (.pt2), {form.precision}"

    def __call__(self, pixels_BHWC: np.ndarray) -> Answers:
        with self._torch.inference_mode():
            answers = self._module(self._torch.from_numpy(np.ascontiguousarray(pixels_BHWC)))
        return refuse_overflow(Answers(*(answer.numpy() for answer in answers)))


def open_engine(folder: Path, form: "Form", *, trusted: bool = False) -> tuple[Pt2Engine, About]:
    """Raises VitralError unless the file is trusted."""
    if not trusted:
        raise VitralError(UNTRUSTED)
    path = folder / form.model_file
    engine = Pt2Engine(path, form)
    return engine, embedded_about(engine.embedded, path)
