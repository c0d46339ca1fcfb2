"""Foreign checkpoints from the command line: info, convert, predict, eval, train, doctor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.test_cli
from tests.conftest import write_images
from tests.test_layouts import randomize

vitral = tests.test_cli.vitral  # the fixture

Vitral = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm hub folder of three classes, with a model card."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=2, num_classes=3
    )
    randomize(model)
    folder = tmp_path_factory.mktemp("hub")
    labels = {"label_names": ["ant", "bee", "cat"]}
    timm.models.save_for_hf(model, folder, model_config=labels, safe_serialization=True)
    (folder / "README.md").write_text("---\ntags: [vision]\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), {"ant": 9, "bee": 9, "cat": 9})


def test_info_tells_shapes_preprocessing_source_and_licence(vitral: Vitral, folder: Path) -> None:
    result = vitral("info", str(folder), "--no-measure")
    assert result.status == 0
    for text in (
        "3 labels (ant, bee, cat",
        "img_size=(32, 32)",
        "crop_fraction=0.9",
        "positions bicubic_antialias",
        "timm's layout",
        "licence of the weights: cc-by-nc-4.0",
    ):
        assert text in result.out


def test_conversion_carries_labels_licence_and_a_certificate(
    vitral: Vitral, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    result = vitral("convert", str(folder), str(tmp_path / "out"), "--to", "transformers")
    assert result.status == 0
    assert "features and logits differ from those of transformers" in result.out
    assert "licence of the weights: cc-by-nc-4.0" in result.out
    certificate = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert certificate["logits"]["relative"] <= 1e-5
    assert certificate["input_shape"] == [2, 3, 32, 32]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["ant", "bee", "cat"]
    # The crop begins a rounded half pixel elsewhere in transformers; that is said, not passed over.
    assert "preprocess.crop_rounding: even -> down; a picture may be cut a pixel elsewhere\n" in result.err


def test_predict_eval_and_doctor_take_a_foreign_model(
    vitral: Vitral, folder: Path, photos: Path, tmp_path: Path
) -> None:
    picture = str(next((photos / "ant").iterdir()))
    prediction = json.loads(vitral("predict", str(folder), picture, "--json").out)
    assert {entry["label"] for entry in prediction["top"]} == {"ant", "bee", "cat"}
    evaluation = json.loads(vitral("eval", str(folder), str(photos), "--split", "all", "--json").out)
    assert evaluation["n"] == 27
    diagnosis = json.loads(
        vitral("doctor", str(folder), str(photos), "--split", "all", "--limit", "9", "--json").out
    )
    assert diagnosis["n"] == 9
    assert diagnosis["conclusion"]


def test_training_starts_from_a_foreign_model_and_keeps_its_licence(
    vitral: Vitral, folder: Path, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = vitral(
        "train", str(photos), "--out", str(run), f"model={folder}", "steps=2", "batch_size=4", "workers=0"
    )
    assert result.status == 0, result.err
    config = json.loads((run / "config.json").read_text())
    assert config["metadata"]["licence"] == "cc-by-nc-4.0"
    assert config["metadata"]["base"] == str(folder)
    assert config["preprocess"]["crop_fraction"] == 0.9
    assert "licence of the weights: cc-by-nc-4.0" in vitral("info", str(run), "--no-measure").out


def test_what_a_bare_file_does_not_say_is_asked_for_and_taken(
    vitral: Vitral, folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), tmp_path / "bare.pth")
    refused = vitral("info", str(tmp_path / "bare.pth"), "--no-measure")
    assert refused.status == 1
    assert "do not say how many heads a width of 24 has; pass num_heads=" in refused.err
    assert refused.err.count("\n") == 1
    assert vitral("info", str(tmp_path / "bare.pth"), "num_heads=3", "--no-measure").status == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["layer.atention.qk_norm=true"], "LayerOptions has no 'atention'; it has order, layer_scale"),
        (["img_size=33"], "patch_size 16 does not divide"),
        (["num_heads=7"], "num_heads is 7; it must divide embed_dim 24"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refused_conversion_is_one_line_and_writes_nothing(
    words: list[str], text: str, vitral: Vitral, folder: Path, tmp_path: Path
) -> None:
    result = vitral("convert", str(folder), str(tmp_path / "out"), *words)
    assert result.status == 1
    assert text in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
