"""Scoring without end: the answers of `predict` in parquet parts, each image once, whatever stops it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_images
from tests.test_cli import Vitral
from tests.test_cli import vitral as vitral  # the fixture
from vitral import load
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.sources import Unlabelled
from vitral.images.preprocess import Preprocess
from vitral.inference.scoring import results as module
from vitral.inference.scoring.results import Job, Results
from vitral.inference.scoring.score import score
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.stopping import Interrupted


def tiny_model(folder: Path, seed: int = 0) -> Path:
    import torch

    torch.manual_seed(seed)
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 12, "num_layers": 1, "num_heads": 3}
    model = VisionTransformer(**sizes, num_classes=3)
    torch.nn.init.normal_(model.state_dict()["head.weight"])
    save_checkpoint(folder, Checkpoint(model.eval(), Preprocess((24, 24)), ("ant", "bee", "cat")))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """23 images, of which one is damaged and one has a name of strange bytes."""
    folder = write_images(tmp_path / "photos", {"x": 11, "y": 10})
    (folder / "x" / "005.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (folder / "z.png").write_bytes((folder / "y" / "000.png").read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(
        (folder / "y" / "001.png").read_bytes()
    )
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_ROWS", 6)


def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder).to_pylist()


def test_the_folder_has_the_answers_of_predict(
    model: Path, photos: Path, tmp_path: Path, small_parts: None
) -> None:
    scored = score(model, str(photos), tmp_path / "out", batch_size=4, top=2)
    found = rows(tmp_path / "out")
    files = [row["image"] for row in found]
    expected = load(model).predict(
        [os.fsdecode(os.fsencode(row)) for row in files if "caf" not in row], top=2
    )
    assert (scored.images, scored.failed, scored.parts, scored.resumed) == (23, 1, 3, 0)  # parts of 8
    assert [row["row"] for row in found] == list(range(23))
    assert sum("caf\\xe9" in name for name in files) == 1
    by_name = {one.image: one for one in expected}
    for row in found:
        if "caf" in row["image"]:
            continue
        one = by_name[row["image"]]
        assert row["error"] == one.error
        if one.error is None:
            assert [pair["label"] for pair in row["top"]] == [label for label, _ in one.top]
            assert np.allclose(
                [pair["probability"] for pair in row["top"]], [p for _, p in one.top], atol=1e-6
            )
            assert (row["label"], row["probability"]) == tuple(row["top"][0].values())
        else:
            assert row["label"] is row["probability"] is row["top"] is None


def test_what_was_written_is_not_computed_again_and_the_end_is_the_same_to_the_bit(
    model: Path, photos: Path, tmp_path: Path, small_parts: None
) -> None:
    score(model, str(photos), tmp_path / "calm", batch_size=4)
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done >= 12:  # in the middle of the second part
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, str(photos), out, batch_size=4, on_images=stop)
    assert [file.name for file in out.glob("*.parquet")] == ["part-000000.parquet"]
    written = (out / "part-000000.parquet").stat().st_mtime_ns
    # What a killed process may leave, and a part that is not whole.
    (out / ".part-000001.parquet.abcd1234").write_bytes(b"half")
    (out / "part-000002.parquet").write_bytes(b"PAR1")
    scored = score(model, str(photos), out, batch_size=4)
    assert scored.resumed == 8
    assert (out / "part-000000.parquet").stat().st_mtime_ns == written
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "calm"))
    assert not list(out.glob(".part*"))


def test_images_of_bytes_are_fetched_once_each_and_lost_ones_have_their_reason(
    model: Path, tmp_path: Path
) -> None:
    photos = write_images(tmp_path / "more", {"x": 7})
    content = [path.read_bytes() for path in sorted(photos.glob("x/*"))]
    asked: list[int] = []

    class Images:
        def __len__(self) -> int:
            return 7

        def __getitem__(self, row: int) -> bytes:
            asked.append(row)
            if row == 3:
                raise ImageError("its cell is empty")
            return content[row]

    source = Unlabelled(Images(), [f"row {number}" for number in range(7)])
    score(model, source, tmp_path / "out", batch_size=2)
    found = rows(tmp_path / "out")
    assert sorted(asked) == list(range(7))
    assert [row["image"] for row in found] == [f"row {number}" for number in range(7)]
    assert [row["error"] for row in found if row["error"]] == ["its cell is empty"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": 2}, "holds scores of top=3; choose another --out"),
        ({"batch_size": 8}, "holds scores of batch_size=32"),
        ({"tta": "flip"}, "holds scores of tta=none"),
    ],
)
def test_other_scores_are_not_mixed_in(
    model: Path, photos: Path, tmp_path: Path, change: dict, message: str
) -> None:
    score(model, str(photos), tmp_path / "out")
    with pytest.raises(VitralError, match=message):
        score(model, str(photos), tmp_path / "out", **change)


def test_another_model_or_other_images_are_told_by_their_digests(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    score(model, str(photos), out)
    moved = model.rename(tmp_path / "moved")
    assert score(moved, str(photos), out).resumed == 23  # the same, wherever it lies
    with pytest.raises(VitralError, match="holds scores of another model"):
        score(tiny_model(tmp_path / "other", seed=1), str(photos), out)
    (photos / "z.png").unlink()
    with pytest.raises(VitralError, match="holds scores of other images"):
        score(moved, str(photos), out)


def test_a_folder_of_something_else_is_left_alone(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.parquet").write_bytes(b"mine")
    with pytest.raises(VitralError, match="holds parquet files of something else"):
        score(model, str(photos), tmp_path / "out")
    assert (tmp_path / "out" / "train.parquet").read_bytes() == b"mine"


def test_one_process_at_a_time(model: Path, photos: Path, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(VitralError, match=r"is in use: process \d+ scores there"):
            score(model, str(photos), tmp_path / "out")

    score(model, str(photos), tmp_path / "out", on_images=again)


def test_if_nothing_can_be_read_that_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(VitralError, match="not one of the 1 images could be read"):
        score(model, str(tmp_path / "bad"), tmp_path / "out")


def test_parts_are_whole_batches_and_few_enough() -> None:
    def job(images: int, batch_size: int) -> Job:
        return Job("m", "w", "s", images, "n", 3, batch_size, "none", None, "auto")

    for images in (1, 1023, 1024, 1_280_000, 10**9):
        for batch_size in (1, 32, 100, 5000):
            this = job(images, batch_size)
            assert this.rows % batch_size == 0
            assert this.parts <= 10_000
            ends = [this.span(0).start, this.span(this.parts - 1).stop]
            assert ends == [0, images]
            assert len(this.span(this.parts - 1)) > 0
    assert job(1_280_000, 32).rows == 1024


def test_the_end_checks_that_each_row_is_there_once(
    model: Path, photos: Path, tmp_path: Path, small_parts: None
) -> None:
    score(model, str(photos), tmp_path / "out", batch_size=4)
    out = Results(tmp_path / "out")
    out.part_file(0).write_bytes(out.part_file(1).read_bytes())  # as many rows, of another part
    with pytest.raises(VitralError, match=r"part-000000\.parquet does not hold rows 0"):
        score(model, str(photos), tmp_path / "out", batch_size=4)


# --- The command -----------------------------------------------------------------------------------


def test_the_command_says_what_came_of_it(vitral: Vitral, model: Path, photos: Path, tmp_path: Path) -> None:
    result = vitral("predict", model, photos, "--out", tmp_path / "out")
    assert result.status == 0
    assert result.out == (
        f"{tmp_path / 'out'}: 23 images in 1 file; 1 could not be read, see the column error\n"
    )
    again = json.loads(vitral("predict", model, photos, "--out", tmp_path / "out", "--json").out)
    assert (again["resumed"], again["failed"]) == (23, 1)
    files = sorted(photos.glob("y/*"))
    assert "10 images" in vitral("predict", model, *files, "--out", tmp_path / "files").out


def test_after_a_signal_it_says_that_the_same_command_goes_on(
    vitral: Vitral, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(model: str, found: object, out: Path, **_: object) -> None:
        out.mkdir()
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr("vitral.inference.scoring.score.score", ended)
    result = vitral("predict", model, photos, "--out", tmp_path / "out")
    assert result.status == 130
    assert result.err.splitlines() == [
        f"vitral: {tmp_path / 'out'} keeps what is scored; the same command goes on from there",
        "vitral: interrupted",
    ]


@pytest.mark.parametrize("data", ["labels.csv", "images.parquet", "a-{0..3}.tar", "hf://datasets/a/b"])
def test_what_holds_images_is_scored_into_a_folder(vitral: Vitral, model: Path, data: str) -> None:
    result = vitral("predict", model, data)
    assert result.status == 1
    assert result.err == f"vitral: {data} is no image, but data that holds some; score it with --out FOLDER\n"


def test_a_folder_may_be_called_as_other_data(
    vitral: Vitral, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    Path("y").rename("digits")
    assert len(vitral("predict", model, "digits").out.splitlines()) == 10


def test_the_engine_is_for_a_folder(vitral: Vitral, model: Path, photos: Path) -> None:
    result = vitral("predict", model, photos, "--engine", "ray")
    assert result.status == 2
    assert "name the folder that --engine, --actors and --column are for" in result.err


# --- Ray -------------------------------------------------------------------------------------------


def ray_command(model: Path, photos: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "vitral", "predict", str(model), str(photos), "--out", str(out)]
    return [*command, "--engine", "ray", "--actors", "2", "--batch-size", "4"]


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "Scorer" in words and "ray::" in words:
            found.append(process)
    return found


@pytest.mark.slow
def test_ray_gives_the_rows_of_predict_through_killed_actors_and_a_killed_driver(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    photos = write_images(tmp_path / "photos", {"x": 3000, "y": 3000}, size=(160, 120))
    (photos / "x" / "005.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    out, command = tmp_path / "out", ray_command(model, photos, tmp_path / "out")
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    killed: set[int] = set()
    end = time.monotonic() + 120
    while len(killed) < 1 and time.monotonic() < end and driver.poll() is None:
        if list(out.glob("part-*")):
            for process in actors()[:1]:
                process.send_signal(signal.SIGKILL)
                killed.add(process.pid)
        time.sleep(0.05)
    assert killed
    before = len(list(out.glob("part-*")))
    while len(list(out.glob("part-*"))) == before and driver.poll() is None:
        time.sleep(0.05)  # it goes on with another actor
    driver.kill()
    driver.wait()
    parts = len(list(out.glob("part-*")))
    assert 0 < parts < 6
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6,000 images" in done.stdout
    score(model, str(photos), tmp_path / "here", batch_size=4)
    ours, theirs = (pq.read_table(folder) for folder in (tmp_path / "here", out))
    for name in ("row", "image", "label", "error"):
        assert ours[name].equals(theirs[name])
    assert np.allclose(
        *(np.array(of["probability"].to_pylist(), float) for of in (ours, theirs)), equal_nan=True
    )
