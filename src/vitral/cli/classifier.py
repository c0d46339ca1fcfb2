"""The classifier that a command's MODEL names, with what is to be said of it."""

from typing import TYPE_CHECKING, Any

from vitral.cli.console import warn

if TYPE_CHECKING:
    from vitral.inference.classifier import Classifier


def load_classifier(
    model: str,
    device: str,
    precision: str,
    tta: str = "none",
    img_size: int | None = None,
    *,
    merge: str | None = None,
    trusted: bool = False,
) -> "Classifier":
    """Load it, and print the notes on how it was read."""
    from vitral.artifacts.manifest import is_artifact
    from vitral.checkpoints.folder import load_checkpoint
    from vitral.inference.classifier import as_classifier, load
    from vitral.runtime.devices import Placement

    if is_artifact(model):
        how: dict[str, Any] = {"device": device, "precision": precision, "tta": tta, "merge": merge}
        return load(model, img_size=img_size, trusted=trusted, **how)
    checkpoint = load_checkpoint(model, **({} if img_size is None else {"img_size": img_size}))
    for note in checkpoint.notes:
        warn(note)
    return as_classifier(checkpoint, Placement.choose(device, precision), tta, merge)  # type: ignore[arg-type]
