"""Each part of the model against torch, another library, a hand-worked number or a second route."""

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from vitral.model import attention as attention_module
from vitral.model import kernels
from vitral.model.attention import MultiHeadAttention
from vitral.model.config import EmbeddingOptions, LayerOptions, Position
from vitral.model.embedding import ConvStem, PatchEmbedding, ViTEmbedding
from vitral.model.encoder import EncoderLayer, FeedForward
from vitral.model.positions.tables import LearnedPositions, PositionalEncoding, PositionalEncoding2d

Module = TypeVar("Module", bound=nn.Module)

BATCH, CHANNELS, PATCH, ROWS, COLUMNS = 2, 3, 5, 7, 11
HEIGHT, WIDTH, PATCHES = ROWS * PATCH, COLUMNS * PATCH, ROWS * COLUMNS
HEADS, HEAD_WIDTH, HIDDEN, TOKENS = 5, 7, 17, 13
DIM = HEADS * HEAD_WIDTH


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM)


def patch_embedding() -> PatchEmbedding:
    return PatchEmbedding((HEIGHT, WIDTH), PATCH, CHANNELS, DIM)


def embedding(dropout: float = 0.0, **options: Any) -> ViTEmbedding:
    return ViTEmbedding((HEIGHT, WIDTH), PATCH, CHANNELS, DIM, dropout, **options)


def bf16() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def away_from_initial_values(module: Module) -> Module:
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- Patches -------------------------------------------------------------------------------------


def test_patch_embedding_signature() -> None:
    defaults = {name: p.default for name, p in inspect.signature(PatchEmbedding).parameters.items()}
    assert defaults == {"img_size": 224, "patch_size": 16, "in_channels": 3, "embed_dim": 768}


def test_patch_embedding_takes_keywords_and_gives_one_vector_a_patch(images: Tensor) -> None:
    embed = PatchEmbedding(img_size=(HEIGHT, WIDTH), patch_size=PATCH, in_channels=CHANNELS, embed_dim=DIM)
    assert embed.n_patches == PATCHES
    assert embed.grid == (ROWS, COLUMNS)
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


@pytest.mark.parametrize("context", [nullcontext, bf16])
def test_forward_is_either_route_in_either_precision(context: type, images: Tensor) -> None:
    embed = patch_embedding()
    with context():
        forward, routes = embed(images), (embed.convolve(images), embed.project(images))
    tolerance = 1e-5 if forward.dtype == torch.float32 else 2**-7
    for route in routes:
        assert_close(forward, route, rtol=tolerance, atol=tolerance)


def test_bf16_really_takes_the_other_route(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for route in ("convolve", "project"):
        monkeypatch.setattr(PatchEmbedding, route, lambda self, images, route=route: taken.append(route))
    embed = patch_embedding()
    embed(images)
    with bf16():
        embed(images)
    assert taken == ["convolve", "project"]


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


# --- Positions -----------------------------------------------------------------------------------


def paper_encoding(position: int, channel: int, width: int) -> float:
    """Attention Is All You Need, §3.5."""
    angle = position / 10_000 ** ((channel - channel % 2) / width)
    return math.cos(angle) if channel % 2 else math.sin(angle)


@pytest.mark.parametrize("width", [2, 11, 12, DIM])
def test_positional_encoding_is_the_papers_formula(width: int) -> None:
    encoding = PositionalEncoding(embed_dim=width, max_len=TOKENS)(torch.zeros(BATCH, TOKENS, width))
    expected = [[paper_encoding(p, c, width) for c in range(width)] for p in range(TOKENS)]
    close(encoding, torch.tensor(expected).expand(BATCH, -1, -1))


def test_positional_encoding_stays_exact_far_along_the_sequence() -> None:
    encoding = PositionalEncoding(4, 100_000)(torch.zeros(1, 100_000, 4))
    close(encoding[0, -1], torch.tensor([paper_encoding(99_999, c, 4) for c in range(4)]))


def test_positional_encoding_is_added_to_the_tokens(tokens: Tensor) -> None:
    encode = PositionalEncoding(DIM, TOKENS)
    close(encode(tokens) - tokens, encode(torch.zeros_like(tokens)))


def test_a_shorter_sequence_takes_the_first_positions(tokens: Tensor) -> None:
    encode = PositionalEncoding(DIM, TOKENS)
    assert torch.equal(encode(tokens[:, :3]), encode(tokens)[:, :3])


def test_a_longer_sequence_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="the sequence has 13 tokens; this encoding has 12"):
        PositionalEncoding(DIM, TOKENS - 1)(tokens)


def test_fixed_encodings_are_neither_trained_nor_saved() -> None:
    for encode in (PositionalEncoding(DIM, TOKENS), PositionalEncoding2d(12, (2, 3), prefix=1)):
        assert not list(encode.parameters())
        assert not encode.state_dict()


def encoding_2d(grid: tuple[int, int], width: int, *, class_token: bool = False) -> Tensor:
    length = grid[0] * grid[1] + class_token
    return PositionalEncoding2d(width, grid, prefix=int(class_token))(torch.zeros(1, length, width))[0]


def test_2d_encoding_is_timms_but_for_the_order_of_sines_and_cosines() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.build_sincos2d_pos_embed([ROWS, COLUMNS], dim=12, interleave_sin_cos=True)
    pairs = encoding_2d((ROWS, COLUMNS), 12).unflatten(1, (2, 3, 2))
    close(pairs.transpose(2, 3).flatten(1), theirs)


def test_2d_encoding_is_the_rows_formula_then_the_columns() -> None:
    table = encoding_2d((ROWS, COLUMNS), 12).unflatten(0, (ROWS, COLUMNS))
    for row, column in [(0, 0), (0, 10), (6, 0), (4, 9)]:
        halves = [[paper_encoding(place, c, 6) for c in range(6)] for place in (row, column)]
        close(table[row, column], torch.tensor(halves).flatten())


def test_2d_encoding_leaves_the_class_token_as_it_is() -> None:
    with_class = encoding_2d((ROWS, COLUMNS), 12, class_token=True)
    assert not with_class[0].any()
    assert torch.equal(with_class[1:], encoding_2d((ROWS, COLUMNS), 12))


def test_2d_encoding_needs_a_width_of_fours() -> None:
    with pytest.raises(ValueError, match="embed_dim % 4 == 0; it is 35"):
        PositionalEncoding2d(DIM, (ROWS, COLUMNS), prefix=1)


def test_learned_positions_are_added_one_a_token(tokens: Tensor) -> None:
    learned = LearnedPositions(DIM, (3, 4), prefix=1, without=0, resize="bicubic")
    for t in range(TOKENS):
        close(learned(tokens)[:, t], tokens[:, t] + learned.table[t])


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


# --- The embedding ---------------------------------------------------------------------------------


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
    assert torch.equal(embed(images), embed.prepend_tokens(embed.patches(images)))


def test_sinusoidal_positions_count_the_class_token_as_position_zero(images: Tensor) -> None:
    embed = embedding(position="sinusoidal")
    added = embed(images) - embed.prepend_tokens(embed.patches(images))
    close(added[0, 0, :4], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    close(added[0, 3], torch.tensor([paper_encoding(3, c, DIM) for c in range(DIM)]))


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
    added = embed(images) - embed.prepend_tokens(embed.patches(images))
    close(added[1], encoding_2d((ROWS, COLUMNS), 12, class_token=class_token))


def test_an_unknown_position_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="position is 'rotary'; it is one of learned, sinusoidal"):
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


# --- The stem ----------------------------------------------------------------------------------------


@pytest.fixture
def stem_embedding() -> ViTEmbedding:
    """Two halvings, then patches of 2 on the smaller map: a patch size of 8."""
    return ViTEmbedding((24, 40), 8, CHANNELS, DIM, 0, stem=(11, 13))


def test_stem_gives_as_many_tokens_as_patches_of_the_image(stem_embedding: ViTEmbedding) -> None:
    images = torch.randn(BATCH, CHANNELS, 24, 40)
    plain = ViTEmbedding((24, 40), 8, CHANNELS, DIM, 0)
    assert stem_embedding.patches.grid == plain.patches.grid == (3, 5)
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
        ValueError, match="patch_size 6 is no multiple of 4, the reduction of the 2-stage stem"
    ):
        ViTEmbedding(24, 6, CHANNELS, DIM, stem=(11, 13))


# --- Attention -------------------------------------------------------------------------------------


@pytest.fixture
def attention() -> MultiHeadAttention:
    return away_from_initial_values(MultiHeadAttention(DIM, HEADS))


def torch_attention(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            "in_proj_weight": state["qkv.weight"],
            "in_proj_bias": state["qkv.bias"],
            "out_proj.weight": state["out.weight"],
            "out_proj.bias": state["out.bias"],
        }
    )
    return theirs


def test_attention_is_torchs(attention: MultiHeadAttention, tokens: Tensor) -> None:
    theirs, _ = torch_attention(attention)(tokens, tokens, tokens)
    close(attention(tokens), theirs)


def test_attention_weights_are_torchs(attention: MultiHeadAttention, tokens: Tensor) -> None:
    _, theirs = torch_attention(attention)(tokens, tokens, tokens, average_attn_weights=False)
    close(attention.weights(tokens), theirs)


def test_each_tokens_attention_sums_to_one(attention: MultiHeadAttention, tokens: Tensor) -> None:
    weights = attention.weights(tokens)
    assert weights.shape == (BATCH, HEADS, TOKENS, TOKENS)
    close(weights.sum(dim=-1), torch.ones(BATCH, HEADS, TOKENS))


def test_mixing_values_with_the_weights_is_the_forward_pass(
    attention: MultiHeadAttention, tokens: Tensor
) -> None:
    values = attention.qkv(tokens)[..., 2 * DIM :].reshape(BATCH, TOKENS, HEADS, HEAD_WIDTH)
    mixed = torch.einsum("batu,buak->btak", attention.weights(tokens), values)
    close(attention(tokens), attention.out(mixed.reshape(BATCH, TOKENS, DIM)))


def test_explicit_and_fused_kernels_agree(
    attention: MultiHeadAttention, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = attention(tokens)
    monkeypatch.setattr(attention_module, "prefers_explicit_attention", lambda q: True)
    close(attention(tokens), fused)


def test_bf16_on_the_cpu_mixes_by_the_explicit_kernel() -> None:
    q = torch.randn(BATCH, HEADS, TOKENS, HEAD_WIDTH)
    assert not kernels.prefers_explicit_attention(q)
    assert kernels.prefers_explicit_attention(q.bfloat16())
    with bf16():
        assert kernels.prefers_explicit_attention(q)


def test_attention_ignores_the_order_of_its_tokens(attention: MultiHeadAttention, tokens: Tensor) -> None:
    order = torch.randperm(TOKENS)
    close(attention(tokens[:, order]), attention(tokens)[:, order])


def test_attention_drops_outputs_and_not_weights(attention: MultiHeadAttention, tokens: Tensor) -> None:
    kept = attention(tokens)
    attention.dropout.p = 0.5
    trained = attention.train()(tokens)
    dropped = trained == 0
    assert dropped.any()
    close(trained[~dropped], 2 * kept[~dropped])


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads 4 does not divide embed_dim 35"):
        MultiHeadAttention(DIM, 4)


# --- The encoder layer -----------------------------------------------------------------------------


OURS_TO_TORCH = {
    "attention.qkv.": "self_attn.in_proj_",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "norm1",
    "feed_forward_norm": "norm2",
    "feed_forward.expand": "linear1",
    "feed_forward.contract": "linear2",
}


def torch_name(name: str) -> str:
    for ours, theirs in OURS_TO_TORCH.items():
        name = name.replace(ours, theirs)
    return name


def layer(*, norm_first: bool = True, dropout: float = 0.0, drop_path: float = 0.0) -> EncoderLayer:
    options = LayerOptions(order="pre" if norm_first else "post")
    built = EncoderLayer(DIM, HEADS, HIDDEN, dropout, options=options, drop_path=drop_path)
    return away_from_initial_values(built)


def torch_layer(ours: EncoderLayer) -> nn.TransformerEncoderLayer:
    theirs = nn.TransformerEncoderLayer(
        DIM, HEADS, HIDDEN, 0.0, "gelu", 1e-6, batch_first=True, norm_first=ours.order == "pre"
    )
    theirs.load_state_dict({torch_name(name): tensor for name, tensor in ours.state_dict().items()})
    return theirs


def named_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        yield name, parameter.grad


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_layer_is_torchs(norm_first: bool, tokens: Tensor) -> None:
    ours = layer(norm_first=norm_first).eval()
    with torch.no_grad():
        close(ours(tokens), torch_layer(ours).eval()(tokens))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_layers_gradients_are_torchs(norm_first: bool, tokens: Tensor) -> None:
    ours = layer(norm_first=norm_first)
    theirs = torch_layer(ours)
    inputs, direction = [tokens.clone().requires_grad_() for _ in range(2)], torch.randn_like(tokens)
    for module, x in zip((ours, theirs), inputs, strict=True):
        (module(x) * direction).mean().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    close(inputs[0].grad, inputs[1].grad)
    expected = dict(named_gradients(theirs))
    for name, gradient in named_gradients(ours):
        close(gradient, expected[torch_name(name)])


def test_feed_forward_is_two_maps_around_the_exact_gelu(tokens: Tensor) -> None:
    mlp = away_from_initial_values(FeedForward(DIM, HIDDEN))
    hidden = tokens @ mlp.expand.weight.T + mlp.expand.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    close(mlp(tokens), gelu @ mlp.contract.weight.T + mlp.contract.bias)


def test_feed_forward_drops_after_each_map(tokens: Tensor) -> None:
    mlp, seen = FeedForward(DIM, HIDDEN, 0.5), []
    mlp.dropout.register_forward_hook(lambda _, __, output: seen.append((output == 0).float().mean().item()))
    mlp(tokens)
    assert seen == [pytest.approx(0.5, abs=0.1)] * 2


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_drop_path_skips_or_doubles_each_branch_of_each_image(norm_first: bool) -> None:
    ours, images = layer(norm_first=norm_first, drop_path=0.5).train(), 400
    x = torch.randn(1, TOKENS, DIM)
    outcomes = [x]
    for norm, f in (
        (ours.attention_norm, ours.attention),
        (ours.feed_forward_norm, ours.feed_forward),
    ):
        outcomes = [
            y + factor * f(norm(y)) if norm_first else norm(y + factor * f(y))
            for y in outcomes
            for factor in (0, 2)
        ]
    trained = ours(x.expand(images, -1, -1))
    matches = torch.stack([torch.isclose(trained, outcome, atol=1e-5).all((1, 2)) for outcome in outcomes])
    assert torch.equal(matches.sum(0), torch.ones(images, dtype=torch.long))
    assert matches.sum(1).min() > images / 4 - 5 * math.sqrt(images * 3 / 16)
    # By subset: exactly half of the images go through each branch.
    through_attention, through_mlp = matches[2:].sum(), matches[1::2].sum()
    assert (through_attention, through_mlp) == (images / 2, images / 2)


@pytest.mark.parametrize("drop_path", [0.25, 0.4, 0.9])
def test_a_branch_keeps_its_expected_value_under_drop_path(drop_path: float) -> None:
    ours = layer(drop_path=drop_path).train()
    x = torch.zeros(8, 1, 1)
    added = [ours.residual(x, lambda x: x + 1) for _ in range(500)]
    assert torch.stack(added).mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.stack(added).mean(0).flatten().tolist() == pytest.approx([1] * 8, abs=0.7)


def test_what_drop_path_drops_is_not_computed() -> None:
    ours, sizes = layer(drop_path=0.75).train(), []
    ours.feed_forward.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    ours(torch.randn(8, TOKENS, DIM))
    assert sizes == [2]


def test_drop_path_does_nothing_in_eval(tokens: Tensor) -> None:
    ours = layer(drop_path=0.9).eval()
    close(ours(tokens), torch_layer(ours).eval()(tokens))
