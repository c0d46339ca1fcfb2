"""What a benchmark is run on: a model with weights and batch sizes, from the words of the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitral.checkpoints.folder import Checkpoint, is_checkpoint, load_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.model.variants import configure
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.limits import BATCH
from vitral.runtime.settings import build, nested, parse_overrides

# Per benchmark, where the command line names no model: of a size that two cores finish.
_DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("ViT-Ti/4", {"img_size": 32, "num_classes": 10}),
    "infer": ("ViT-S/16", {}),
    "start": ("ViT-B/16", {}),
}
# (on a CPU, on an accelerator)
_BATCH_SIZES = {"train": ((64,), (256,)), "infer": ((1, 8), (1, 256)), "start": ((1,), (1,))}


@dataclass(frozen=True)
class Workload:
    """A model with a head, without dropout, its weights in float32."""

    name: str
    checkpoint: Checkpoint
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Batches:
    """For its check of types."""

    batch_size: int | tuple[int, ...]


def choose_workload(benchmark: str, words: Sequence[str], placement: Placement) -> Workload:
    """Make it from ``["ViT-Ti/4", "img_size=32", "batch_size=[1, 32]"]``; all words may be left out.

    A variant's name gives random weights, none of them zero, so that every bias counts in the
    comparison of results.

    Raises:
        VitralError: if a word cannot be used, or the model has no head.
    """
    named, overrides = _DEFAULTS[benchmark]
    if words and "=" not in words[0]:
        named, overrides, words = words[0], {}, words[1:]
    overrides = {**overrides, **nested(parse_overrides(words))}
    batches = overrides.pop("batch_size", _BATCH_SIZES[benchmark][placement.device.type != "cpu"])
    overrides |= {"dropout": 0.0, "drop_path": 0.0}
    read = load_checkpoint if is_checkpoint(named) else _random
    checkpoint = read(named, **overrides)
    config = checkpoint.model.config
    if not config.num_classes:
        raise VitralError(f"{named} has no head to compare; add num_classes=1000")
    if not checkpoint.labels:
        labels = tuple(f"class {index}" for index in range(config.num_classes))
        checkpoint = replace(checkpoint, labels=labels)
    checkpoint.model.float().eval()
    height, width = config.img_size  # pyrefly: ignore[not-iterable] - ViTConfig makes it a pair
    return Workload(f"{named} at {height}x{width} pixels", checkpoint, _batch_sizes(batches))


def batch_sizes_of(words: Sequence[str]) -> tuple[int, ...]:
    """The batch sizes for an artifact, of which nothing else can be set.

    Raises:
        VitralError: if a word is another setting.
    """
    settings = parse_overrides(words)
    batches = settings.pop("batch_size", (1, 8))
    if settings:
        raise VitralError(
            f"{next(iter(settings))}: an artifact is measured as it was exported; only batch_size can be set"
        )
    return _batch_sizes(batches)


def _batch_sizes(value: Any) -> tuple[int, ...]:
    sizes = build(_Batches, {"batch_size": value}).batch_size
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    low, high = BATCH
    if not sizes or min(sizes) < low or max(sizes) > high:
        raise VitralError(
            f"batch_size={value}: give one number of images or a list, each from {low} to {high:,}"
        )
    return sizes


@torch.no_grad()
def _random(name: str, **overrides: Any) -> Checkpoint:
    config = configure(name, overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer.from_config(config)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    height, width = config.img_size  # pyrefly: ignore[not-iterable] - ViTConfig makes it a pair
    return Checkpoint(model, Preprocess((height, width)), ())
