"""What each ``model_type`` stands for: its config says the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitral.checkpoints.layouts.layout import Draft
from vitral.checkpoints.layouts.transformers import clip, dinov2, dinov3, vit
from vitral.checkpoints.layouts.transformers.style import Style
from vitral.runtime.settings import deep_merge


@dataclass(frozen=True)
class Family:
    """What its code fixes."""

    style: Style
    draft: Draft
    model: str = ""  # its class without a head; empty: Vitral does not write this family
    classifier: str = ""  # its class with a head, where there is one
    prefix: str = ""  # before the keys of the encoder, where a head stands beside it
    ignored: str = "(?!)"  # a pattern of keys that are no part of the encoder
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of its config, for what config.json omits
    # Shapes, without the width, of tokens that its class always has, though a model may do without.
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_BICUBIC: Draft = {"embedding": {"resize": "bicubic"}}
_BEIT = deep_merge(
    _BICUBIC,
    {
        "embedding": {"class_token": True},
        "layer": {"attention": {"biases": "qv", "relative_resize": "bilinear"}},
    },
)
_CLIP = deep_merge(_BICUBIC, {"embedding": {"norm": True, "patch_bias": False}, "head": {"bias": False}})
_DINOV3: Draft = {
    "position": "none",
    "layer": {"attention": {"rotary": {"places": "centered", "temperature": 100.0, "halves": True}}},
}
_REGISTERS: Draft = {"embedding": {"resize": "bicubic_antialias", "positioned": "class"}}
_TEXT = r"^(text_model|text_projection|logit_scale|logit_bias)|position_ids$"
_DINOV2_DEFAULTS = {"layer_norm_eps": 1e-6, "mlp_ratio": 4}
_SIGLIP_DEFAULTS = {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "patch_size": 16}

FAMILIES = {
    "vit": Family(vit.STYLE, _BICUBIC, "ViTModel", "ViTForImageClassification", "vit."),
    "deit": Family(
        vit.STYLE, deep_merge(_BICUBIC, {"embedding": {"distillation_token": True}}),
        "DeiTModel", "DeiTForImageClassification", "deit.",
    ),
    "vit_mae": Family(
        vit.STYLE, _BICUBIC, "ViTMAEModel", "ViTForImageClassification", "vit.", r"^decoder\."
    ),
    "vit_msn": Family(
        vit.STYLE, _BICUBIC, "ViTMSNModel", "ViTMSNForImageClassification", "vit.",
        defaults={"layer_norm_eps": 1e-6},
    ),
    "ijepa": Family(
        vit.STYLE, {"pooling": "mean", **_BICUBIC}, "IJepaModel", "IJepaForImageClassification", "ijepa.",
        r"pooler\.",
    ),
    "beit": Family(
        vit.STYLE, _BEIT, "BeitModel", "BeitForImageClassification", "beit.",
        r"^lm_head\.|relative_position_index",
    ),
    "data2vec-vision": Family(
        vit.STYLE, _BEIT, "Data2VecVisionModel", "Data2VecVisionForImageClassification", "data2vec_vision.",
        r"relative_position_index",
    ),
    "dinov2": Family(
        dinov2.STYLE, _BICUBIC, "Dinov2Model", "Dinov2ForImageClassification", "dinov2.",
        defaults=_DINOV2_DEFAULTS,
    ),
    "dinov2_with_registers": Family(
        dinov2.STYLE, _REGISTERS, "Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers.", defaults={**_DINOV2_DEFAULTS, "num_register_tokens": 4},
        tokens={"embeddings.mask_token": (1,), "embeddings.register_tokens": (1, 0)},
    ),
    "dinov3_vit": Family(
        dinov3.STYLE, _DINOV3, "DINOv3ViTModel",
        defaults={"layer_norm_eps": 1e-5, "num_register_tokens": 0, "rope_theta": 100.0},
        tokens={"embeddings.mask_token": (1, 1), "embeddings.register_tokens": (1, 0)},
    ),
    "clip_vision_model": Family(
        clip.STYLE, _CLIP, "CLIPVisionModel", "CLIPVisionModelWithProjection", "vision_model.", _TEXT,
        {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "image_size": 224, "patch_size": 32},
    ),
    "siglip_vision_model": Family(
        clip.STYLE, {"pooling": "map", **_BICUBIC}, "SiglipVisionModel", "", "vision_model.", _TEXT,
        {**_SIGLIP_DEFAULTS, "image_size": 224},
    ),
    "siglip2_vision_model": Family(
        clip.SIGLIP2, {"pooling": "map", "embedding": {"resize": "bilinear_antialias"}}, "", "",
        "vision_model.", _TEXT, {**_SIGLIP_DEFAULTS, "num_patches": 256},
    ),
}  # fmt: skip

# Of the config classes of all families, for what config.json omits.
DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
# Configs of two towers, and the model_type of their vision tower.
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip
# Its `problem_type`s beside one class per image: pipelines take a sigmoid, or the numbers themselves.
MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"
