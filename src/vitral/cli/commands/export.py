"""`vitral export`: a model as files that other runtimes compute, which check themselves."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.console import print_lines, warn, warnings_as_messages
from vitral.runtime import limits

if TYPE_CHECKING:
    from vitral.ship.export.export import Exported


def _forms(text: str) -> str:
    options.one_of(limits.FORMS)(text.split(","))
    return text


def export(
    model: options.Model,
    out: Annotated[Path, typer.Argument(parser=options.as_folder, metavar="OUT", help="A new folder.")],
    to: Annotated[
        str,
        typer.Option(
            callback=_forms,
            metavar="FORMS",
            help=f"Of {', '.join(limits.FORMS)}; several with commas between.",
        ),
    ] = "onnx",
    img_size: Annotated[
        int | None, options.number(limits.PIXELS, "Pixels of a side, if other than the model's.")
    ] = None,
    opset: Annotated[int, options.number(limits.OPSETS, "Of ONNX's operators.")] = 20,
    dynamic_size: Annotated[
        bool,
        typer.Option(
            "--dynamic-size", help="Images of any size that the patch divides, where that is right."
        ),
    ] = False,
    check: Annotated[
        str | None, options.name("DATA", "Labelled images on which each form is compared with torch.")
    ] = None,
) -> None:
    """Write MODEL as an artifact: files that other runtimes compute, with preprocessing and labels inside.

    Each form is opened again and must answer as torch does, or nothing is written. onnx and openvino are for
    servers, onnx-image takes any decoded picture, pt2 is torch.export's, web is a page that runs the model.

    \b
    vitral export runs/photos photos-art --to onnx,openvino,web --check photos/
    """
    from vitral.ship.export.export import export as run_export

    how: dict[str, Any] = {"img_size": img_size, "opset": opset, "dynamic_size": dynamic_size, "check": check}
    with warnings_as_messages():
        exported = run_export(model, out, to=to.split(","), tell=warn, **how)
    for agreement in exported.agreements:
        print_lines(str(agreement))
    _print_artifact(exported)


def _print_artifact(exported: "Exported") -> None:
    """What was written, and what to do with it."""
    from vitral.artifacts.manifest import RUN_HERE

    folder, manifest = exported.folder, exported.manifest
    for form in manifest.forms:
        sizes = sum((folder / name).stat().st_size for name in form.files)
        print_lines(f"{form.kind}: {', '.join(form.files)}, {sizes / 1e6:.1f} MB")
    licence = manifest.about.licence or "not stated"
    print_lines(f"{folder}: answers as torch does; licence of the weights: {licence}")
    print_lines(f"check it anywhere: vitral verify {folder}")
    runnable = [kind for kind in manifest.kinds if kind in RUN_HERE]
    if runnable:
        trust = " --trust" if runnable == ["pt2"] else ""
        print_lines(f"use it: vitral predict {folder} IMAGE{trust}")
        print_lines(f"serve it: vitral serve {folder}{trust}")
    if "web" in manifest.kinds:
        print_lines(f"open it in a browser: {folder / 'index.html'}")
