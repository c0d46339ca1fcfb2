"""The weights put into their model, at the sizes and with the changes that were asked for."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.layouts.key_table import listing
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig, height_and_width
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.resize import resize_patches
from vitral.model.positions.tables import LearnedPositions
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError, one_line
from vitral.runtime.settings import build, deep_merge

PATCHES = "embedding.patches.projection.weight"


def fill(
    found: Checkpoint, state: dict[str, Tensor], overrides: dict[str, Any], described: str, weights: str
) -> Checkpoint:
    """Completes a checkpoint whose model has no weights yet.

    Args:
        found: what was read, its model from `empty_model`.
        state: the weights, of the shapes that they were saved in.
        overrides: fields of `ViTConfig` to change; patches and positions are resized to fit, and another
            ``num_classes`` gives a fresh head.
        described: what messages call the config.
        weights: what they call the file of weights.

    Raises:
        VitralError: if they do not fit together.
    """
    saved = found.model.config
    if found.preprocess.channels != saved.in_channels:
        raise VitralError(
            f"{described} cannot be used: the mean of its images is of {found.preprocess.channels} channels, "
            f"the model takes {saved.in_channels}"
        )
    _refuse_misfits(found.model, state, described, weights)
    num_classes = overrides.pop("num_classes", None)
    model = _fitted(found.model, state, overrides, described)
    _refuse_misfits(model, state, described, weights)
    model.load_state_dict(state, assign=True)
    # Fixed positions are not in the file; they compute in the type of the weights that are.
    model.requires_grad_().to(next(model.parameters()).dtype)
    found = replace(found, model=model, preprocess=_fitting(found.preprocess, saved, model.config))
    if num_classes is not None:
        model.reset_classifier(num_classes)
        found = replace(found, labels=(), temperature=1.0, multi_label=False)
    if found.labels and len(found.labels) != model.config.num_classes:
        raise VitralError(
            f"{described} cannot be used: it has {len(found.labels)} labels for {saved.num_classes} classes"
        )
    return found


def _fitted(
    model: VisionTransformer, state: dict[str, Tensor], overrides: Mapping[str, Any], described: str
) -> VisionTransformer:
    """Changes the empty model as was asked for, and the sizes of what is in `state` with it."""
    saved = model.config
    try:
        wanted = build(ViTConfig, deep_merge(asdict(saved), overrides))
    except VitralError as error:
        raise VitralError(f"{described} cannot be used: {error}") from error
    if wanted == saved:
        return model
    model = empty_model(described, wanted)
    _resize(state, saved, model, described)
    return model


def empty_model(described: str, architecture: ViTConfig) -> VisionTransformer:
    """Builds a model without memory for its weights. Raises VitralError if there can be no such model."""
    # On the meta device nothing is allocated or drawn that a file then replaces.
    try:
        with torch.device("meta"):
            return VisionTransformer.from_config(architecture).eval()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise VitralError(f"{described} cannot be used: {one_line(error)}") from error


def _fitting(preprocess: Preprocess, saved: ViTConfig, wanted: ViTConfig) -> Preprocess:
    """Changes preprocessing to the model's size if that was changed, or if the patch does not divide it."""
    divides = all(side % wanted.patch_size == 0 for side in preprocess.img_size)
    if wanted.img_size == saved.img_size and divides:
        return preprocess
    return replace(preprocess, img_size=height_and_width(wanted.img_size))


def _resize(state: dict[str, Tensor], saved: ViTConfig, model: VisionTransformer, described: str) -> None:
    """Resizes patches and tables in `state`, of a model like `saved`, to the sizes of `model`."""
    wanted = model.config
    if wanted.patch_size != saved.patch_size:
        if wanted.stem:
            raise VitralError(f"{described}: the patches of a model with a stem cannot be resized")
        state[PATCHES] = resize_patches(state[PATCHES], wanted.patch_size, wanted.embedding.resize)
    if wanted.grid_size == saved.grid_size:
        return
    # Each table resizes itself: filled with what was saved, asked for the new grid.
    old = empty_model(described, replace(saved, embedding=wanted.embedding, layer=wanted.layer))
    for name, module in old.named_modules():
        if isinstance(module, LearnedPositions | RelativeBias):
            module.table = torch.nn.Parameter(state[f"{name}.table"])
            state[f"{name}.table"] = module.resized(wanted.grid_size).detach()


def _refuse_misfits(
    model: VisionTransformer, state: Mapping[str, Tensor], described: str, weights: str
) -> None:
    """Raises VitralError naming each tensor that is missing, of another shape or not the model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not of this model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    if problems:
        raise VitralError(f"{weights} does not fit {described}: {listing(problems)}")


def told(overrides: Mapping[str, Any]) -> str:
    """Lists the overrides that were asked for, for a message."""
    plain = {name: value for name, value in overrides.items() if name not in ("num_classes", "preprocess")}
    asked = ", ".join(f"{name}={value}" for name, value in plain.items())
    return asked and f" with {asked}"
