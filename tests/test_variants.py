"""Named sizes against published counts and timm, and what a name may say."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vitral.model import variants
from vitral.model.config import AttentionOptions, LayerOptions, RotaryOptions, ViTConfig
from vitral.model.encoder import EncoderLayer
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

# DeiT (Ti, S), the paper and timm, all with 1000 classes at 224 pixels.
PARAMETERS = {
    "ViT-Ti/16": 5_717_416,
    "ViT-S/16": 22_050_664,
    "ViT-B/32": 88_224_232,
    "ViT-B/16": 86_567_656,
    "ViT-L/16": 304_326_632,
    "ViT-H/14": 632_045_800,
}

TIMM = {
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-S/32": "vit_small_patch32_224",
    "ViT-B/8": "vit_base_patch8_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-B/32": "vit_base_patch32_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-L/32": "vit_large_patch32_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
}


def weightless(name: str, **overrides: Any) -> VisionTransformer:
    with torch.device("meta"):
        return variants.create(name, **overrides)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """Without axes of one, as timm's position table has a batch axis."""
    return sorted(tuple(n for n in p.shape if n > 1) for p in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items(), ids=PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    assert count(weightless(name)) == parameters


@pytest.mark.parametrize(("ours", "theirs"), TIMM.items(), ids=TIMM)
def test_sizes_are_timms(ours: str, theirs: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        reference = timm.create_model(theirs, num_classes=1000)
    model = weightless(ours)
    assert shapes(model) == shapes(reference)
    layer = model.layers[0]
    assert isinstance(layer, EncoderLayer)
    assert layer.attention.num_heads == reference.blocks[0].attn.num_heads


def test_every_published_size_is_compared_with_timm() -> None:
    assert set(variants.PUBLISHED) == set(TIMM)


@pytest.mark.parametrize("name", variants.names())
def test_every_listed_name_gives_a_classifier_of_224_pixels(name: str) -> None:
    images = torch.empty(2, 3, 224, 224, device="meta")
    assert weightless(name)(images).shape == (2, 1000)


def test_pico_is_four_layers_of_width_128() -> None:
    width, hidden, classes = 128, 256, 10
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * hidden + hidden + hidden * width + width
    layer = attention + mlp + 4 * width
    patches, positions = 3 * 4 * 4 * width + width, (8 * 8 + 1) * width
    total = patches + width + positions + 4 * layer + 2 * width + classes * (width + 1)
    assert count(weightless("ViT-Pico/4@32", num_classes=classes)) == total


def test_overrides_change_the_classes_and_the_positions() -> None:
    model = weightless("ViT-B/16", num_classes=10, img_size=384)
    assert model.config.grid_size == (24, 24)
    more_positions, fewer_classes = (24 * 24 - 14 * 14) * 768, (1000 - 10) * (768 + 1)
    assert count(model) == PARAMETERS["ViT-B/16"] + more_positions - fewer_classes


def test_an_override_wins_over_the_name() -> None:
    model = weightless("ViT-Ti/16@384", img_size=(32, 48), patch_size=8, drop_path=0.1, pooling="mean")
    assert model.config == ViTConfig((32, 48), 8, 3, 192, 12, 3, drop_path=0.1, pooling="mean")


# A user's two ways from a name and overrides to a config.
WAYS = pytest.mark.parametrize(
    "changed",
    [
        lambda name, **overrides: weightless(name, **overrides).config,
        lambda name, **overrides: variants.configure(name, overrides),
    ],
    ids=["create", "configure"],
)
Way = Callable[..., ViTConfig]
HYBRID = "Conv+ViT-Pico/4@32"


def with_attention(config: ViTConfig, **fields: Any) -> ViTConfig:
    attention = replace(config.layer.attention, **fields)
    return replace(config, layer=replace(config.layer, attention=attention))


@WAYS
def test_an_override_within_a_group_leaves_the_rest_as_the_variant_has_it(changed: Way) -> None:
    hybrid = variants.parse(HYBRID)
    started = changed(HYBRID, layer={"attention": {"relative_start": "zero"}})
    assert started == with_attention(hybrid, relative_start="zero")
    assert started.layer.attention.relative_bias == "layer"
    scaled = changed(HYBRID, layer={"layer_scale": 0.1})
    assert scaled == replace(hybrid, layer=replace(hybrid.layer, layer_scale=0.1))
    resized = changed(HYBRID, embedding={"resize": "bilinear"})
    assert resized == replace(hybrid, embedding=replace(hybrid.embedding, resize="bilinear"))


@WAYS
def test_options_as_a_whole_replace_the_variants(changed: Way) -> None:
    hybrid = variants.parse(HYBRID)
    bare = replace(hybrid, layer=LayerOptions())
    assert changed(HYBRID, layer=LayerOptions()) == bare
    assert changed(HYBRID, layer={"attention": AttentionOptions()}) == bare


@WAYS
def test_rotary_positions_come_by_what_differs_from_the_usual(changed: Way) -> None:
    rotary = {"temperature": 100.0, "reference_grid": [16, 16]}
    expected = with_attention(
        variants.parse(HYBRID),
        relative_bias="none",
        rotary=RotaryOptions(temperature=100, reference_grid=(16, 16)),
    )
    assert changed(HYBRID, layer={"attention": {"relative_bias": "none", "rotary": rotary}}) == expected


def test_an_unknown_override_within_a_group_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="AttentionOptions has no 'depth'; it has biases, out_bias"):
        weightless(HYBRID, layer={"attention": {"depth": 3}})


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"img_sise": 64}, "there is no setting 'img_sise'; did you mean 'img_size'?"),
        (
            {"layer": {"atention": {}}},
            "there is no setting 'layer.atention'; did you mean 'layer.attention'?",
        ),
        (
            {"layer": {"attention": {"rotary": {"ofset": 1}}}},
            "there is no setting 'layer.attention.rotary.ofset'; did you mean 'layer.attention.rotary.offset",
        ),
        (
            {"layer": {"attention": {"relative_start": "far"}}},
            "layer.attention.relative_start='far': input should be 'zero' or 'local'",
        ),
        ({"layer": {"layer_scale": {"a": 1}}}, "layer.layer_scale={'a': 1}: input should be a valid number"),
        ({"layer": 3}, "layer=3: input should be a dictionary or an instance of LayerOptions"),
        ({"img_size": 30}, "img_size is 30x30, which patch_size 4 does not divide"),
    ],
    ids=str,
)
def test_an_override_that_cannot_be_used_is_named_as_it_was_written(
    overrides: dict[str, Any], text: str
) -> None:
    with pytest.raises(VitralError, match="^" + re.escape(f"{HYBRID}: {text}")):
        variants.configure(HYBRID, overrides)


@pytest.mark.parametrize("override", ["classes", "image_size", "depth"])
def test_an_unknown_override_is_refused_by_name(override: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{override}'"):
        weightless("ViT-Ti/16", **{override: 10})


@pytest.mark.parametrize(
    ("name", "patch_size", "img_size"),
    [
        ("ViT-B/16", 16, (224, 224)),
        ("ViT-B/16@384", 16, (384, 384)),
        ("ViT-B/16@32x48", 16, (32, 48)),
        ("ViT-B/7@21x35", 7, (21, 35)),
        ("Conv+ViT-B/8@32x48", 8, (32, 48)),
    ],
)
def test_a_name_says_patch_and_image_size(name: str, patch_size: int, img_size: tuple[int, int]) -> None:
    config = variants.parse(name)
    assert (config.patch_size, config.img_size) == (patch_size, img_size)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("ViT-Pico/4", ()),
        ("Conv+ViT-Pico/2", (128,)),
        ("Conv+ViT-Pico/4", (64, 128)),
        ("Conv+ViT-Ti/8", (32, 64, 128)),
        ("Conv+ViT-B/32", (16, 16, 32, 64, 128)),
    ],
)
def test_conv_halves_the_image_until_a_patch_is_one_position(name: str, channels: tuple[int, ...]) -> None:
    assert variants.parse(name).stem == channels


def test_a_hybrid_has_the_tokens_of_its_plain_sibling() -> None:
    hybrid = variants.create("Conv+ViT-Pico/4@20x28", num_classes=11, num_layers=1).eval()
    plain = variants.create("ViT-Pico/4@20x28", num_classes=11, num_layers=1).eval()
    images = torch.randn(2, 3, 20, 28)
    assert hybrid.embedding(images).shape == plain.embedding(images).shape == (2, 36, 128)
    assert hybrid(images).shape == (2, 11)
    assert hybrid.embedding.patches.patch_size == 1


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("ViT-b/16", "ViT-B/16"),
        ("vit-l/32", "ViT-L/32"),
        ("ViT-B16", "ViT-B/16"),
        ("VIT_S_16", "ViT-S/16"),
        ("ViT-Tiny/16", "ViT-Ti/16"),
        ("ViT-Huge/14", "ViT-H/14"),
        ("ViT-B/16@big", "ViT-B/16"),
        ("ViT-B/16@224x", "ViT-B/16"),
        ("ViT-B/16 ", "ViT-B/16"),
        ("conv-vit-pico/4", "Conv+ViT-Pico/4"),
    ],
)
def test_a_misspelt_name_is_answered_by_the_nearest(misspelt: str, meant: str) -> None:
    answer = f"there is no model {misspelt!r}; did you mean {meant!r}? Known: ViT-Ti/16, ViT-S/16,"
    with pytest.raises(ValueError, match=re.escape(answer)):
        variants.create(misspelt)


@pytest.mark.parametrize("patch_size", [1, 14, 0])
def test_a_hybrids_patch_is_a_power_of_two(patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"patch size is {patch_size}; for a Conv"):
        variants.parse(f"Conv+ViT-B/{patch_size}")


@pytest.mark.parametrize(
    ("name", "text"),
    [("ViT-B/0", "patch_size is 0"), ("ViT-B/16@0", "img_size is"), ("ViT-B/16@100", "does not divide")],
)
def test_a_readable_name_with_useless_numbers_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        weightless(name)
