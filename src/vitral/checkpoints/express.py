"""What another library's layout can express of a model, and the same function in its terms."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.folder import load_checkpoint
from vitral.checkpoints.layouts.key_table import listing
from vitral.checkpoints.layouts.registry import WRITERS
from vitral.checkpoints.layouts.transformers.write import lacks_classifier, takes_class_and_mean
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

_TABLE = "embedding.positions.table"
# What a target may round: a norm's eps and the kind of GELU change results little, and no loader says them.
_ROUNDED = {"norm.eps", "layer.feed_forward.activation"}
# What a target keeps in its own code, or for training only.
_UNWRITTEN = {
    "dropout", "drop_path", "embedding.resize", "layer.attention.relative_resize",
    "layer.attention.relative_start", "mlp_ratio",
}  # fmt: skip


def refuse_inexpressible(config: ViTConfig, source: str, to: str) -> None:
    """Raises VitralError about what no other library's ViT has, with what can be done."""
    if to == "transformers" and (reason := lacks_classifier(config)):
        raise VitralError(
            f"transformers cannot hold this model: {reason}. timm may: vitral convert {source} OUT --to timm"
        )
    if to == "vitral" or not config.stem:
        return
    raise VitralError(
        f"{to} cannot hold this model: no ViT of {', '.join(WRITERS)} has its convolutional stem "
        f"(Conv+). In Python it is: import vitral; model = vitral.load({source!r}); "
        'model.predict(["photo.jpg"]). For another library train a plain one: '
        "vitral train DATA model=ViT-Ti/16"
    )


@torch.no_grad()
def fold_temperature(checkpoint: Checkpoint) -> Checkpoint:
    """Divides the head by the temperature, of which no foreign layout knows: the probabilities stay."""
    heads = (checkpoint.model.head, checkpoint.model.distillation_head)
    for parameter in (parameter for head in heads if head is not None for parameter in head.parameters()):
        parameter /= checkpoint.temperature
    return replace(checkpoint, temperature=1.0)


def in_terms_of(to: str, checkpoint: Checkpoint) -> Checkpoint:
    """Returns the same function in a layout's terms: positions as its table, a head of its width."""
    model, config = checkpoint.model, checkpoint.model.config
    state = dict(model.state_dict())
    changes: dict[str, Any] = {}
    if config.position in ("sinusoidal", "sinusoidal_2d"):
        positions = model.embedding.positions
        zero = next(model.parameters()).new_zeros(1, 1, config.embed_dim)
        rows, columns = config.grid_size
        prefix, patches = (zero.expand(1, n, -1) for n in (config.num_prefix_tokens, rows * columns))
        state[_TABLE] = torch.cat([positions.of_prefix(prefix), positions(patches)], dim=1)[0]
        changes = {"position": "learned", "embedding": replace(config.embedding, positioned="all")}
    elif config.position == "learned" and config.num_prefix_tokens:
        positioned = _cover(to, config, state)
        if positioned != config.embedding.positioned:
            changes = {"embedding": replace(config.embedding, positioned=positioned)}
    if to == "transformers" and takes_class_and_mean(config):
        # Its classifier reads both; of the one that the head does not read, it takes nothing.
        weight = state["head.weight"]
        halves = [weight, torch.zeros_like(weight)]
        state["head.weight"] = torch.cat(halves if config.pooling == "class" else halves[::-1], dim=1)
        changes["pooling"] = "class_mean"
    if not changes:
        return checkpoint
    with torch.device("meta"):
        adapted = VisionTransformer.from_config(replace(config, **changes)).eval()
    adapted.load_state_dict(state, assign=True)
    return replace(checkpoint, model=adapted)


def _cover(to: str, config: ViTConfig, state: dict[str, Tensor]) -> Literal["all", "class", "patches"]:
    """Changes the table in `state` to cover what a layout's does, and returns what that is."""
    positioned, table = config.embedding.positioned, state[_TABLE]
    if config.embedding.register_tokens:
        if to == "timm" and positioned == "class" and config.class_token:
            # timm's registers stand between; the class token's vector is added to the token itself.
            state["embedding.class_token"] = state["embedding.class_token"] + table[:1]
            state[_TABLE] = table[1:]
            return "patches"
        if to == "transformers" and positioned == "patches" and config.class_token:
            state[_TABLE] = torch.cat([torch.zeros_like(table[:1]), table])
            return "class"
    elif to != "timm" and positioned == "patches":
        state[_TABLE] = torch.cat([table.new_zeros(config.num_prefix_tokens, config.embed_dim), table])
        return "all"
    return positioned


def check_expressed(folder: Path, checkpoint: Checkpoint, to: str) -> tuple[str, ...]:
    """Reads back what was written: the same weights to the bit, and a config with the same meaning.

    Returns what was rounded. Raises VitralError naming the settings that the layout has no place for.
    """
    wanted = checkpoint.model.config
    try:
        read = load_checkpoint(folder, **({"num_heads": wanted.num_heads} if to == "torchvision" else {}))
    except VitralError as error:
        lacking = str(error).rpartition("layout: ")[2]
        raise VitralError(f"{to} cannot hold this model: of its tensors {lacking} there") from error
    again = read.model
    asked, found = dict(_leaves(_meaning(wanted))), dict(_leaves(_meaning(again.config)))
    differing = [name for name in asked if asked[name] != found.get(name) and name not in _UNWRITTEN]
    lost = [f"{name}={asked[name]!r}" for name in differing if name not in _ROUNDED]
    if wanted.hidden_dim != again.config.hidden_dim:
        lost.append(f"an MLP of width {wanted.hidden_dim}")
    if lost:
        raise VitralError(f"{to} cannot hold this model: it has no place for {', '.join(lost)}")
    ours, theirs = checkpoint.model.state_dict(), again.state_dict()
    changed = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    if changed:
        raise VitralError(f"{to} cannot hold this model: {listing(changed)} come back changed")
    rounded = [f"{name}: {asked[name]} -> {found[name]}" for name in differing]
    if read.multi_label != checkpoint.multi_label:
        rounded.append("probabilities: sigmoid -> softmax")
    return (*rounded, *_other_preprocessing(checkpoint.preprocess, read.preprocess))


def _other_preprocessing(wanted: Preprocess, found: Preprocess) -> Iterator[str]:
    """Names what the target does otherwise to an image, or has no file for."""
    for name, value in vars(wanted).items():
        other = vars(found)[name]
        same = np.allclose(value, other) if isinstance(value, tuple | float) else value == other
        if not same:
            yield f"preprocess.{name}: {value} -> {other}"


def _meaning(config: ViTConfig) -> ViTConfig:
    """Returns the config with everything that makes no difference at its default."""
    embedding, head, layer = config.embedding, config.head, config.layer
    as_all = embedding.positioned == "class" and not embedding.register_tokens
    if as_all or not config.num_prefix_tokens or config.position != "learned":
        embedding = replace(embedding, positioned="all")
    if not config.num_prefix_tokens or config.pooling == "class":
        head = replace(head, pool_prefix=False)
    if config.pooling != "map":
        head = replace(head, pool_heads=None, pool_mlp_ratio=None)
    else:
        head = replace(
            head,
            pool_heads=head.pool_heads or config.num_heads,
            pool_mlp_ratio=round(head.pool_mlp_ratio or config.mlp_ratio, 4),
        )
    if not config.num_classes:
        head = replace(head, bias=True)
    scaled = None if layer.layer_scale is None else 1.0
    embedding = replace(embedding, class_token=config.class_token)
    return replace(config, embedding=embedding, head=head, layer=replace(layer, layer_scale=scaled))


def _leaves(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value
