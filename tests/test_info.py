"""Costs against formulas worked by hand from the paper's equations."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model_weights

from vitral.inference.info import seconds_an_image
from vitral.model import cost as info
from vitral.model.config import ViTConfig
from vitral.model.variants import parse
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement

CHANNELS, PATCH, ROWS, COLUMNS = 3, 4, 5, 7
DIM, LAYERS, HEADS, MLP_RATIO, CLASSES = 44, 3, 11, 1.5, 13
HIDDEN, PATCHES = 66, ROWS * COLUMNS
TOKENS = PATCHES + 1

OPTIONS = {
    "paper": {},
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal_2d": {"position": "sinusoidal_2d"},
    "no positions": {"position": "none"},
    "mean": {"pooling": "mean"},
    "stem": {"stem": (17, 19)},
    "post-norm": {"layer": {"order": "post"}},
    "features": {"num_classes": 0},
    "drop path": {"drop_path": 0.3, "dropout": 0.1},
    "a relative bias a layer": {"layer": {"attention": {"relative_bias": "layer"}}},
    "a shared relative bias": {"layer": {"attention": {"relative_bias": "shared"}}},
    "rotary": {"layer": {"attention": {"rotary": {"kind": "axial"}}}},
    "learned rotary": {"layer": {"attention": {"rotary": {"kind": "mixed"}}}},
    "registers": {"embedding": {"register_tokens": 3}},
    "attention pool": {"pooling": "map", "head": {"norm": "pooled"}},
    "hidden head": {"head": {"hidden_dim": 23}},
    "two heads": {"embedding": {"distillation_token": True}, "head": {"distillation_head": True}},
}


def config(**options: Any) -> ViTConfig:
    sizes: dict[str, Any] = {
        "img_size": (ROWS * PATCH, COLUMNS * PATCH),
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "embed_dim": DIM,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "mlp_ratio": MLP_RATIO,
        "num_classes": CLASSES,
    }
    return ViTConfig(**{**sizes, **options})


def stage(name: str, **options: Any) -> info.Stage:
    [found] = [stage for stage in info.stages(config(**options)) if stage.name == name]
    return found


def linear_flops(tokens: int) -> int:
    """The four linear maps of a layer: q k v, out, and the MLP's two."""
    return 2 * tokens * DIM * 3 * DIM + 2 * tokens * DIM**2 + 4 * tokens * DIM * HIDDEN


def attention_flops(tokens: int) -> int:
    """The products q k^T and weights v."""
    return 4 * tokens**2 * DIM


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stages_leave_no_parameter_out_and_count_none_twice(options: dict[str, Any]) -> None:
    model = VisionTransformer.from_config(config(**options))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(stage.parameters for stage in info.stages(config(**options))) == total


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stages_leave_no_flop_out(options: dict[str, Any]) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = VisionTransformer.from_config(config(**options)).eval()
        images = torch.zeros(1, CHANNELS, ROWS * PATCH, COLUMNS * PATCH)
        model.classify(model.encode(model.embedding(images)))  # all of the last layer too
    assert sum(stage.flops for stage in info.stages(config(**options))) == counter.get_total_flops()


def test_what_attention_knows_of_places_is_a_stage_a_table() -> None:
    layer = {"attention": {"relative_bias": "layer"}}
    relations = [stage for stage in info.stages(config(layer=layer)) if stage.name.startswith("relations")]
    table = ((2 * ROWS - 1) * (2 * COLUMNS - 1) + 3) * HEADS
    assert [relation.parameters for relation in relations] == [table] * LAYERS
    assert relations[0].shape == (HEADS, TOKENS, TOKENS)


def test_stages_come_in_the_order_of_the_forward_pass() -> None:
    assert [stage.name for stage in info.stages(config(stem=(17, 19)))] == [
        "embedding.stem",
        "embedding.patches",
        "embedding.class_token + positions",
        "layers.0",
        "layers.1",
        "layers.2",
        "norm",
        "head",
    ]


def test_stages_that_a_model_lacks_are_not_listed() -> None:
    names = {stage.name for stage in info.stages(config(layer={"order": "post"}, num_classes=0))}
    assert not names & {"embedding.stem", "norm", "head"}


def test_shapes_are_those_of_one_image() -> None:
    shapes = [stage.shape for stage in info.stages(config())]
    tokens = (TOKENS, DIM)
    assert shapes == [(PATCHES, DIM), tokens, *[tokens] * LAYERS, tokens, (CLASSES,)]


def test_class_token_and_positions_are_a_vector_a_token_and_one_more() -> None:
    assert stage("embedding.class_token + positions").parameters == (TOKENS + 1) * DIM
    assert stage("embedding.class_token + positions", position="none").parameters == DIM


def test_flops_of_the_patches() -> None:
    assert stage("embedding.patches").flops == 2 * PATCHES * (CHANNELS * PATCH**2) * DIM


def test_flops_of_a_layer() -> None:
    assert stage("layers.1").flops == linear_flops(TOKENS) + attention_flops(TOKENS)


def test_flops_of_the_head() -> None:
    assert stage("head").flops == 2 * DIM * CLASSES


def test_flops_of_the_stem() -> None:
    pixels = ROWS * PATCH * COLUMNS * PATCH
    first, second = 2 * pixels * 9 * CHANNELS * 17, 2 * (pixels // 4) * 9 * 17 * 19
    assert stage("embedding.stem", stem=(17, 19)).flops == first + second
    assert stage("embedding.patches", stem=(17, 19)).flops == 2 * PATCHES * 19 * DIM


@pytest.mark.parametrize("size", ["B_16", "B_32", "L_16", "L_32"])
def test_flops_are_those_that_torchvision_publishes(size: str) -> None:
    """Torchvision counts a multiplication and its addition as one."""
    published = get_model_weights(f"vit_{size.lower()}")["IMAGENET1K_V1"].meta["_ops"]
    flops = sum(stage.flops for stage in info.stages(parse(f"ViT-{size.replace('_', '/')}")))
    assert flops / 2e9 == pytest.approx(published, abs=1e-3)


def test_looking_at_costs_draws_no_weights() -> None:
    before = torch.random.get_rng_state()
    info.stages(ViTConfig())
    assert torch.equal(torch.random.get_rng_state(), before)


# --- Patch sizes -------------------------------------------------------------------------------------


def costs(**options: Any) -> dict[int, info.PatchCost]:
    return {cost.patch_size: cost for cost in info.patch_costs(config(**options), None)}


def test_patch_sizes_that_divide_the_image_are_compared_and_the_models_own() -> None:
    assert list(costs(img_size=(56, 112))) == [4, 8, 14]


def test_patch_sizes_that_a_stem_cannot_make_are_left_out() -> None:
    assert list(costs(img_size=(56, 112), stem=(17, 19))) == [4, 8]


def test_patch_sizes_that_leave_a_head_no_neighbour_are_left_out() -> None:
    costs = info.patch_costs(parse("Conv+ViT-Pico/4@32"), None)
    assert [cost.patch_size for cost in costs] == [4, 8, 16]


def test_a_smaller_patch_gives_more_tokens() -> None:
    assert [cost.patches for cost in costs(img_size=(56, 112)).values()] == [14 * 28, 7 * 14, 4 * 8]


@pytest.mark.parametrize("size", [4, 8, 14])
def test_cost_splits_into_attention_and_the_linear_rest(size: int) -> None:
    cost = costs(img_size=(56, 112))[size]
    patches = (56 // size) * (112 // size)
    embedding, head = 2 * patches * (CHANNELS * size**2) * DIM, 2 * DIM * CLASSES
    assert cost.attention_flops == LAYERS * attention_flops(patches + 1)
    assert cost.linear_flops == LAYERS * linear_flops(patches + 1) + embedding + head


def test_half_the_patch_costs_sixteen_times_the_attention() -> None:
    mean_pooled = costs(img_size=(56, 112), pooling="mean")
    assert mean_pooled[4].attention_flops == 16 * mean_pooled[8].attention_flops


def test_times_are_measured_only_where_a_clock_is_given() -> None:
    clock = partial(seconds_an_image, placement=Placement.choose("cpu", "float32"), budget_seconds=0.1)
    [timed] = info.patch_costs(config(), clock)
    [untimed] = info.patch_costs(config(), None)
    assert timed.milliseconds is not None
    assert 0 < timed.milliseconds < 1000
    assert untimed.milliseconds is None


def test_merged_patches_cost_less_from_the_next_layer_on() -> None:
    counts = [6 - 2 * index for index in range(LAYERS - 1)] + [0]
    found = [stage for stage in info.stages(config(), counts) if stage.name.startswith("layers.")]
    tokens = [1 + ROWS * COLUMNS - sum(counts[:index]) for index in range(LAYERS + 1)]
    assert [stage.shape for stage in found] == [(after, DIM) for after in tokens[1:]]
    for stage, before, after in zip(found, tokens, tokens[1:], strict=False):
        mlp = 4 * (before - after) * DIM * HIDDEN
        without = linear_flops(before) - mlp + attention_flops(before)
        matching = 2 * (before // 2) * ((before - 1) // 2) * (DIM // HEADS) if after < before else 0
        joining = 2 * ((before - 1) // 2) * (before - after) * DIM
        assert stage.flops == without + matching + joining
    [own] = [cost for cost in info.patch_costs(config(), None, counts) if cost.patch_size == PATCH]
    assert own.attention_flops == sum(attention_flops(count) for count in tokens[:-1])
