"""From a model of ours to a folder that transformers loads, as the ``model_type`` nearest to the model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.layouts.key_table import without
from vitral.checkpoints.layouts.layout import Draft, Writing
from vitral.checkpoints.layouts.transformers.families import (
    ACTIVATIONS,
    FAMILIES,
    MULTI_LABEL,
    REGRESSION,
    TOWERS,
    Family,
)
from vitral.checkpoints.layouts.transformers.preprocessing import PREPROCESSOR_FILE, write_preprocessor
from vitral.model.config import ViTConfig, height_and_width
from vitral.model.vit import VisionTransformer

# The kinds whose code computes the same as another's, so that a model goes home to the one that it came from.
_ALIKE = {
    "vit": ("vit_mae", "vit_msn", "deit"),
    "vit_msn": ("vit_mae",),
    "siglip_vision_model": ("ijepa",),
    "beit": ("data2vec-vision",),
    "data2vec-vision": ("beit",),
    "dinov2": ("dinov2_with_registers",),
}
# What of a config is about how it was saved, not about what the model is.
_OF_SAVING = (
    "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "problem_type",
    "num_labels", "_num_labels", "quantization_config",
)  # fmt: skip


def takes_class_and_mean(config: ViTConfig) -> bool:
    """Tells whether the only classifier of the model's kind reads the class token and the patches' mean."""
    kinds = ("dinov2", "dinov2_with_registers")
    return bool(config.num_classes) and config.pooling in ("class", "mean") and _model_type(config) in kinds


def lacks_classifier(config: ViTConfig) -> str | None:
    """Says why the library has no class for the model's head, if so."""
    kind = _model_type(config)
    if not config.num_classes or config.stem:
        return None
    if kind == "dinov3_vit":
        return "it has no classifier for DINOv3's family (rotary positions)"
    if kind == "siglip_vision_model" and config.pooling == "map":
        return "its classifier for SigLIP's family reads the mean of tokens, this one an attention pool"
    if kind == "clip_vision_model" and config.pooling == "class" and config.head.bias:
        return (
            "what it has on CLIP's class token is a projection without a bias, this is a classifier with one"
        )
    return None


def _origin(checkpoint: Checkpoint, kind: str) -> tuple[str, Mapping[str, Any]]:
    """Returns the model_type that the model came from, if its code is as good, and the rest of its config."""
    origin = checkpoint.metadata.get("origin", {}).get("config", {})
    came_from = TOWERS.get(origin.get("model_type"), origin.get("model_type"))
    plain = not checkpoint.model.config.num_classes or came_from != "vit_mae"
    if came_from == kind or (came_from in _ALIKE.get(kind, ()) and plain):
        tower = origin.get("vision_config", origin) if origin.get("model_type") in TOWERS else origin
        return came_from, {name: value for name, value in tower.items() if name not in _OF_SAVING}
    return kind, {}


def _model_type(config: ViTConfig) -> str:
    """Returns the one whose code computes what the model does, or comes nearest."""
    embedding, attention = config.embedding, config.layer.attention
    if attention.rotary is not None:
        return "dinov3_vit"
    if attention.relative_bias != "none" or attention.biases == "qv":
        # Without a head, only data2vec's class has no norm after the layers.
        return "beit" if config.head.norm != "none" else "data2vec-vision"
    if embedding.norm:
        return "clip_vision_model"
    if config.pooling == "map" or (config.pooling == "mean" and not config.num_classes):
        return "siglip_vision_model"
    if embedding.register_tokens:
        return "dinov2_with_registers"
    if config.layer.layer_scale is not None or config.pooling == "class_mean":
        return "dinov2"
    if embedding.distillation_token:
        return "deit"
    if config.pooling == "mean":
        return "ijepa"
    # ViTModel always has the tanh layer that it calls a pooler; ViTMSNModel is the same without.
    return "vit" if config.num_classes or config.head.hidden_dim else "vit_msn"


def write(checkpoint: Checkpoint) -> Writing:
    """Makes a hub folder: config, preprocessing, weights."""
    config = checkpoint.model.config
    kind, known = _origin(checkpoint, _model_type(config))
    family, style = FAMILIES[kind], FAMILIES[kind].style
    with_head = bool(config.num_classes and family.classifier)
    architecture = family.classifier if with_head else family.model
    if config.head.distillation_head:
        architecture += "WithTeacher"
    described = {
        **known,
        "architectures": [architecture],
        "model_type": kind,
        "dtype": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
        **_common(config),
        **style.write(config, kind),
    }
    if checkpoint.multi_label or checkpoint.metadata.get("regression"):
        described["problem_type"] = MULTI_LABEL if checkpoint.multi_label else REGRESSION
    # A head without names is as long all the same; a projection of CLIP's is no classifier.
    numbered = tuple(f"LABEL_{index}" for index in range(config.num_classes)) if config.head.bias else ()
    if labels := checkpoint.labels or numbered:
        described["id2label"] = {str(index): label for index, label in enumerate(labels)}
        described["label2id"] = {label: index for index, label in enumerate(labels)}
    return Writing(
        without(style.rows(config), style.unused(config)),
        "model.safetensors",
        {"config.json": described, PREPROCESSOR_FILE: write_preprocessor(checkpoint.preprocess, kind)},
        family.prefix if with_head else "",
        r"classifier\.|^visual_projection\.",
        _constants(family, checkpoint.model),
    )


def _constants(family: Family, model: VisionTransformer) -> dict[str, Tensor]:
    """Makes tokens that the family's class always has: pre-training's mask token, which begins at 0.

    Without them the library warns that weights are missing and that the model should be trained.
    """
    like = next(model.parameters())
    return {name: like.new_zeros(*shape, model.config.embed_dim) for name, shape in family.tokens.items()}


def _common(config: ViTConfig) -> Draft:
    height, width = height_and_width(config.img_size)
    acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    acts["gelu_tanh"] = "gelu_pytorch_tanh"
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "hidden_act": acts[config.layer.feed_forward.activation],
        "layer_norm_eps": config.norm.eps,
    }
