"""``manifest.json``: which files an artifact has, in which forms, and what they must answer.

`assemble` makes an artifact of exported files, `open` checks and runs it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vitral.artifacts.about import About, about_from
from vitral.runtime.errors import VitralError
from vitral.runtime.files import write_atomically
from vitral.runtime.settings import build

MANIFEST_FILE = "manifest.json"
_VERSION = 1

Kind = Literal["onnx", "onnx-image", "openvino", "pt2", "web"]
FormPrecision = Literal["float32", "bfloat16", "int8"]
KINDS: tuple[str, ...] = get_args(Kind)
_MODEL_SUFFIXES = (".onnx", ".xml", ".pt2", ".html")
# The kinds that Vitral itself answers with; the others are for other runtimes.
RUN_HERE: tuple[Kind, ...] = ("openvino", "onnx", "pt2")
# Of the largest logit: float32 sums in another order; bfloat16 has 8 bits of mantissa. An int8 form is
# compared with its own answers at export, which another processor may round otherwise.
TOLERANCES: dict[str, float] = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 2e-2}


@dataclass(frozen=True)
class Form:
    """One exported form of the model: its files and how they are run."""

    kind: Kind
    files: dict[str, str]  # name -> SHA-256; the first is the model
    precision: FormPrecision = "float32"
    options: dict[str, Any] = field(default_factory=dict)  # of its engine, such as batch_sizes
    judged_on: dict[str, Any] = field(default_factory=dict)  # the machine and engine it was measured on

    @property
    def model_file(self) -> str:
        return next(iter(self.files))


@dataclass(frozen=True)
class Manifest:
    """What an artifact's folder holds."""

    about: About
    forms: tuple[Form, ...]  # the one to prefer first
    files: dict[str, str]  # the golden files and others of no form -> SHA-256
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that exported it

    def form(self, wanted: str) -> Form:
        """Gives a form by its kind or the name of its model's file. Raises VitralError if there is none."""
        found = next((form for form in self.forms if wanted in (form.kind, form.model_file)), None)
        if found is None:
            raise VitralError(f"there is no form {wanted!r}; this artifact has {', '.join(self.kinds)}")
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(form.kind for form in self.forms)


def is_artifact(path: Path | str) -> bool:
    """Tells whether it is an artifact's folder, or the model's file of one of its forms."""
    path = Path(path)
    folder = path.parent if path.suffix in _MODEL_SUFFIXES else path
    return (folder / MANIFEST_FILE).is_file()


def located(path: Path | str) -> tuple[Path, str | None]:
    """Gives the artifact's folder, and the file within it that was named, if one was."""
    path = Path(path)
    return (path.parent, path.name) if path.suffix in _MODEL_SUFFIXES else (path, None)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {"vitral_artifact": _VERSION, **asdict(manifest)}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / MANIFEST_FILE, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads what the folder says it holds; `open_artifact` checks that it does.

    Raises:
        VitralError: if there is no artifact, or its manifest is damaged or of a later version.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise VitralError(
            f"{folder} is no artifact: it has no {MANIFEST_FILE} that can be read; `vitral export` makes one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise VitralError(f"{path} is not JSON: {error}; export the model again") from error
    if not isinstance(content, dict) or content.pop("vitral_artifact", None) != _VERSION:
        raise VitralError(
            f"{path} is of no artifact that this version of Vitral reads; export the model again, or update"
        )
    try:
        about = about_from(content.pop("about"), str(path))
        manifest = build(Manifest, {**content, "about": about})
        for name in [*manifest.files, *(name for form in manifest.forms for name in form.files)]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise VitralError(f"it names a file outside of the artifact, {name!r}")
        return manifest
    except (VitralError, KeyError, TypeError) as error:
        raise VitralError(f"{path} cannot be used: {error}; export the model again") from error


def sha256(path: Path) -> str:
    """Raises VitralError if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VitralError(
            f"{path} is missing or cannot be read ({error.strerror}); export it again"
        ) from error
