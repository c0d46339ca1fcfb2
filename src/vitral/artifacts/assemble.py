"""Makes an artifact of exported files: each form is opened as users do, and must answer as torch does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vitral.artifacts import golden
from vitral.artifacts.about import About
from vitral.artifacts.engine import Engine
from vitral.artifacts.manifest import (
    TOLERANCES,
    Form,
    FormPrecision,
    Kind,
    Manifest,
    sha256,
    write_manifest,
)
from vitral.artifacts.open import answers_to_golden


@dataclass(frozen=True)
class Draft:
    """A form whose files were written, before it was opened and checked."""

    kind: Kind
    files: Sequence[str]  # names in the artifact's folder; the first is the model
    precision: FormPrecision = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    judged_on: Mapping[str, Any] = field(default_factory=dict)


def assemble(
    folder: Path, about: About, drafts: Sequence[Draft], reference: Engine, extra: Sequence[str] = ()
) -> Manifest:
    """Makes an artifact of the files in `folder`: golden answers, checksums and ``manifest.json``.

    Each form but the page is opened as a user's will be, and its answers are compared with the reference's.

    Args:
        folder: where the files lie.
        about: what is embedded in them.
        drafts: the forms, the one to prefer first.
        reference: the model as torch computes it in float32; of int8 forms the own answers are kept.
        extra: further files of the folder, such as a ledger.

    Raises:
        VitralError: if a form cannot be opened, or answers otherwise than the reference.
    """
    pixels_HWC = golden.write_golden(folder, about.preprocess)
    expected = reference(pixels_HWC[None])
    forms, answers = [], {"torch": expected}
    for draft in drafts:
        form = Form(
            draft.kind,
            {name: sha256(folder / name) for name in draft.files},
            draft.precision,
            dict(draft.options),
            dict(draft.judged_on),
        )
        answers[form.kind] = expected
        if form.kind != "web":  # a browser runs it; its model was run before it went into the page
            runner, found = answers_to_golden(folder, about, form, pixels_HWC)
            if form.precision == "int8":
                answers[form.kind] = found
            else:
                described = f"the form {form.kind}, {runner}"
                golden.compare(found, expected, TOLERANCES[form.precision], described)
        forms.append(form)
    golden.write_answers(folder, answers, about.labels)
    names = (golden.PICTURE, golden.PIXELS, golden.ANSWERS, *extra)
    manifest = Manifest(about, tuple(forms), {name: sha256(folder / name) for name in names}, _versions())
    write_manifest(folder, manifest)
    return manifest


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("vitral", "pillow", "numpy")}
