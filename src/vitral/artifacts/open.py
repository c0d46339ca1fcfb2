"""Opens an artifact: its files are those of the export and it answers as it did, or it is refused."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from vitral.artifacts import golden
from vitral.artifacts.about import About, first_difference
from vitral.artifacts.engine import Answers, Engine
from vitral.artifacts.engines import onnx, openvino, pt2
from vitral.artifacts.manifest import (
    RUN_HERE,
    TOLERANCES,
    Form,
    Kind,
    Manifest,
    located,
    read_manifest,
    sha256,
)
from vitral.artifacts.predictor import Predictor
from vitral.runtime.errors import VitralError
from vitral.runtime.extras import why_not

# Each opens the engine of one kind of form, and gives the `About` that is embedded in its file.
_ENGINES = {"onnx": onnx.open_engine, "openvino": openvino.open_engine, "pt2": pt2.open_engine}


def open_artifact(path: str | PathLike, *, form: str | None = None, trusted: bool = False) -> Predictor:
    """Opens what `vitral export` or `vitral optimize` wrote, and checks that it answers as it did.

    Args:
        path: the artifact's folder, or the model's file of one of its forms, such as ``art/model.onnx``.
        form: "onnx", "openvino" or "pt2"; None: the first that this machine can run.
        trusted: whether to open a .pt2 file, which is loaded by pickle and can execute code.

    Raises:
        VitralError: if a file is missing or changed, no form can be run here, or the golden picture gives
            other pixels, logits, probabilities or labels than at export.
    """
    return open_with_about(path, form=form, trusted=trusted)[0]


def open_with_about(
    path: str | PathLike, *, form: str | None = None, trusted: bool = False
) -> tuple[Predictor, About]:
    """As `open_artifact`; gives what else is known of the model too."""
    folder, file = located(Path(path))
    manifest = read_manifest(folder)
    chosen = _first_that_runs(manifest, form or file, trusted=trusted)
    _check_files(folder, manifest, chosen)
    predictor, _ = _opened(folder, manifest, chosen, trusted=trusted)
    return predictor, manifest.about


def verify_artifact(
    path: str | PathLike, *, trusted: bool = False, tell: Callable[[str, str], None] = lambda *_: None
) -> Manifest:
    """Checks every form of an artifact.

    Args:
        path: the artifact's folder.
        trusted: whether .pt2 files are opened too.
        tell: told the name of each form and what was found.

    Raises:
        VitralError: as `open_artifact`, for the first form that differs.
    """
    folder, _ = located(Path(path))
    manifest = read_manifest(folder)
    for form in manifest.forms:
        _check_files(folder, manifest, form)
        tell(form.kind, _verified(folder, manifest, form, trusted=trusted))
    return manifest


def _verified(folder: Path, manifest: Manifest, form: Form, *, trusted: bool) -> str:
    """Checks a form by running it, where it can be run; gives what was found."""
    about = manifest.about
    if form.kind == "pt2" and not trusted:
        return "its files are those that were exported; not run, for a .pt2 can execute code (--trust)"
    if form.kind == "web":
        return "its files are those that were exported; the page checks its answers itself when it is opened"
    if form.kind == "onnx-image":
        kept = golden.kept_answers(folder, form.kind, about.labels)
        runner, answers = answers_to_golden(folder, about, form, None)
        found = golden.compare(answers, kept, TOLERANCES[form.precision], f"{folder}, form {form.kind}")
        return f"{runner}: {found}"
    predictor, found = _opened(folder, manifest, form, trusted=trusted)
    return f"{predictor.engine.name}: pixels the same, {found}"


def _opened(
    folder: Path, manifest: Manifest, form: Form, *, trusted: bool
) -> tuple[Predictor, golden.Difference]:
    """Runs a form whose files were checked on the golden picture."""
    about = manifest.about
    pixels_HWC = golden.check_pixels(folder, about.preprocess)
    engine = engine_of(folder, about, form, trusted=trusted)
    kept = golden.kept_answers(folder, form.kind, about.labels)
    described = f"{folder}, form {form.kind}"
    found = golden.check_answers(engine, pixels_HWC, kept, TOLERANCES[form.precision], described)
    predictor = Predictor(
        engine, about.preprocess, about.labels, about.multi_label, about.abstain_below, str(folder)
    )
    return predictor, found


def answers_to_golden(
    folder: Path, about: About, form: Form, pixels_HWC: np.ndarray | None
) -> tuple[str, Answers]:
    """Runs a trusted form on the golden picture: the picture itself where it takes that, else its pixels.

    Gives what ran it too.

    Raises:
        VitralError: as `engine_of`.
    """
    if form.kind == "onnx-image":
        found = onnx.run_on_picture(folder / form.model_file, golden.golden_picture())
        return "onnxruntime, the picture as it is", Answers(*found)
    assert pixels_HWC is not None
    engine = engine_of(folder, about, form, trusted=True)
    return engine.name, engine(pixels_HWC[None])


def engine_of(folder: Path, about: About, form: Form, *, trusted: bool = False) -> Engine:
    """Opens the engine of a form.

    Raises:
        VitralError: if its library is missing, its file is damaged, or describes another model.
    """
    engine, embedded = _ENGINES[form.kind](folder, form, trusted=trusted)
    if field := first_difference(about, embedded):
        raise VitralError(
            f"{folder}: manifest.json and {form.model_file} describe two models, their {field} differs; "
            "export the model again"
        )
    return engine


def _check_files(folder: Path, manifest: Manifest, form: Form) -> None:
    for name, digest in {**form.files, **manifest.files}.items():
        if sha256(folder / name) != digest:
            raise VitralError(
                f"{folder / name} was changed or damaged after the export: its checksum is another; "
                "copy the artifact again, or export it again"
            )


def _first_that_runs(manifest: Manifest, wanted: str | None, *, trusted: bool) -> Form:
    if wanted is not None:
        chosen = manifest.form(wanted)
        if why_not := _why_not(chosen.kind, trusted=trusted):
            raise VitralError(why_not)
        return chosen
    reasons = {form.kind: _why_not(form.kind, trusted=trusted) for form in manifest.forms}
    for form in manifest.forms:
        if reasons[form.kind] is None:
            return form
    raise VitralError(
        f"no form of this artifact can be run here: {'; '.join(filter(None, reasons.values()))}"
    )


def _why_not(kind: Kind, *, trusted: bool) -> str | None:
    """Why a form cannot be run here; None if it can."""
    if kind not in RUN_HERE:
        return f"{kind} is for other runtimes (export with --to {RUN_HERE[1]} too)"
    if kind == "pt2" and not trusted:
        return pt2.UNTRUSTED
    library = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "torch"}[kind]
    return why_not(kind, [library], "export")
