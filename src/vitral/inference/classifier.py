"""`Classifier`: model, preprocessing and labels as one object; what predict, explain and serve all hold."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitral.artifacts.manifest import is_artifact
from vitral.artifacts.open import open_with_about
from vitral.artifacts.prediction import Prediction, likeliest, predicted
from vitral.checkpoints.folder import Checkpoint, load_checkpoint
from vitral.images import notebook
from vitral.images.picture import ImageSource
from vitral.images.preprocess import Preprocess
from vitral.images.reading import as_sequence, batches_ahead
from vitral.inference.activation import log_activation
from vitral.inference.artifact import EngineModule
from vitral.model.config import Size
from vitral.model.merging import Merge
from vitral.model.vit import Features, VisionTransformer
from vitral.runtime.devices import Device, Placement, Precision
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.limits import BATCH, LABELS
from vitral.runtime.ranges import refuse_beyond

# "flip": probabilities are the mean over the image and its mirror.
TestTimeAugmentation = Literal["none", "flip"]


@dataclass(frozen=True)
class Classifier:
    """A trained model that takes images of any kind: paths, bytes, PIL images, arrays and tensors."""

    model: VisionTransformer  # or any module of logits, which gives no features
    preprocess: Preprocess
    labels: tuple[str, ...]
    placement: Placement
    metadata: dict = field(default_factory=dict)
    temperature: float = 1.0  # probabilities are softmax(logits / temperature)
    tta: TestTimeAugmentation = "none"  # what is averaged over, test-time augmentation
    multi_label: bool = False  # an image shows any number of the labels: sigmoid in softmax's place
    notes: tuple[str, ...] = ()  # what no file of the source states, and what was taken

    def __post_init__(self) -> None:
        if self.tta not in get_args(TestTimeAugmentation):
            raise VitralError(
                f"tta={self.tta}: it must be one of {', '.join(get_args(TestTimeAugmentation))}"
            )

    def __repr__(self) -> str:
        return f"<Classifier: {'; '.join(f'{name} {value}' for name, value in self._facts())}>"

    def _repr_html_(self) -> str:
        return notebook.table(self._facts(), title="Classifier")

    def _facts(self) -> list[tuple[str, str]]:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        height, width = self.preprocess.img_size
        shown = ", ".join(self.labels[:3]) + (", ..." if len(self.labels) > 3 else "")
        facts = [
            ("model", f"{type(self.model).__name__}, {parameters:,} parameters"),
            ("images", f"{height}x{width} pixels"),
            ("labels", f"{len(self.labels):,} ({shown})" if self.labels else "none"),
            ("computes on", self.computed_by),
        ]
        if self.multi_label:
            facts.append(("answers", "any number of labels per image"))
        if isinstance(self.model, VisionTransformer) and any(self.model.merge):
            listed = ", ".join(map(str, self.model.merge))
            facts.append(("patches that merge, by layer", listed))
        if self.temperature != 1:
            facts.append(("temperature", f"{self.temperature:.3f}"))
        return facts if self.tta == "none" else [*facts, ("test-time augmentation", self.tta)]

    @property
    def computed_by(self) -> str:
        """The engine of an artifact, or torch's device and precision."""
        return self.model.engine.name if isinstance(self.model, EngineModule) else str(self.placement)

    def predict(
        self, images: ImageSource | Iterable[ImageSource], *, top: int = 5, batch_size: int = 32
    ) -> list[Prediction]:
        """The likeliest labels of each image, in order; an unreadable image gives its error instead.

        A multi-label model too gives the `top` likeliest; those above 0.5 are the ones it says are there.
        """
        return list(self.predictions(as_sequence(images), top=top, batch_size=batch_size))

    def predictions(
        self, images: Iterable[ImageSource], *, top: int = 5, batch_size: int = 32
    ) -> Iterator[Prediction]:
        """As `predict`, one at a time while later images are still being read."""
        refuse_beyond("top", top, LABELS)
        refuse_beyond("batch_size", batch_size, BATCH)
        if self.metadata.get("regression"):
            raise VitralError(
                "this model is a regression, whose numbers are no labels' probabilities; ask for logits"
            )
        if not self.labels:
            raise VitralError("this model has no labels to predict; train it, or ask for features")
        yield from predicted(
            images,
            self.preprocess,
            batch_size,
            lambda tensors: self.log_probabilities(torch.stack(tensors)).exp().cpu().numpy(),
            lambda name, probabilities_L: Prediction(name, likeliest(probabilities_L, self.labels, top)),
        )

    @torch.inference_mode()
    def features(
        self,
        images: ImageSource | Iterable[ImageSource],
        layers: Sequence[int] = (),
        *,
        batch_size: int = 32,
    ) -> Features:
        """The tokens of all images, on the CPU (see `VisionTransformer.features`).

        Raises:
            ImageError: if an image cannot be read.
            VitralError: if the model is another module than ours.
        """
        self.refuse_others("features")
        parts = []
        for images_BCHW in self.batches(images, batch_size):
            with self.placement.autocast():
                parts.append(self.model.features(images_BCHW, layers))
            _refuse_overflow(parts[-1].patch_tokens)
        return _concatenate(parts)

    @torch.inference_mode()
    def logits(self, images: ImageSource | Iterable[ImageSource], *, batch_size: int = 32) -> Tensor:
        """The model's raw answers (B, L), on the CPU: no temperature, no test-time augmentation.

        Raises:
            ImageError: if an image cannot be read.
        """
        parts = [self._logits(batch).cpu() for batch in self.batches(images, batch_size)]
        return torch.cat(parts)

    @torch.inference_mode()
    def log_probabilities(self, images_BCHW: Tensor) -> Tensor:
        """Preprocessed images -> (B, L), the logarithm of what `predict` gives.

        Probabilities are softmax(logits / temperature), or for a multi-label model its sigmoid, each label
        for itself; and their mean over the views of `tta`.
        """
        return self.answers(images_BCHW)[1]

    @torch.inference_mode()
    def answers(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Preprocessed images -> logits (B, L) and `log_probabilities` (B, L), in one pass."""
        images_BCHW = self.placement.put(images_BCHW)
        views = (images_BCHW,) if self.tta == "none" else (images_BCHW, images_BCHW.flip(-1))
        logits = [self._logits(view_BCHW) for view_BCHW in views]
        activation = log_activation(multi_label=self.multi_label)
        answers = [activation(view_BL / self.temperature) for view_BL in logits]
        return logits[0], torch.stack(answers).logsumexp(0) - math.log(len(views))

    def refuse_others(self, what: str) -> None:
        """Raises VitralError if the model is a module of the user's own, whose inside is unknown."""
        if isinstance(self.model, EngineModule):
            raise VitralError(
                f"{what} are of a model, and an artifact gives its answers; take what it was made from"
            )
        if not isinstance(self.model, VisionTransformer):
            name = type(self.model).__name__
            raise VitralError(f"{what} are of Vitral's own models; a {name} gives logits alone")

    def refuse_merged(self, what: str) -> None:
        """Raises VitralError if patches merge in the model, of which `what` would be of fewer."""
        if isinstance(self.model, VisionTransformer) and any(self.model.merge):
            raise VitralError(f"{what} are of every patch, and this model merges some; load it without merge")

    def _logits(self, images_BCHW: Tensor) -> Tensor:
        with self.placement.autocast():
            logits_BL = self.model(images_BCHW).float()
        _refuse_overflow(logits_BL)
        return logits_BL

    def batches(self, images: ImageSource | Iterable[ImageSource], batch_size: int) -> Iterator[Tensor]:
        """Preprocessed images (B, C, H, W), at least one batch, on the model's device."""
        given = False
        for names, loaded in batches_ahead(as_sequence(images), self.preprocess, batch_size):
            for name, item in zip(names, loaded, strict=True):
                if isinstance(item, ImageError):
                    raise ImageError(f"{name}: {item}")
            given = True
            yield self.placement.put(torch.stack([item for item in loaded if isinstance(item, Tensor)]))
        if not given:
            raise VitralError("no images were given")


def load(  # noqa: PLR0913 - whatever a checkpoint leaves open
    source: str | PathLike,
    *,
    model: nn.Module | None = None,
    img_size: Size | None = None,
    num_classes: int | None = None,
    patch_size: int | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    tta: TestTimeAugmentation = "none",
    merge: Merge | None = None,
    trusted: bool = False,
    **options: Any,
) -> Classifier:
    """A `Classifier` from a checkpoint of any known layout, or from an artifact of `export`.

    Args:
        source: a model or run folder, a hub folder of timm or transformers, a file of Google's, torchvision's
            or the authors', or ``hf://org/name[@revision]``; an artifact's folder.
        model: takes the weights of a folder of ours, as those of your own modules need it; it is changed.
        img_size: pixels, if other than the model was trained with; positions are resized by its own rule.
        num_classes: for a fresh, untrained head.
        patch_size: pixels, if other than the model's; the projection is resized (FlexiViT, arXiv:2212.08013).
        device: where to compute.
        precision: of matrix products.
        tta: "flip" averages probabilities over an image and its mirror, at twice the time; not for what
            a mirror changes, such as digits.
        merge: how many of the most similar patches merge in each layer, for speed at a small loss (ToMe,
            arXiv:2210.09461): 8, or "16..0" for 16 in the first layer falling to none in the last, or a
            list of one number a layer. The weights stay as they are.
        trusted: opens an artifact's .pt2 file, which is loaded by pickle and can execute code.
        options: other fields of `ViTConfig`, for what a bare file does not say, such as
            ``num_heads=12`` or ``layer={"feed_forward": {"activation": "quick_gelu"}}``; and
            ``preprocess={"mean": [...]}``, or ``base``, the model of a LoRA adapter that does not name it.

    What no file states, and what is taken for it, is said in a warning.

    Raises:
        VitralError: if there is no usable model there.
    """
    asked = {"model": model, "img_size": img_size, "num_classes": num_classes, "patch_size": patch_size}
    overrides = {name: value for name, value in asked.items() if value is not None}
    if is_artifact(str(source)):
        merging = {} if merge is None else {"merge": merge}
        fixed = {**overrides, **options, **merging, **_placing(device, precision)}
        return artifact_classifier(source, tta, trusted=trusted, asked=fixed)
    checkpoint = load_checkpoint(str(source), **overrides, **options)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    return as_classifier(checkpoint, Placement.choose(device, precision), tta, merge)


def artifact_classifier(
    source: str | PathLike,
    tta: TestTimeAugmentation = "none",
    *,
    trusted: bool = False,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> Classifier:
    """The `Classifier` of an artifact: its engine in the place of the model.

    Args:
        source: the artifact, as `open_artifact` takes it.
        tta: as `load` takes it.
        trusted: as `load` takes it.
        asked: settings of a model that an artifact has not, each of which is refused.

    Raises:
        VitralError: if it cannot be opened, or a setting was asked for.
    """
    if asked:
        raise VitralError(
            f"{source} was exported as it is and computes on the CPU; {next(iter(asked))} cannot be changed: "
            "leave it out, or give the model that it was made from"
        )
    predictor, about = open_with_about(source, trusted=trusted)
    module = EngineModule(predictor.engine, about.preprocess)
    return Classifier(
        module,  # pyrefly: ignore[bad-argument-type] - a module of logits
        about.preprocess,
        about.labels,
        Placement(torch.device("cpu"), torch.float32),
        about.metadata,
        about.temperature,
        tta,
        about.multi_label,
    )


def _placing(device: Device, precision: Precision) -> dict[str, str]:
    """What was asked for beyond the CPU."""
    asked = {"device": device, "precision": precision}
    return {name: value for name, value in asked.items() if value not in ("auto", "cpu")}


def loaded(model: str | PathLike | Classifier) -> Classifier:
    """Give a classifier as it is, and load what is named."""
    return model if isinstance(model, Classifier) else load(model)


def as_classifier(
    checkpoint: Checkpoint,
    placement: Placement,
    tta: TestTimeAugmentation = "none",
    merge: Merge | None = None,
) -> Classifier:
    """What computes as is asked for; the arguments are those of `load`."""
    if merge is not None:
        _merge_tokens(checkpoint.model, merge)
    return Classifier(
        placement.place(checkpoint.model).eval(),
        checkpoint.preprocess,
        checkpoint.labels,
        placement,
        checkpoint.metadata,
        checkpoint.temperature,
        tta,
        checkpoint.multi_label,
        checkpoint.notes,
    )


def _merge_tokens(model: nn.Module, merge: Merge) -> None:
    if not isinstance(model, VisionTransformer):
        name = type(model).__name__
        raise VitralError(f"tokens merge in Vitral's own models only; use the {name} without merge")
    try:
        model.merge_tokens(merge)
    except ValueError as error:
        raise VitralError(str(error)) from error


def _refuse_overflow(answers: Tensor) -> None:
    """Of weights too large to be multiplied: an answer of NaN would be taken for one."""
    if not answers.isfinite().all():
        raise VitralError(
            "the model's outputs are not finite numbers: its weights are damaged, or its training diverged"
        )


def _concatenate(parts: list[Features]) -> Features:
    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.float().cpu() for tensor in tensors])

    def joined_if_any(tensors: list[Tensor | None]) -> Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        return joined(found) if found else None

    return Features(
        class_token=joined_if_any([part.class_token for part in parts]),
        distillation_token=joined_if_any([part.distillation_token for part in parts]),
        register_tokens=joined([part.register_tokens for part in parts]),
        patch_tokens=joined([part.patch_tokens for part in parts]),
        grid=parts[0].grid,
        layers={index: joined([part.layers[index] for part in parts]) for index in parts[0].layers},
    )
