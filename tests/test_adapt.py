"""Frozen parts stay as they were, and adapters become plain weights that compute the same."""

import json
from pathlib import Path

import pytest
import torch

from tests.test_train import base as base
from tests.test_train import copied, opened, random_batches, small
from tests.test_train import data as data
from vitral.checkpoints.folder import load_checkpoint
from vitral.data.image_data import ImageData
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.training.adapt import adapters, choose_trained, merged
from vitral.training.loop import train


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_a_frozen_backbone_trains_the_head_alone(base: str, data: ImageData) -> None:
    run = opened(data, small(base, trained="head", warmup=0.0))
    before = copied(run.model)
    run.step(random_batches(1)[0])
    assert moved(before, copied(run.model)) == {"head.weight", "head.bias"}


def test_lora_trains_adapters_and_the_head(base: str, data: ImageData) -> None:
    pytest.importorskip("peft")
    run = opened(data, small(base, trained="lora", lora_rank=2, warmup=0.0, learning_rate=0.01))
    assert len(adapters(run.model)) == 2 * 4
    before = copied(run.model)
    for batch in random_batches(2):
        run.step(batch)
    changed = moved(before, copied(run.model))
    assert {"head.weight", "head.bias"} < changed
    assert {name.split(".")[-3] for name in changed if not name.startswith("head")} == {"lora_A", "lora_B"}
    assert {name.split(".")[3] for name in changed if not name.startswith("head")} == {
        "qkv", "out", "expand", "contract",
    }  # fmt: skip


@pytest.mark.parametrize("biases", ["qkv", "qv"])
def test_merged_adapters_compute_the_same(biases: str) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = VisionTransformer(
        16, 8, embed_dim=16, num_layers=2, num_heads=2, num_classes=2, layer={"attention": {"biases": biases}}
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    untouched = model(images)
    choose_trained(model, "lora", 2, seed=0)
    torch.testing.assert_close(model(images), untouched)  # adapters begin at nought
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B["default"].weight)  # pyrefly: ignore[bad-argument-type]
    plain = merged(model)
    assert not adapters(plain)
    assert set(plain.state_dict()) == set(VisionTransformer.from_config(plain.config).state_dict())
    assert not torch.allclose(plain(images), untouched, atol=1e-3)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_lora_run_leaves_a_plain_model_with_its_head(base: str, data: ImageData, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    summary = train(data, tmp_path / "run", small(base, trained="lora", steps=3, learning_rate=0.01))
    assert summary.finished
    folder = load_checkpoint(tmp_path / "run")
    assert folder.model.config.num_classes == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["labels"] == list(data.classes)


def test_a_lora_run_resumes_to_the_same_bits(base: str, data: ImageData, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = small(base, trained="lora", steps=4, checkpoint_steps=2, keep_state=True, learning_rate=0.01)
    train(data, tmp_path / "whole", recipe)
    train(data, tmp_path / "parts", recipe.changed(steps=2, schedule="constant"))
    train(data, tmp_path / "twice", recipe.changed(schedule="constant"))
    train(data, tmp_path / "parts", Recipe(steps=4), resume=True)
    twice, parts = (load_checkpoint(tmp_path / name / "last").model for name in ("twice", "parts"))
    for name, tensor in twice.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_a_model_without_a_head_has_nothing_to_train() -> None:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=0)
    with pytest.raises(VitralError, match="trained=head trains the head"):
        choose_trained(model, "head", 16, seed=0)
