"""What can be changed of a classifier: one setting at a time, at the values that are usual."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from vitral.checkpoints.layouts.preprocessing import CLIP, IMAGENET
from vitral.images.preprocess import Interpolation, Preprocess, Resize
from vitral.inference.artifact import EngineModule
from vitral.inference.classifier import Classifier
from vitral.model.config import ViTConfig, patch_grid
from vitral.model.encoder import ACTIVATIONS, FeedForward, Gated
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.resize import RESIZE
from vitral.model.positions.tables import LearnedPositions
from vitral.model.vit import VisionTransformer

_NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "of ImageNet": IMAGENET,
    "of CLIP": CLIP,
    "0.5 and 0.5": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "0 and 1 (0..1)": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "0 and 1/255 (0..255)": {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)},
}
_CROP_FRACTIONS = (0.875, 0.9, 0.95, 1.0)
_ACTIVATION_NAMES = ("gelu", "gelu_tanh", "quick_gelu", "silu")
_EPSILONS = (1e-5, 1e-6, 1e-12)


@dataclass(frozen=True)
class Change:
    """One setting at another value: of the preprocessing, the order of channels, or modules' attributes."""

    setting: str
    now: str
    value: str
    preprocess: Preprocess
    bgr: bool = False
    edits: tuple[tuple[Any, str, Any], ...] = ()  # (object, attribute, value) while the model runs
    why_idle: str = "the answers are the same"  # said where it has no effect

    @property
    def view(self) -> Preprocess:
        """What decides the pixels before they are normalized; equal for changes that share them."""
        channels = self.preprocess.channels
        mean = self.preprocess.mean if self.preprocess.resize == "longest" else (0.0,) * channels
        return replace(self.preprocess, mean=mean, std=(1.0,) * channels)

    @contextmanager
    def applied(self) -> Iterator[None]:
        old = [(target, name, getattr(target, name)) for target, name, _ in self.edits]
        try:
            for target, name, value in self.edits:
                setattr(target, name, value)
            yield
        finally:
            for target, name, value in old:
                setattr(target, name, value)


def changes_to_try(classifier: Classifier) -> list[Change]:
    """No change first, then one at a time; of a module of the user's, of the images alone."""
    now, model = classifier.preprocess, classifier.model
    bgr = Change("channel order", "RGB", "BGR", now, bgr=True, why_idle="the images are grey")
    normalizes = isinstance(model, EngineModule)  # in the graph, where no setting reaches
    changes = [
        Change("", "", "", now),
        *(change for change in _preprocess_changes(now) if not (normalizes and change.setting == "mean/std")),
        *([bgr] if now.channels == 3 else []),
    ]
    if not isinstance(getattr(model, "config", None), ViTConfig):
        return changes
    return [
        *changes,
        *_activation_changes(model, now),
        *_epsilon_changes(model, now),
        *_position_changes(model, now),
    ]


def _preprocess_changes(now: Preprocess) -> list[Change]:
    usual: dict[str, dict[str, Any]] = {
        name: {part: (sum(values) / 3,) if now.channels == 1 else values for part, values in fields.items()}
        for name, fields in _NORMALIZATIONS.items()
    }
    known = [name for name, fields in usual.items() if replace(now, **fields) == now]
    normalization = known[0] if known else f"{now.mean} and {now.std}"
    tried: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
        "mean/std": (normalization, usual),
        "crop fraction": (
            f"{now.crop_fraction:g}",
            {f"{f:g}": {"crop_fraction": f} for f in _CROP_FRACTIONS},
        ),
        "interpolation": (
            now.interpolation,
            {name: {"interpolation": name} for name in get_args(Interpolation)},
        ),
        "resize": (now.resize, {name: {"resize": name} for name in get_args(Resize)}),
    }
    return [
        Change(setting, current, value, changed, why_idle="the images come out the same")
        for setting, (current, values) in tried.items()
        for value, fields in values.items()
        if (changed := replace(now, **fields)) != now
    ]


def _activation_changes(model: VisionTransformer, now: Preprocess) -> list[Change]:
    places = [
        part
        for part in model.modules()
        if isinstance(part, FeedForward | Gated) and not isinstance(part.activation, Gated)
    ]
    current = model.config.layer.feed_forward.activation
    return [
        Change("activation", current, name, now, edits=_edits(places, "activation", ACTIVATIONS[name]()))
        for name in _ACTIVATION_NAMES
        if name != current
    ]


def _epsilon_changes(model: VisionTransformer, now: Preprocess) -> list[Change]:
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm | nn.RMSNorm)]
    current = model.config.norm.eps
    return [
        Change("norm eps", f"{current:g}", f"{eps:g}", now, edits=_edits(norms, "eps", eps))
        for eps in _EPSILONS
        if eps != current
    ]


def _position_changes(model: VisionTransformer, now: Preprocess) -> list[Change]:
    """The other rules for tables of positions, or one change without effect that says why there are none."""
    tables = [part for part in model.modules() if isinstance(part, LearnedPositions | RelativeBias)]
    if not tables:
        return [Change("position resize", "-", "-", now, why_idle="the model has no table of positions")]
    current, grid = tables[0].resize, model.config.grid_size
    if patch_grid(now.img_size, model.config.patch_size) == grid:
        why = f"the model runs at the {grid[0]}x{grid[1]} patches of its table as it was loaded"
        return [Change("position resize", current, "-", now, why_idle=why)]
    return [
        Change("position resize", current, rule, now, edits=_edits(tables, "resize", rule))
        for rule in RESIZE
        # The rule for distances, dense around their middle, fits no table of places.
        if rule != current and (rule != "geometric" or isinstance(tables[0], RelativeBias))
    ]


def _edits(parts: Sequence[nn.Module], name: str, value: Any) -> tuple[tuple[nn.Module, str, Any], ...]:
    return tuple((part, name, value) for part in parts)
