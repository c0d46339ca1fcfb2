"""From pixels to tokens: against hand-worked numbers, torch's own layers and a second route."""

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.parts import (
    BATCH,
    CHANNELS,
    COLUMNS,
    DIM,
    HEIGHT,
    PATCH,
    PATCHES,
    ROWS,
    WIDTH,
    close,
)
from vitral.model.config import EmbeddingOptions, Position
from vitral.model.embedding import ConvStem, PatchEmbedding, ViTEmbedding
from vitral.model.kernels import Kernels, set_kernels
from vitral.model.positions.tables import LearnedPositions, PositionalEncoding, PositionalEncoding2d


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)


def patch_embedding() -> PatchEmbedding:
    return PatchEmbedding((HEIGHT, WIDTH), PATCH, CHANNELS, DIM)


def embedding(dropout: float = 0.0, **options: Any) -> ViTEmbedding:
    return ViTEmbedding((HEIGHT, WIDTH), PATCH, CHANNELS, DIM, dropout, **options)


# --- Patches -------------------------------------------------------------------------------------


def test_patch_embedding_signature() -> None:
    defaults = {name: p.default for name, p in inspect.signature(PatchEmbedding).parameters.items()}
    assert defaults == {"img_size": 224, "patch_size": 16, "in_channels": 3, "embed_dim": 768}


def test_patch_embedding_takes_keywords_and_gives_one_vector_a_patch(images: Tensor) -> None:
    embed = PatchEmbedding(img_size=(HEIGHT, WIDTH), patch_size=PATCH, in_channels=CHANNELS, embed_dim=DIM)
    assert embed.n_patches == PATCHES
    assert embed.grid_size == (ROWS, COLUMNS)
    assert embed(images).shape == (BATCH, PATCHES, DIM)


def test_default_patch_embedding_is_that_of_vit_base_16() -> None:
    embed = PatchEmbedding()
    assert embed.n_patches == 196
    assert embed(torch.zeros(1, 3, 224, 224)).shape == (1, 196, 768)


def test_patch_k_is_row_k_over_columns_and_column_k_modulo_columns(images: Tensor) -> None:
    patches = patch_embedding().patchify(images)
    for k in range(PATCHES):
        top, left = k // COLUMNS * PATCH, k % COLUMNS * PATCH
        pixels = images[:, :, top : top + PATCH, left : left + PATCH]
        assert torch.equal(patches[:, k], pixels.reshape(BATCH, -1))


def test_a_patch_becomes_the_sum_of_its_weighted_pixels(images: Tensor) -> None:
    embed = patch_embedding()
    row, column, channel = 2, 9, 31
    corner = images[1, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    weight, bias = embed.projection.weight[channel], embed.projection.bias
    assert bias is not None
    close(embed(images)[1, row * COLUMNS + column, channel], (corner * weight).sum() + bias[channel])


def test_convolution_and_linear_map_are_the_same_function(images: Tensor) -> None:
    embed = patch_embedding()
    close(embed.convolve(images), embed.project(images))


@pytest.mark.parametrize(("kernel", "route"), [("convolution", "convolve"), ("product", "project")])
def test_the_chosen_kernel_is_taken(kernel: Any, route: str, images: Tensor) -> None:
    embed = patch_embedding()
    set_kernels(embed, Kernels(patches=kernel))
    assert torch.equal(embed(images), getattr(embed, route)(images))


def test_both_routes_agree_in_bfloat16(images: Tensor) -> None:
    embed = patch_embedding()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(embed.convolve(images), embed.project(images), rtol=2**-7, atol=2**-7)


def test_a_patch_that_does_not_divide_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"img_size is 35x54, which patch_size 5 does not divide"):
        PatchEmbedding((HEIGHT, WIDTH - 1), PATCH)


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 35, 55), (2, 3, 35, 54), (3, 35, 55)],
    ids=["gray", "narrow", "3d"],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    for embed in (patch_embedding(), embedding()):
        with pytest.raises(
            ValueError, match=re.escape(f"images are {shape}; this model takes (batch, 3, height, width)")
        ):
            embed(torch.zeros(shape))


# --- The embedding ---------------------------------------------------------------------------------


def with_class_token(embed: ViTEmbedding, images: Tensor) -> Tensor:
    """The tokens without their positions."""
    patches = embed.patches(images)
    if embed.class_token is None:
        return patches
    return torch.cat([embed.class_token.expand(len(images), -1, -1), patches], dim=1)


def test_vit_embedding_defaults_to_a_tenth_dropout() -> None:
    names = list(inspect.signature(ViTEmbedding).parameters)
    assert names[:5] == ["img_size", "patch_size", "in_channels", "embed_dim", "dropout"]
    assert ViTEmbedding(img_size=4, patch_size=2, in_channels=1, embed_dim=3).dropout.p == 0.1


def test_embedding_is_class_token_then_patches_plus_positions(images: Tensor) -> None:
    embed = embedding()
    assert embed.class_token is not None
    assert isinstance(embed.positions, LearnedPositions)
    table, patches, z_0 = embed.positions.table, embed.patches(images), embed(images)
    assert z_0.shape == (BATCH, PATCHES + 1, DIM)
    for b in range(BATCH):
        close(z_0[b, 0], embed.class_token[0, 0] + table[0])
        for n in range(PATCHES):
            close(z_0[b, n + 1], patches[b, n] + table[n + 1])


def test_embedding_without_class_token_is_one_token_a_patch(images: Tensor) -> None:
    embed = embedding(position="none", options=EmbeddingOptions(class_token=False))
    assert embed.class_token is None
    assert torch.equal(embed(images), embed.patches(images))


def test_position_none_adds_nothing(images: Tensor) -> None:
    embed = embedding(position="none")
    assert embed.class_token is not None
    assert torch.equal(embed(images), with_class_token(embed, images))


def test_sinusoidal_positions_count_the_class_token_as_position_zero(images: Tensor) -> None:
    embed = embedding(position="sinusoidal")
    added = embed(images) - with_class_token(embed, images)
    close(added[0, 0, :4], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    close(added[:1], PositionalEncoding(DIM, PATCHES + 1)(torch.zeros(1, PATCHES + 1, DIM)))


@pytest.mark.parametrize("class_token", [True, False])
def test_2d_positions_follow_the_embeddings_grid(class_token: bool) -> None:
    embed = ViTEmbedding(
        (ROWS * 2, COLUMNS * 2),
        2,
        1,
        12,
        0,
        position="sinusoidal_2d",
        options=EmbeddingOptions(class_token=class_token),
    )
    images = torch.randn(BATCH, 1, ROWS * 2, COLUMNS * 2)
    added = embed(images) - with_class_token(embed, images)
    encoding = PositionalEncoding2d(12, (ROWS, COLUMNS))(torch.zeros(1, PATCHES, 12))[0]
    close(added[1], F.pad(encoding, (0, 0, int(class_token), 0)))


def test_an_unknown_position_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="position is 'rotary'; it must be one of learned, sinusoidal"):
        embedding(position="rotary")


def test_class_token_and_positions_start_normal_with_std_a_fiftieth() -> None:
    embed = ViTEmbedding(2, 2, 1, 50_021)
    assert embed.class_token is not None
    assert isinstance(embed.positions, LearnedPositions)
    for drawn in (embed.class_token, embed.positions.table):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(drawn.mean().item()) < 4 * 0.02 / drawn.numel() ** 0.5


def test_embedding_dropout_zeroes_in_training_only(images: Tensor) -> None:
    embed = embedding(dropout=0.5)
    kept = embed.eval()(images)
    assert torch.equal(kept, embed(images))
    trained = embed.train()(images)
    dropped = trained == 0
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    close(trained[~dropped], 2 * kept[~dropped])


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
def test_patches_can_be_dropped_between_the_steps(position: Position, images: Tensor) -> None:
    embed = embedding(position=position, options=EmbeddingOptions(register_tokens=2))
    kept = torch.tensor([0, 5, 6, 40])
    patches = embed.positions(embed.embed_patches(images), (ROWS, COLUMNS))
    some, whole = embed.prepend_tokens(patches[:, kept]), embed(images)
    assert embed.num_prefix_tokens == 3
    assert torch.equal(some, torch.cat([whole[:, :3], whole[:, 3 + kept]], dim=1))


def test_registers_without_positions_stand_between_class_token_and_patches(images: Tensor) -> None:
    embed = embedding(options=EmbeddingOptions(register_tokens=4, positioned="class"))
    assert isinstance(embed.positions, LearnedPositions)
    assert embed.class_token is not None
    assert embed.register_tokens is not None
    table, z_0 = embed.positions.table, embed(images)
    assert len(table) == 1 + PATCHES
    close(z_0[1, 0], embed.class_token[0, 0] + table[0])
    assert torch.equal(z_0[1, 1:5], embed.register_tokens[0])
    close(z_0[1, 5:], embed.patches(images)[1] + table[1:])


@pytest.mark.parametrize("position", ["sinusoidal", "sinusoidal_2d"])
def test_fixed_positions_survive_building_on_the_meta_device(position: Position) -> None:
    with torch.device("meta"):
        weightless = ViTEmbedding(4, 2, 1, 12, position=position)
    table, built_here = (
        weightless.positions.table,
        ViTEmbedding(4, 2, 1, 12, position=position).positions.table,
    )
    assert isinstance(table, Tensor)
    assert isinstance(built_here, Tensor)
    assert torch.equal(table, built_here)


# --- The stem ----------------------------------------------------------------------------------------


@pytest.fixture
def stem_embedding() -> ViTEmbedding:
    """Two halvings, then patches of 2 on the smaller map: a patch size of 8."""
    return ViTEmbedding((24, 40), 8, CHANNELS, DIM, 0, stem=(11, 13))


def test_stem_gives_as_many_tokens_as_patches_of_the_image(stem_embedding: ViTEmbedding) -> None:
    images = torch.randn(BATCH, CHANNELS, 24, 40)
    plain = ViTEmbedding((24, 40), 8, CHANNELS, DIM, 0)
    assert stem_embedding.patches.grid_size == plain.patches.grid_size == (3, 5)
    assert stem_embedding(images).shape == plain(images).shape == (BATCH, 16, DIM)


def test_stem_is_convolve_relu_pool_twice(stem_embedding: ViTEmbedding) -> None:
    maps = images = torch.randn(BATCH, CHANNELS, 24, 40)
    stem = stem_embedding.stem
    assert isinstance(stem, ConvStem)
    for convolution in stem.convolutions():
        maps = nn.functional.conv2d(maps, convolution.weight, padding=1)
        maps = nn.functional.max_pool2d(maps.clamp(min=0), 2)
    assert maps.shape == (BATCH, 13, 6, 10)
    close(stem(images), maps)


def test_stem_keeps_the_scale_of_its_input() -> None:
    stem = ViTEmbedding(64, 2, 64, DIM, stem=(512,)).stem
    assert isinstance(stem, ConvStem)
    [convolution] = stem.convolutions()
    # He et al., arXiv:1502.01852, eq. 10: variance 2 / fan-in.
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)


def test_a_whitened_stem_gives_uncorrelated_maps_of_variance_one_and_their_negatives() -> None:
    torch.manual_seed(0)
    stem = ViTEmbedding(32, 2, 2, DIM, stem=(40,)).stem
    assert isinstance(stem, ConvStem)
    [convolution] = stem.convolutions()
    drawn = convolution.weight.detach().clone()
    # Neighbours and channels alike, as in pictures, and far from a variance of one.
    images = 30 * F.avg_pool2d(torch.randn(64, 2, 34, 34), 3, stride=1) + 5
    images[:, 1] += images[:, 0]
    stem.whiten(images)
    maps = F.conv2d(images, convolution.weight)[:, :18]
    torch.testing.assert_close(maps.transpose(0, 1).flatten(1).cov(), torch.eye(18), rtol=0, atol=0.05)
    assert torch.equal(convolution.weight[18:36], -convolution.weight[:18])
    assert torch.equal(convolution.weight[36:], drawn[36:])


def test_images_that_the_stem_would_round_down_are_refused(stem_embedding: ViTEmbedding) -> None:
    with pytest.raises(
        ValueError, match=r"images are \(2, 3, 25, 41\); this model takes .* multiples of patch_size 8"
    ):
        stem_embedding(torch.zeros(BATCH, CHANNELS, 25, 41))


def test_a_stem_that_shrinks_more_than_the_patch_is_refused() -> None:
    with pytest.raises(
        ValueError, match="patch_size is 6; it must be a multiple of 4, by which the 2-stage stem"
    ):
        ViTEmbedding(24, 6, CHANNELS, DIM, stem=(11, 13))
