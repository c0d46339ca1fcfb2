"""`Asking`: how a model is asked about images, the same wherever it is done."""

import hashlib
from dataclasses import dataclass

from vitral.artifacts.manifest import MANIFEST_FILE, is_artifact, located, sha256
from vitral.artifacts.open import open_artifact
from vitral.artifacts.predictor import Predictor
from vitral.runtime.limits import BATCH, LABELS
from vitral.runtime.ranges import refuse_beyond


@dataclass(frozen=True)
class Asking:
    """A model by its name, and how it is asked; made into a `Predictor` by each process that asks."""

    model: str  # as `vitral.load` takes it
    top: int = 3  # labels for each image
    batch_size: int = 32
    tta: str = "none"
    merge: str | None = None
    device: str = "auto"
    precision: str = "auto"
    trusted: bool = False  # whether an artifact's .pt2 may be opened

    def __post_init__(self) -> None:
        refuse_beyond("top", self.top, LABELS)
        refuse_beyond("batch_size", self.batch_size, BATCH)

    @property
    def needs_torch(self) -> bool:
        """Whether it is more than an artifact as it was exported."""
        as_exported = (self.tta, self.merge, self.device, self.precision) == ("none", None, "auto", "auto")
        return not (is_artifact(self.model) and as_exported)

    def predictor(self) -> Predictor:
        """Open the model.

        Raises:
            VitralError: if there is none, or it has no labels.
        """
        if not self.needs_torch:
            return open_artifact(self.model, trusted=self.trusted)
        from vitral.inference.classifier import load
        from vitral.inference.engine import predictor_of

        classifier = load(
            self.model,
            device=self.device,  # type: ignore[arg-type]  # pyrefly: ignore[bad-argument-type]
            precision=self.precision,  # type: ignore[arg-type]  # pyrefly: ignore[bad-argument-type]
            tta=self.tta,  # type: ignore[arg-type]  # pyrefly: ignore[bad-argument-type]
            merge=self.merge,
            trusted=self.trusted,
        )
        return predictor_of(classifier, self.model)

    def digest(self, predictor: Predictor) -> str:
        """Digest all of a model that decides its answers, to tell later whether it is still the same."""
        about = (predictor.labels, predictor.preprocess, predictor.multi_label, predictor.abstain_below)
        digest = hashlib.sha256(repr(about).encode())
        if is_artifact(self.model):
            digest.update(sha256(located(self.model)[0] / MANIFEST_FILE).encode())
        else:
            _add_weights(digest, predictor)
        return digest.hexdigest()


def _add_weights(digest: "hashlib._Hash", predictor: Predictor) -> None:
    import torch

    from vitral.inference.engine import ClassifierEngine

    assert isinstance(predictor.engine, ClassifierEngine)
    classifier = predictor.engine.classifier
    digest.update(repr((classifier.temperature, type(classifier.model).__name__)).encode())
    digest.update(repr(getattr(classifier.model, "config", None)).encode())
    for name, tensor in classifier.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
