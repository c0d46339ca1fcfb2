"""How far a written model's answers are from the read one's, asked of the target library itself."""

import hashlib
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from vitral.checkpoints import peers
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.folder import load_checkpoint
from vitral.model.config import ViTConfig, height_and_width
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.version import vitral_version

CERTIFICATE_FILE = "parity.json"
_TOLERANCE = 1e-4  # relative; what float32 sums in another order differ by, with room


@dataclass(frozen=True)
class Certificate:
    """How far the written model's answers are from the read one's."""

    layout: str
    source: str
    compared_with: str  # the library that loaded what was written, and its version
    input_sha256: str
    input_shape: tuple[int, ...]
    features: dict[str, float] | None  # largest absolute and relative difference of tokens
    logits: dict[str, float] | None  # None if the library's class gives none, only tokens
    rounded: tuple[str, ...]  # settings that the target has otherwise
    versions: dict[str, str]
    licence: str | None
    assumed: tuple[str, ...] = ()  # what no file of the source states
    temperature: float = 1.0  # the source's, by which the written head is divided; so are its logits here

    @property
    def worst(self) -> float:
        """Returns the largest relative difference of all that was compared."""
        found = [part["relative"] for part in (self.features, self.logits) if part is not None]
        return math.nan if any(math.isnan(value) for value in found) else max(found)


def certify(
    folder: Path, checkpoint: Checkpoint, source: str, to: str, rounded: tuple[str, ...]
) -> Certificate:
    """Compares the model in `folder`, as its library loads and computes it, with `checkpoint`.

    Raises:
        VitralError: if the library refuses it, or computes something else.
    """
    config = checkpoint.model.config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.in_channels, *height_and_width(config.img_size), generator=generator)
    with torch.inference_mode():
        tokens, logits = _compute(checkpoint.model, images)
        compared_with, their_tokens, their_logits = _compute_there(folder, config, to, images)
    certificate = Certificate(
        to,
        source,
        compared_with,
        hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        tuple(images.shape),
        None if their_tokens is None else _difference(tokens, their_tokens),
        None if their_logits is None else _difference(logits, their_logits),
        rounded,
        {"vitral": vitral_version(), **{name: version(name) for name in ("torch", "numpy", "safetensors")}},
        checkpoint.metadata.get("licence"),
        checkpoint.notes,
    )
    rounds = any(not name.startswith(("preprocess.", "probabilities")) for name in rounded)
    # A difference that is no number is none that may be certified.
    if not certificate.worst <= (1e-2 if rounds else _TOLERANCE):
        raise VitralError(
            f"{to} cannot hold this model: {compared_with} answers otherwise, by {certificate.worst:.1e} of "
            "the largest value"
        )
    return certificate


def _compute(model: VisionTransformer, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Computes tokens and logits in float32, whatever the weights are stored in."""
    stored = next(model.parameters()).dtype
    tokens_BTD = model.float().encode(model.embedding(images_BCHW))
    logits_BL = model.classify(tokens_BTD)
    model.to(stored)
    return tokens_BTD, logits_BL


def _compute_there(
    folder: Path, config: ViTConfig, to: str, images_BCHW: Tensor
) -> tuple[str, Tensor | None, Tensor | None]:
    """Computes them in the library that the layout is named after, or, without it, in Vitral once more."""
    try:
        peer = peers.load(to, folder)
    except Exception as error:  # whatever the library says of what it cannot load
        reason = " ".join(str(error).split())[:300]
        raise VitralError(f"{to} cannot hold this model: its own loader refuses it: {reason}") from error
    if peer is not None:
        peer.model.float()
        return f"{peer.library} {peer.version}", *peer.answer(images_BCHW)
    heads = {"num_heads": config.num_heads} if to == "torchvision" else {}
    again = load_checkpoint(folder, **heads).model
    return f"vitral {vitral_version()}, which read it back", *_compute(again, images_BCHW)


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    absolute = float((ours - theirs).abs().max())
    return {"absolute": absolute, "relative": absolute / max(float(theirs.abs().max()), 1e-12)}
