"""Tables at another grid, patches of another size, rotary angles: against the functions they imitate."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from vitral.model.config import Grid, Resize, RotaryOptions
from vitral.model.positions.relation import Rotation, rotate
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.resize import RESIZE, resize_grid, resize_patches
from vitral.model.positions.rotary import RotaryPositions
from vitral.model.positions.tables import LearnedPositions

CPU = torch.device("cpu")
RULES: tuple[Resize, ...] = get_args(Resize)
DIM, HEADS, HEAD_DIM, PATCH = 12, 3, 20, 4

# Tables are drawn as wide as models draw theirs. F.interpolate finds places in float32, jax and scipy in
# float64; it costs 1e-5 of the table's width.
WIDTH = 0.02
SAME = {"rtol": 0.0, "atol": 1e-6}

Original = Callable[[Tensor, Grid, Grid], Tensor]  # a table (N, D) over a grid, at another grid


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def table(count: int, width: int = DIM) -> Tensor:
    return torch.randn(count, width) * WIDTH


# --- The originals ---------------------------------------------------------------------------------


def timm_absolute(**options: Any) -> Original:
    def resize(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
        resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
        return resample(table_ND[None], list(new), list(old), num_prefix_tokens=0, **options)[0]

    return resize


@contextmanager
def timm_indexing() -> Iterator[None]:
    """Without torch's warnings of how timm indexes its relative tables."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.searchsorted|Using a non-tuple sequence", UserWarning)
        yield


def timm_relative(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    resize = pytest.importorskip("timm.layers").resize_rel_pos_bias_table
    windows = [((rows + 1) // 2, (columns + 1) // 2) for rows, columns in (new, old)]
    with timm_indexing():
        return resize(table_ND, windows[0], (math.prod(new), table_ND.shape[1]), windows[1])


def google_zoom(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    """What vit_jax/checkpoint.py and big_vision's models/vit.py call."""
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    resized = scipy.ndimage.zoom(table_ND.numpy().reshape(*old, -1), zoom, order=1)
    return torch.from_numpy(resized).flatten(0, 1)


def jax_weights(old: int, new: int) -> np.ndarray:
    """(new, old), in float64: triangles around the new centres, as wide as the coarser grid's pixels."""
    centres = (np.arange(new) + 0.5) * old / new
    distances = np.abs(centres[:, None] - (np.arange(old) + 0.5))
    heights = np.clip(1 - distances / max(old / new, 1), 0, None)
    return heights / heights.sum(axis=1, keepdims=True)


def jax_linear(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    """jax.image.resize(..., "linear"), which FlexiViT calls; antialias is its default."""
    down, across = map(jax_weights, old, new)
    resized = np.einsum("ri,cj,ijd->rcd", down, across, table_ND.numpy().reshape(*old, -1))
    return torch.from_numpy(resized).float().flatten(0, 1)


def dinov2_offset(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    """interpolate_pos_encoding of DINOv2's vision_transformer.py: both scales are of the table's one side."""
    side = old[0]
    scale = (float(new[0] + 0.1) / side, float(new[1] + 0.1) / side)
    image = table_ND.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, scale_factor=scale, mode="bicubic")
    assert resized.shape[2:] == new
    return resized.permute(0, 2, 3, 1).flatten(0, 2)


def transformers_embeddings(kind: str, name: str) -> Original:
    """`interpolate_pos_encoding` of an embedding class, its class token cut off."""

    def resize(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
        module, configs = transformers_module(kind), pytest.importorskip("transformers")
        side = old[0] * PATCH
        config = getattr(configs, f"{name}Config")(
            hidden_size=table_ND.shape[1], image_size=side, patch_size=PATCH
        )
        embeddings = getattr(module, f"{name}Embeddings")(config)
        with torch.no_grad():
            embeddings.position_embeddings[0, 1:] = table_ND
            tokens = torch.zeros(1, 1 + math.prod(new), table_ND.shape[1])
            return embeddings.interpolate_pos_encoding(tokens, new[0] * PATCH, new[1] * PATCH)[0, 1:]

    return resize


def transformers_module(kind: str) -> ModuleType:
    return pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")


def siglip2(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    embeddings = transformers_module("siglip2").Siglip2VisionEmbeddings
    image = table_ND.unflatten(0, old)
    return embeddings.resize_positional_embeddings(image, torch.tensor([new]), math.prod(new))[0]


def torchvision_embeddings(table_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    from torchvision.models.vision_transformer import interpolate_embeddings

    del old
    class_token = torch.zeros(1, table_ND.shape[1])
    state: Any = {"encoder.pos_embedding": torch.cat([class_token, table_ND])[None]}
    return interpolate_embeddings(new[0] * PATCH, PATCH, state)["encoder.pos_embedding"][0, 1:]


UP, DOWN, TALL, WIDE = ((7, 7), (11, 11)), ((14, 14), (9, 9)), ((7, 7), (13, 5)), ((7, 11), (5, 19))
SAME_COUNT = ((6, 6), (4, 9))
SQUARE = (UP, DOWN)
FROM_SQUARE = (*SQUARE, TALL, SAME_COUNT)
ANY = (*FROM_SQUARE, WIDE)
# Sides of relative tables: distances of windows 7 -> 12, 14 -> 8, (4, 6) -> (3, 10).
ODD = (((13, 13), (23, 23)), ((27, 27), (15, 15)), ((7, 11), (5, 19)))

ORIGINALS: dict[str, tuple[Resize, Original, tuple[tuple[Grid, Grid], ...]]] = {
    "timm bilinear": ("bilinear", timm_absolute(interpolation="bilinear", antialias=False), ANY),
    "jax": ("bilinear_antialias", jax_linear, ANY),
    "SigLIP 2 in transformers": ("bilinear_antialias", siglip2, FROM_SQUARE),
    "Google's zoom": ("bilinear_corners", google_zoom, ANY),
    "RADIO in timm": (
        "bilinear_corners",
        timm_absolute(interpolation="bilinear", antialias=False, align_corners=True),
        ANY,
    ),
    "ViT in transformers": ("bicubic", transformers_embeddings("vit", "ViT"), FROM_SQUARE),
    "DINOv2 in transformers": ("bicubic", transformers_embeddings("dinov2", "Dinov2"), FROM_SQUARE),
    "timm": ("bicubic_antialias", timm_absolute(), ANY),
    "DINOv2 with registers in transformers": (
        "bicubic_antialias",
        transformers_embeddings("dinov2_with_registers", "Dinov2WithRegisters"),
        FROM_SQUARE,
    ),
    "torchvision": ("bicubic_corners", torchvision_embeddings, SQUARE),
    "DINOv2": ("bicubic_offset", dinov2_offset, FROM_SQUARE),
    "BEiT in timm": ("geometric", timm_relative, ODD),
}


# --- Tables ----------------------------------------------------------------------------------------


def test_every_rule_has_an_original() -> None:
    assert {rule for rule, _, _ in ORIGINALS.values()} == set(RESIZE) == set(RULES)


@pytest.mark.parametrize(("rule", "original", "grids"), ORIGINALS.values(), ids=ORIGINALS.keys())
def test_a_resized_table_equals_the_original_functions(
    rule: Resize, original: Original, grids: tuple[tuple[Grid, Grid], ...]
) -> None:
    for old, new in grids:
        old_table = table(math.prod(old))
        resized = resize_grid(old_table, old, new, rule)
        assert resized.shape == (math.prod(new), DIM)
        assert_close(resized, original(old_table, old, new), **SAME)


@pytest.mark.parametrize("rule", RULES)
def test_rules_differ_from_each_other(rule: Resize) -> None:
    """What the tolerance above must be able to tell apart."""
    old, new = ODD[0] if rule == "geometric" else DOWN
    old_table = table(math.prod(old))
    resized = resize_grid(old_table, old, new, rule)
    for other in RULES:
        if other in (rule, "geometric"):
            continue
        assert (resized - resize_grid(old_table, old, new, other)).abs().max() > 1000 * SAME["atol"]


@pytest.mark.parametrize("rule", RULES)
def test_a_table_keeps_its_type_and_is_resized_in_float32(rule: Resize) -> None:
    old, new = ODD[2]
    half = table(math.prod(old)).bfloat16()
    resized = resize_grid(half, old, new, rule)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, resize_grid(half.float(), old, new, rule).bfloat16())


@pytest.mark.parametrize("rule", RULES)
def test_the_same_grid_gives_the_same_table(rule: Resize) -> None:
    old_table = table(35)
    assert resize_grid(old_table, (5, 7), (5, 7), rule) is old_table


@pytest.mark.parametrize("rule", RULES)
def test_a_table_of_one_vector_stays_that_vector(rule: Resize) -> None:
    old, new = ODD[2]
    vector = table(1)
    resized = resize_grid(vector.expand(math.prod(old), -1), old, new, rule)
    assert_close(resized, vector.expand(math.prod(new), -1), **SAME)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("old", "new"), [UP, WIDE])
def test_tokens_before_the_patches_are_kept_apart_as_in_timm(prefix: int, old: Grid, new: Grid) -> None:
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    positions = LearnedPositions(DIM, old, prefix, "bicubic_antialias")
    expected = resample(positions.table[None], list(new), list(old), num_prefix_tokens=prefix)[0]
    assert_close(positions.resized(new), expected, **SAME)
    patches = positions(torch.zeros(1, math.prod(new), DIM), new)
    assert_close(patches, expected[None, prefix:], **SAME)


def test_the_class_token_is_kept_apart_as_in_torchvision() -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    positions = LearnedPositions(DIM, (7, 7), 1, "bicubic_corners")
    state: Any = {"encoder.pos_embedding": positions.table[None].detach()}
    expected = interpolate_embeddings(11 * PATCH, PATCH, state)["encoder.pos_embedding"][0]
    assert_close(positions.resized((11, 11)).detach(), expected, **SAME)


# --- Patches ---------------------------------------------------------------------------------------

PATCH_RULES: dict[Resize, dict[str, Any]] = {
    "bicubic_antialias": {"interpolation": "bicubic", "antialias": True},
    "bilinear": {"interpolation": "bilinear", "antialias": False},
}


@pytest.mark.parametrize(("old", "new"), [(8, 16), (16, 14), (12, 6), (8, 12)])
@pytest.mark.parametrize("rule", PATCH_RULES)
def test_resized_patches_equal_timm(rule: Resize, old: int, new: int) -> None:
    resample = pytest.importorskip("timm.layers").resample_patch_embed
    weight = torch.randn(5, 3, old, old) * WIDTH
    expected = resample(weight, [new, new], **PATCH_RULES[rule])
    assert_close(resize_patches(weight, new, rule), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["bilinear", "bilinear_antialias", "bicubic", "bicubic_antialias"])
@pytest.mark.parametrize(("old", "new"), [(6, 12), (8, 12), (7, 9)])
def test_tokens_of_enlarged_patches_are_unchanged(rule: Resize, old: int, new: int) -> None:
    weight = torch.randn(5, 3, old, old)
    images = torch.randn(2, 3, old, old)
    enlarged = torch.stack([RESIZE[rule](image[None], (new, new))[0] for image in images])
    before = F.conv2d(images, weight)
    assert_close(F.conv2d(enlarged, resize_patches(weight, new, rule)), before, rtol=0, atol=1e-4)


def test_resized_patches_keep_their_type_and_their_own_size() -> None:
    weight = torch.randn(5, 3, 8, 8, dtype=torch.bfloat16)
    assert resize_patches(weight, 12, "bicubic").dtype == torch.bfloat16
    assert resize_patches(weight, 8, "bicubic") is weight


# --- Rotary positions ------------------------------------------------------------------------------

GRIDS: tuple[Grid, ...] = ((5, 7), (11, 3))


def rotation(options: RotaryOptions, grid: Grid, prefix: int = 0) -> Rotation:
    found = RotaryPositions(HEAD_DIM, HEADS, prefix, options)(grid, CPU).rotation
    assert found is not None
    return found


def assert_same_angles(ours: Rotation, sine_then_cosine: Tensor) -> None:
    sin, cos = sine_then_cosine.chunk(2, dim=-1)
    # Angles up to 80 have an error of 4e-6 in float32.
    assert_close(ours.sin, sin, rtol=0, atol=1e-5)
    assert_close(ours.cos, cos, rtol=0, atol=1e-5)


# Each with what timm's RotaryEmbeddingCat is told.
AXIAL: dict[str, tuple[RotaryOptions, dict[str, Any]]] = {
    "rows and columns": (RotaryOptions(), {}),
    "EVA-02": (RotaryOptions(reference_grid=(16, 16)), {"ref_feat_shape": [16, 16]}),
    "a reference that is no square": (RotaryOptions(reference_grid=(4, 9)), {"ref_feat_shape": [4, 9]}),
    "RoPE-ViT": (
        RotaryOptions(temperature=100.0, column_first=True),
        {"temperature": 100.0, "grid_indexing": "xy"},
    ),
    "Perception Encoder": (
        RotaryOptions(column_first=True, offset=1.0, reference_grid=(24, 24)),
        {"grid_indexing": "xy", "grid_offset": 1.0, "ref_feat_shape": [24, 24]},
    ),
    "column first, a reference that is no square": (
        RotaryOptions(column_first=True, offset=0.5, reference_grid=(4, 9)),
        {"grid_indexing": "xy", "grid_offset": 0.5, "ref_feat_shape": [4, 9]},
    ),
    "halves": (RotaryOptions(halves=True), {"rotate_half": True}),
}


@pytest.mark.parametrize(("options", "told"), AXIAL.values(), ids=AXIAL.keys())
def test_axial_angles_equal_timm(options: RotaryOptions, told: dict[str, Any]) -> None:
    peer = pytest.importorskip("timm.layers").RotaryEmbeddingCat(HEAD_DIM, in_pixels=False, **told)
    for grid in GRIDS:
        assert_same_angles(rotation(options, grid), peer.get_embed(list(grid)))


@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_mixed_angles_equal_timm(indexing: str) -> None:
    depth = 2
    peer = pytest.importorskip("timm.layers").RotaryEmbeddingMixed(
        HEADS * HEAD_DIM, depth, HEADS, grid_indexing=indexing
    )
    ours = RotaryPositions(
        HEAD_DIM, HEADS, 0, RotaryOptions(kind="mixed", temperature=10.0, column_first=indexing == "xy")
    )
    assert ours.frequencies is not None
    for layer in range(depth):
        ours.frequencies.data = peer.freqs.data[:, layer]
        for grid in GRIDS:
            found = ours(grid, CPU).rotation
            assert found is not None
            assert_same_angles(found, peer.get_embed(list(grid))[layer])


def test_mixed_frequencies_start_as_axial_ones_turned_by_one_angle_per_head() -> None:
    """For each head two perpendicular directions in the plane, each with the lengths of the axial bands."""
    positions = RotaryPositions(HEAD_DIM, 50, 0, RotaryOptions(kind="mixed", temperature=10.0))
    positions.reset_parameters()
    assert positions.frequencies is not None
    vectors = torch.complex(*positions.frequencies.detach())
    first, second = vectors.chunk(2, dim=-1)
    lengths = torch.tensor([10 ** -(step / 5) for step in range(5)])
    assert_close(first.abs(), lengths.expand(50, -1))
    assert_close(second, first * 1j)
    angles = first.angle()
    assert_close(angles, angles[:, :1].expand_as(angles))
    assert angles.min() < -2
    assert angles.max() > 2


def test_centered_angles_equal_timm() -> None:
    layers = pytest.importorskip("timm.layers")
    for halves in (True, False):
        peer = layers.RotaryEmbeddingDinoV3(HEAD_DIM, temperature=100.0, rotate_half=halves)
        options = RotaryOptions(places="centered", temperature=100.0, halves=halves)
        for grid in GRIDS:
            assert_same_angles(rotation(options, grid), peer.get_embed(list(grid)))


def test_centered_angles_equal_transformers() -> None:
    module = transformers_module("dinov3_vit")
    config = pytest.importorskip("transformers").DINOv3ViTConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, patch_size=PATCH, image_size=8 * PATCH
    )
    peer = module.DINOv3ViTRopePositionEmbedding(config).eval()
    options = RotaryOptions(places="centered", temperature=config.rope_theta, halves=True)
    for rows, columns in GRIDS:
        cos, sin = peer(torch.zeros(1, 3, rows * PATCH, columns * PATCH))
        assert_same_angles(rotation(options, (rows, columns)), torch.cat([sin, cos], -1))


def test_tokens_before_the_patches_do_not_turn() -> None:
    turned = rotation(RotaryOptions(offset=1.0), (5, 7), prefix=3)
    tokens = torch.randn(2, HEADS, 3 + 35, HEAD_DIM)
    assert torch.equal(rotate(tokens, turned)[:, :, :3], tokens[:, :, :3])
    patches = rotation(RotaryOptions(offset=1.0), (5, 7))
    assert torch.equal(rotate(tokens, turned)[:, :, 3:], rotate(tokens[:, :, 3:], patches))


@pytest.mark.parametrize("halves", [False, True])
def test_rotating_is_multiplying_by_unit_complex_numbers(halves: bool) -> None:
    angles = torch.randn(7, HEAD_DIM // 2)
    tokens = torch.randn(2, HEADS, 7, HEAD_DIM)
    layout = (2, HEAD_DIM // 2) if halves else (HEAD_DIM // 2, 2)
    pair_axis = -2 if halves else -1

    def spread(values: Tensor) -> Tensor:
        return torch.stack([values, values], dim=pair_axis).flatten(-2)

    numbers = torch.complex(*tokens.unflatten(-1, layout).unbind(pair_axis))
    turned = numbers * torch.polar(torch.ones(()), angles)
    expected = torch.stack([turned.real, turned.imag], dim=pair_axis).flatten(-2)
    assert_close(rotate(tokens, Rotation(spread(angles.cos()), spread(angles.sin()), halves)), expected)


def test_a_quarter_turn_by_hand() -> None:
    quarter = Rotation(torch.zeros(1, 4), torch.ones(1, 4), halves=False)
    token = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert rotate(token, quarter).tolist() == [[-2, 1, -4, 3]]
    assert rotate(token, quarter._replace(halves=True)).tolist() == [[-3, -4, 1, 2]]


def test_rotated_products_depend_on_the_distance_alone() -> None:
    """The promise of RoFormer's eq. 16, over a grid."""
    turned = rotation(RotaryOptions(), (6, 8))
    query, key = torch.randn(2, HEAD_DIM)
    places = (rotate(vector.expand(48, -1), turned).unflatten(0, (6, 8)) for vector in (query, key))
    queries, keys = places
    expected = queries[0, 0] @ keys[2, 3]
    for row, column in [(1, 0), (0, 4), (3, 4)]:
        assert_close(queries[row, column] @ keys[row + 2, column + 3], expected)


def test_rotating_half_precision_is_done_in_the_angles_float32() -> None:
    turned = rotation(RotaryOptions(), (5, 7))
    tokens = torch.randn(35, HEAD_DIM).bfloat16()
    assert turned.cos.dtype == torch.float32
    assert torch.equal(rotate(tokens, turned), rotate(tokens.float(), turned).bfloat16())


def test_a_head_that_cannot_be_split_in_four_is_refused() -> None:
    with pytest.raises(ValueError, match="a head is 18 channels wide; for rotary"):
        RotaryPositions(18, HEADS, 0, RotaryOptions())


# --- Relative biases -------------------------------------------------------------------------------


def relative_bias(grid: Grid, rule: Resize = "geometric") -> RelativeBias:
    bias = RelativeBias(grid, HEADS, rule)
    torch.nn.init.normal_(bias.table, std=WIDTH)
    return bias


def biases(bias: RelativeBias, grid: Grid) -> Tensor:
    found = bias(grid, CPU).bias_ATT
    assert found is not None
    return found.detach()


@pytest.mark.parametrize("grid", [(5, 7), (3, 3), (1, 4)])
def test_biases_stand_where_timm_puts_them(grid: Grid) -> None:
    index = pytest.importorskip("timm.models.beit").gen_relative_position_index(grid)
    bias = relative_bias(grid)
    assert torch.equal(biases(bias, grid), bias.table.detach()[index].permute(2, 0, 1))


@pytest.mark.parametrize("grid", [(5, 7), (3, 3), (1, 4), (8, 2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_products_and_an_index_give_the_same_biases(grid: Grid, autocast: bool) -> None:
    bias = relative_bias((5, 7))
    weights = torch.randn(HEADS, grid[0] * grid[1] + 1, grid[0] * grid[1] + 1)
    found = []
    for route in (bias.by_products, bias.by_index):
        bias.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and grid == bias.grid):
            biases_ATT = route(grid)
        (biases_ATT * weights).sum().backward()
        assert bias.table.grad is not None
        found.append((biases_ATT.detach(), bias.table.grad.clone()))
    (products, their_gradient), (indexed, its_gradient) = found
    assert torch.equal(products, indexed)
    assert_close(their_gradient, its_gradient)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((14, 14), (7, 7)), ((5, 7), (8, 3))])
def test_resized_biases_equal_timm(old: Grid, new: Grid) -> None:
    beit = pytest.importorskip("timm.models.beit")
    bias = relative_bias(old)
    count = (2 * new[0] - 1) * (2 * new[1] - 1) + 3
    with timm_indexing():
        resized = beit.resize_rel_pos_bias_table(bias.table.detach(), new, (count, HEADS), old)
    index = beit.gen_relative_position_index(new)
    assert_close(biases(bias, new), resized[index].permute(2, 0, 1), **SAME)


@pytest.mark.parametrize("new", [(12, 12), (5, 5), (9, 4)])
def test_resized_biases_equal_transformers(new: Grid) -> None:
    module = transformers_module("beit")
    config = pytest.importorskip("transformers").BeitConfig(
        image_size=7 * PATCH, patch_size=PATCH, num_attention_heads=HEADS, hidden_size=HEADS
    )
    bias, peer = relative_bias((7, 7), "bilinear"), module.BeitRelativePositionBias(config)
    peer.relative_position_bias_table.data = bias.table.data
    assert_close(biases(bias, new), peer(new)[0].detach(), **SAME)


def test_a_local_start_looks_at_one_neighbour_a_head() -> None:
    # Attention of the bias alone, for the middle patch of 5x5: most of the weight on the head's neighbour.
    relation = RelativeBias((5, 5), 8, "geometric", "local")
    relation.reset_parameters()
    bias = relation((5, 5), torch.device("cpu")).bias_ATT
    assert bias is not None
    weights = bias[:, 1:, 1:].softmax(-1)[:, 12].unflatten(1, (5, 5))
    looked_at = {tuple((weights[head] == weights[head].max()).nonzero()[0].tolist()) for head in range(8)}
    assert looked_at == {(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)}
    # exp(-d^2), of the taps themselves by hand: the four heads that look straight have one neighbour at a
    # distance of 1 on each side, and so on.
    total = sum(math.exp(-(y * y + x * x)) for y in range(-1, 4) for x in range(-2, 3))
    assert weights[0].max().item() == pytest.approx(1 / total, rel=1e-3)


def test_a_grid_with_fewer_neighbours_than_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a neighbour of its own, and a grid of 1x2 patches has 2"):
        RelativeBias((1, 2), 4, "geometric", "local").reset_parameters()
