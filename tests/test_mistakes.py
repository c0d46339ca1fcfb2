"""The wrong images are named and pictured, the worst first, by the library and by `vitral eval`."""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from tests.conftest import write_images
from tests.test_evaluate import Tint, tint_classifier
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli import app as cli
from vitral.data.split import Split
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.evaluation.mistakes import Mistakes, find_mistakes
from vitral.evaluation.multi_label import MultiLabelOutcomes
from vitral.evaluation.single_label import SingleLabelOutcomes
from vitral.images.preprocess import Preprocess
from vitral.images.sheet import prediction_sheet
from vitral.inference.classifier import load
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

LABELS = ("ant", "bee", "cat, a; pet")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Five grey pictures; the names of two are no plain text."""
    names = ["0.png", "1.png", "2 ä\n.png", "3.png", b"4 \xe9.png".decode(errors="surrogateescape")]
    for place, name in enumerate(names):
        Image.new("L", (9, 7), 40 * place).save(tmp_path / name)
    return Split([tmp_path / name for name in names], np.array([0, 1, 2, 0, 1]), names)


@pytest.fixture
def found(split: Split) -> Mistakes:
    """Of images 0, 2, 3 and 4 the last three are wrong; image 1 was damaged."""
    rows = np.array([0, 2, 3, 4])
    return find_mistakes(
        split, rows, outcomes(split.labels[rows], [0, 1, 1, 2], [0.9, 0.6, 0.8, 0.7]), LABELS
    )


def outcomes(
    labels: np.ndarray, answers: Sequence[int], probabilities: Sequence[float]
) -> SingleLabelOutcomes:
    unused = np.zeros(len(labels))
    return SingleLabelOutcomes(labels, np.array(answers), unused, np.array(probabilities), unused)


def test_mistakes_by_hand(found: Mistakes) -> None:
    assert found.judged == 4
    assert [(row.index, row.truth, row.answer, row.probability) for row in found.rows] == [
        (3, "ant", "bee", 0.8),
        (4, "bee", "cat, a; pet", 0.7),
        (2, "cat, a; pet", "bee", 0.6),
    ]


def test_a_table_is_read_back_as_it_was(found: Mistakes, tmp_path: Path) -> None:
    found.write(tmp_path / "wrong.csv")
    with (tmp_path / "wrong.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row.path for row in found.rows]
    assert [(row["truth"], row["answer"]) for row in rows] == [(row.truth, row.answer) for row in found.rows]
    assert [float(row["probability"]) for row in rows] == [0.8, 0.7, 0.6]
    assert b"4 \xe9.png" in (tmp_path / "wrong.csv").read_bytes()


def test_json_is_read_back_as_it_was(found: Mistakes, tmp_path: Path) -> None:
    found.write(tmp_path / "wrong.JSON")
    rows = json.loads((tmp_path / "wrong.JSON").read_text())
    assert [Path(row["path"]).exists() for row in rows] == [True] * 3
    assert rows[0] == {
        "path": str(tmp_path / "3.png"),
        "truth": "ant",
        "answer": "bee",
        "probability": 0.8,
    }


def test_several_labels_are_wrong_where_any_is(split: Split, tmp_path: Path) -> None:
    shown = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]], dtype=bool)
    probabilities = np.array(
        [[0.9, 0.1, 0.2], [0.1, 0.2, 0.3], [0.8, 0.3, 0.6], [0.1, 0.95, 0.4], [0.2, 0.9, 0.1]]
    )
    several = Split(split.images, shown, split.names)
    judged = MultiLabelOutcomes(shown, np.log(probabilities), np.zeros(5))
    found = find_mistakes(several, np.arange(5), judged, LABELS)
    # Image 3: "bee" at 0.95 is the surest of its two wrong answers; image 2: no "bee", at 1 - 0.3.
    assert [(row.index, row.truth, row.answer, row.probability) for row in found.rows] == [
        (3, ("cat, a; pet",), ("bee",), pytest.approx(0.95)),
        (2, ("ant", "bee"), ("ant", "cat, a; pet"), pytest.approx(0.7)),
    ]
    found.write(tmp_path / "wrong.csv")
    rows = list(csv.DictReader((tmp_path / "wrong.csv").read_text().splitlines()))
    assert json.loads(rows[1]["answer"]) == ["ant", "cat, a; pet"]


def test_a_sheet_shows_every_wrong_image(found: Mistakes, tmp_path: Path) -> None:
    (tmp_path / "3.png").unlink()  # vanished since
    found.draw(tmp_path / "wrong.png", "title")
    with Image.open(tmp_path / "wrong.png") as sheet:
        assert sheet.format == "PNG"
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**20) or []}
    assert {(160, 160, 160), (80, 80, 80), (128, 128, 128)} <= colours


def test_no_mistake_is_a_list_and_a_sheet_too(split: Split, tmp_path: Path) -> None:
    found = find_mistakes(split, np.arange(5), outcomes(split.labels, split.labels.tolist(), [1] * 5), LABELS)
    found.write(tmp_path / "wrong.csv")
    found.draw(tmp_path / "wrong.webp", "none")
    assert (tmp_path / "wrong.csv").read_text() == "path,truth,answer,probability\n"


@pytest.mark.parametrize("name", ["wrong.txt", "wrong", "no/wrong.csv", "folder.csv"])
def test_what_cannot_be_written_is_refused(name: str, found: Mistakes, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(VitralError, match=r"wrong|folder\.csv is a folder"):
        found.write(tmp_path / name)


def test_captions_are_cut_to_their_tile() -> None:
    def sheet(label: str) -> Image.Image:
        return prediction_sheet("t", [Image.new("RGB", (8, 8))], [(label, 0.5)], ["x"], columns=1)

    long = np.asarray(sheet("a label of far too many words for its tile\nand lines"))
    assert (long[:, 96:] == long[0, 0]).all(), "it runs over the edge of its tile"
    assert long.shape == np.asarray(sheet("b")).shape
    for place in (0, -1):  # what is left tells names of one length from each other
        letters = list("n0209233" * 3)
        letters[place] = "7"
        assert (np.asarray(sheet("n0209233" * 3)) != np.asarray(sheet("".join(letters)))).any()


# --- Of a classifier -------------------------------------------------------------------------------


def test_an_evaluation_keeps_mistakes_only_if_asked(image_folder: Path) -> None:
    # It takes bees for cats and cats for bees; one ant is damaged.
    (image_folder / "ant" / "003.png").write_bytes(b"no picture")
    swapped = replace(tint_classifier("ant cat bee"), model=cast(Any, Tint(0, 1, 2)))
    options: dict[str, Any] = {"split": "all", "max_damaged": 0.5}
    assert evaluate_classifier(swapped, str(image_folder), **options)[1].mistakes is None
    _, evaluation = evaluate_classifier(swapped, str(image_folder), mistakes=True, **options)
    assert evaluation.mistakes is not None
    assert evaluation.mistakes.judged == evaluation.n == 35
    found = {row.path for row in evaluation.mistakes.rows}
    assert found == {str(file) for name in ("bee", "cat") for file in (image_folder / name).iterdir()}
    assert {(Path(row.path).parent.name, row.truth) for row in evaluation.mistakes.rows} == {
        ("bee", "bee"), ("cat", "cat"),
    }  # fmt: skip
    assert "mistakes" not in evaluation.to_dict()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    network = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=3)
    save_checkpoint(tmp_path / "model", Checkpoint(network, Preprocess((16, 16)), ("ant", "bee", "cat")))
    return tmp_path / "model"


def vitral(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vitral", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_eval_writes_the_list_and_the_sheet(
    model: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed, sheet = tmp_path / "wrong.json", tmp_path / "wrong.png"
    words = ("eval", model, image_folder, "--split", "all", "--precision", "float32", "--json")
    assert vitral(monkeypatch, *words, "--wrong", listed, "--sheet", sheet) == 0
    evaluation = json.loads(capsys.readouterr().out)
    rows = json.loads(listed.read_text())
    assert len(rows) == 36 - round(36 * evaluation["top1"])
    for row in rows[:3]:
        (prediction,) = load(model, precision="float32").predict(row["path"])
        assert prediction.top[0] == (row["answer"], pytest.approx(row["probability"], rel=1e-4))
        assert row["truth"] == Path(row["path"]).parent.name
    assert [row["probability"] for row in rows] == sorted((r["probability"] for r in rows), reverse=True)
    with Image.open(sheet) as picture:
        assert picture.width > 1000


def test_several_labels_are_listed_by_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = write_images(tmp_path / "images", {"ant": 4, "bee": 4})
    files = sorted(folder.rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": cells, "label": [["ant"], ["ant", "bee"]] * 4}), tmp_path / "d.parquet")
    network = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    checkpoint = Checkpoint(network, Preprocess((16, 16)), ("ant", "bee"), multi_label=True)
    save_checkpoint(tmp_path / "model", checkpoint)
    out = tmp_path / "wrong.json"
    words = ("eval", tmp_path / "model", tmp_path / "d.parquet", "--split", "all", "--json")
    assert vitral(monkeypatch, *words, "--wrong", out, "--sheet", tmp_path / "w.png") == 0
    for row in json.loads(out.read_text()):
        assert row["path"].startswith("train row ")
        assert row["truth"] != row["answer"]
        assert {*row["truth"], *row["answer"]} <= {"ant", "bee"}
