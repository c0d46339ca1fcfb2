"""The whole model against timm, torchvision and torch, and what compiles, exports and trains."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import VisionTransformer as TorchvisionViT

from tests.parts import OURS_TO_TORCH
from vitral.model.config import ViTConfig
from vitral.model.encoder import EncoderLayer
from vitral.model.vit import Features, VisionTransformer
from vitral.runtime.devices import Placement

BATCH, CHANNELS, PATCH, ROWS, COLUMNS = 2, 3, 4, 5, 7
DIM, LAYERS, HEADS, MLP_RATIO, CLASSES = 44, 3, 11, 1.5, 13
HIDDEN, PATCHES = 66, ROWS * COLUMNS

OPTIONS = {
    "paper": {},
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal_2d": {"position": "sinusoidal_2d"},
    "no positions": {"position": "none"},
    "mean": {"pooling": "mean"},
    "stem": {"stem": (17, 19)},
    "post-norm": {"layer": {"order": "post"}},
    "features": {"num_classes": 0},
    "drop path": {"drop_path": 0.3},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(BATCH, CHANNELS, ROWS * PATCH, COLUMNS * PATCH)


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
        "dropout": 0.0,
    }
    return ViTConfig(**{**sizes, **options})


def initial_model(**options: Any) -> VisionTransformer:
    return VisionTransformer.from_config(config(**options))


@torch.no_grad()
def tiny_model(**options: Any) -> VisionTransformer:
    """In eval mode, its weights, biases and norms all moved away from their initial values."""
    model = initial_model(**options).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def layers_of(model: VisionTransformer) -> list[EncoderLayer]:
    return [layer for layer in model.layers if isinstance(layer, EncoderLayer)]


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- Against other libraries -----------------------------------------------------------------------


OURS_TO_TIMM = {
    "embedding.class_token": "cls_token",
    "embedding.positions.table": "pos_embed",
    "embedding.patches.projection": "patch_embed.proj",
    "layers.": "blocks.",
    "attention_norm": "norm1",
    "feed_forward_norm": "norm2",
    "attention.": "attn.",
    "attn.out": "attn.proj",
    "feed_forward.expand": "mlp.fc1",
    "feed_forward.contract": "mlp.fc2",
}

OURS_TO_TORCHVISION = {
    "embedding.class_token": "class_token",
    "embedding.positions.table": "encoder.pos_embedding",
    "embedding.patches.projection": "conv_proj",
    "layers.": "encoder.layers.encoder_layer_",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
    "attention.qkv.": "self_attention.in_proj_",
    "attention.out": "self_attention.out_proj",
    "feed_forward.expand": "mlp.0",
    "feed_forward.contract": "mlp.3",
    "norm.": "encoder.ln.",
    "head.": "heads.head.",
}


def with_weights_of(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> nn.Module:
    wanted, state = theirs.state_dict(), {}
    for name, tensor in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor.reshape(wanted[name].shape)
    theirs.load_state_dict(state)
    return theirs.eval()


def timm_model(ours: VisionTransformer, **options: Any) -> Any:
    timm = pytest.importorskip("timm.models.vision_transformer")
    theirs = timm.VisionTransformer(
        img_size=ours.config.img_size,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=LAYERS,
        num_heads=HEADS,
        mlp_ratio=MLP_RATIO,
        num_classes=ours.config.num_classes,
        **options,
    )
    return with_weights_of(ours, theirs, OURS_TO_TIMM)


def test_logits_are_timms(images: Tensor) -> None:
    ours = tiny_model()
    close(ours(images), timm_model(ours)(images))


def test_tokens_are_timms(images: Tensor) -> None:
    ours = tiny_model()
    features, theirs = ours.features(images), timm_model(ours).forward_features(images)
    assert features.class_token is not None
    close(features.class_token, theirs[:, 0])
    close(features.patch_tokens, theirs[:, 1:])


def test_layers_outputs_are_timms(images: Tensor) -> None:
    ours = tiny_model()
    theirs = timm_model(ours).forward_intermediates(
        images, intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC"
    )
    layers = ours.features(images, layers=range(LAYERS)).layers
    for index, (patch_tokens, class_token) in enumerate(theirs):
        close(layers[index], torch.cat([class_token, patch_tokens], dim=1))


def test_mean_pooled_logits_are_timms(images: Tensor) -> None:
    ours = tiny_model(pooling="mean")
    theirs = timm_model(ours, global_pool="avg", class_token=False, fc_norm=False)
    close(ours(images), theirs(images))


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_features_without_a_head_are_timms(pooling: str, images: Tensor) -> None:
    ours = tiny_model(num_classes=0, pooling=pooling)
    options = {} if pooling == "class" else {"global_pool": "avg", "class_token": False, "fc_norm": False}
    pooled = ours(images)
    assert pooled.shape == (BATCH, DIM)
    close(pooled, timm_model(ours, **options)(images))


def test_gradients_are_timms(images: Tensor) -> None:
    ours = tiny_model()
    theirs, direction = timm_model(ours), torch.randn(BATCH, CLASSES)
    for model in (ours, theirs):
        (model(images) * direction).mean().backward()
    our_weight, their_weight = ours.embedding.patches.projection.weight, theirs.patch_embed.proj.weight
    assert our_weight.grad is not None
    close(our_weight.grad, their_weight.grad)


def test_drop_path_rates_are_timms() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    theirs = timm.VisionTransformer(28, 7, embed_dim=DIM, depth=5, num_heads=HEADS, drop_path_rate=0.3)
    ours = initial_model(num_layers=5, drop_path=0.3)
    assert rates(ours) == pytest.approx(
        [getattr(block.drop_path1, "drop_prob", 0) for block in theirs.blocks]
    )


def test_logits_are_torchvisions() -> None:
    ours = tiny_model(img_size=28)
    theirs = TorchvisionViT(28, PATCH, LAYERS, HEADS, DIM, HIDDEN, num_classes=CLASSES)
    with_weights_of(ours, theirs, OURS_TO_TORCHVISION)
    images = torch.randn(BATCH, CHANNELS, 28, 28)
    close(ours(images), theirs(images))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_is_torchs(norm_first: bool) -> None:
    ours, tokens = (
        tiny_model(layer={"order": "pre" if norm_first else "post"}),
        torch.randn(BATCH, PATCHES + 1, DIM),
    )
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, HIDDEN, 0.0, "gelu", 1e-6, batch_first=True, norm_first=norm_first
    )
    last_norm = nn.LayerNorm(DIM, eps=1e-6) if norm_first else None
    theirs = nn.TransformerEncoder(layer, LAYERS, last_norm, enable_nested_tensor=False)
    encoder = nn.ModuleDict({"layers": ours.layers, "norm": ours.norm})
    close(ours.encode(tokens), with_weights_of(encoder, theirs, OURS_TO_TORCH)(tokens))


# --- Shapes and options ------------------------------------------------------------------------------


def test_the_papers_nine_numbers_come_first_with_vit_base_defaults() -> None:
    parameters = list(inspect.signature(VisionTransformer).parameters.values())
    assert [(p.name, p.default) for p in parameters[:9]] == [
        ("img_size", 224),
        ("patch_size", 16),
        ("in_channels", 3),
        ("embed_dim", 768),
        ("num_layers", 12),
        ("num_heads", 12),
        ("mlp_ratio", 4),
        ("num_classes", 1000),
        ("dropout", 0.1),
    ]


def test_config_and_model_have_the_same_defaults() -> None:
    with torch.device("meta"):
        assert VisionTransformer().config == ViTConfig()


@every_option
def test_one_row_of_logits_an_image(options: dict[str, Any], images: Tensor) -> None:
    model = tiny_model(**options)
    assert model(images).shape == (BATCH, model.config.num_classes or DIM)


@every_option
def test_a_model_remembers_the_config_it_was_built_from(options: dict[str, Any]) -> None:
    assert initial_model(**options).config == config(**options)


@every_option
def test_an_images_logits_do_not_depend_on_its_batch(options: dict[str, Any], images: Tensor) -> None:
    model = tiny_model(**options)
    close(model(images)[1:], model(images[1:]))


def test_mean_pooling_averages_the_patch_tokens(images: Tensor) -> None:
    model = tiny_model(pooling="mean", num_classes=0)
    tokens = model.features(images).patch_tokens
    close(model(images), torch.einsum("bnd->bd", tokens) / PATCHES)


def test_class_pooling_is_the_class_token(images: Tensor) -> None:
    model = tiny_model(num_classes=0)
    assert_close(model(images), model.features(images).class_token)


READ_BY_CLASS_TOKEN = {
    "paper": {},
    "post-norm": {"layer": {"order": "post"}},
    "residual post-norm": {"layer": {"order": "residual_post", "layer_scale": 0.3}},
    "parallel": {"layer": {"order": "parallel"}},
    "rotary": {"layer": {"attention": {"rotary": {"kind": "mixed"}, "qk_norm": True}}},
    "relative": {"layer": {"attention": {"relative_bias": "layer"}}},
    "registers": {"embedding": {"register_tokens": 2}},
    "distilled": {"embedding": {"distillation_token": True}, "head": {"distillation_head": True}},
    "a layer": {"num_layers": 1},
    "drop path": {"drop_path": 0.3},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("options", READ_BY_CLASS_TOKEN.values(), ids=READ_BY_CLASS_TOKEN.keys())
def test_of_the_last_layer_only_what_the_head_reads_is_computed(
    options: dict[str, Any], kept: bool, training: bool, images: Tensor
) -> None:
    sizes = {"embed_dim": 48, "num_heads": 4}  # rotary heads are of four channels or eight
    model = tiny_model(**{**sizes, **options}).train(training)
    model.checkpoint_layers = kept
    given: list[int] = []
    model.norm.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].shape[1]))

    def outcome(forward: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)  # for stochastic depth
        model.zero_grad()
        logits = forward()
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    ours = outcome(lambda: model(images))
    whole = outcome(lambda: model.classify(model.encode(model.embedding(images))))
    for ours_part, whole_part in zip(ours, whole, strict=True):
        assert_close(ours_part, whole_part, rtol=1e-4, atol=1e-4)
    assert given == [model.num_tokens_read, PATCHES + model.config.num_prefix_tokens]


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_scales_do_not_widen_the_stream(drop_path: float, images: Tensor) -> None:
    placement = Placement(torch.device("cpu"), torch.bfloat16)
    model = placement.place(initial_model(layer={"layer_scale": 0.1}, drop_path=drop_path), training=True)
    types: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, output: types.append(output.dtype))
    with placement.autocast():
        model.train()(images)
    assert types == [torch.bfloat16] * LAYERS


def test_hooks_see_every_part_of_every_layer(images: Tensor) -> None:
    model, seen = tiny_model(), []
    for name, module in model.layers.named_modules():
        if not isinstance(module, nn.Identity) and name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(images)
    parts = {name for name, module in model.layers.named_modules() if not isinstance(module, nn.Identity)}
    assert parts - {""} == set(seen)


@pytest.mark.parametrize("pooling", ["mean", "class_mean", "map"])
def test_a_head_that_reads_all_tokens_has_them_all(pooling: str) -> None:
    assert initial_model(pooling=pooling, embedding={"class_token": True}).num_tokens_read is None


def test_without_positions_the_order_of_patches_does_not_matter(images: Tensor) -> None:
    rolled = images.roll(PATCH, dims=3)
    unordered, ordered = tiny_model(position="none"), tiny_model()
    close(unordered(rolled), unordered(images))
    assert not torch.allclose(ordered(rolled), ordered(images), atol=1e-2)


def test_post_norm_has_no_further_norm() -> None:
    assert isinstance(initial_model(layer={"order": "post"}).norm, nn.Identity)


@pytest.mark.parametrize("images_shape", [(2, 3, 20, 27), (2, 1, 20, 28), (3, 20, 28)])
@pytest.mark.parametrize("stem", [(), (17, 19)], ids=["pure", "stem"])
def test_another_image_shape_is_refused(images_shape: tuple[int, ...], stem: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"images are \(.*\); this model takes \(batch, 3, height, width\).*4\. Resize"
    ):
        tiny_model(stem=stem)(torch.zeros(images_shape))


# --- Features ----------------------------------------------------------------------------------------


def test_features_are_the_tokens_behind_the_logits(images: Tensor) -> None:
    model = tiny_model()
    features = model.features(images)
    assert features.class_token is not None
    close(model(images), model.head(features.class_token))


def test_features_lay_patches_on_the_grid(images: Tensor) -> None:
    features = tiny_model().features(images)
    assert features.grid == (ROWS, COLUMNS)
    assert features.patch_tokens.shape == (BATCH, ROWS * COLUMNS, DIM)


def test_mean_pooling_features_have_no_class_token(images: Tensor) -> None:
    features = tiny_model(pooling="mean").features(images)
    assert features.class_token is None
    assert features.patch_tokens.shape == (BATCH, PATCHES, DIM)


def test_layers_are_as_hooks_see_them(images: Tensor) -> None:
    model, seen = tiny_model(), {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, __, output, index=index: seen.update({index: output}))
    features = model.features(images, layers=[0, 2])
    assert list(features.layers) == [0, 2]
    for index, output in features.layers.items():
        assert torch.equal(output, seen[index])


def test_negative_layers_count_from_the_end(images: Tensor) -> None:
    layers = tiny_model().features(images, layers=[-1, LAYERS - 1, -LAYERS, 0]).layers
    assert list(layers) == [-1, LAYERS - 1, -LAYERS, 0]
    assert torch.equal(layers[-1], layers[LAYERS - 1])
    assert torch.equal(layers[-LAYERS], layers[0])


def test_layers_come_before_the_final_norm(images: Tensor) -> None:
    model = tiny_model()
    features = model.features(images, layers=[-1])
    close(model.norm(features.layers[-1])[:, 1:], features.patch_tokens)


@pytest.mark.parametrize("index", [LAYERS, -LAYERS - 1])
def test_a_layer_that_is_not_there_is_refused(index: int, images: Tensor) -> None:
    with pytest.raises(IndexError, match=f"there is no layer {index}; this model has 0 to 2"):
        tiny_model().features(images, layers=[index])


def test_features_cannot_be_changed(images: Tensor) -> None:
    features = tiny_model().features(images)
    assert isinstance(features, Features)
    with pytest.raises(dataclasses.FrozenInstanceError):
        features.grid = (1, 1)  # pyrefly: ignore


# --- Stochastic depth ----------------------------------------------------------------------------------


def rates(model: VisionTransformer) -> list[float]:
    return [layer.drop_path for layer in layers_of(model)]


def test_drop_path_grows_linearly_with_depth() -> None:
    assert rates(initial_model(num_layers=5, drop_path=0.4)) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_one_layer_alone_is_never_dropped() -> None:
    assert rates(initial_model(num_layers=1, drop_path=0.4)) == [0]


def test_drop_path_and_dropout_do_nothing_in_eval(images: Tensor) -> None:
    regularized = tiny_model(drop_path=0.9, dropout=0.9)
    plain = tiny_model()
    plain.load_state_dict(regularized.state_dict())
    assert torch.equal(regularized(images), plain(images))
    assert not torch.equal(regularized.train()(images), plain(images))


def test_dropout_follows_the_embedding_attention_and_mlp_alike() -> None:
    dropouts = [m.p for m in initial_model(dropout=0.3).modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.3] * (1 + 2 * LAYERS)


# --- Initialization ------------------------------------------------------------------------------------


def test_linear_maps_start_normal_with_std_a_fiftieth_and_no_bias() -> None:
    model = initial_model(embed_dim=440, num_classes=440, patch_size=PATCH)
    projection = model.embedding.patches.projection
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4 * LAYERS + 1
    for map_ in (projection, *linears):
        assert map_.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert map_.weight.mean().item() == pytest.approx(0, abs=1e-3)
        assert map_.bias is not None
        assert not map_.bias.any()


def test_norms_start_as_the_identity() -> None:
    norms = [module for module in initial_model().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * LAYERS + 1
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones(DIM))
        assert torch.equal(norm.bias, torch.zeros(DIM))


def test_norms_add_the_epsilon_of_googles_models() -> None:
    epsilons = {module.eps for module in initial_model().modules() if isinstance(module, nn.LayerNorm)}
    assert epsilons == {1e-6}


def test_layers_start_different_from_each_other() -> None:
    first, second, third = layers_of(initial_model())
    for one, other in ((first, second), (second, third), (first, third)):
        assert not torch.equal(one.attention.qkv.weight, other.attention.qkv.weight)


@every_option
def test_a_seed_decides_all_weights(options: dict[str, Any]) -> None:
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        states.append(initial_model(**options).state_dict())
    same, again, other = states
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(
        same["layers.2.feed_forward.expand.weight"], other["layers.2.feed_forward.expand.weight"]
    )


def test_initialize_leaves_nothing_of_the_old_weights() -> None:
    model = tiny_model(stem=(17, 19))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_new_head_has_the_new_classes_and_leaves_the_body(images: Tensor) -> None:
    model = tiny_model()
    before = model.features(images).class_token
    model.reset_classifier(23)
    assert model(images).shape == (BATCH, 23)
    assert model.config == config(num_classes=23)
    assert_close(model.features(images).class_token, before)


def test_replacing_the_head_by_none_gives_features(images: Tensor) -> None:
    model = tiny_model()
    model.reset_classifier(0)
    assert_close(model(images), model.features(images).class_token)


def test_a_new_head_computes_in_the_models_type(images: Tensor) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.reset_classifier(23)
    assert model(images.bfloat16()).dtype == torch.bfloat16


# --- Training, compiling, exporting -----------------------------------------------------------------------


@every_option
def test_gradients_reach_every_parameter(options: dict[str, Any], images: Tensor) -> None:
    model = tiny_model(**options)
    outputs = model(images)
    (outputs * torch.randn_like(outputs)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def in_one_graph(model: nn.Module, backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@every_option
def test_compiles_into_one_graph(options: dict[str, Any], images: Tensor) -> None:
    model = tiny_model(**options)
    close(in_one_graph(model, "eager")(images), model(images))


def test_compiles_its_training_step_into_one_graph(images: Tensor) -> None:
    model = tiny_model(dropout=0.1, drop_path=0.1).train()
    in_one_graph(model, "aot_eager")(images).sum().backward()
    assert model.embedding.patches.projection.weight.grad is not None


def test_compiles_under_autocast_into_one_graph(images: Tensor) -> None:
    model = tiny_model()
    compiled = in_one_graph(model, "aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(compiled(images), model(images))


@pytest.mark.slow
def test_compiles_with_inductor(images: Tensor) -> None:
    model = tiny_model()
    close(in_one_graph(model, "inductor")(images), model(images))


@every_option
def test_exports_for_any_batch_size(options: dict[str, Any], images: Tensor) -> None:
    model = tiny_model(**options)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more_images = torch.randn(5, *images.shape[1:])
    close(program.module()(more_images), model(more_images))


@every_option
def test_bf16_autocast_agrees_to_what_bf16_allows(options: dict[str, Any], images: Tensor) -> None:
    model = initial_model(**options).eval()
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images).float()
    assert (rounded - exact).norm() < 4 * 2**-8 * exact.norm()


@every_option
def test_autocast_keeps_tokens_in_float32_between_layers(options: dict[str, Any], images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layers = tiny_model(**options).features(images, layers=range(LAYERS)).layers
    assert {output.dtype for output in layers.values()} == {torch.float32}


# --- The config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"img_size": 0}, r"img_size is \(0, 0\); height and width must be at least 1"),
        ({"img_size": (32, -32)}, r"img_size is \(32, -32\); height and width must be at least 1"),
        ({"patch_size": 0}, "patch_size is 0; it must be at least 1"),
        ({"in_channels": 0}, "in_channels is 0; it must be at least 1"),
        ({"embed_dim": -1}, "embed_dim is -1; it must be at least 1"),
        ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"img_size": 8192, "patch_size": 4}, "gives 4,194,304 patches of 4 pixels; a model takes 262,144"),
        ({"mlp_ratio": 0}, "hidden_dim is 0; it must be at least 1"),
        ({"num_classes": -1}, "num_classes is -1; it must be 0 "),
        ({"dropout": 1.0}, "dropout is 1.0; it must be from 0 to below 1"),
        ({"drop_path": -0.1}, "drop_path is -0.1; it must be from 0 to below 1"),
        ({"pooling": "max"}, "pooling is 'max'; it must be one of class, mean"),
        (
            {"position": "rotary"},
            "position is 'rotary'; it must be one of learned, sinusoidal, sinusoidal_2d, none",
        ),
    ],
)
def test_config_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ViTConfig(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 7}, "num_heads is 7; it must divide embed_dim 44"),
        ({"img_size": (20, 30)}, "img_size is 20x30, which patch_size 4 does not divide"),
        ({"stem": (17, 19, 23)}, "patch_size is 4; it must be a multiple of 8, by which the 3-stage stem"),
        ({"position": "sinusoidal_2d", "embed_dim": 55}, "embed_dim is 55; for 2-D"),
    ],
)
def test_model_refuses_numbers_that_do_not_fit_each_other(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        initial_model(**options)


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        VisionTransformer(depth=12)  # pyrefly: ignore


def test_one_number_names_a_square_image() -> None:
    assert config(img_size=28) == config(img_size=(28, 28))


def test_hidden_width_is_the_ratio_times_the_width() -> None:
    assert config().hidden_dim == HIDDEN


def test_config_knows_the_grid() -> None:
    assert config().grid_size == (ROWS, COLUMNS)


def test_another_pooling_than_the_models_own_is_that_of_its_tokens() -> None:
    model = VisionTransformer(16, 8, embed_dim=12, num_layers=1, num_heads=3, num_classes=2).eval()
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(model.pool(tokens, "mean"), tokens[:, 1:].sum(1) / 4)
    torch.testing.assert_close(model.pool(tokens), tokens[:, 0])
    with pytest.raises(ValueError, match="pooling is 'map', and this model has no attention pooling"):
        model.pool(tokens, "map")
