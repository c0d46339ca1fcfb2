"""A model folder with the linear probe in the place of its head."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitral.checkpoints.folder import Checkpoint
from vitral.data.image_data import ImageData
from vitral.evaluation.probing.choosing import Choice, temperature_of
from vitral.evaluation.probing.linear import LinearHead
from vitral.inference.classifier import Classifier
from vitral.model.config import Pooling
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.files import refuse_filled


def refuse_unwritable(out: Path, model: VisionTransformer, kind: Pooling, layers: Sequence[int]) -> None:
    refuse_filled(out)
    last = len(model.layers) - 1
    if any(layer % len(model.layers) != last for layer in layers):
        raise VitralError("a model's head stands on its last layer; leave out --out, or take --layer -1")
    if kind == "class_mean" and not isinstance(model.pooled_norm, torch.nn.Identity):
        raise VitralError(
            "this model norms one pooled vector, not two; leave out --out, or take --features class or mean"
        )


def with_head(
    classifier: Classifier,
    head: LinearHead,
    choice: Choice,
    classes: tuple[str, ...],
    metadata: dict[str, Any],
) -> Checkpoint:
    """The model with the probe in the place of its head, whatever stood there."""
    model = copy.deepcopy(classifier.model).cpu()
    config = model.config
    model.config = replace(
        config,
        pooling=choice.features,
        embedding=replace(config.embedding, class_token=config.class_token),
        head=replace(config.head, distillation_head=False),
    )
    if choice.features != "map":
        model.attention_pool = None
    model.reset_classifier(len(classes))
    head.put_into(model)
    return Checkpoint(model, classifier.preprocess, classes, metadata, temperature_of(choice))


def metadata_of(classifier: Classifier, data: ImageData, seed: int) -> dict[str, Any]:
    """As a training run's, so that `vitral eval` finds the images that were held out."""
    carried = {k: v for k, v in classifier.metadata.items() if k in ("source", "licence", "origin")}
    split: dict[str, Any] = {"data": data.source, "val_fraction": 0.2, "seed": seed}
    if data.held_out:
        split["held_out"] = data.split("val").fingerprint
    return {**carried, **split, **data.columns.metadata()}
