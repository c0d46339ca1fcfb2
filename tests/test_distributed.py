"""Several processes under torchrun: the same bits as one, one line for what is wrong, and no share lost."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import write_images
from tests.processes import ALL_THAT_IS_RANDOM, SMALL, assert_same_run, started, torchrun, words
from vitral.runtime.world import share_of
from vitral.training.distributed import Node, Tree, shape_of

# --- The tree --------------------------------------------------------------------------------------


def summed(values: list[Tensor]) -> Tensor:
    tree: Tree[Tensor] = Tree(torch.add)
    for place, value in enumerate(values):
        tree.push(Node(0, place, value))
    return tree.total()


@pytest.mark.parametrize("parts", range(1, 14))
def test_any_number_of_processes_adds_in_the_same_order(parts: int) -> None:
    """What each process is left with, put together in order, gives the bits of one process."""
    values = [torch.randn(1000) * 10**place for place in torch.randn(parts)]
    expected = summed([value.clone() for value in values])
    for processes in range(1, parts + 1):
        whole: Tree[Tensor] = Tree(torch.add)
        for rank in range(processes):
            mine, own = share_of(rank, processes, parts), Tree(torch.add)
            for part in mine:
                own.push(Node(0, part, values[part]))
            assert shape_of(mine) == [(node.level, node.place) for node in own.nodes]
            for node in own.nodes:
                whole.push(node)
        assert torch.equal(whole.total(), expected)


def test_the_tree_is_the_one_on_paper() -> None:
    a, b, c, d, e = (torch.randn(100) for _ in range(5))
    assert torch.equal(summed([a, b, c]), (a + b) + c)
    assert torch.equal(summed([a, b, c, d, e]), ((a + b) + (c + d)) + e)


def test_every_part_is_in_one_share() -> None:
    for size in range(1, 9):
        for count in range(size, 20):
            shares = [share_of(rank, size, count) for rank in range(size)]
            assert [part for share in shares for part in share] == list(range(count))
            assert {len(share) for share in shares} <= {count // size, count // size + 1}


# --- Under torchrun --------------------------------------------------------------------------------

SETTINGS = words(**SMALL)
RANDOM = words(**ALL_THAT_IS_RANDOM)


def launched(processes: int, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`vitral` under torchrun, or in one process without it."""
    return started([*torchrun(processes, *options), "-m", "vitral", *arguments])


def trained(folder: Path, data: Path, processes: int, *settings: str) -> Path:
    """A finished run; raises AssertionError with what was said if it is not."""
    done = launched(processes, "train", str(data), "--out", str(folder), *SETTINGS, *settings)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """90 images to train on."""
    return write_images(tmp_path / "images", {"ant": 37, "bee": 37, "cat": 37})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "processes", "steps"), [(2, 2, 50), (3, 3, 8), (4, 4, 8), (5, 2, 8), (4, 2, 8), (6, 4, 8)]
)
def test_any_number_of_processes_gives_the_bits_of_one(
    parts: int, processes: int, steps: int, data: Path, tmp_path: Path
) -> None:
    """Of weights, their average, the optimizer's state and the metrics, with every draw on."""
    size = 12 if parts == 2 else 2 * parts
    settings = [f"parts={parts}", f"batch_size={size}", f"steps={steps}", *RANDOM]
    settings += [] if parts == 2 else ["optimizer=adamw"]
    one = trained(tmp_path / "one", data, 1, *settings)
    assert_same_run(one, trained(tmp_path / "more", data, processes, *settings))


# --- What goes wrong -------------------------------------------------------------------------------


def damaged(data: Path, share: int) -> Path:
    """Some images of each class, cut short."""
    for image in sorted(data.rglob("*.png"))[::share]:
        image.write_bytes(image.read_bytes()[:60])
    return data


@pytest.mark.slow
def test_damaged_images_count_alike_whoever_reads_them(data: Path, tmp_path: Path) -> None:
    """With two images a part, some parts have none that can be read."""
    damaged(data, 3)
    settings = ["parts=2", "batch_size=4", "steps=20", "max_damaged=0.5", *RANDOM]
    one, two = (trained(tmp_path / name, data, count, *settings) for name, count in (("one", 1), ("two", 2)))
    assert_same_run(one, two)
    records = [json.loads((run / "checkpoints" / "run.json").read_text())["damaged"] for run in (one, two)]
    assert records[0] == records[1]
    assert len(records[0]) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["learning_rate=1e30", "warmup=0.0"], "the loss is"),
        (["max_damaged=0.1"], "images are damaged, more than the limit of 10.0%"),
    ],
)
def test_what_one_process_meets_ends_all_with_one_line(
    settings: list[str], words: str, data: Path, tmp_path: Path
) -> None:
    damaged(data, 3) if "max_damaged=0.1" in settings else None
    settings = [*settings, "parts=2", "batch_size=8", "steps=40"]
    done = launched(2, "train", str(data), "--out", str(tmp_path / "run"), *SETTINGS, *settings)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("vitral:") and words in line]
    assert len(lines) == 1, done.stderr
    assert "defect" not in done.stderr


_WATCHED = """
import os, signal, sys
from vitral.cli.app import main
from vitral.cli import training

sent, step, number, rank = sys.argv[1:5]

class Console(training.TrainingConsole):
    def __call__(self, event):
        super().__call__(event)
        if type(event).__name__ == "StepDone" and event.step == int(step) and not os.path.exists(sent):
            open(sent, "w").close()
            victim = int(open(sent + ".pid").read()) if rank == "1" else os.getpid()
            os.kill(victim, getattr(signal, number))

if os.environ.get("RANK") == "1":
    open(sent + ".pid", "w").write(str(os.getpid()))
training.TrainingConsole = Console
sys.argv = ["vitral", *sys.argv[5:]]
main()
"""


def signalled(
    folder: Path, data: Path, processes: int, number: str, rank: int, *settings: str, restarts: int = 0
) -> subprocess.CompletedProcess:
    """A run of which one process gets a signal after step 7, once."""
    program = folder.parent / "watched.py"
    program.write_text(_WATCHED)
    command = [*torchrun(processes, f"--max-restarts={restarts}"), str(program)]
    command += [str(folder) + ".sent", "7", number, str(rank)]
    return started([*command, "train", str(data), "--out", str(folder), *SETTINGS, *settings])


COURSE = ["parts=2", "batch_size=12", "steps=12", "checkpoint_steps=3", *RANDOM]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_comes_back_and_the_run_goes_on(rank: int, data: Path, tmp_path: Path) -> None:
    done = signalled(tmp_path / "killed", data, 2, "SIGKILL", rank, *COURSE, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "holds this run already: it goes on" in done.stderr
    assert_same_run(trained(tmp_path / "calm", data, 1, *COURSE), tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_with_a_checkpoint(rank: int, data: Path, tmp_path: Path) -> None:
    """And it is taken up by one process, where two began it."""
    done = signalled(tmp_path / "stopped", data, 2, "SIGTERM", rank, *COURSE)
    assert done.returncode
    assert f"go on with: vitral train {data} --out {tmp_path / 'stopped'} --resume" in done.stdout
    saved = torch.load(tmp_path / "stopped" / "checkpoints" / "state.pt", weights_only=True)
    assert saved["state"]["step"] in (7, 8)
    resumed = launched(1, "train", str(data), "--out", str(tmp_path / "stopped"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(trained(tmp_path / "calm", data, 2, *COURSE), tmp_path / "stopped")


@pytest.mark.slow
def test_a_process_that_dies_without_a_word_ends_the_others(data: Path, tmp_path: Path) -> None:
    done = signalled(tmp_path / "killed", data, 2, "SIGKILL", 1, *COURSE)
    assert done.returncode == 1
    assert done.stderr.count("another process of this run ended without a word") == 1, done.stderr


# --- Evaluation ------------------------------------------------------------------------------------

_EVALUATES = """
import json, sys
import numpy as np, torch
from dataclasses import replace
from vitral.data.image_data import open_data
from vitral.evaluation.evaluate import EvaluationOptions, judge
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.world import joined

with joined() as world:
    data = open_data(sys.argv[1], val_fraction=0)
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=3).eval()
    classifier = Classifier(model, Preprocess((16, 16)), data.classes, Placement.choose("cpu", "float32"))
    images = data.split("train")
    found = {}
    for count in range(1, 18):
        rows = np.linspace(0, len(images) - 1, count).astype(int)
        options = EvaluationOptions(batch_size=2, workers=0, max_damaged=1.0)
        judged = judge(classifier, images.take(rows), options, lambda _: None, lambda *_: None, world=world)
        found[count] = judged.evaluation.to_dict(), judged.rows.tolist(), len(judged.damaged)
    if world.is_first:
        print(json.dumps(found))
"""


@pytest.mark.slow
def test_each_image_counts_once_whatever_the_number_of_processes(data: Path, tmp_path: Path) -> None:
    """To the bit: 1 to 17 images, a few of them damaged, in 1 to 3 processes."""
    for image in sorted(data.rglob("*.png"))[7::11]:
        image.write_bytes(b"")
    program = tmp_path / "evaluates.py"
    program.write_text(_EVALUATES)
    answers = []
    for processes in (1, 2, 3):
        done = started([*torchrun(processes), str(program), str(data)])
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] == answers[2]
    for count, (figures, rows, damaged_images) in json.loads(answers[0]).items():
        assert figures["n"] + damaged_images == int(count)
        assert rows == sorted(set(rows))
