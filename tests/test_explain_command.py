"""`vitral explain`: pictures, arrays and lines of what an answer rests on; one line for what cannot be."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_images
from tests.parts import away_from_initial_values
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli import app as cli
from vitral.explain import pictures
from vitral.explain.attribution.methods import DEFAULT, METHODS
from vitral.explain.inside import Inside
from vitral.explain.pictures import Attribution, Drawing, explain_images, file_names
from vitral.explain.render import enlarged
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import load
from vitral.model.vit import VisionTransformer

Run = Callable[[str], tuple[int, str, str]]
LABELS = ("ant", "bee", "wasp")


def save_model(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    size: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_classes": 3}
    labels, multi_label = options.pop("labels", LABELS), options.pop("multi_label", False)
    metadata = options.pop("metadata", {})
    model = VisionTransformer((16, 24), 8, **size | options)
    model = away_from_initial_values(model)
    preprocess = Preprocess((16, 24), crop_fraction=0.8)
    checkpoint = Checkpoint(model, preprocess, labels, multi_label=multi_label, metadata=metadata)
    save_checkpoint(folder, checkpoint)
    return folder


@pytest.fixture
def vitral(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command line, in this process, in a folder with ``model``, ``photos`` and ``broken.jpg``."""
    save_model(tmp_path / "model")
    write_images(tmp_path / "photos", {"ant": 2, "bee": 1}, size=(40, 30))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitral", *line.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        assert isinstance(status, int | None)
        out, err = capsys.readouterr()
        return status or 0, out, err

    return run


def lines_of(result: tuple[int, str, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result[1].splitlines()]


def opened(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


# --- Maps of images ------------------------------------------------------------------------------


def test_each_image_has_a_picture_an_array_and_a_line(vitral: Run) -> None:
    result = vitral("explain model photos --out maps --json")
    assert result[0] == 0, result[2]
    lines = lines_of(result)
    assert [line["image"] for line in lines] == sorted(str(file) for file in Path("photos").rglob("*.png"))
    assert sorted(path.name for path in Path("maps").iterdir()) == [
        "000-2.npy", "000-2.png", "000.npy", "000.png", "001.npy", "001.png"
    ]  # fmt: skip
    classifier = load("model", device="cpu")
    for line in lines:
        label, probability = classifier.predict(line["image"])[0].top[0]
        logit = float(classifier.logits(line["image"]).max())
        assert (line["label"], line["grid"], line["error"]) == (label, [2, 3], None)
        assert line["probability"] == pytest.approx(probability, abs=1e-6)
        [one] = line["maps"]
        assert (one["method"], one["target"], one["against"]) == (DEFAULT, label, None)
        assert one["score"] == pytest.approx(logit, abs=1e-5)
        assert 0 <= one["prefix_mass"] <= 1
        own = Inside(classifier).relevance(line["image"], method=DEFAULT).values.numpy()
        saved = np.load(line["files"]["maps"])
        assert saved.dtype == np.float32
        np.testing.assert_allclose(saved, own, rtol=1e-5, atol=1e-7)
        assert opened(line["files"]["picture"]).width > 500


def test_the_picture_is_the_part_that_the_model_saw(vitral: Run) -> None:
    """The crop is cut out here by hand: 30x40 is resized to 22x30, of which 16x24 are seen, in the middle."""
    assert vitral("explain model photos/ant/000.png --out maps")[0] == 0
    whole = opened("photos/ant/000.png").resize((30, 22), Image.Resampling.BICUBIC)
    seen = whole.crop((3, 3, 27, 19))
    drawn = opened("maps/000.png")
    shown = enlarged(seen, (2, 3), 384)
    found = [
        top for top in range(drawn.height - shown.height)
        if drawn.crop((16, top, 16 + shown.width, top + shown.height)) == shown
    ]  # fmt: skip
    assert len(found) == 1


def test_classes_methods_and_a_rival_are_maps_of_one_picture(vitral: Run) -> None:
    result = vitral(
        f"explain model photos/bee/000.png --class ant --class wasp --against bee "
        f"--method {DEFAULT},rollout --out maps --json"
    )
    assert result[0] == 0, result[2]
    [line] = lines_of(result)
    kinds = [(one["method"], one["target"], one["against"]) for one in line["maps"]]
    assert kinds == [(DEFAULT, "ant", "bee"), (DEFAULT, "wasp", "bee"), ("rollout", None, None)]
    logits = load("model", device="cpu").logits("photos/bee/000.png")[0].tolist()
    assert line["maps"][0]["score"] == pytest.approx(logits[0] - logits[1], abs=1e-5)
    assert line["maps"][1]["score"] == pytest.approx(logits[2] - logits[1], abs=1e-5)
    assert np.load("maps/000.npy").shape == (3, 2, 3)


def test_layers_and_heads_show_attention_itself(vitral: Run) -> None:
    result = vitral("explain model photos/bee/000.png --layers 0,-1 --heads 1 --out maps --json")
    assert result[0] == 0, result[2]
    [line] = lines_of(result)
    assert [(one["layer"], one["head"], one["query"]) for one in line["maps"]] == [
        (0, 1, "class"),
        (1, 1, "class"),
    ]
    own = Inside(load("model", device="cpu")).attention("photos/bee/000.png", layers=[0, 1], heads=[1])
    np.testing.assert_allclose(np.load("maps/000.npy"), own.values[0, :, 0, 0], atol=1e-6)
    sums = np.load("maps/000.npy").sum((1, 2)) + [one["prefix_mass"] for one in line["maps"]]
    np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_all_heads_are_shown_where_layers_alone_are_named(vitral: Run) -> None:
    assert vitral("explain model photos/bee/000.png --layers all --out maps")[0] == 0
    assert np.load("maps/000.npy").shape == (4, 2, 3)


def test_a_multi_label_model_has_a_map_for_each_label_that_is_there(vitral: Run, tmp_path: Path) -> None:
    save_model(tmp_path / "several", multi_label=True)
    result = vitral("explain several photos --out maps --json")
    assert result[0] == 0, result[2]
    classifier = load(tmp_path / "several", device="cpu")
    for line in lines_of(result):
        top = classifier.predict(line["image"])[0].top
        there = [label for label, probability in top if probability > 0.5] or [top[0][0]]
        assert {one["target"] for one in line["maps"]} == set(there)
        assert np.load(line["files"]["maps"]).shape[0] == len(there)


def test_a_model_without_classes_is_explained_without_them(vitral: Run, tmp_path: Path) -> None:
    save_model(tmp_path / "features", num_classes=0, labels=())
    result = vitral("explain features photos/bee/000.png --method rollout --out maps --json")
    assert result[0] == 0, result[2]
    [line] = lines_of(result)
    assert (line["label"], line["maps"][0]["target"]) == (None, None)
    status, out, err = vitral("explain features photos/bee/000.png --out more")
    assert (status, out) == (1, "")
    assert "no classes" in err
    assert "rollout" in err
    assert not Path("more").exists()


def test_a_regression_is_explained_without_classes(vitral: Run) -> None:
    save_model(Path("scale"), num_classes=1, labels=("years",), metadata={"regression": True})
    status, out, err = vitral("explain scale photos/bee/000.png --out maps")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f"a regression, without classes, and {DEFAULT} explains a class; attention or rollout can" in err
    result = vitral("explain scale photos/bee/000.png --method rollout --out maps --json")
    assert result[0] == 0, result[2]
    assert lines_of(result)[0]["label"] is None


def test_the_same_images_give_the_same_bytes(vitral: Run) -> None:
    for out in ("one", "two"):
        assert vitral(f"explain model photos --out {out}")[0] == 0
    for file in Path("one").iterdir():
        assert file.read_bytes() == (Path("two") / file.name).read_bytes()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_unreadable_image_is_named_and_the_rest_goes_on(batch_size: int, vitral: Run) -> None:
    line = (
        f"explain model photos/bee broken.jpg none.png photos/ant --batch-size {batch_size} --out maps --json"
    )
    status, _, err = result = vitral(line)
    assert status == 1
    assert "2 of 5" in err.splitlines()[-1]
    assert "broken.jpg: " in err
    errors = {line["image"]: line["error"] for line in lines_of(result)}
    assert [error is None for error in errors.values()] == [True, False, False, True, True]
    assert len(list(Path("maps").glob("*.png"))) == len(list(Path("maps").glob("*.npy"))) == 3


def test_who_stops_in_the_middle_keeps_whole_files(vitral: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = pictures.png, []

    def interrupted(image: Image.Image) -> bytes:
        drawn.append(image)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(pictures, "png", interrupted)
    inside = Inside(load("model", device="cpu"))
    files = [str(file) for file in sorted(Path("photos").rglob("*.png"))]
    with pytest.raises(KeyboardInterrupt):
        list(explain_images(inside, files, Attribution(), Drawing(Path("maps"))))
    assert [path.name for path in Path("maps").iterdir() if path.suffix == ".png"] == ["000.png"]
    opened("maps/000.png")
    assert not [path for path in Path("maps").iterdir() if path.name.startswith(".")]


def test_names_that_differ_in_case_alone_have_files_of_their_own() -> None:
    assert file_names(["a/Cat.jpg", "b/cat.png", "cat-2.png", "b/cat.gif"]) == [
        "Cat", "cat-2", "cat-2-2", "cat-3"
    ]  # fmt: skip


# --- The methods -----------------------------------------------------------------------------------


def test_the_list_has_every_method(vitral: Run) -> None:
    status, out, _ = vitral("explain --list")
    assert status == 0
    assert all(name in out for name in METHODS)
    listed = json.loads(vitral("explain --list --json")[1])
    assert [row["method"] for row in listed] == list(METHODS)
    assert [row["method"] for row in listed if row["default"]] == [DEFAULT]


def test_the_list_counts_the_cost_of_the_model_that_is_named(vitral: Run) -> None:
    cost = {row["method"]: row["forwards"] for row in json.loads(vitral("explain model --list --json")[1])}
    usual = {row["method"]: row["forwards"] for row in json.loads(vitral("explain --list --json")[1])}
    assert cost.keys() == usual.keys()
    for name, method in METHODS.items():
        if "occlusion" in name:
            assert cost[name] < usual[name], method.name


# --- How far to believe them -------------------------------------------------------------------------


def test_scores_are_a_table_and_sentences(vitral: Run) -> None:
    line = f"explain model photos --score --split all --images 3 --method {DEFAULT} --method rollout"
    status, out, err = vitral(line)
    assert status == 0, err
    assert "model on photos, split all (cpu, float32): 3 images" in out
    assert all(name in out for name in (DEFAULT, "rollout", "random"))
    found = json.loads(vitral(f"{line} --json")[1])
    assert found["n"] == 3
    assert {DEFAULT, "rollout", "random"} <= {row["method"] for row in found["methods"]}
    only = json.loads(vitral(f"{line} --fill mean --json")[1])
    assert list(only["pairs"]) == ["mean"]


# --- The papers' figures -----------------------------------------------------------------------------


def test_figures_are_a_page_with_files(vitral: Run) -> None:
    save_model(Path("other"))
    status, out, err = vitral("explain model other photos --figures figures --images 3 --json")
    assert status == 0, err
    told = json.loads(out)
    page = Path(told["page"]).read_text()
    assert "model" in page
    assert "other" in page
    assert "filters" in told["figures"]
    assert (Path("figures") / "model" / "filters.png").exists()
    status, out, err = vitral("explain model --figures alone")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "page: alone/index.html"
    assert "not drawn" in out


# --- What cannot be ----------------------------------------------------------------------------------

WRONG_USAGE = [
    ("explain", "MODEL IMAGE...: name a model and images"),
    ("explain model", "MODEL IMAGE...: name a model and images"),
    ("explain model broken.jpg", "--out: name a new folder for the maps; see `vitral explain --help`"),
    ("explain model broken.jpg --out broken.jpg", "broken.jpg is a file; name a new folder"),
    ("explain model photos --out maps --look round", "--look: 'round' is not one of smooth, patches, both"),
    ("explain model photos --out maps --layers last", "--layers: 'last' is no list of whole numbers"),
    ("explain model photos --out maps --heads 0;3", "--heads: '0;3' is no list of whole numbers"),
    ("explain model photos --out maps --heads 0 --class ant", "--heads: shows attention itself, and goes"),
    ("explain --figures figures", "MODEL: name a model; see"),
    ("explain model --figures", "'--figures' requires an argument"),
    ("explain model photos --figures broken.jpg", "broken.jpg is a file; name a new folder"),
    ("explain model --score --figures figures", "--score: goes without --figures; ask for one at a time"),
    ("explain model --figures figures --out maps", "--out: is for maps of images, and --figures"),
    ("explain model --score", "MODEL DATA: name a model and data"),
    ("explain model photos more --score", "DATA: 'more' is one too many; --score takes one"),
    ("explain model photos --score --out maps", "--out: is for maps of images, and --score goes without it"),
    ("explain model photos --out maps --images 9", "--images: is for --figures and --score, and maps"),
    ("explain model photos --score --list", "--score: goes without --list; ask for one at a time"),
    ("explain model photos --score --fill grey", "--fill: 'grey' is not one of drop, mean"),
    ("explain --list --out maps", "--out: is for maps of images, and --list goes without it"),
    ("explain model photos --list", "IMAGE...|DATA: is for --figures and --score and maps of images"),
    ("explain model photos --out maps --batch-size 0", "--batch-size: 0 is not a whole number"),
    ("explain model photos --out maps --classes ant", "no option --classes; did you mean '--class'?"),
]  # fmt: skip

NOT_POSSIBLE = [
    ("explain model photos --out photos", "photos exists already; choose a new folder"),
    ("explain model photos --figures photos", "photos exists already; choose a new folder"),
    ("explain model nowhere/*.png --out maps", "nowhere/*.png holds no images"),
    ("explain nothing photos --out maps", "nothing"),
    ("explain model photos --out maps --class ants", "it has ant, bee, wasp; did you mean 'ant'?"),
    ("explain model photos --out maps --against wsap", "no class 'wsap'; it has ant, bee, wasp"),
    ("explain model photos --out maps --method legrab", "did you mean 'legrad'?"),
    ("explain model photos --out maps --method rollout --class ant", "legrad"),
    ("explain model photos --out maps --layers 2", "there is no layer 2; this model has 0 to 1"),
    ("explain model photos --out maps --heads 7", "there is no head 7; this model has 0 to 1"),
]  # fmt: skip


def test_without_matplotlib_nothing_is_written(vitral: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = vitral("explain model photos --out maps")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "pip install 'vitral[explain]'" in err
    assert not Path("maps").exists()


def refused(result: tuple[int, str, str], status: int, text: str, there: set[Path], folder: Path) -> None:
    got, out, err = result
    assert (got, out) == (status, ""), err
    assert err.startswith("vitral: ")
    assert err.count("\n") == 1
    assert text in err
    assert "defect" not in err
    assert set(folder.rglob("*")) == there, "something was written"


@pytest.mark.parametrize(("line", "text"), WRONG_USAGE, ids=[line for line, _ in WRONG_USAGE])
def test_wrong_usage_is_one_line(line: str, text: str, vitral: Run, tmp_path: Path) -> None:
    refused(vitral(line), 2, text, set(tmp_path.rglob("*")), tmp_path)


@pytest.mark.parametrize(("line", "text"), NOT_POSSIBLE, ids=[line for line, _ in NOT_POSSIBLE])
def test_what_cannot_be_is_one_line(line: str, text: str, vitral: Run, tmp_path: Path) -> None:
    refused(vitral(line), 1, text, set(tmp_path.rglob("*")), tmp_path)
