"""What is written is what is read, bit for bit; and a bad file is named, not loaded."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitral.checkpoints.folder import (
    Checkpoint,
    is_model_folder,
    load_checkpoint,
    save_checkpoint,
)
from vitral.images.preprocess import Preprocess
from vitral.model.config import LayerOptions
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

LABELS = ("ant", "bee", "cat")


def tiny(**options: Any) -> VisionTransformer:
    numbers = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
    settings: dict[str, Any] = {**numbers, "num_classes": 3, **options}
    return VisionTransformer(**settings).eval()


def positions(model: VisionTransformer) -> Tensor:
    return model.state_dict()["embedding.positions.table"]


def saved(folder: Path, model: VisionTransformer) -> Path:
    height, width = model.embedding.img_size
    labels = LABELS if model.config.num_classes else ()
    preprocess = Preprocess((height, width), "squash", 0.875, "bilinear", (0.1, 0.2, 0.3))
    save_checkpoint(folder, Checkpoint(model, preprocess, labels, {"seed": 3, "data": "there"}))
    return folder


def images(model: VisionTransformer, dtype: torch.dtype = torch.float32) -> Tensor:
    height, width = model.embedding.img_size
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def rewrite_config(folder: Path, **sections: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **sections}))


# --- There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"position": "learned"},
        {"position": "sinusoidal"},
        {"position": "sinusoidal_2d"},
        {"position": "none"},
        {"position": "sinusoidal_2d", "pooling": "mean"},
        {"stem": (8, 16)},
        {"layer": {"order": "post"}},
        {"num_classes": 0},
        {"drop_path": 0.2, "mlp_ratio": 1.5},
    ],
    ids=str,
)
def test_a_loaded_model_answers_with_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**options)
    loaded = load_checkpoint(saved(tmp_path, model)).model
    assert loaded.config == model.config
    assert torch.equal(loaded(images(model)), model(images(model)))


def test_everything_beside_the_weights_comes_back(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path, tiny()))
    assert loaded.preprocess == Preprocess((12, 20), "squash", 0.875, "bilinear", (0.1, 0.2, 0.3))
    assert loaded.labels == LABELS
    assert loaded.metadata == {"seed": 3, "data": "there"}


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "sinusoidal_2d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_is_kept(dtype: torch.dtype, position: str, tmp_path: Path) -> None:
    model = tiny(position=position).to(dtype)
    loaded = load_checkpoint(saved(tmp_path, model)).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(images(model, dtype)), model(images(model, dtype)))


def test_a_loaded_model_can_be_trained(tmp_path: Path) -> None:
    model = load_checkpoint(saved(tmp_path, tiny())).model
    model(images(model)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny(position="sinusoidal"))
    before = torch.get_rng_state()
    load_checkpoint(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weights_are_a_file_that_safetensors_itself_reads(tmp_path: Path) -> None:
    model = tiny()
    weights = load_file(saved(tmp_path, model) / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_folder_is_one_with_a_config(tmp_path: Path) -> None:
    assert not is_model_folder(tmp_path)
    assert is_model_folder(saved(tmp_path, tiny()))


# --- At other sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 20), (32, 12), (8, 8), (12, 40)], ids=str)
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_positions_at_another_size_are_timms(pooling: str, size: tuple[int, int], tmp_path: Path) -> None:
    layers = pytest.importorskip("timm.layers")
    model = tiny(pooling=pooling)
    loaded = load_checkpoint(saved(tmp_path, model), img_size=size).model
    expected = layers.resample_abs_pos_embed(
        positions(model)[None],
        new_size=[size[0] // 4, size[1] // 4],
        old_size=[3, 5],
        num_prefix_tokens=int(pooling == "class"),
    )[0]
    torch.testing.assert_close(positions(loaded), expected)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "sinusoidal_2d", "none"])
def test_at_another_size_only_positions_differ(position: str, tmp_path: Path) -> None:
    model = tiny(position=position)
    loaded = load_checkpoint(saved(tmp_path, model), img_size=(20, 24))
    assert loaded.preprocess.img_size == (20, 24)
    assert loaded.model(images(loaded.model)).shape == (2, 3)
    for name, tensor in loaded.model.state_dict().items():
        assert name == "embedding.positions.table" or torch.equal(tensor, model.state_dict()[name])


def test_the_same_size_leaves_positions_alone(tmp_path: Path) -> None:
    model = tiny()
    loaded = load_checkpoint(saved(tmp_path, model), img_size=(12, 20)).model
    assert torch.equal(positions(loaded), positions(model))


def test_another_number_of_classes_gives_a_fresh_head_without_labels(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path, tiny()), num_classes=7)
    assert loaded.model.state_dict()["head.weight"].shape == (7, 16)
    assert loaded.model.config.num_classes == 7
    assert loaded.labels == ()


def test_an_override_within_a_group_leaves_the_rest_as_it_was_trained(tmp_path: Path) -> None:
    layer = {"attention": {"relative_bias": "layer", "qk_norm": True}, "feed_forward": {"activation": "relu"}}
    model = tiny(layer=layer)
    started = {"attention": {"relative_start": "local"}}
    loaded = load_checkpoint(saved(tmp_path, model), layer=started, embedding={"resize": "bilinear"}).model
    attention = replace(model.config.layer.attention, relative_start="local")
    assert loaded.config == replace(
        model.config,
        layer=replace(model.config.layer, attention=attention),
        embedding=replace(model.config.embedding, resize="bilinear"),
    )
    assert torch.equal(loaded(images(model)), model(images(model)))


def test_options_as_a_whole_replace_the_trained_ones(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny(layer={"feed_forward": {"activation": "relu"}}))
    assert load_checkpoint(folder, layer=LayerOptions()).model.config == tiny().config


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ({"order": "last"}, "layer.order='last': input should be 'pre'"),
        ({"depth": 3}, "there is no setting 'layer.depth'"),
    ],
    ids=str,
)
def test_an_override_that_cannot_be_used_is_named(layer: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny())
    with pytest.raises(VitralError, match=re.escape(text)):
        load_checkpoint(folder, layer=layer)


# --- Bad folders ---------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=r"nowhere does not exist; a model is a folder"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=r"has no config\.json; a model is a folder"):
        load_checkpoint(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    saved(tmp_path, tiny())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VitralError, match=r"model\.safetensors is missing; the model folder is incomplete"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights_are_refused(kept: int, tmp_path: Path) -> None:
    weights = saved(tmp_path, tiny()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(VitralError, match=r"model\.safetensors is damaged or incomplete"):
        load_checkpoint(tmp_path)


def test_a_pickle_in_place_of_the_weights_is_not_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny())
    torch.save(tiny().state_dict(), folder / "model.safetensors")
    with pytest.raises(VitralError, match="damaged or incomplete"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "is not the config of a model"),
        (b"{}", "cannot be used: it has no 'architecture'"),
    ],
)
def test_a_damaged_config_is_named(content: bytes, text: str, tmp_path: Path) -> None:
    (saved(tmp_path, tiny()) / "config.json").write_bytes(content)
    with pytest.raises(VitralError, match=rf"config\.json {text}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("section", "content", "text"),
    [
        ("architecture", {"embed_dimension": 16}, "did you mean 'embed_dim'"),
        ("architecture", {"layer": {"ordre": "pre"}}, "did you mean 'layer.order'"),
        ("architecture", {"embed_dim": "wide"}, "embed_dim='wide': input should be a valid integer"),
        ("architecture", {"embed_dim": 16, "num_heads": 3}, "num_heads is 3; it must divide embed_dim 16"),
        ("preprocess", {"img_size": [12]}, "img_size="),
        ("labels", ["ant", "bee"], "it has 2 labels for 3 classes"),
        ("labels", None, "cannot be used"),
        ("metadata", None, "cannot be used"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(
    section: str, content: Any, text: str, tmp_path: Path
) -> None:
    rewrite_config(saved(tmp_path, tiny()), **{section: content})
    with pytest.raises(VitralError, match=text):
        load_checkpoint(tmp_path)


def test_every_weight_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    weights = saved(tmp_path, tiny()) / "model.safetensors"
    state = load_file(weights)
    del state["norm.bias"]
    save_file({**state, "head.bias": torch.zeros(5), "tail.bias": torch.zeros(3)}, weights)
    with pytest.raises(VitralError) as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value).endswith(
        "head.bias is (5,), not (3,), norm.bias is missing, tail.bias is not of this model"
    )


def test_a_size_that_the_patch_does_not_divide_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny())
    with pytest.raises(VitralError, match=r"with img_size=25 cannot be used: .*patch_size 4 does not divide"):
        load_checkpoint(folder, img_size=25)
