"""What each form of an artifact is written with, and which of a model there can be."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch.export import ExportedProgram

from vitral.artifacts.about import About
from vitral.artifacts.assemble import Draft
from vitral.artifacts.engine import Engine
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.limits import OPSETS
from vitral.ship.export import openvino
from vitral.ship.export.pixels import PixelsModel, exported, refuse_one_size
from vitral.ship.export.pt2 import write_pt2

_ONNX = "onnx", "onnxscript", "onnxruntime"
# What each form is written with, and opened to be checked.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "onnx": _ONNX, "onnx-image": _ONNX, "openvino": ("openvino",), "pt2": (), "web": _ONNX,
}  # fmt: skip
_MODEL, _PREPROCESS, _IMAGE = "model.onnx", "preprocess.onnx", "image.onnx"


@dataclass(frozen=True)
class Source:
    """What all forms are written from."""

    classifier: Classifier  # in float32, on the CPU
    about: About
    engine: Engine  # the classifier's answers
    opset: int  # of ONNX
    dynamic_size: bool

    @cached_property
    def program(self) -> ExportedProgram:
        """The graph, traced when a form first asks; the page traces one of its own."""
        height_width = self.classifier.preprocess.img_size
        return exported(PixelsModel(self.classifier), height_width, any_size=self.dynamic_size)


def refuse_forms(kinds: Sequence[str], classifier: Classifier, opset: int, *, dynamic_size: bool) -> None:
    """Raises VitralError if the model cannot be had in one of these forms, before any work is done."""
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise VitralError(f"opset is {opset}; ONNX's operators are written in {OPSETS[0]} to {OPSETS[1]}")
    if not dynamic_size:
        return
    refuse_one_size(classifier.model)
    if "openvino" in kinds and isinstance(classifier.model, VisionTransformer):
        openvino.refuse_any_size(classifier.model)


def write_form(kind: str, folder: Path, source: Source) -> Draft:
    """Writes one form into a folder. Raises VitralError, which names the form, if that cannot be."""
    try:
        return _WRITERS[kind](folder, source)
    except VitralError as error:
        raise VitralError(f"the form {kind} cannot be written: {error}") from error


def _write_onnx(folder: Path, source: Source) -> Draft:
    import onnx

    from vitral.ship.export.onnx import write_onnx
    from vitral.ship.export.picture import picture_model

    files = write_onnx(source.program, folder / _MODEL, source.about.to_json(), source.opset)
    onnx.save(picture_model(source.about.preprocess, source.opset), folder / _PREPROCESS)
    names = [*(file.name for file in files), _PREPROCESS]
    return Draft("onnx", names, options={"opset": source.opset})


def _write_image(folder: Path, source: Source) -> Draft:
    import onnx

    from vitral.ship.export.onnx import merged
    from vitral.ship.export.picture import picture_model

    picture = picture_model(source.about.preprocess, source.opset, batch=True)
    with _one_file(folder, source) as model:
        onnx.save(merged(picture, model, source.about.to_json()), folder / _IMAGE)
    return Draft("onnx-image", [_IMAGE], options={"opset": source.opset})


@contextmanager
def _one_file(folder: Path, source: Source) -> Iterator[Path]:
    """The model as one file of ONNX: the form's, where that was written, else one that goes again.

    Raises:
        VitralError: if one file does not hold the weights.
    """
    from vitral.ship.export.onnx import write_onnx

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = folder / _MODEL
        if not path.exists():
            path = Path(scratch, _MODEL)
            write_onnx(source.program, path, source.about.to_json(), source.opset)
        if path.with_name(f"{_MODEL}.data").exists():
            raise VitralError("its weights are 2 GiB or more, which one file does not hold; export --to onnx")
        yield path


def _write_openvino(folder: Path, source: Source) -> Draft:
    files = openvino.write_openvino(source.program, folder / "model.xml", source.about.to_json())
    return Draft("openvino", [file.name for file in files])


def _write_pt2(folder: Path, source: Source) -> Draft:
    files = write_pt2(source.program, folder / "model.pt2", source.about.to_json())
    return Draft("pt2", [file.name for file in files])


def _write_web(folder: Path, source: Source) -> Draft:
    from vitral.ship.export.web import write_page

    page = write_page(folder, source.classifier, source.about, source.engine, source.opset)
    return Draft("web", [page.name], options={"opset": source.opset})


_WRITERS: dict[str, Callable[[Path, Source], Draft]] = {
    "onnx": _write_onnx, "onnx-image": _write_image, "openvino": _write_openvino, "pt2": _write_pt2,
    "web": _write_web,
}  # fmt: skip
