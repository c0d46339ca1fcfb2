"""`export`: a trained model as an artifact, a folder of forms that other runtimes compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from vitral.artifacts.about import About
from vitral.artifacts.assemble import assemble
from vitral.artifacts.manifest import KINDS, Manifest, is_artifact
from vitral.checkpoints.own import architecture
from vitral.data.columns import Columns
from vitral.data.image_data import DataSource
from vitral.inference.classifier import Classifier, load
from vitral.inference.engine import ClassifierEngine
from vitral.model.config import Size, height_and_width
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.extras import need
from vitral.runtime.files import new_folder, refuse_filled
from vitral.runtime.spelling import meant
from vitral.runtime.version import vitral_version
from vitral.ship.export.agreement import Agreement, agreements
from vitral.ship.export.forms import LIBRARIES, Source, refuse_forms, write_form
from vitral.ship.export.pixels import PixelsModel

# Of a model's metadata: which images were held out. Where its data lies on this machine is nobody's business.
_CARRIED = "val_fraction", "seed", "held_out"


@dataclass(frozen=True)
class Exported:
    """An artifact that was written and checked."""

    folder: Path
    manifest: Manifest
    agreements: tuple[Agreement, ...] = ()  # of each form with torch, if labelled images were given


def export(
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
    """Writes a model as an artifact: forms that other runtimes compute, and what they must answer.

    All from the pixels on is inside of every form: mean and std, the model, temperature, softmax or sigmoid;
    labels, licence and the rest are in its metadata. Each is opened again and must answer as torch does.

    Args:
        model: a run or any checkpoint, or a `Classifier`, which stays as it is.
        out: a new folder; it appears whole, or not at all.
        to: "onnx", "onnx-image" (any decoded picture in), "openvino", "pt2" (torch.export) or "web" (a page
            that runs the model), or several; the first is what `open_artifact` prefers.
        img_size: pixels, if other than the model's; positions are resized by its own rule.
        opset: of ONNX's operators, 18 to 23.
        dynamic_size: lets forms take images of any size that the patch divides, where that is right.
        check: labelled images on which each form is compared with torch.
        tell: told what is done.

    Raises:
        VitralError: if the model has no labels, or a form cannot be written or answers otherwise.
    """
    kinds = _known((to,) if isinstance(to, str) else tuple(to))
    out = Path(out)
    refuse_filled(out)
    classifier = _loaded(model, img_size)
    refuse_without_answers(classifier)
    refuse_forms(kinds, classifier, opset, dynamic_size=dynamic_size)
    reference = in_float32(classifier)
    about = about_of(classifier, name_of(model))
    with new_folder(out) as folder:
        tell("tracing the model")
        source = Source(reference, about, ClassifierEngine(reference), opset, dynamic_size)
        drafts = {}
        for kind in sorted(kinds, key=KINDS.index):  # others are made of the first
            tell(f"writing {kind}")
            drafts[kind] = write_form(kind, folder, source)
        tell("opening each form, to compare its answers with torch's")
        manifest = assemble(folder, about, [drafts[kind] for kind in kinds], source.engine)
        found = () if check is None else agreements(folder, manifest, reference, check, tell)
    return Exported(out, manifest, tuple(found))


def _known(to: tuple[str, ...]) -> tuple[str, ...]:
    """The forms, each once. Raises VitralError if one is unknown or its library is missing."""
    kinds = tuple(dict.fromkeys(to))
    for kind in kinds:
        if kind not in KINDS:
            raise VitralError(f"there is no form {kind!r}; choose of {', '.join(KINDS)}{meant(kind, KINDS)}")
        need(f"the form {kind}", *LIBRARIES[kind], extra="export")
    if not kinds:
        raise VitralError(f"no form was asked for; choose of {', '.join(KINDS)}")
    return kinds


def _loaded(model: str | PathLike | Classifier, img_size: Size | None) -> Classifier:
    if not isinstance(model, Classifier):
        if is_artifact(str(model)):
            raise VitralError(f"{model} is an artifact already; export the model that it was made from")
        return load(model, img_size=img_size, device="cpu", precision="float32")
    own = model.preprocess.img_size
    if img_size is not None and height_and_width(img_size) != own:
        raise VitralError(
            f"this classifier takes {own[0]}x{own[1]} pixels; load it with img_size={img_size}, or export it "
            "by its path"
        )
    return model


def name_of(model: str | PathLike | Classifier) -> str:
    """Give what a model is called: its class, its place on the hub, or its folder's name."""
    if isinstance(model, Classifier):
        return type(model.model).__name__
    return str(model).removeprefix("hf://") if str(model).startswith("hf://") else Path(model).resolve().name


def refuse_without_answers(classifier: Classifier) -> None:
    """Raises VitralError if there is nothing to answer with, or no picture to answer for."""
    if classifier.metadata.get("regression"):
        raise VitralError(
            "this model is a regression, whose numbers are no labels' probabilities, and an artifact answers "
            "with labels; it cannot be exported"
        )
    if not classifier.labels:
        raise VitralError(
            "this model has no labels, and an artifact answers with labels; train it on labelled images first"
        )
    if classifier.tta != "none":
        raise VitralError(
            "an artifact answers for the image as it is; load the model without tta, and ask for it where "
            "the artifact is used (vitral predict ARTIFACT IMAGE --tta flip)"
        )
    if classifier.preprocess.channels not in (1, 3):
        raise VitralError(
            f"the model takes {classifier.preprocess.channels} channels, and an artifact takes pictures, "
            "which have 3, or 1 where they are grey"
        )


def in_float32(classifier: Classifier) -> Classifier:
    """A copy that computes on the CPU, by kernels that every exporter knows; the given one stays as it is."""
    module: Any = PixelsModel.portable(classifier.model)
    return replace(classifier, model=module, placement=Placement(torch.device("cpu"), torch.float32))


def about_of(classifier: Classifier, name: str) -> About:
    """What travels with the weights, inside of each form's file."""
    model, metadata = classifier.model, classifier.metadata
    source = metadata.get("source")
    if source is not None and not str(source).startswith("hf://"):
        source = Path(str(source)).name
    return About(
        name,
        classifier.preprocess,
        classifier.labels,
        classifier.temperature,
        classifier.multi_label,
        architecture=architecture(model) if isinstance(model, VisionTransformer) else {},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        licence=metadata.get("licence"),
        source=source,
        metadata={
            **{name: metadata[name] for name in _CARRIED if name in metadata},
            **replace(Columns.of_metadata(metadata), image_root="").metadata(),
        },
        vitral=vitral_version(),
    )
