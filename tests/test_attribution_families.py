"""Every family that loads is explained by every method, and nobody names a layer, a token or a grid.

The models are those of `test_layouts`: another library's, tiny and with random weights, as that library saves
them, loaded at a size that is not square.
"""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_layouts import NARROW, TIMM, TRANSFORMERS, build, pictures, randomize
from tests.test_observe import explicit_attention
from vitral.checkpoints.folder import load_checkpoint
from vitral.explain.attribution.attribute import attribute
from vitral.explain.attribution.method import Settings
from vitral.explain.attribution.methods import METHODS
from vitral.explain.observe import frozen, observe
from vitral.explain.target import Question
from vitral.inference.classifier import as_classifier
from vitral.runtime.devices import Placement

CPU = Placement.choose("cpu", "float32")
FEW = Settings(steps=2, masks=12)
ONE = Question(torch.tensor([1, 1]))  # a class, or a feature of a model without a head


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("timm").setLevel(logging.ERROR)


@pytest.mark.parametrize(("name", "options"), TIMM, ids=[f"{n}{o or ''}" for n, o in TIMM])
def test_timm(name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    found = re.search(r"patch(\d+)", name)
    patch = int(found[1]) if found else 16
    heads = {"attn_pool_num_heads": 5} if "pe_core" in name else {}
    theirs = timm.create_model(name, img_size=(4 * patch, 4 * patch), **{**NARROW, **heads, **options}).eval()
    randomize(theirs)
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    # RADIO's rule for positions is for square grids, then cut.
    size = (4 * patch, 4 * patch) if "radio" in name else (3 * patch, 5 * patch)
    assert_explained(tmp_path / "theirs", size, monkeypatch)


@pytest.mark.parametrize(
    ("name", "config", "options"), TRANSFORMERS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(TRANSFORMERS)]
)
def test_transformers(
    name: str, config: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(transformers, name, config, options).save_pretrained(tmp_path / "theirs")
    assert_explained(tmp_path / "theirs", (21, 35), monkeypatch)


def assert_explained(folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = as_classifier(load_checkpoint(folder, img_size=size), CPU)
    model, images = classifier.model, pictures(size)
    grid = model.embedding.grid_of(images)
    for method in METHODS.values():
        found = attribute(classifier, images, method, lambda _: ONE, FEW)
        assert found.values.shape == (2, *grid), method.name
        assert found.values.isfinite().all(), method.name
        assert float(found.values.std()) > 0, method.name
        assert found.certificate <= (1e-4 if method.name != "integrated_gradients" else torch.inf), (
            method.name
        )
    assert_gradients_are_autograds(model, images, monkeypatch)


def assert_gradients_are_autograds(model: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = len(model.layers)
    with frozen(model):
        seen = observe(model, images)
        layers = [seen.taken[index] for index in range(depth)]
        score = ONE.scores(seen.logits_BL).sum()
        gradients = torch.autograd.grad(score, [layer.mixed_BAQK for layer in layers])
        with explicit_attention(monkeypatch) as explicit:
            tokens = model.embedding(images).requires_grad_()
            logits = model.classify(model.encode(tokens, seen.grid))
            expected = torch.autograd.grad(ONE.scores(logits).sum(), explicit[:depth])
    for layer, gradient, weights, of_weights in zip(layers, gradients, explicit, expected, strict=False):
        assert float((layer.weights() - weights.detach()).abs().max()) <= 1e-5
        relative = (layer.gradient(gradient) - of_weights).abs().max() / of_weights.abs().max()
        assert float(relative) <= 1e-4
