"""Token merging: against a merge by hand, one in numpy, and attention over tokens that never merged."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitral
from tests.parts import away_from_initial_values, close
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli import app as cli
from vitral.images.preprocess import Preprocess
from vitral.inference import features
from vitral.inference.classifier import as_classifier
from vitral.model.encoder import EncoderLayer
from vitral.model.merging import LayerMerge, Merging, log_sizes, match, merging_in, plan
from vitral.model.positions.relation import NO_RELATION
from vitral.model.positions.rotary import RotaryPositions
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "no positions": {"position": "none"},
    "registers": {"embedding": {"register_tokens": 4}},
    "mean": {"pooling": "mean"},
    "mean of all": {"pooling": "mean", "embedding": {"register_tokens": 2}, "head": {"pool_prefix": True}},
    "class and mean": {"pooling": "class_mean"},
    "map": {"pooling": "map"},
    "map that sees the class token": {
        "pooling": "map", "head": {"pool_prefix": True}, "embedding": {"class_token": True}
    },
    "distilled": {"embedding": {"distillation_token": True}, "head": {"distillation_head": True}},
    "rotary": {"pooling": "mean", "layer": {"attention": {"rotary": {}}}},
    "rotary halves": {
        "layer": {"attention": {"rotary": {"halves": True, "places": "centered"}}},
        "embedding": {"register_tokens": 4},
    },
    "mixed rotary": {"pooling": "class_mean", "layer": {"attention": {"rotary": {"kind": "mixed"}}}},
    "post-norm": {"layer": {"order": "post"}, "pooling": "mean"},
    "residual post-norm": {"layer": {"order": "residual_post"}, "pooling": "mean"},
    "norms in attention": {"layer": {"attention": {"norm": True, "qk_norm": True}}},
}  # fmt: skip
SIZE, GRID = (12, 20), (3, 5)  # an odd number of patches, 15
LAYERS = 3


def build(kind: str = "paper", **more: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(SIZE, 4, 3, 24, LAYERS, 3, 2, 7, 0.1, **(KINDS[kind] | more))
    return away_from_initial_values(model).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(3))


# --- One merge -------------------------------------------------------------------------------------


def test_a_merge_by_hand() -> None:
    # Patches 0 to 4 point to 0, 90, 8, 10 and 80 degrees; even are 0, 2, 4 and odd 1, 3. Best of each: 0 and
    # 3 (10 degrees apart), 2 and 3 (2), 4 and 1 (10, but longer keys do not matter). One pair: 2 into 3.
    degrees = torch.tensor([0.0, 90.0, 8.0, 10.0, 80.0])
    keys = torch.stack([torch.cos(degrees.deg2rad()), torch.sin(degrees.deg2rad())], dim=1)
    keys *= torch.tensor([1.0, 5.0, 2.0, 3.0, 1.0])[:, None]
    # A class token whose key is that of patch 3 does not merge. Two heads whose mean is the key.
    tokens = torch.tensor([[100.0], [1.0], [2.0], [3.0], [4.0], [5.0]])[None]
    keys = torch.cat([keys[3:4], keys])[None]
    heads = torch.stack([keys + 0.5, keys - 0.5], dim=1)
    sizes = torch.tensor([[1.0, 1.0, 1.0, 3.0, 1.0, 2.0]])
    merge = LayerMerge(1, 1, sizes, places_BT2=torch.arange(12.0).view(6, 2))
    merge.see(heads)
    merged = merge(tokens)
    # (3 patches of value 3 and one of 4) / 4 = 3.25; the class token, even ones that stay, odd ones.
    close(merged, torch.tensor([[[100.0], [1.0], [5.0], [2.0], [3.25]]]))
    close(merge.sizes_BT_after, torch.tensor([[1.0, 1.0, 2.0, 1.0, 4.0]]))
    assert merge.places_BT2_after is not None
    close(merge.places_BT2_after[0, -1], (3 * torch.tensor([6.0, 7.0]) + torch.tensor([8.0, 9.0])) / 4)
    assert merge.before(torch.arange(5)[None]).tolist() == [[0, 1, 3, 4, 4, 2]]


def merged_by_numpy(
    tokens: np.ndarray, sizes: np.ndarray, keys: np.ndarray, count: int, prefix: int
) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """One image: tokens (T, D), sizes (T,) and keys (T, K) -> what is left, and which tokens each was."""
    even, odd = range(prefix, len(tokens), 2), range(prefix + 1, len(tokens), 2)
    pairs = []
    for i in even:
        cosines = [keys[i] @ keys[j] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[j]) for j in odd]
        pairs.append((max(cosines), i, odd[int(np.argmax(cosines))]))
    joins = {i: j for _, i, j in sorted(pairs, reverse=True)[:count]}
    groups = [[index] for index in range(prefix)]
    groups += [[i] for i in even if i not in joins]
    groups += [[j, *(i for i, into in joins.items() if into == j)] for j in odd]
    means = [np.average(tokens[group], axis=0, weights=sizes[group]) for group in groups]
    return np.stack(means), np.array([sizes[group].sum() for group in groups]), groups


@pytest.mark.parametrize("patches", [2, 9, 16])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_merges_are_those_of_numpy(patches: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(patches)
    tokens = torch.randn(3, prefix + patches, 6, generator=generator, dtype=torch.float64)
    sizes = torch.ones(3, prefix + patches, dtype=torch.float64)
    expected_index = None
    for count in filter(None, merging_in([4, 3, 2], patches)):
        keys = torch.randn(3, 2, tokens.shape[1], 5, generator=generator, dtype=torch.float64)
        merge = LayerMerge(count, prefix, sizes, None)
        merge.see(keys)
        merged = merge(tokens)
        assert merged.shape[1] == tokens.shape[1] - count
        index = merge.before(torch.arange(merged.shape[1]).expand(3, -1))
        for image in range(3):
            mean_key = keys[image].mean(0).numpy()
            values, whole, groups = merged_by_numpy(
                tokens[image].numpy(), sizes[image].numpy(), mean_key, count, prefix
            )
            close(merged[image], torch.from_numpy(values))
            close(merge.sizes_BT_after[image], torch.from_numpy(whole).float())
            expected_index = {token: new for new, group in enumerate(groups) for token in group}
            assert index[image].tolist() == [expected_index[token] for token in range(len(tokens[image]))]
        assert torch.equal(merge.sizes_BT_after.sum(1), torch.full((3,), prefix + patches).float())
        tokens, sizes = merged, merge.sizes_BT_after.double()


def test_what_does_not_merge_keeps_every_bit() -> None:
    tokens = torch.randn(2, 10, 6)
    merge = LayerMerge(2, 1, None, None)
    merge.see(torch.randn(2, 3, 10, 5))
    merged = merge(tokens)
    back = merged.gather(1, merge.before(torch.arange(8).expand(2, -1))[:, :, None].expand(-1, -1, 6))
    same = (back == tokens).all(2)
    assert (same.sum(1) >= 10 - 4).all()
    assert same[:, 0].all()


# --- A whole pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_to_merge_nothing_changes_no_bit(kind: str) -> None:
    model = build(kind)
    with torch.inference_mode():
        expected, features = model(images()), model.features(images()).patch_tokens
        for nothing in (0, [0] * LAYERS):
            model.merge_tokens(nothing)
            assert torch.equal(model(images()), expected)
            assert torch.equal(model.features(images()).patch_tokens, features)
        model.merge_tokens(2)
        assert not torch.allclose(model(images()), expected)
        model.merge_tokens(None)
        assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_merged_answer_as_their_patches_would(kind: str) -> None:
    """The head reads sizes, or as many tokens as there were patches: two routes to one answer."""
    model = build(kind)
    model.merge_tokens("5..1")
    with torch.inference_mode():
        logits = model(images(3))
        encoded = model.encode(model.embedding(images(3)))
        close(model.classify(encoded), logits)
        features = model.features(images(3), layers=(0, 1, -1))
    prefix = model.config.num_prefix_tokens
    assert features.patch_tokens.shape == (3, 15, 24)
    counts = {index: len(features.layers[index][0, prefix:].unique(dim=0)) for index in (0, 1, -1)}
    assert counts == {0: 10, 1: 7, -1: 6 if model.num_tokens_read is None else 7}


def twins(model: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Tokens of which each even patch is its odd neighbour too, and the places of both, which are one."""
    prefix, count = model.config.num_prefix_tokens, GRID[0] * GRID[1] // 2
    index_T = torch.cat([torch.arange(prefix), prefix + torch.arange(count).repeat_interleave(2)])
    return torch.randn(2, prefix + count, 24)[:, index_T], index_T


@pytest.mark.parametrize("kind", KINDS)
def test_twins_merge_without_a_loss(kind: str) -> None:
    """Attention in proportion to sizes is attention over all of them, exactly (ToMe, eq. 1)."""
    model = build(kind)
    tokens_BTD, index_T = twins(model)
    relations = [
        relation.of_tokens(index_T.expand(2, -1)) for relation in model.relations_of_layers(tokens_BTD)
    ]
    rotaries = [found for found in model.relations if isinstance(found, RotaryPositions)]
    places = rotaries[0].places(GRID, torch.device("cpu"))[index_T] if rotaries else None
    rotaries = rotaries if len(rotaries) == LAYERS else rotaries * LAYERS
    merging = Merging([5, 0, 0], model.config.num_prefix_tokens, rotaries, places)
    with torch.inference_mode():
        expected_BTD = model.encode(tokens_BTD, relations=relations)
        z_BTD = tokens_BTD
        for index, layer in enumerate(model.layers):
            z_BTD = layer(z_BTD, merging.relation(index, relations[index]))
        z_BTD = model.norm(z_BTD)
        assert z_BTD.shape[1] == tokens_BTD.shape[1] - 5
        close(merging.unmerged(z_BTD), expected_BTD)
        close(model.classify(z_BTD, merging.sizes_BT), model.classify(expected_BTD))
        assert merging.sizes_BT is not None
        ignored = torch.ones_like(merging.sizes_BT)  # not by chance
        if model.num_tokens_read is None:
            assert not torch.allclose(model.classify(z_BTD, ignored), model.classify(expected_BTD), atol=1e-4)


@pytest.mark.parametrize("kind", ["rotary halves", "mixed rotary"])
def test_a_merged_token_stands_between_its_patches(kind: str) -> None:
    """The mean of two places turns by the mean of their angles."""
    rotary = build(kind).relations[-1]
    assert isinstance(rotary, RotaryPositions)
    places_T2 = rotary.places(GRID, torch.device("cpu"))
    table = rotary(GRID, torch.device("cpu")).rotation
    assert table is not None
    whole = rotary.rotation(places_T2.expand(2, -1, -1))
    close(whole.cos[1], table.cos.expand_as(whole.cos[1]))
    close(whole.sin[0], table.sin.expand_as(whole.sin[0]))
    halfway = rotary.rotation((places_T2[None, -2:-1] + places_T2[None, -1:]) / 2)
    both = [torch.complex(whole.cos[:1, :, token], whole.sin[:1, :, token]) for token in (-2, -1)]
    close(torch.complex(halfway.cos, halfway.sin)[:, :, 0] ** 2, both[0] * both[1])


@pytest.mark.parametrize("kind", ["paper", "registers", "map", "mixed rotary"])
def test_sizes_add_up_to_the_patches_and_prefix_tokens_stay(kind: str) -> None:
    model = build(kind)
    prefix = model.config.num_prefix_tokens
    counts = merging_in([3, 100, 100], 15)
    assert counts == [3, 6, 3]
    rotaries = [found for found in model.relations if isinstance(found, RotaryPositions)]
    places = rotaries[0].places(GRID, torch.device("cpu")) if rotaries else None
    merging = Merging(counts, prefix, rotaries, places)
    relations = model.relations_of_layers(model.embedding(images()))
    with torch.inference_mode():
        z_BTD = model.embedding(images())
        for index, layer in enumerate(model.layers):
            z_BTD = layer(z_BTD, merging.relation(index, relations[index]))
            assert merging.sizes_BT is not None
            assert torch.equal(merging.sizes_BT[:, :prefix], torch.ones(2, prefix))
            assert torch.equal(merging.sizes_BT.sum(1), torch.full((2,), 15.0 + prefix))
    assert z_BTD.shape[1] == prefix + 3


def test_proportional_attention_is_eq_1_of_the_paper() -> None:
    layer = build("paper").layers[0]
    assert isinstance(layer, EncoderLayer)
    tokens, sizes = torch.randn(2, 6, 24), torch.tensor([[1.0, 2, 1, 4, 1, 3]]).expand(2, -1)
    with torch.inference_mode():
        plain = layer.attention.weights(tokens, tokens)
        weighted = layer.attention.weights(tokens, tokens, NO_RELATION._replace(bias_ATT=log_sizes(sizes)))
        expected = plain * sizes[:, None, None]
        close(weighted, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_patch_and_weight(kind: str) -> None:
    model = build(kind).train()
    model.merge_tokens(4)
    pixels = images().requires_grad_()
    model(pixels).square().sum().backward()
    assert pixels.grad is not None
    patches = pixels.grad.unflatten(2, (3, 4)).unflatten(4, (5, 4)).abs().sum(dim=(1, 3, 5))
    assert (patches > 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", ["mixed rotary", "mean"])
def test_layers_that_are_computed_again_merge_again(kind: str) -> None:
    model = build(kind).train()
    model.merge_tokens(3)
    gradients = []
    for again in (False, True):
        model.checkpoint_layers = again
        model.zero_grad()
        torch.manual_seed(1)  # of dropout
        model(images()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for once, twice in zip(*gradients, strict=True):
        close(once, twice)


def test_similarity_is_float32_under_autocast() -> None:
    model = build("mean")
    model.merge_tokens(4)
    seen: list[torch.dtype] = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = model(images())
        product = torch.ones(1, 1) @ torch.ones(1, 1)
        seen.append(product.dtype)
    assert seen == [torch.bfloat16]  # autocast is as it was
    assert half.isfinite().all()
    merge = LayerMerge(2, 0, None, None)
    keys = torch.randn(1, 1, 40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        merge.see(keys)
        merged = merge(torch.randn(1, 40, 8))
    assert merged.dtype == torch.float32
    found = match(keys[:, 0], 2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(merge.match, found, strict=True))


# --- What may be asked for -------------------------------------------------------------------------


def test_plans() -> None:
    assert plan(8, 3) == plan("8", 3) == (8, 8, 8)
    assert plan("16..0", 5) == (16, 12, 8, 4, 0)
    assert plan("4..8", 1) == (4,)
    assert plan("3,2,0", 3) == plan([3, 2, 0], 3) == (3, 2, 0)
    for r in (5, 8, 13):  # 2 r falling to 0 merges as many as r in each layer
        assert math.isclose(sum(plan(f"{2 * r}..0", 12)), 12 * r, abs_tol=1)
    assert merging_in([10, 10, 10], 16) == [8, 4, 2]
    assert merging_in([0, 3, 1], 2) == [0, 1, 0]


@pytest.mark.parametrize("wrong", [-1, "many", "", "8..", "8,,8", [1, 2.5, 3], True, "1,-2,3", object()])
def test_plans_that_say_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"merge is .*; it must say how many patches merge in a layer"):
        plan(wrong, 3)


def test_a_list_is_of_every_layer() -> None:
    with pytest.raises(ValueError, match="merge lists 2 layers, and the model has 3"):
        build().merge_tokens([1, 2])


def test_the_last_layer_merges_only_what_is_read() -> None:
    class_token, pooled = build("paper"), build("mean")
    for model in (class_token, pooled):
        model.merge_tokens(4)
    assert class_token.merge == (4, 4, 0)
    assert pooled.merge == (4, 4, 4)


def test_models_whose_tokens_cannot_merge_say_so() -> None:
    relative = build(layer={"attention": {"relative_bias": "shared"}})
    with pytest.raises(ValueError, match="relative biases"):
        relative.merge_tokens(2)
    with pytest.raises(ValueError, match="side by side"):
        build(layer={"order": "parallel"}).merge_tokens(2)
    deep = build(drop_path=0.6).train()
    deep.merge_tokens(2)
    with pytest.raises(ValueError, match="set drop_path to 0"):
        deep(images(8))
    assert deep.eval()(images()).isfinite().all()


# --- As users meet it ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "saved", Checkpoint(build("registers"), Preprocess(SIZE), tuple("abcdefg")))
    return tmp_path / "saved"


def picture(folder: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return str(folder / "a.png")


def test_a_loaded_model_merges_and_its_files_stay(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    merged, plain = vitral.load(folder, merge="4..0", device="cpu"), vitral.load(folder, device="cpu")
    assert "merge, by layer 4, 2, 0" in repr(merged)
    assert "merge" not in repr(plain)
    image = picture(folder.parent)
    assert not torch.allclose(merged.logits(image), plain.logits(image))
    expected = build("registers")
    expected.merge_tokens([4, 2, 0])
    with torch.inference_mode():
        close(merged.logits(image), expected(next(plain.batches([image], 1))))
    assert merged.features(image).patch_tokens.shape == plain.features(image).patch_tokens.shape
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_cached_features_are_of_one_plan(folder: Path) -> None:
    keys = {
        features._keys(vitral.load(folder, merge=merge, device="cpu"), [-1])[-1] for merge in (None, 0, 2, 3)
    }
    assert len(keys) == 3  # to merge none is not to merge


def test_what_needs_every_patch_refuses_a_merged_model(folder: Path) -> None:
    merged = vitral.load(folder, merge=2, device="cpu")
    refused = "are of every patch, and this model merges some; load it without merge"
    with pytest.raises(VitralError, match=refused):
        vitral.Inside(merged)
    with pytest.raises(VitralError, match=refused):
        vitral.draw_figures(merged, folder.parent / "figures")
    with pytest.raises(VitralError, match="it must say how many patches merge in a layer"):
        vitral.load(folder, merge="some")
    with pytest.raises(VitralError, match="tokens cannot merge in a model with relative biases"):
        vitral.info("Conv+ViT-Pico/4", img_size=32, merge=2)


def test_modules_of_the_users_own_do_not_merge(tmp_path: Path) -> None:
    module: Any = torch.nn.Linear(2, 7)
    with pytest.raises(VitralError, match="tokens merge in Vitral's own models only; use the Linear without"):
        as_classifier(
            Checkpoint(module, Preprocess(SIZE), tuple("abcdefg")), Placement.choose("cpu"), merge=2
        )


def test_the_command_line_merges(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(folder.parent)
    said: list[tuple[Any, str, str]] = []
    for words in (["--merge", "4..0"], [], ["--merge", "x"]):
        monkeypatch.setattr(
            sys, "argv", ["vitral", "predict", str(folder), image, "--json", "--device", "cpu", *words]
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        said.append((ended.value.code, captured.out, captured.err))
    merged, plain, wrong = said
    top = dict(vitral.load(folder, merge="4..0", device="cpu").predict(image, top=3)[0].top)
    found = {row["label"]: row["probability"] for row in json.loads(merged[1])["top"]}
    assert found == pytest.approx(top, abs=1e-6)
    assert merged[1] != plain[1]
    assert wrong[0] == 1
    assert wrong[2].count("\n") == 1
    assert "merge is 'x'" in wrong[2]


# --- In other engines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "rotary halves",  # five prefix tokens
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("registers", "map", "mixed rotary", "mean")
        ),
    ],
)
@pytest.mark.slow  # tests/test_export.py has one that is quick
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_models_merge_alike(kind: str, tmp_path: Path) -> None:
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    model = build(kind).requires_grad_(False)
    model.merge_tokens("5..2")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(program, dynamo=True, external_data=False, verbose=False).save(file)  # pyrefly: ignore
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    single = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", single)
    for count in (1, 3, 8):
        with torch.inference_mode():
            expected = model(images(count))
            close(program.module()(images(count)), expected)
        pixels = images(count).numpy()
        (by_onnx,) = session.run(None, {session.get_inputs()[0].name: pixels})
        for answered in (by_onnx, compiled(pixels)[0]):
            assert float((torch.from_numpy(answered) - expected).abs().max() / expected.abs().max()) <= 1e-5
