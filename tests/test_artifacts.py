"""An artifact answers as it did at export, or it is refused, and what differs is named."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image

import vitral
from vitral.artifacts.about import About, about_from
from vitral.artifacts.engine import Answers, in_sizes
from vitral.artifacts.golden import golden_picture
from vitral.artifacts.manifest import read_manifest, sha256, write_manifest
from vitral.artifacts.open import open_artifact, verify_artifact
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.ship.export.export import export

LABELS = ("ant", "bee", 'quoted "cat"', "犬")
FORMS = ("onnx", "openvino", "pt2")


def classifier() -> Classifier:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=24, num_layers=2, num_heads=2, num_classes=4
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    preprocess = vitral.Preprocess((24, 24), crop_fraction=0.8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    placement = Placement(torch.device("cpu"), torch.float32)
    return Classifier(model.eval(), preprocess, LABELS, placement, {"seed": 3}, temperature=1.7)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "art"
    export(classifier(), folder, to=FORMS)
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    import shutil

    return Path(shutil.copytree(made, tmp_path / "art"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(5)
    paths = []
    for number, size in enumerate([(31, 57, 3), (90, 40, 3), (24, 24, 3)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize("form", FORMS)
def test_every_form_predicts_what_the_model_does(made: Path, pictures: list[Path], form: str) -> None:
    expected = classifier().predict(pictures)
    found = open_artifact(made, form=form, trusted=True).predict(pictures)
    for one, other in zip(expected, found, strict=True):
        assert one.image == other.image
        assert [label for label, _ in one.top] == [label for label, _ in other.top]
        np.testing.assert_allclose([p for _, p in one.top], [p for _, p in other.top], atol=2e-6)


def test_a_form_is_chosen_by_its_file_and_pt2_only_if_trusted(made: Path) -> None:
    assert "openvino" in open_artifact(made / "model.xml").engine.name
    assert "onnxruntime" in open_artifact(made).engine.name  # the first that was exported
    with pytest.raises(VitralError, match="can execute code; if you trust it"):
        open_artifact(made / "model.pt2")
    with pytest.raises(VitralError, match="no form 'web'; this artifact has onnx, openvino, pt2"):
        open_artifact(made, form="web")


def test_prediction_needs_no_torch(made: Path, pictures: list[Path]) -> None:
    code = (
        "import sys, vitral\n"
        "for form in ('onnx', 'openvino'):\n"
        "    print(vitral.open_artifact(sys.argv[1], form=form).predict(sys.argv[2])[0].label)\n"
        "assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", code, str(made), str(pictures[0])]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
    assert found == [classifier().predict(pictures[0])[0].label] * 2


def test_load_gives_a_classifier_that_evaluates_as_the_model(made: Path, image_folder: Path) -> None:
    loaded = vitral.load(made)
    assert loaded.temperature == 1.7
    assert loaded.metadata == {"seed": 3}
    (image_folder / "cat").rename(image_folder / LABELS[3])
    ours, theirs = (vitral.evaluate(of, image_folder, "all") for of in (classifier(), loaded))
    assert ours.top1 == theirs.top1
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    with pytest.raises(VitralError, match="img_size cannot be changed"):
        vitral.load(made, img_size=48)
    with pytest.raises(VitralError, match="precision cannot be changed"):
        vitral.load(made, precision="bfloat16")


def test_other_commands_name_what_an_artifact_is_for(made: Path) -> None:
    with pytest.raises(VitralError, match="is an artifact of `vitral export`; predict, eval"):
        vitral.convert(made, made.parent / "out", "timm")


# --- Sabotage --------------------------------------------------------------------------------------


def test_golden_picture_is_not_symmetric_in_any_way_that_goes_wrong() -> None:
    picture = golden_picture().astype(int)
    for other in (picture[:, ::-1], picture[::-1], picture[..., ::-1]):
        assert np.abs(picture - other).mean() > 30


def repaired(folder: Path) -> None:
    """As by someone who replaces a file and its checksum."""
    manifest = read_manifest(folder)
    forms = tuple(
        replace(form, files={name: sha256(folder / name) for name in form.files}) for form in manifest.forms
    )
    write_manifest(folder, replace(manifest, forms=forms))


def in_graph(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def sabotage(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        change(model)
        onnx.save(model, folder / "model.onnx")
        repaired(folder)

    return sabotage


def in_description(**fields: object) -> Callable[[Path], None]:
    """In the manifest and within the file alike."""

    def sabotage(folder: Path) -> None:
        manifest = read_manifest(folder)
        about: dict[str, Any] = asdict(manifest.about)
        for name, value in fields.items():
            group, _, field = name.rpartition("__")
            (about[group] if group else about)[field] = value
        changed = about_from(about, "test")
        model = onnx.load(folder / "model.onnx")
        helper.set_model_props(model, {"vitral": changed.to_json()})
        onnx.save(model, folder / "model.onnx")
        write_manifest(folder, replace(manifest, about=changed))
        repaired(folder)

    return sabotage


def constant_near(model: onnx.ModelProto, values: tuple[float, ...]) -> onnx.TensorProto:
    for tensor in model.graph.initializer:
        found = numpy_helper.to_array(tensor)
        if found.size == len(values) and np.allclose(found.ravel(), values, atol=1e-6):
            return tensor
    raise AssertionError(f"the graph has no constant {values}")


def set_constant(values: tuple[float, ...], new: tuple[float, ...]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = constant_near(model, values)
        array = np.array(new, np.float32).reshape(numpy_helper.to_array(tensor).shape)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def reverse_axis(axis: int) -> Callable[[onnx.ModelProto], None]:
    """Turns the pixels before all else: axis 3 makes BGR of RGB, axis 2 a mirror image."""

    def change(model: onnx.ModelProto) -> None:
        count = (24, 3)[axis == 3]
        order = numpy_helper.from_array(np.arange(count)[::-1].copy(), "reversed_order")
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == "pixels":
                    node.input[place] = "reversed_pixels"
        model.graph.initializer.append(order)
        node = helper.make_node("Gather", ["pixels", "reversed_order"], ["reversed_pixels"], axis=axis)
        model.graph.node.insert(0, node)

    return change


def one_weight(model: onnx.ModelProto) -> None:
    tensor = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[array.size // 2] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def temperature(model: onnx.ModelProto) -> None:
    set_constant((1.7,), (1.0,))(model)


def truncated(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1000])


SABOTAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "mean": (in_graph(set_constant((0.4, 0.5, 0.6), (0.485, 0.456, 0.406))), "logits on the golden picture"),
    "std": (in_graph(set_constant((0.2, 0.3, 0.25), (0.229, 0.224, 0.225))), "logits on the golden picture"),
    "filter": (in_description(preprocess__interpolation="bilinear"), "preprocessing differs"),
    "crop": (in_description(preprocess__crop_fraction=0.875), "preprocessing differs"),
    "BGR": (in_graph(reverse_axis(3)), "logits on the golden picture"),
    "flip": (in_graph(reverse_axis(2)), "logits on the golden picture"),
    "label order": (in_description(labels=list(LABELS[::-1])), "the labels are not those of the export"),
    "temperature": (in_graph(temperature), "probabilities on the golden picture"),
    "one weight": (in_graph(one_weight), "logits on the golden picture"),
    "truncation": (truncated, "was changed or damaged after the export"),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_noticed_and_the_part_is_named(artifact: Path, name: str) -> None:
    sabotage, message = SABOTAGES[name]
    assert open_artifact(artifact, form="onnx").labels == LABELS
    sabotage(artifact)
    with pytest.raises(VitralError, match=message) as refused:
        open_artifact(artifact, form="onnx")
    assert "\n" not in str(refused.value)


def test_a_description_of_another_model_is_noticed(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    write_manifest(artifact, replace(manifest, about=replace(manifest.about, temperature=1.0)))
    for form in ("onnx", "openvino"):
        with pytest.raises(VitralError, match="describe two models, their temperature differs"):
            open_artifact(artifact, form=form)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is of no artifact that this version of Vitral reads"),
        (b'{"vitral_artifact": 99}', "is of no artifact that this version of Vitral reads"),
        (b'{"vitral_artifact": 1}', "cannot be used"),
        (b'{"vitral_artifact": 1, "about": {"name": "a"}, "forms": [], "files": {}}', "has no 'preprocess'"),
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(artifact: Path, content: bytes, message: str) -> None:
    (artifact / "manifest.json").write_bytes(content)
    with pytest.raises(VitralError, match=message) as refused:
        open_artifact(artifact)
    assert "\n" not in str(refused.value)


def test_missing_files_are_named(artifact: Path) -> None:
    (artifact / "golden" / "answers.json").unlink()
    with pytest.raises(VitralError, match=r"answers\.json is missing"):
        open_artifact(artifact)
    with pytest.raises(VitralError, match="nowhere is no artifact"):
        open_artifact(artifact / "nowhere")


def test_a_file_outside_of_the_folder_is_not_read(artifact: Path) -> None:
    text = (artifact / "manifest.json").read_text().replace("golden/picture.png", "../../picture.png")
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(VitralError, match=r"names a file outside"):
        open_artifact(artifact)


def test_verify_tells_of_every_form(made: Path) -> None:
    told: dict[str, str] = {}
    verify_artifact(made, tell=told.__setitem__)
    assert list(told) == list(FORMS)
    assert "pixels the same" in told["onnx"]
    assert "not run" in told["pt2"]
    verify_artifact(made, trusted=True, tell=told.__setitem__)
    assert "pixels the same" in told["pt2"]


# --- Parts -----------------------------------------------------------------------------------------


def test_description_survives_as_it_is() -> None:
    about = About("a", vitral.Preprocess((7, 5)), ('<&>"', "日本", "line\nbreak"), 0.7, licence=None)
    again = about_from(json.loads(about.to_json()), "test")
    assert again == about


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11, 21])
def test_batches_are_cut_and_padded_to_the_sizes_there_are(count: int) -> None:
    asked: list[int] = []

    def run(batch: np.ndarray) -> Answers:
        asked.append(len(batch))
        row = batch.reshape(len(batch), -1).astype(np.float32)
        return Answers(row, row + 1)

    pixels = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    found = in_sizes(pixels, (2, 8), run)
    np.testing.assert_array_equal(found.logits[:, 0], np.arange(count))
    np.testing.assert_array_equal(found.probabilities[:, 0], np.arange(count) + 1)
    assert set(asked) <= {2, 8}
    assert sum(asked) - count < 8


def test_a_signal_after_overlapping_engines_is_heeded(made: Path) -> None:
    """OpenVINO's plugins gave back each other's stacks for signals, and Ctrl-C was a segmentation fault."""
    program = (
        "import gc, os, signal, sys\n"
        "from vitral.artifacts.open import open_artifact\n"
        "import faulthandler; faulthandler.enable()\n"  # without a stack to give back nothing goes wrong
        "first, second = (open_artifact(sys.argv[1], form='openvino') for _ in range(2))\n"
        "del first; gc.collect()\n"
        "del second; gc.collect()\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heeded'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(made)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "heeded\n"), done.stderr
