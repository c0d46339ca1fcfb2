"""A server says what `predict` and `Inside` say of the same model; an artifact's does without torch."""

import asyncio
import base64
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from tests.serving import JPEG, Server, asked, encoded, picture
from vitral.explain.inside import Inside
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, load
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.ship.export.export import export
from vitral.ship.serve.served import served_artifact, served_classifier
from vitral.ship.serve.threshold import threshold_from

LABELS = ("ant", "bee", "cat", "dog", "elk")
FILES = [encoded(picture(seed)) for seed in range(6)]
DIGITS = Path(__file__).parents[1] / "docs" / "digits-vit"


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer((12, 20), 4, embed_dim=16, num_layers=2, num_heads=2, num_classes=5)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    preprocess = Preprocess((12, 20), crop_fraction=0.8)
    return Classifier(model.eval(), preprocess, LABELS, Placement.choose("cpu", "float32"), temperature=1.5)


def test_it_answers_as_predict_does(classifier: Classifier) -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> list[httpx.Response]:
        posts = (client.post("/v1/predict", content=file, headers=JPEG) for file in FILES)
        return await asyncio.gather(*posts)

    replies = asked(ask, served_classifier(classifier, "model"))
    for reply, expected in zip(replies, classifier.predict(FILES), strict=True):
        (found,) = reply.json()["predictions"]
        assert [one["label"] for one in found["top"]] == [label for label, _ in expected.top]
        assert [one["probability"] for one in found["top"]] == pytest.approx(
            [probability for _, probability in expected.top], abs=1e-6
        )


def test_it_explains_as_inside_does(classifier: Classifier) -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> list[httpx.Response]:
        queries = ("", "?class=bee&against=dog", "?method=rollout", "?class=yak", "?method=occlusion")
        return [await client.post(f"/v1/explain{one}", content=FILES[0], headers=JPEG) for one in queries]

    likeliest, against, rollout, unknown, slow = asked(ask, served_classifier(classifier, "model"))
    inside = Inside(classifier)
    for reply, expected in (
        (likeliest, inside.relevance(FILES[0])),
        (against, inside.relevance(FILES[0], target="bee", against="dog")),
        (rollout, inside.relevance(FILES[0], method="rollout")),
    ):
        found = reply.json()
        assert found["grid"] == [3, 5]
        assert found["values"] == pytest.approx(expected.values.flatten().tolist(), rel=1e-3, abs=1e-6)
        assert found["method"] == expected.method
    assert (against.json()["target"], against.json()["against"]) == ("bee", "dog")
    assert (unknown.status_code, slow.status_code) == (422, 422)
    assert "'yak'" in unknown.json()["error"]
    content = base64.b64decode(likeliest.json()["picture"].partition(",")[2])
    whole = replace(classifier.preprocess, crop_fraction=1.0)
    assert np.array_equal(whole.pixels(content), classifier.preprocess.pixels(FILES[0]))


def test_its_attention_is_that_of_inside(classifier: Classifier) -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> list[dict]:
        paths = ("/v1/attention", "/v1/attention?layer=1")
        return [(await client.post(path, content=FILES[0], headers=JPEG)).json() for path in paths]

    every, last = asked(ask, served_classifier(classifier, "model"))
    assert (every["layers"], every["heads"], every["prefix_tokens"], every["grid"]) == (2, 2, 1, [3, 5])
    weights = np.frombuffer(base64.b64decode(every["weights"]), np.uint8).reshape(2, 2, 16, 16) / 255
    rows = weights * np.frombuffer(base64.b64decode(every["maxima"]), "<f4").reshape(2, 2, 16, 1)
    queries = [(2, 3), (0, 0)]
    expected = Inside(classifier).attention(FILES[0], layers=(0, 1), queries=["class", *queries])
    for position, token in enumerate((0, 1 + 2 * 5 + 3, 1)):
        found = expected.values[0, :, :, position].flatten(2).numpy()
        assert np.abs(rows[:, :, token, 1:] - found).max() < 0.003
    assert last["first_layer"] == 1
    one = np.frombuffer(base64.b64decode(last["weights"]), np.uint8).reshape(2, 16, 16) / 255
    assert np.array_equal(one, weights[1])


_WITHOUT_TORCH = """
import sys, asyncio
from tests.serving import JPEG, asked, encoded, picture
from vitral.ship.serve.served import served_artifact
async def ask(_, client):
    paths = ("predict", "explain", "attention")
    return [await client.post(f"/v1/{p}", content=encoded(picture(0)), headers=JPEG) for p in paths]
replies = asked(ask, served_artifact(sys.argv[1]))
print([reply.status_code for reply in replies], replies[0].json()["predictions"][0]["top"][0]["probability"])
print("torch" in sys.modules)
"""


def test_an_artifact_is_served_without_torch(classifier: Classifier, tmp_path: Path) -> None:
    export(classifier, tmp_path / "art", to=("onnx",))
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(tmp_path / "art")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr
    (codes, probability), torch_there = (
        done.stdout.splitlines()[0].rsplit(" ", 1),
        done.stdout.splitlines()[1],
    )
    assert codes == "[200, 501, 501]"
    assert float(probability) == pytest.approx(classifier.predict(FILES[0])[0].top[0][1], abs=1e-5)
    assert torch_there == "False"
    assert served_artifact(str(tmp_path / "art"), "my model!").name == "my-model"


def test_held_out_images_choose_when_to_abstain() -> None:
    classifier = load(DIGITS, device="cpu")
    found = threshold_from(classifier, "digits", 0.05)
    assert found.assured
    assert 0 < found.probability < 1
    assert "assurance of 95 %" in found.line
    strict = threshold_from(classifier, "digits", 0.01)  # of which so few images cannot assure anybody
    assert not strict.assured
    assert strict.probability > found.probability
    wrong = replace(classifier, labels=(*classifier.labels[1:], classifier.labels[0]))
    with pytest.raises(VitralError, match="no threshold keeps errors to 1e-09"):
        threshold_from(wrong, "digits", 1e-9)
