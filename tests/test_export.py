"""Exported forms give torch's numbers, from pixels or from pictures on, or are refused in a line."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import write_images
from tests.test_cli import Vitral
from tests.test_cli import vitral as vitral  # the fixture
from vitral.artifacts.assemble import Draft
from vitral.artifacts.open import open_artifact, verify_artifact
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.folder import save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.ship.export import forms
from vitral.ship.export import onnx as as_onnx
from vitral.ship.export.export import Exported, export, in_float32
from vitral.ship.export.picture import picture_model

LABELS = ('a "quoted" <label> & more', "猫\nと犬", "plain", "ümläut", "five")
SIDE = 24


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def classifier(preprocess: Preprocess | None = None, model: Any = None, **options: Any) -> Classifier:
    preprocess = preprocess or Preprocess((SIDE, SIDE), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "embed_dim": 20,
        "num_layers": 2,
        "num_heads": 5,
        "num_classes": len(LABELS),
        **options,
    }
    module = model or VisionTransformer(SIDE, 8, preprocess.channels, **settings)
    cpu = Placement(torch.device("cpu"), torch.float32)
    return Classifier(randomized(module), preprocess, LABELS, cpu, temperature=1.7)  # type: ignore[arg-type]


def pictures(batch: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(batch + height).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def expected(of: Classifier, pixels_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and probabilities by the eager model's own route, image by image."""
    images = torch.stack([of.preprocess.normalize(pixels_HWC) for pixels_HWC in pixels_BHWC])
    with torch.inference_mode():
        logits_BL = of.model(images)
        scaled_BL = logits_BL / of.temperature
        probabilities = scaled_BL.sigmoid() if of.multi_label else scaled_BL.softmax(1)
    return logits_BL.numpy(), probabilities.numpy()


def close(found: Any, wanted: tuple[np.ndarray, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


# --- From the picture on ---------------------------------------------------------------------------

SHAPES = [
    (1, 1), (1, 9), (9, 1), (2, 3), (3, 2), (5, 61), (61, 5), (7, 200), (200, 7), (23, 24), (24, 23),
    (24, 24), (25, 24), (27, 27), (27, 28), (28, 33), (31, 47), (47, 31), (64, 64), (100, 66), (66, 100),
    (97, 89), (150, 200), (200, 150), (211, 199), (333, 500), (500, 333), (427, 640), (801, 601), (600, 900),
]  # fmt: skip
RULES = [
    Preprocess((24, 24)),
    Preprocess((24, 24), crop_fraction=0.875, crop_rounding="down"),
    Preprocess((24, 24), crop_fraction=0.77, interpolation="bilinear"),
    Preprocess((40, 24), interpolation="bicubic", crop_fraction=0.9),
    Preprocess((24, 40), interpolation="bilinear", crop_rounding="down"),
    Preprocess((24, 24), "squash"),
    Preprocess((24, 40), "squash", 0.875, "bilinear"),
    Preprocess((24, 24), "longest", mean=(0.1, 0.5, 0.9)),
    Preprocess((24, 40), "longest", 0.875, "bilinear", (0.3, 0.6, 0.2)),
    Preprocess((24, 24), "longest", 0.8, "nearest", (0.3, 0.6, 0.2), crop_rounding="down"),
    Preprocess((24, 24), interpolation="nearest"),
    Preprocess((24, 24), interpolation="lanczos"),
    Preprocess((40, 24), "longest", 0.9, "lanczos", (0.3, 0.6, 0.2)),
    Preprocess((24, 24), mean=(0.3,), std=(0.2,)),
    Preprocess((24, 40), "longest", interpolation="bilinear", mean=(0.3,), std=(0.2,)),
]


@pytest.mark.parametrize("preprocess", RULES, ids=str)
def test_the_graph_sees_what_pillow_sees_to_the_bit(preprocess: Preprocess, tmp_path: Path) -> None:
    onnx.save(picture_model(preprocess), tmp_path / "preprocess.onnx")
    graph = session(tmp_path / "preprocess.onnx")
    generator = np.random.default_rng(0)
    for height, width in SHAPES:
        steps = generator.integers(-12, 13, (height, width, 3)).cumsum(1) + generator.integers(0, 256, 3)
        picture = steps.astype(np.uint8)
        seen = preprocess.pixels(Image.fromarray(picture)).astype(int)
        found = np.asarray(graph.run(None, {"picture": picture})[0])
        assert found.shape == seen.shape
        assert np.array_equal(found, seen), (height, width)


def test_a_picture_too_narrow_is_refused_by_the_graph_too(tmp_path: Path) -> None:
    onnx.save(picture_model(Preprocess((224, 224))), tmp_path / "preprocess.onnx")
    with pytest.raises(Exception, match="refuse_a_picture_that_is_too_narrow"):
        session(tmp_path / "preprocess.onnx").run(None, {"picture": np.zeros((1, 100_000, 3), np.uint8)})


# --- An artifact -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Classifier:
    """One whose tokens merge: the most that a graph of ours has to do."""
    merging = classifier()
    merging.model.merge_tokens(2)
    return merging


@pytest.fixture(scope="module")
def artifact(model: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("export") / "art"
    return export(model, out, to=("onnx", "onnx-image", "openvino", "pt2"))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_onnx_runtime_answers_as_torch(artifact: Exported, model: Classifier, batch: int) -> None:
    pixels = pictures(batch)
    found = session(artifact.folder / "model.onnx").run(["logits", "probabilities"], {"pixels": pixels})
    close(found, expected(model, pixels))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_openvino_answers_as_torch(artifact: Exported, model: Classifier, batch: int) -> None:
    core, pixels = openvino.Core(), pictures(batch)
    graph = core.read_model(artifact.folder / "model.xml")
    assert graph.input("pixels").partial_shape == openvino.PartialShape([-1, SIDE, SIDE, 3])
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({"pixels": pixels})
    close((found["logits"], found["probabilities"]), expected(model, pixels))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_exported_program_answers_as_torch(artifact: Exported, model: Classifier, batch: int) -> None:
    pixels = pictures(batch)
    program = torch.export.load(artifact.folder / "model.pt2")
    found = [answer.numpy() for answer in program.module()(torch.from_numpy(pixels))]
    close(found, expected(model, pixels))


def test_the_whole_from_a_picture_to_probabilities(artifact: Exported, model: Classifier) -> None:
    graph = session(artifact.folder / "image.onnx")
    assert [output.shape for output in graph.get_outputs()] == [[1, len(LABELS)]] * 2
    for height, width in [(150, 200), (60, 24), (24, 24), (10, 70)]:
        picture = pictures(1, height, width)[0]
        found = graph.run(["logits", "probabilities"], {"picture": picture})
        close(found, expected(model, model.preprocess.pixels(picture)[None]))


def test_each_file_says_what_it_is(artifact: Exported) -> None:
    text = artifact.manifest.about.to_json()
    assert json.loads(text)["labels"] == list(LABELS)
    for name in ("model.onnx", "image.onnx"):
        assert session(artifact.folder / name).get_modelmeta().custom_metadata_map == {"vitral": text}
    graph = openvino.Core().read_model(artifact.folder / "model.xml")
    assert graph.get_rt_info(["vitral", "about"]).astype(str) == text
    extra = {"vitral_about.json": ""}
    torch.export.load(artifact.folder / "model.pt2", extra_files=extra)
    assert extra["vitral_about.json"] == text


def test_the_axes_of_a_graph_are_called_what_they_are(artifact: Exported) -> None:
    graph = onnx.load(artifact.folder / "model.onnx").graph
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output]
    assert [v.name for v in (*graph.input, *graph.output)] == ["pixels", "logits", "probabilities"]
    assert shapes == [["batch", len(LABELS)]] * 2


def test_no_file_tells_of_the_machine(artifact: Exported) -> None:
    root = str(Path(__file__).parents[1]).encode()
    for file in artifact.folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert root not in content
            assert b"site-packages" not in content


def test_the_artifact_is_verified_and_predicts(artifact: Exported, model: Classifier) -> None:
    verify_artifact(artifact.folder, trusted=True)
    picture = pictures(1, 60, 90)[0]
    (wanted,) = model.predict(picture)
    (found,) = open_artifact(artifact.folder, form="openvino").predict(picture)
    assert [label for label, _ in found.top] == [label for label, _ in wanted.top]
    assert [p for _, p in found.top] == pytest.approx([p for _, p in wanted.top], abs=1e-5)


# --- Other models ----------------------------------------------------------------------------------


def test_a_module_of_the_users_own_of_grey_pictures_and_several_labels(tmp_path: Path) -> None:
    own = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    grey = Preprocess((SIDE, SIDE), mean=(0.3,), std=(0.2,))
    found = replace(classifier(grey, model=own), multi_label=True)
    pixels = np.repeat(pictures(3)[..., :1], 3, axis=3)
    export(found, tmp_path / "art", to="onnx")
    answers = session(tmp_path / "art" / "model.onnx").run(None, {"pixels": pixels})
    close(answers, expected(found, pixels))
    with pytest.raises(VitralError, match="only Vitral's own models"):
        export(found, tmp_path / "more", dynamic_size=True)


def test_the_artifact_is_of_the_merged_tokens(artifact: Exported) -> None:
    (logits_BL, _) = session(artifact.folder / "model.onnx").run(None, {"pixels": pictures(3)})
    assert np.abs(logits_BL - expected(classifier(), pictures(3))[0]).max() > 1e-4


@pytest.mark.slow
def test_weights_of_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_onnx, "MAX_IN_ONE_FILE", 1000)
    found = export(classifier(), tmp_path / "art", opset=23)
    assert list(found.manifest.form("onnx").files) == ["model.onnx", "model.onnx.data", "preprocess.onnx"]
    close(
        session(tmp_path / "art" / "model.onnx").run(None, {"pixels": pictures(3)}),
        expected(classifier(), pictures(3)),
    )
    with pytest.raises(VitralError, match="the form onnx-image cannot be written: its weights are 2 GiB"):
        export(classifier(), tmp_path / "image", to=["onnx-image"])
    assert not (tmp_path / "image").exists()


def test_the_classifier_stays_as_it_is() -> None:
    found = classifier()
    copy = in_float32(found)
    assert copy.model is not found.model
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    assert not any(parameter.requires_grad for parameter in copy.model.parameters())


# --- Images of any size ----------------------------------------------------------------------------


@pytest.mark.slow
def test_images_of_any_size(tmp_path: Path) -> None:
    found = classifier(embedding={"resize": "bicubic_antialias"})
    export(found, tmp_path / "art", to=["onnx", "pt2"], dynamic_size=True)
    program = torch.export.load(tmp_path / "art" / "model.pt2").module()
    for height, width in [(SIDE, SIDE), (32, 48), (24, 16)]:
        pixels = pictures(2, height, width)
        wanted = expected(found, pixels)
        close(session(tmp_path / "art" / "model.onnx").run(None, {"pixels": pixels}), wanted)
        close([answer.numpy() for answer in program(torch.from_numpy(pixels))], wanted)


RELATIVE = {"attention": {"relative_bias": "layer"}}


@pytest.mark.parametrize(
    ("options", "to", "why"),
    [
        ({"layer": RELATIVE}, "onnx", "resized by a search.*geometric"),
        ({"embedding": {"resize": "bicubic_offset"}}, "pt2", "DINOv2's 'bicubic_offset'"),
        ({}, "openvino", "without antialiasing, and the model's rule is 'bicubic_antialias'"),
    ],
)
def test_one_size_alone(options: dict[str, Any], to: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=why):
        export(classifier(**options), tmp_path / "art", to=[to], dynamic_size=True)
    assert not (tmp_path / "art").exists()


def test_a_table_at_its_own_size_is_itself_when_resized() -> None:
    """What a graph of any size rests on: no rule that is allowed changes a table at its own size."""
    from vitral.model.positions.resize import RESIZE

    table_1DHW = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    for rule, resize in RESIZE.items():
        if rule not in ("bicubic_offset", "geometric"):
            torch.testing.assert_close(resize(table_1DHW, (5, 7)), table_1DHW, rtol=0, atol=1e-6)
    assert not torch.allclose(RESIZE["bicubic_offset"](table_1DHW, (5, 7)), table_1DHW, atol=1e-3)


# --- Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "asked", "why"),
    [
        ({"labels": ()}, {}, "has no labels"),
        ({"metadata": {"regression": True}}, {}, "is a regression"),
        ({"tta": "flip"}, {}, "load the model without tta"),
        ({}, {"to": ["onx"]}, "did you mean 'onnx'"),
        ({}, {"to": []}, "no form was asked for"),
        ({}, {"opset": 17}, "opset is 17; ONNX's operators are written in 18 to 23"),
        ({}, {"img_size": 32}, "takes 24x24 pixels"),
    ],
)
def test_what_cannot_be_exported(
    change: dict[str, Any], asked: dict[str, Any], why: str, model: Classifier, tmp_path: Path
) -> None:
    with pytest.raises(VitralError, match=why):
        export(replace(model, **change), tmp_path / "art", **asked)
    assert list(tmp_path.iterdir()) == []


def test_other_channels_than_pictures_have(tmp_path: Path) -> None:
    five = classifier(Preprocess((SIDE, SIDE), mean=(0.5,) * 5, std=(0.2,) * 5))
    with pytest.raises(VitralError, match="takes 5 channels"):
        export(five, tmp_path / "art")


def test_a_library_that_is_missing(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        VitralError, match=r"the form openvino needs openvino: pip install 'vitral\[export\]'"
    ):
        export(model, tmp_path / "art", to=["openvino"])


def test_an_artifact_and_a_folder_that_is_there(
    artifact: Exported, model: Classifier, tmp_path: Path
) -> None:
    with pytest.raises(VitralError, match="is an artifact already"):
        export(artifact.folder, tmp_path / "art")
    with pytest.raises(VitralError, match="exists already"):
        export(model, artifact.folder)


def test_a_form_that_answers_otherwise_is_not_kept(
    artifact: Exported, model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_weights(folder: Path, _: forms.Source) -> Draft:
        written = onnx.load(artifact.folder / "model.onnx")
        (weight,) = (tensor for tensor in written.graph.initializer if tensor.name == "model.head.weight")
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[0] += 0.05
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(written, folder / "model.onnx")
        return Draft("onnx", ["model.onnx"])

    monkeypatch.setitem(forms._WRITERS, "onnx", other_weights)
    with pytest.raises(
        VitralError, match=r"the form onnx, onnxruntime .*: logits on the golden picture differ"
    ):
        export(model, tmp_path / "art")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_agreement_on_labelled_images(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", {"ant": 12, "bee": 12})
    found = replace(classifier(), labels=("ant", "bee", "cat", "dog", "eel"))
    told: list[str] = []
    (agreement,) = export(found, tmp_path / "art", check=data, tell=told.append).agreements
    assert (agreement.kind, agreement.same, agreement.images) == ("onnx", 1.0, 24)
    assert agreement.probabilities < 1e-5
    assert agreement.accuracy == agreement.accuracy_torch
    right = [p.label in p.image for p in found.predict(sorted(data.rglob("*.png")))]
    assert agreement.accuracy == pytest.approx(np.mean(right))
    assert any("split all" in line for line in told)


# --- The command line ------------------------------------------------------------------------------


def test_the_command_says_what_to_do_with_what_it_wrote(
    vitral: Vitral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("run"), Checkpoint(classifier().model, Preprocess((SIDE, SIDE)), LABELS))
    Image.fromarray(pictures(1, 50, 40)[0]).save("a.png")
    result = vitral("export", "run", "art", "--to", "openvino,pt2", "--opset", "21")
    assert result.status == 0, result.err
    assert "writing openvino" in result.err
    assert "writing pt2" in result.err
    said = [line.partition(": ")[2] for line in result.out.splitlines() if ": vitral " in line]
    assert [line.split()[1] for line in said] == ["verify", "predict", "serve"]
    for line in said[:2]:
        again = vitral(*line.replace("IMAGE", "a.png").split()[1:])
        assert again.status == 0, again.err
    assert vitral("predict", "run", "a.png").out == vitral("predict", "art", "a.png").out


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (("--to", "onnx,onxx"), 2, "'onxx' is not one of onnx, onnx-image, openvino, pt2, web"),
        (("--opset", "7"), 2, "7 is not a whole number from 18 to 23"),
        (("--img-size", "25"), 1, "25"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: tuple[str, ...], status: int, why: str, vitral: Vitral, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "run", Checkpoint(classifier().model, Preprocess((SIDE, SIDE)), LABELS))
    result = vitral("export", str(tmp_path / "run"), str(tmp_path / "art"), *words)
    assert result.status == status
    assert why in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "art").exists()
