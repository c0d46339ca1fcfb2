"""Random invocations of the command line: each ends in time, in words, with a status that it may have."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_images
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli import app as cli
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.schema import FIELDS

pytestmark = pytest.mark.slow

IN_PROCESS, AS_PROCESSES = 300, 40
SECONDS = 60.0  # on a machine that may be busy; alone, each takes a second or two

ODD = [
    "", " ", ".", "..", "/", "/dev/null", "/proc/x", "/proc/self/mem", "a\nb", "\x1b[31m", "[bold]red[",
    "[/b]", "🦄", "caf\udce9", "-1", "0", "1", "nan", "inf", "1e308", "1e-320", "10**9", "9" * 30, "true",
    "none", "null", "None", "{}", "[]", "[1,2]", "x" * 300, "--", "-", "--help", "*", "{split}.parquet",
    "x.parquet", "a=b", "=", "hf:/x",
]  # fmt: skip
FLAGS = [
    "--json",
    "--help",
    "--resume",
    "--show-groups",
    "--private",
    "--no-measure",
    "--version",
    "-x",
    "--x",
]
OPTIONS = [
    "--out", "--recipe", "--split", "--max-damaged", "--workers", "--tta", "--device", "--precision", "--top",
    "--batch-size", "--limit", "--seed", "--img-size", "--features", "--layer", "--per-class", "--cache",
    "--to", "--wrong", "--sheet",
]  # fmt: skip
GOOD = {
    "--split": "all", "--workers": "1", "--tta": "flip", "--device": "cpu", "--precision": "float32",
    "--top": "2", "--limit": "4", "--seed": "3", "--img-size": "16", "--features": "mean", "--layer": "-1",
    "--per-class": "2", "--to": "timm", "--recipe": "deit", "--batch-size": "2", "--max-damaged": "0.5",
}  # fmt: skip
SETTINGS = list(FIELDS)


@dataclass
class Place:
    """What an invocation may name."""

    folder: Path
    number: int = 0

    def new(self) -> str:
        self.number += 1
        return str(self.folder / f"new-{self.number}")

    def value(self, draw: random.Random) -> str:
        there = [str(path) for path in (self.folder / "in").iterdir()]
        return draw.choice([draw.choice(ODD), draw.choice(there), self.new(), "digits", "ViT-Ti/16", "deit3"])

    def words(self, draw: random.Random) -> list[str]:
        """A command that would do, with some of its words changed, left out or added."""
        model, data = str(self.folder / "in/model"), str(self.folder / "in/images")
        command = draw.choice(
            [
                ["train", data, "--out", self.new(), f"model={model}", "steps=2", "batch_size=4"],
                ["train", data, "--out", self.new(), "model=ViT-Pico/8", "steps=2", "batch_size=4"],
                ["eval", model, data],
                ["predict", model, data],
                ["info", draw.choice([model, "ViT-Ti/16"]), "--no-measure"],
                ["doctor", model, data],
                ["probe", model, data],
                ["convert", model, self.new()],
                ["recipe", draw.choice(["show", "list", "diff"]), "deit", "deit3"],
            ]
        )
        for _ in range(draw.randrange(4)):
            self._change(command, draw)
        # Whatever else it was told, it is not asked to train for long.
        return [*command, "minutes=0.02", "device=cpu"] if command[0] == "train" else command

    def _change(self, words: list[str], draw: random.Random) -> None:
        match draw.randrange(6):
            case 0 if len(words) > 1:
                del words[draw.randrange(1, len(words))]
            case 1 if len(words) > 1:
                words[draw.randrange(1, len(words))] = self.value(draw)
            case 2:
                words.append(draw.choice(FLAGS))
            case 3:
                option = draw.choice(OPTIONS)
                words += [option, GOOD.get(option, self.new()) if draw.random() < 0.6 else self.value(draw)]
            case 4:
                words.append(f"{draw.choice(SETTINGS)}={self.value(draw)}")
            case _:
                words.append(self.value(draw))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    there = tmp_path / "in"
    write_images(there / "images", {"a [/b] c": 6, "[bold]red[": 6}, size=(20, 20))
    write_images(there / "plain", {"ant": 5, "bee": 5})
    (there / "empty").mkdir()
    (there / "text.png").write_text("no picture")
    (there / "model.safetensors").write_bytes(b"\xff" * 100)
    os.mkfifo(there / "pipe.png")
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    labels = ("[bold]red[", "a [/b] c")
    save_checkpoint(there / "model", Checkpoint(model, Preprocess((16, 16)), labels))
    return Place(tmp_path)


class HangError(BaseException):
    pass


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault(status: object, err: str) -> str:
    """What is wrong with an ending; "" if nothing is."""
    if "this is a defect" in err or "Traceback" in err:
        return err.strip().splitlines()[-1][:300]
    if status not in (0, 1, 2, 129, 130, 143):
        return f"status {status}"
    if (
        status == 1 and not err.strip().splitlines()[-1:][0].startswith("vitral: ")
        if err.strip()
        else status == 1
    ):
        return f"status 1 without a line: {err[-200:]!r}"
    if "\x1b[3" in err:
        return "an escape of the input reached the terminal"
    return ""


@pytest.mark.filterwarnings("default")
def test_no_invocation_fails_without_a_reason_or_hangs(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw, faults = random.Random(0), []
    for _ in range(IN_PROCESS):
        words = place.words(draw)
        monkeypatch.setattr(sys, "argv", ["vitral", *words])
        status: Any = None
        try:
            with in_time(SECONDS), pytest.raises(SystemExit) as ended:
                cli.main()
            status = ended.value.code or 0
        except HangError:
            faults.append((words, f"took over {SECONDS:g} s"))
        err = capfd.readouterr().err
        if status is not None and (found := fault(status, err)):
            faults.append((words, found))
    assert not faults, "\n".join(f"{words}: {found}" for words, found in faults)


STREAMS = [
    "",
    "",
    ">&-",
    "2>&-",
    ">&- 2>&-",
    "<&-",
    "> /dev/full",
    "2> /dev/full",
    "| head -1",
    "2>&1 | head -c 1",
]
SIGNALS: list[Callable[[subprocess.Popen], object]] = [
    lambda _: None,
    lambda process: process.send_signal(signal.SIGTERM),
    lambda process: process.send_signal(signal.SIGINT),
    lambda process: os.killpg(process.pid, signal.SIGHUP),
    lambda process: [os.killpg(process.pid, signal.SIGINT) for _ in range(3)],
]


def test_no_process_dies_with_a_traceback_whatever_its_streams_and_signals(place: Place) -> None:
    draw, faults = random.Random(1), []
    for _ in range(AS_PROCESSES):
        words, streams, send = place.words(draw), draw.choice(STREAMS), draw.choice(SIGNALS)
        delay = draw.uniform(0.1, 8.0)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            **draw.choice([{}, {"PYTHONIOENCODING": "ascii"}]),
        }
        # exec: the signal reaches the command itself.
        script = f'{"" if "|" in streams else "exec "}"$0" -m vitral "$@" {streams}'
        process = subprocess.Popen(
            [
                "bash",
                "-o",
                "pipefail",
                "-c",
                f"exec {script}" if "|" not in streams else script,
                sys.executable,
            ]
            + [word.encode("utf-8", "surrogateescape") for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd=place.folder,
            env=environment,
        )
        time.sleep(delay)
        if process.poll() is None:
            send(process)
        try:
            _, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            faults.append((words, streams, delay, "hangs"))
            continue
        text = err.decode(errors="replace")
        if "Traceback" in text or "this is a defect" in text or text.count("\n") > 40:
            faults.append((words, streams, delay, text[-400:]))
    assert not faults, "\n".join(map(str, faults))
