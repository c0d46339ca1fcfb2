"""What reaches the terminal, and a command whose terminal, reader or disk is gone."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitral.artifacts.prediction import Prediction
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli.commands.predict import _print_prediction
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import ImageError
from vitral.runtime.streams import shown, steady

VITRAL = [sys.executable, "-m", "vitral"]
FULL = Path("/dev/full")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("žluťoučký kůň, 日本語, 👍", "žluťoučký kůň, 日本語, 👍"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("caf\udce9.png", r"caf\udce9.png"),
        ("x\u202eypj.exe\u2028\x9b", r"x\u202eypj.exe\u2028\x9b"),
        ("[bold]red[/b] C:\\new", "[bold]red[/b] C:\\new"),
    ],
)
def test_what_would_move_the_cursor_is_made_visible(text: str, seen: str) -> None:
    assert shown(text) == seen


def test_other_streams_than_the_process_own_are_left_alone() -> None:
    stream: Any = object()
    assert steady(stream) is stream


def shell(words: str, **environment: str) -> subprocess.CompletedProcess:
    python = f"'{sys.executable}' -m vitral"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", words.replace("vitral", python, 1)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_results_that_a_full_disk_does_not_take_are_one_line_and_a_failure() -> None:
    done = shell("vitral --help > /dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        "vitral: standard output cannot be written: No space left on device\n",
    )


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_messages_that_nobody_can_read_change_no_status() -> None:
    assert shell("vitral nothing 2> /dev/full").returncode == 2
    assert shell("vitral --version 2> /dev/full").returncode == 0


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    done = shell("vitral --help | head -1")
    assert done.returncode in (0, 1)  # as the reader left before or after the last line
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(closed: str) -> None:
    done = shell(f"vitral --version {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("vitral" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_what_is_printed_to_a_closed_stream_reaches_no_file(tmp_path: Path) -> None:
    """The next file that is opened has the number of a stream that is closed."""
    code = """if True:
        import os, sys
        from vitral.runtime.streams import command_streams
        with command_streams(), open(sys.argv[1], "w") as file:
            os.write(1, b"results")
            os.write(2, b"messages")
    """
    file = tmp_path / "file"
    command = f"exec '{sys.executable}' -c '{code}' {file} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], timeout=60).returncode == 0
    assert file.read_text() == ""


@pytest.mark.parametrize("how", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_of_ascii_is_shown_escapes(how: dict[str, str]) -> None:
    code = """if True:
        import sys
        from vitral.runtime.streams import command_streams
        with command_streams():
            print("\\u017e \\udce9")
            print("\\u017e \\udce9", file=sys.stderr)
            sys.stdout.flush()
    """
    environment = {**os.environ, "PYTHONUTF8": "0", **how}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u017e \\udce9\n", "\\u017e \\udce9\n")


def test_names_and_labels_are_printed_visibly(capsys: pytest.CaptureFixture[str]) -> None:
    name, label = "a\nb\x1b[31m.png", "x\x07"
    _print_prediction(Prediction(name, ((label, 0.5),)), as_json=False)
    assert capsys.readouterr().out == "a\\nb\\x1b[31m.png: x\\x07 50.0%\n"
    _print_prediction(Prediction(name, (), "no image"), as_json=False)
    assert capsys.readouterr().err == "vitral: a\\nb\\x1b[31m.png: no image\n"
    _print_prediction(Prediction(name, ((label, 0.5),)), as_json=True)
    assert json.loads(capsys.readouterr().out)["image"] == name  # JSON is exact


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_libtiff_says_nothing_of_a_damaged_picture(
    compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "TIFF", compression=compression)
    damaged = bytearray(content.getvalue())
    damaged[200:240] = bytes(value ^ 0x5A for value in damaged[200:240])
    with pytest.raises(ImageError):
        open_image(bytes(damaged))
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="decoder error"):
        Image.open(io.BytesIO(damaged)).load()
    assert capfd.readouterr().err  # for others it speaks as before


@pytest.mark.parametrize("lost", ["2> /dev/full", "2>&1 | head -1"])
def test_a_run_outlives_its_terminal(lost: str, image_folder: Path, tmp_path: Path) -> None:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    words = f"model={tmp_path / 'base'} steps=6 batch_size=4 device=cpu precision=float32 workers=0"
    done = shell(f"vitral train {image_folder} --out {tmp_path / 'run'} {words} {lost}")
    # A lost reader of results is told by the status; the run is complete all the same.
    assert done.returncode == (1 if "|" in lost else 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
    assert done.stdout.count("\n") == (1 if "|" in lost else 4)


# --- Signals ---------------------------------------------------------------------------------------

# A command that waits for long; what it does when it is interrupted is in the braces.
_WAITING = """
import sys, time
from vitral import __main__
from vitral.cli import app as cli
from vitral.runtime import stopping
stopping._SECONDS_TO_END = 2.0
def app(**_):
    try:
        print("ready", flush=True)
        time.sleep(300)
    except BaseException:
        {}
cli.app = app
__main__.main()
"""


def interrupted(code: str, *numbers: int) -> subprocess.CompletedProcess:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # until it waits
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, "vitral: interrupted\n"),
        (signal.SIGTERM, "vitral: ended by SIGTERM\n"),
        (signal.SIGHUP, "vitral: ended by SIGHUP\n"),
    ],
)
def test_a_signal_ends_a_command_with_a_line_and_the_shells_status(number: int, line: str) -> None:
    done = interrupted(_WAITING.format("raise"), number)
    assert (done.returncode, done.stderr) == (128 + number, line)


def test_three_quick_ctrl_c_give_no_traceback() -> None:
    done = interrupted(_WAITING.format("time.sleep(0.03); raise"), *[signal.SIGINT] * 3)
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr in ("", "vitral: interrupted\n")


def test_a_second_sigterm_leaves_time_for_what_was_begun() -> None:
    done = interrupted(_WAITING.format("time.sleep(0.3); print('kept'); raise"), *[signal.SIGTERM] * 2)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (143, "kept")


def test_a_command_that_swallows_the_interruption_ends_all_the_same() -> None:
    began = time.monotonic()
    done = interrupted(_WAITING.format("time.sleep(300)"), signal.SIGTERM)
    assert done.returncode == 143
    assert time.monotonic() - began < 60


def test_what_nohup_ignores_stays_ignored() -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _WAITING.format("raise")
    done = interrupted(code, signal.SIGHUP, signal.SIGTERM)
    assert done.stderr == "vitral: ended by SIGTERM\n"
