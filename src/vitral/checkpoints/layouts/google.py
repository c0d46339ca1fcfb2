"""Google's .npz: google-research/vision_transformer (ViT, AugReg, SAM optimizer) and big_vision.

Flax names and axes: kernels are (in, out), those of attention have an axis of heads. big_vision may stack
all layers in one tensor (its scan over layers) and counts its modules from another number.
"""

import re
from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.formats.damage import NUMPY
from vitral.checkpoints.formats.weights import Renamed, Weights
from vitral.checkpoints.layouts import preprocessing
from vitral.checkpoints.layouts.key_table import (
    SAME,
    TRANSPOSED,
    UNBATCHED,
    Row,
    Transform,
    each,
    joined,
    row,
)
from vitral.checkpoints.layouts.labels import assumed_labels
from vitral.checkpoints.layouts.layout import Draft, RawCheckpoint, Reading, Writing, count_layers, square
from vitral.model.config import ViTConfig
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import deep_merge

_CONVOLUTION = each(lambda x: x.permute(3, 2, 0, 1), lambda x: x.permute(2, 3, 1, 0))
_LAYER = "Transformer/encoderblock_{i}"


def _heads_out(num_heads: int) -> Transform:
    """Kernels (D, A, K) of q, k, v."""
    return each(lambda x: x.flatten(1).T, lambda x: x.T.unflatten(1, (num_heads, -1)))


def _heads_in(num_heads: int) -> Transform:
    """The kernel (A, K, D) of the output projection."""
    return each(lambda x: x.flatten(0, 1).T, lambda x: x.T.unflatten(0, (num_heads, -1)))


def _head_bias(num_heads: int) -> Transform:
    return each(lambda x: x.flatten(), lambda x: x.unflatten(0, (num_heads, -1)))


def rows(config: ViTConfig) -> list[Row]:
    """Returns the key table of google-research/vision_transformer; `_renamed` brings big_vision's there."""
    heads, ours = config.num_heads, "layers.{i}"
    return [
        row("embedding.class_token", "cls"),
        row("embedding.positions.table", "Transformer/posembed_input/pos_embedding", UNBATCHED),
        row("embedding.patches.projection.weight", "embedding/kernel", _CONVOLUTION),
        row("embedding.patches.projection.bias", "embedding/bias"),
        *_norm(f"{ours}.attention_norm", f"{_LAYER}/LayerNorm_0"),
        *_attention(f"{ours}.attention", f"{_LAYER}/MultiHeadDotProductAttention_1", heads),
        *_norm(f"{ours}.feed_forward_norm", f"{_LAYER}/LayerNorm_2"),
        *_feed_forward(f"{ours}.feed_forward", f"{_LAYER}/MlpBlock_3"),
        *_norm("norm", "Transformer/encoder_norm"),
        row("attention_pool.query", "MAPHead_0/probe"),
        *_attention("attention_pool", "MAPHead_0/MultiHeadDotProductAttention_0", heads),
        *_norm("attention_pool.norm", "MAPHead_0/LayerNorm_0"),
        *_feed_forward("attention_pool.feed_forward", "MAPHead_0/MlpBlock_0"),
        *_dense("hidden.0", "pre_logits"),
        *_dense("head", "head"),
    ]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [row(f"{ours}.weight", f"{theirs}/scale"), row(f"{ours}.bias", f"{theirs}/bias")]


def _dense(ours: str, theirs: str) -> list[Row]:
    return [row(f"{ours}.weight", f"{theirs}/kernel", TRANSPOSED), row(f"{ours}.bias", f"{theirs}/bias")]


def _feed_forward(ours: str, theirs: str) -> list[Row]:
    return [*_dense(f"{ours}.expand", f"{theirs}/Dense_0"), *_dense(f"{ours}.contract", f"{theirs}/Dense_1")]


def _attention(ours: str, theirs: str, heads: int) -> list[Row]:
    parts = [f"{theirs}/{part}" for part in ("query", "key", "value")]
    return [
        row(f"{ours}.qkv.weight", [f"{p}/kernel" for p in parts], joined(1, 1, 1, then=_heads_out(heads))),
        row(f"{ours}.qkv.bias", [f"{p}/bias" for p in parts], joined(1, 1, 1, then=_head_bias(heads))),
        row(f"{ours}.out.weight", f"{theirs}/out/kernel", _heads_in(heads)),
        row(f"{ours}.out.bias", f"{theirs}/out/bias", SAME),
    ]


# --- Reading -------------------------------------------------------------------------------------


def recognizes(raw: RawCheckpoint) -> bool:
    return raw.weights.path.suffix == NUMPY


def read(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    weights = _renamed(raw.weights)
    del asked
    draft = _draft(raw, weights)
    return Reading(
        draft,
        rows,
        weights,
        preprocessing.google,
        assumed_labels(raw, draft["num_classes"]),
        ignored=r"^opt/(?!target)|^t$|^params/(txt|t|b)(/|$)",
    )


def _draft(raw: RawCheckpoint, weights: Weights) -> Draft:
    needed = ("embedding/kernel", "Transformer/posembed_input/pos_embedding", f"{_LAYER}/LayerNorm_0/scale")
    for name in needed:
        if name.replace("{i}", "0") not in weights:
            raise VitralError(f"{raw.name} has no {name.replace('{i}', '0')}; it is no plain ViT of Google's")
    patch, across, channels, width = weights.shape("embedding/kernel")
    if patch != across:
        raise VitralError(f"{raw.name}: patches are {patch}x{across} pixels; Vitral's are square")
    attention = f"{_LAYER}/MultiHeadDotProductAttention_1".replace("{i}", "0")
    hidden = weights.shape(f"{_LAYER}/MlpBlock_3/Dense_0/kernel".replace("{i}", "0"))[1]
    length, has_class = weights.shape(needed[1])[1], "cls" in weights
    pooling = "map" if "MAPHead_0/probe" in weights else "class" if has_class else "mean"
    return deep_merge(
        {
            "patch_size": patch,
            "in_channels": channels,
            "embed_dim": width,
            "num_layers": count_layers(weights, f"{_LAYER}/LayerNorm_0/scale"),
            "num_heads": weights.shape(f"{attention}/query/kernel")[1],
            "mlp_ratio": hidden / width,
            "num_classes": weights.shape("head/kernel")[1] if "head/kernel" in weights else 0,
            "dropout": 0.0,
            "pooling": pooling,
            # flax's gelu is the tanh approximation unless told otherwise, and neither project tells it.
            "layer": {"feed_forward": {"activation": "gelu_tanh"}},
            # scipy's zoom of order 1, which both projects use.
            "embedding": {"class_token": has_class, "resize": "bilinear_corners"},
            "head": {
                "hidden_dim": weights.shape("pre_logits/kernel")[1]
                if "pre_logits/kernel" in weights
                else None
            },
        },
        _sizes(raw, length, patch, has_class=has_class),
    )


def _sizes(raw: RawCheckpoint, length: int, patch: int, *, has_class: bool) -> Draft:
    # With the class token in the table (ViT), or without (big_vision's later models, FlexiViT).
    for positioned, count in (("all", length - has_class), ("patches", length)):
        side = square(count)
        if side:
            return {"img_size": side * patch, "embedding": {"positioned": positioned}}
    raise VitralError(f"{raw.name}: its {length} positions are no square grid of patches")


def _renamed(weights: Weights) -> Weights:
    """Renames to google-research/vision_transformer's names, each layer a tensor of its own."""
    names: dict[str, str | tuple[str, int]] = {}
    for name in weights:
        plain = re.sub(r"^(opt/target|params/img|params|img)/", "", name)
        plain = re.sub(r"^pos_embedding$", "Transformer/posembed_input/pos_embedding", plain)
        if "/encoderblock/" in plain:
            for layer in range(weights.shape(name)[0]):
                one = plain.replace("/encoderblock/", f"/encoderblock_{layer}/")
                names[_renumbered(one)] = (name, layer)
        else:
            names[plain] = name
    if any("MultiHeadDotProductAttention_0" in name and "encoderblock" in name for name in names):
        names = {_renumbered(name): old for name, old in names.items()}
    return Renamed(weights, names)


_NUMBERS = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


def _renumbered(name: str) -> str:
    """Numbers a layer's modules by order, as the older project does; big_vision does by kind."""
    if "encoderblock" not in name:
        return name
    for theirs, ours in _NUMBERS.items():
        name = name.replace(f"/{theirs}/", f"/{ours}/")
    return name


def write(checkpoint: Checkpoint) -> Writing:
    """Makes ``model.npz`` under google-research/vision_transformer's names."""
    return Writing(rows(checkpoint.model.config), "model.npz", {})
