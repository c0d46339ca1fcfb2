"""`vitral serve`: a model behind HTTP, with a page to try it."""

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import progress_bar, say, warn
from vitral.cli.tokens import read_tokens
from vitral.runtime import limits
from vitral.runtime.errors import VitralError

if TYPE_CHECKING:
    from vitral.inference.classifier import Classifier
    from vitral.ship.serve.served import Served

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "": 1.0}
_SIZES = {"KiB": 2**10, "kB": 10**3, "MiB": 2**20, "MB": 10**6, "GiB": 2**30, "GB": 10**9, "B": 1, "": 1}
_LEAST_TOKEN = 16  # characters


def _amount(about: str, units: dict[str, float], example: str) -> Any:
    """An option that is a number with a unit."""

    def parsed(text: str) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
        if not found or found[2] not in units or not float(found[1]) > 0:
            raise typer.BadParameter(f"{text!r}: give {example}")
        return float(found[1]) * units[found[2]]

    return typer.Option(parser=parsed, metavar=example.partition(" ")[0], help=about)


def _seconds(about: str) -> Any:
    return _amount(about, _UNITS, "1s or 500ms")


def _bytes(about: str) -> Any:
    return _amount(about, _SIZES, "10MiB or another size above 0")  # type: ignore[arg-type]


def _share_above_0(about: str) -> Any:
    def checked(value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise typer.BadParameter(f"{value:g} is not between 0 and 1")
        return value

    return typer.Option(callback=checked, help=about)


_Model = Annotated[
    str, options.text("MODEL", "A model as `vitral predict` takes it, or an artifact of `vitral export`.")
]
_Host = Annotated[str, options.name("ADDRESS", "Where to listen; beyond this machine a token is needed.")]
_Port = Annotated[int, options.number((0, 65535), "0 takes any that is free.")]
_Name = Annotated[str | None, options.name("NAME", "What the model is called; by default as its folder.")]
_Deadline = Annotated[float, _seconds("An answer that would come later is refused at once.")]
_MaxBatch = Annotated[int, options.number((1, 1024), "Pictures that are computed together.")]
_MaxBody = Annotated[float, _bytes("Largest body of a request.")]
_AbstainBelow = Annotated[
    float | None, _share_above_0("Give no label where the likeliest is less probable than this.")
]
_MaxError = Annotated[
    float | None,
    _share_above_0("Abstain so often that at most this share of the answers is wrong; needs --data."),
]
_Data = Annotated[str | None, options.name("DATA", f"Held-out images for --max-error: {limits.DATA}.")]
_TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File of tokens, one a line; requests must carry one.")
]
_Insecure = Annotated[bool, typer.Option("--insecure", help="Listen to other machines without a token.")]
_Grace = Annotated[float, _seconds("For what is under way when the server is asked to stop.")]
_Log = Annotated[
    bool, typer.Option("--log", help="A line of JSON a request on standard error; no image, no name.")
]
_Form = Annotated[
    str | None, options.name("FORM", "Of an artifact: onnx, openvino or pt2; by default the first that runs.")
]


def serve(  # noqa: PLR0913 - a command's options
    model: _Model,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    name: _Name = None,
    deadline: _Deadline = "1s",  # type: ignore[assignment]
    max_batch: _MaxBatch = 8,
    max_body: _MaxBody = "10MiB",  # type: ignore[assignment]
    abstain_below: _AbstainBelow = None,
    max_error: _MaxError = None,
    data: _Data = None,
    token_file: _TokenFile = None,
    insecure: _Insecure = False,
    grace: _Grace = "30s",  # type: ignore[assignment]
    log: _Log = False,
    form: _Form = None,
    trust: options.Trust = False,
    tta: options.Tta = "none",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Serve MODEL over HTTP: predictions, explanations, metrics, and a page at /.

    Ctrl-C or SIGTERM ends it once what is under way is answered.

    \b
    vitral serve runs/photos
    vitral serve art/ --max-error 0.02 --data photos/
    """
    from vitral.ship.serve.options import ServeOptions
    from vitral.ship.serve.server import serve as run

    tokens = read_tokens(token_file, _LEAST_TOKEN) if token_file else ()
    wanted = ServeOptions(
        host, port, tokens, deadline, max_batch, int(max_body), grace=grace, log=_print_line if log else None
    )
    _refuse_open(wanted.on_loopback, token_file, insecure)
    _refuse_half(abstain_below, max_error, data)
    served = _served(model, name, form, trust, {"tta": tta, "device": device, "precision": precision})
    if max_error is not None and data is not None:
        served = served.abstaining_below(_chosen(served, model, data, max_error, trust))
    elif abstain_below is not None:
        served = served.abstaining_below(abstain_below)
    unfinished = run(served, wanted, listening=lambda address: _greet(address, served, tokens), tell=warn)
    if unfinished:
        raise VitralError(f"{unfinished:,} requests were not finished within --grace {grace:g}s")


def _served(model: str, name: str | None, form: str | None, trust: bool, how: dict[str, str]) -> "Served":
    from vitral.artifacts.manifest import is_artifact
    from vitral.ship.serve.served import served_artifact, served_classifier

    if is_artifact(model):
        asked = [option for option, value in how.items() if value not in ("none", "auto", "cpu")]
        if asked:
            raise VitralError(
                f"{model} was exported as it is; --{asked[0]} is of models that torch computes: leave it out"
            )
        return served_artifact(model, name, form, trusted=trust)
    if form is not None:
        raise VitralError(f"--form is of artifacts, and {model} is none; `vitral export` makes one")
    classifier = load_classifier(model, how["device"], how["precision"], how["tta"])
    return served_classifier(classifier, model, name)


def _chosen(served: "Served", model: str, data: str, max_error: float, trust: bool) -> float:
    """The threshold that held-out images choose; said in a line."""
    from vitral.ship.serve.threshold import threshold_from

    classifier: Classifier = served.classifier or load_classifier(model, "auto", "auto", trusted=trust)
    with progress_bar("choosing when to abstain") as bar:
        found = threshold_from(classifier, data, max_error, warn=warn, on_images=bar)
    say(found.line)
    return found.probability


def _refuse_open(on_loopback: bool, token_file: Path | None, insecure: bool) -> None:
    if not on_loopback and token_file is None and not insecure:
        raise VitralError(
            "other machines would be answered without a token: give --token-file FILE, or --insecure if that "
            "is what you want"
        )


def _refuse_half(abstain_below: float | None, max_error: float | None, data: str | None) -> None:
    if (max_error is None) != (data is None):
        raise VitralError("--max-error and --data go together: the images say where to abstain")
    if max_error is not None and abstain_below is not None:
        raise VitralError("--abstain-below and --max-error both say when to abstain; give one")


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _greet(address: str, served: "Served", tokens: tuple[str, ...]) -> None:
    """Says where it listens, and what to try."""
    predictor = served.predictor
    token = ' -H "Authorization: Bearer $TOKEN"' if tokens else ""
    say(f"{served.name} ({predictor.engine.name}) at {address}; Ctrl-C ends it")
    if predictor.abstain_below is not None:
        say(f"it gives no label below a probability of {predictor.abstain_below:.3g}")
    print(f"  a page to try it:  {address}/")
    header = shlex.quote("Content-Type: image/jpeg")
    print(f"  one picture:       curl{token} -H {header} --data-binary @photo.jpg {address}/v1/predict")
    print(f"  what it is:        curl{token} {address}/v1/model", flush=True)
