"""`vitral convert`: a model in another library's layout."""

from pathlib import Path
from typing import Annotated

import typer

from vitral.cli import options
from vitral.cli.console import print_lines, warn
from vitral.runtime import limits

# What another value of a setting comes to, where its name does not say it.
_MEANINGS = {"preprocess.crop_rounding": "a picture may be cut a pixel elsewhere"}


def convert(
    model: options.Model,
    out: Annotated[Path, typer.Argument(parser=options.as_folder, metavar="OUT", help="A new folder.")],
    settings: options.Settings = None,
    to: Annotated[str, options.choice(limits.LAYOUTS)] = "vitral",
    dtype: Annotated[
        str | None, options.choice(limits.DTYPES, ", to store weights in; else as MODEL has them.")
    ] = None,
) -> None:
    """Write MODEL in another library's layout, with a certificate that the answers are the same.

    \b
    vitral convert hf://facebook/dinov2-small dino --to timm
    vitral convert clip.pth clip --to vitral layer.feed_forward.activation=quick_gelu
    """
    from vitral.checkpoints.certificate import CERTIFICATE_FILE
    from vitral.checkpoints.convert import convert as run_conversion
    from vitral.runtime.settings import nested, parse_overrides

    certificate = run_conversion(model, out, to, dtype, **nested(parse_overrides(settings or [])))
    for note in certificate.assumed:
        warn(note)
    for rounded in certificate.rounded:
        meaning = _MEANINGS.get(rounded.partition(":")[0])
        warn(f"{to} has another {rounded}" + (f"; {meaning}" if meaning else ""))
    print_lines(
        f"{out}: {to}'s layout; features and logits differ from those of {certificate.compared_with} by at "
        f"most {certificate.worst:.1e} of the largest"
    )
    licence = certificate.licence or "not stated"
    print_lines(f"certificate: {out / CERTIFICATE_FILE}; licence of the weights: {licence}")
