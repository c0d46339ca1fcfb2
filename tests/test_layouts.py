"""The contract of every family in every layout: their numbers are ours, and ours are theirs.

Each case builds the other library's model tiny and with random weights, norms and scales away from their
initial values, saves it as that library saves it, loads it here, compares tokens and logits at two image
sizes, converts it back, loads that with the library's strict loader and compares again.

A new family is one more line in `TIMM` or `TRANSFORMERS`.
"""

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitral.checkpoints.certificate import Certificate
from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import Checkpoint, load_checkpoint
from vitral.model.vit import VisionTransformer

TOLERANCE = 1e-5  # relative error of features in float32


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if (
                re.search(r"gamma|lambda|norm.*weight|ln_.*weight|layrnorm.weight", name)
                and parameter.ndim <= 1
            ):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim > 1 and name.endswith("weight") and "position" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif name != "rope.freqs":
                parameter.copy_(0.2 * noise)


def pictures(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE


def tokens_of(model: VisionTransformer, images: Tensor) -> Tensor:
    return model.encode(model.embedding(images), model.embedding.grid_of(images))


def certified(source: Path, out: Path, to: str) -> Certificate:
    certificate = convert(str(source), out, to)
    assert certificate.compared_with.startswith(f"{to} ")
    for part in (certificate.features, certificate.logits):
        assert part is None or part["relative"] <= TOLERANCE
    return certificate


def assert_same_bits(ours: Checkpoint, again: Checkpoint) -> None:
    mine, theirs = ours.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- timm ------------------------------------------------------------------------------------------

NARROW = {"embed_dim": 40, "num_heads": 5, "depth": 2}
TIMM: list[tuple[str, dict[str, Any]]] = [
    ("vit_base_patch16_224", {}),
    ("vit_base_patch16_224", {"act_layer": "quick_gelu", "qk_norm": True, "qkv_bias": False}),
    ("vit_base_patch16_224_miil", {}),
    ("vit_base_patch16_gap_224", {}),
    ("vit_base_patch16_clip_224", {"num_classes": 7}),
    ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 7}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_base_patch32_siglip_256", {}),
    ("vit_base_patch16_siglip_gap_224", {}),
    ("vit_small_patch14_dinov2", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_giant_patch14_dinov2", {"mlp_ratio": 5.0}),
    ("vit_giant_patch14_reg1_tipsv2", {"mlp_ratio": 5.0}),
    ("vit_base_patch16_radio_v3", {}),
    ("vit_intern300m_patch14_448", {}),
    ("vit_base_patch16_rpn_224", {}),
    ("vit_pwee_patch16_reg1_gap_256", {}),
    ("vit_base_patch16_xp_224", {}),
    ("vit_so150m_patch16_reg4_map_256", {}),
    ("test_vit3", {}),
    ("test_vit4", {}),
    ("flexivit_small", {}),
    ("aimv2_large_patch14_224", {}),
    ("beit3_base_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("eva_large_patch14_196", {}),
    ("eva_giant_patch14_224", {}),
    ("eva02_tiny_patch14_224", {}),
    ("eva02_base_patch14_224", {}),
    ("eva02_base_patch16_clip_224", {"num_classes": 7}),
    ("eva02_enormous_patch14_clip_224", {"num_classes": 7}),
    ("vit_medium_patch16_rope_reg1_gap_256", {}),
    ("vit_small_patch16_rope_224", {}),
    ("vit_small_patch16_rope_ape_224", {}),
    ("vit_small_patch16_rope_mixed_ape_224", {}),
    ("vit_small_patch16_dinov3", {}),
    ("vit_small_plus_patch16_dinov3_qkvb", {}),
    ("vit_small_patch16_lingbot", {}),
    ("vit_pe_core_small_patch16_384", {"num_classes": 7}),
    ("vit_pe_lang_large_patch14_448", {}),
    ("vit_pe_spatial_small_patch16_512", {}),
    ("beit_base_patch16_224", {}),
]


@pytest.mark.parametrize(("name", "options"), TIMM, ids=[f"{n}{o or ''}" for n, o in TIMM])
def test_timm(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    patch = int(re.search(r"patch(\d+)", name)[1]) if "patch" in name else 16  # pyrefly: ignore
    heads = {"attn_pool_num_heads": 5} if "pe_core" in name else {}
    small, large = (4 * patch, 4 * patch), (6 * patch, 5 * patch)
    theirs = timm.create_model(name, img_size=small, **{**NARROW, **heads, **options}).eval()
    randomize(theirs)
    folder, back = tmp_path / "theirs", tmp_path / "back"
    timm.models.save_for_hf(theirs, folder, safe_serialization=True)
    for size in (small, large):
        if size == large:
            if "radio" in name:
                continue  # its rule is for square grids, then cut
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of their resizing BEiT's tables
                theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()
        ours = load_checkpoint(folder, **({"img_size": size} if size == large else {})).model
        with torch.inference_mode():
            tokens = theirs.forward_features(pictures(size))
            close(tokens_of(ours, pictures(size)), tokens)
            close(ours(pictures(size)), theirs.forward_head(tokens))
    certified(folder, back, "timm")
    assert_same_bits(load_checkpoint(folder), load_checkpoint(back))


# --- transformers ----------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 72,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
TEXT = {
    "hidden_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 9,
}
NAFLEX = {**{k: v for k, v in SMALL.items() if k != "image_size"}, "num_patches": 16}
TRANSFORMERS: list[tuple[str, str, dict[str, Any]]] = [
    ("ViTForImageClassification", "ViTConfig", {"num_labels": 3}),
    ("ViTModel", "ViTConfig", {"qkv_bias": False, "hidden_act": "gelu_new"}),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {"num_labels": 3}),
    ("DeiTForImageClassification", "DeiTConfig", {"num_labels": 3}),
    ("DeiTModel", "DeiTConfig", {}),
    ("Dinov2ForImageClassification", "Dinov2Config", {"num_labels": 3}),
    ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {"num_labels": 3}),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 3}),
    (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4, "key_bias": True}),
    ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 0}),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 8}),
    ("CLIPVisionModel", "CLIPVisionConfig", {"hidden_act": "gelu"}),
    ("CLIPForImageClassification", "CLIPConfig", {"vision_config": SMALL, "num_labels": 3}),
    ("CLIPModel", "CLIPConfig", {"vision_config": SMALL, "text_config": TEXT, "projection_dim": 8}),
    ("SiglipVisionModel", "SiglipVisionConfig", {}),
    ("SiglipForImageClassification", "SiglipConfig", {"vision_config": SMALL, "num_labels": 3}),
    ("SiglipModel", "SiglipConfig", {"vision_config": SMALL, "text_config": TEXT}),
    ("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX),
    ("Siglip2ForImageClassification", "Siglip2Config", {"vision_config": NAFLEX, "num_labels": 3}),
    ("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}),
    ("ViTMAEForPreTraining", "ViTMAEConfig", {"mask_ratio": 0.0, "decoder_num_hidden_layers": 1}),
    ("ViTMSNForImageClassification", "ViTMSNConfig", {"num_labels": 3}),
    ("ViTMSNModel", "ViTMSNConfig", {}),
    ("IJepaForImageClassification", "IJepaConfig", {"num_labels": 3}),
    ("IJepaModel", "IJepaConfig", {}),
    ("BeitForImageClassification", "BeitConfig", {"use_relative_position_bias": True, "num_labels": 3}),
    ("BeitModel", "BeitConfig", {"use_absolute_position_embeddings": True, "use_mean_pooling": False}),
    (
        "BeitForMaskedImageModeling",
        "BeitConfig",
        {"use_shared_relative_position_bias": True, "use_mask_token": True},
    ),
    (
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        {"use_shared_relative_position_bias": True, "num_labels": 3},
    ),
    ("Data2VecVisionModel", "Data2VecVisionConfig", {"use_relative_position_bias": True}),
]
# What no class of transformers' but itself computes, and Vitral does not write.
NOT_BACK = {"CLIPForImageClassification"}


def build(transformers: Any, name: str, config: str, options: dict[str, Any]) -> Any:
    whole = "vision_config" in options or "num_patches" in options
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**({} if whole else SMALL), **options))
    randomize(model)
    return model.eval()


def tower(model: Any) -> Any:
    """The part whose tokens are compared, where a model is more than an image encoder."""
    name = type(model).__name__
    if name in ("CLIPModel", "SiglipModel"):
        return model.vision_model
    if name in ("ViTMAEForPreTraining",):
        return model.vit
    return model.beit if name == "BeitForMaskedImageModeling" else model


def ask(model: Any, images: Tensor) -> Any:
    name = type(model).__name__
    height, width = images.shape[2:]
    if "Siglip2" in name:
        patches = images.unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
        shape = torch.tensor([[height // 7, width // 7]] * 2)
        return model(patches, pixel_attention_mask=torch.ones(patches.shape[:2]).long(), spatial_shapes=shape)
    words: dict[str, Any] = {}
    if "MAE" in name:
        words["noise"] = torch.arange(height * width // 49).float()[None].expand(2, -1)
    if (height, width) != (28, 28) and not re.match("DINO|Dino|Beit|Data2", name):
        words["interpolate_pos_encoding"] = True
    return model(pixel_values=images, **words)


@pytest.mark.parametrize(
    ("name", "config", "options"), TRANSFORMERS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(TRANSFORMERS)]
)
def test_transformers(name: str, config: str, options: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = build(transformers, name, config, options)
        theirs.save_pretrained(tmp_path / "theirs")
    found = load_checkpoint(tmp_path / "theirs")
    for size in ((28, 28), (42, 56)):
        ours = load_checkpoint(tmp_path / "theirs", img_size=size).model
        with torch.inference_mode():
            answer = ask(tower(theirs), pictures(size))
            compare(theirs, answer, ours, size)
            # At run time, without being told the size, the same.
            close(found.model(pictures(size)), ours(pictures(size)))


def final_norm_of(theirs: Any) -> Any:
    """The norm that they apply to what they took from the tokens, or in another module."""
    match type(theirs).__name__:
        case "CLIPModel" | "CLIPVisionModelWithProjection":
            return theirs.vision_model.post_layernorm
        case "CLIPVisionModel":
            return theirs.post_layernorm
        case "BeitForMaskedImageModeling":
            return theirs.layernorm
    return None


def compare(theirs: Any, answer: Any, ours: VisionTransformer, size: tuple[int, int]) -> None:
    name, tokens = type(theirs).__name__, answer.get("last_hidden_state")
    compared = 0
    if tokens is not None:
        norm = final_norm_of(theirs)
        close(tokens_of(ours, pictures(size)), tokens if norm is None else norm(tokens))
        compared += 1
    for key in ("logits", "image_embeds", "pooler_output"):
        if answer.get(key) is not None:
            if answer[key].shape == ours(pictures(size)).shape and name not in ("CLIPModel",):
                close(ours(pictures(size)), answer[key])
                compared += 1
            break
    assert compared


BACK: list[tuple[str, str, dict[str, Any]]] = [case for case in TRANSFORMERS if case[0] not in NOT_BACK]


@pytest.mark.parametrize(
    ("name", "config", "options"), BACK, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BACK)]
)
def test_back_to_transformers(
    name: str, config: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(transformers, name, config, options).save_pretrained(tmp_path / "theirs")
        certified(tmp_path / "theirs", tmp_path / "back", "transformers")
    assert_same_bits(load_checkpoint(tmp_path / "theirs"), load_checkpoint(tmp_path / "back"))
    assert said_on_loading(transformers, tmp_path / "back", caplog) == ""


def said_on_loading(transformers: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What people read who load it as its config says, such as that weights are missing."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    transformers.utils.logging.set_verbosity_warning()
    caplog.clear()
    try:
        getattr(transformers, name).from_pretrained(folder)
    finally:
        logger.removeHandler(caplog.handler)
        transformers.utils.logging.set_verbosity_error()
    return caplog.text
