"""`export`: a trained model as an artifact, a folder of forms that other runtimes compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from vitral.artifacts.about import About
from vitral.artifacts.assemble import Draft, assemble
from vitral.artifacts.golden import check_answers, golden_picture
from vitral.artifacts.engine import Answers
from vitral.artifacts.manifest import KINDS, TOLERANCES, Kind, Manifest
from vitral.checkpoints.own import architecture
from vitral.data.image_data import DataSource
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, load
from vitral.inference.engine import ClassifierEngine
from vitral.model.config import Size, height_and_width
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.files import new_folder, refuse_filled
from vitral.runtime.spelling import meant
from vitral.runtime.version import vitral_version
from vitral.ship.export.agreement import Agreement, agreements
from vitral.ship.export.pixels import PixelsModel, exported

# What each form is made with, and opened to be checked.
_LIBRARIES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-image": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "pt2": (),
    "web": ("onnx", "onnxscript", "onnxruntime"),
}
MODEL_ONNX, PREPROCESS_ONNX, IMAGE_ONNX = "model.onnx", "preprocess.onnx", "image.onnx"


@dataclass(frozen=True)
class Exported:
    """An artifact that was written and checked."""

    folder: Path
    manifest: Manifest
    agreements: tuple[Agreement, ...] = ()  # of each form with torch, if held-out images were given


@dataclass(frozen=True)
class ExportOptions:
    """How forms are written."""

    opset: int = 20  # of ONNX
    dynamic_size: bool = False  # images of any height and width that the patch divides
    notes: list[str] = field(default_factory=list)


def export(  # noqa: PLR0913 - a public call, as its users write it
    model: str | PathLike | Classifier,
    out: str | PathLike,
    *,
    to: Sequence[str] = ("onnx",),
    img_size: Size | None = None,
    opset: int = 20,
    dynamic_size: bool = False,
    check: DataSource | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Writes a model as an artifact: forms that other runtimes compute, which check themselves.

    Preprocessing from bytes of pixels on, temperature and probabilities are inside of every form; labels,
    licence and architecture in its metadata. Each form is opened again and must answer as torch does.

    Args:
        model: a run or any checkpoint, or a `Classifier`, which stays as it is.
        out: a new folder; it appears whole, or not at all.
        to: of "onnx", "onnx-image" (any picture's bytes in), "openvino", "pt2" (torch.export) and "web" (a
            page that runs the model); the first is what `open_artifact` prefers.
        img_size: pixels, if other than the model's; positions are resized by its own rule.
        opset: of ONNX's operators, 18 to 23.
        dynamic_size: lets a form take images of any height and width that the patch divides, where that is
            right; not for "web".
        check: labelled images on which each form is compared with torch.
        tell: told what is done.

    Raises:
        VitralError: if the model has no labels, a form cannot be written, or it answers otherwise.
    """
    kinds = _known(to)
    _refuse_missing(kinds)
    out = Path(out)
    refuse_filled(out)
    classifier = _loaded(model, img_size)
    refuse_unfit(classifier)
    name = classifier_name(model)
    module = PixelsModel(classifier)
    reference = replace(
        classifier, model=module.model, placement=Placement(torch.device("cpu"), torch.float32)
    )
    with new_folder(out) as folder:
        tell("tracing the model")
        program = exported(module, classifier.preprocess.img_size, any_size=dynamic_size)
        writer = _Writer(folder, about_of(classifier, name), program, module, opset, dynamic_size)
        drafts = [writer.draft(kind, tell) for kind in kinds]
        tell("opening each form and comparing its answers with torch's")
        engine = ClassifierEngine(reference)
        manifest = assemble(folder, writer.about, drafts, engine)
        if "onnx-image" in kinds:
            check_image_form(folder / IMAGE_ONNX, classifier.preprocess, engine)
        found = agreements(folder, manifest, reference, check, tell) if check is not None else ()
    return Exported(out, manifest, tuple(found))
