"""The command line keeps its contract: what is printed where, in which form, with which status."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_images
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.cli import app as cli
from vitral.cli.commands.demo import learn_digits
from vitral.cli.training import TrainingConsole
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import load
from vitral.model.vit import VisionTransformer
from vitral.training.events import StepDone


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


Vitral = Callable[..., Result]


@pytest.fixture
def vitral(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Vitral:
    """Runs the command in this process, as its words on a wide terminal would."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")

    def command(*words: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["vitral", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        assert isinstance(status, int | None)
        return Result(status or 0, *capsys.readouterr())

    return command


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """Settings of a run of two steps of a tiny model."""
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2, dropout=0.0)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    base = f"model={tmp_path / 'base'}"
    return [base, "steps=2", "batch_size=8", "workers=0", "device=cpu", "precision=float32"]


@pytest.fixture
def run(vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path) -> Path:
    """A finished run on `image_folder`."""
    assert vitral("train", image_folder, "--out", tmp_path / "run", *quick).status == 0
    return tmp_path / "run"


def assert_failed_in_one_line(result: Result, text: str) -> None:
    assert result.status == 1
    last = result.err.splitlines()[-1]
    assert last.startswith("vitral: ")
    assert text in last
    assert "defect" not in result.err
    assert "Traceback" not in result.err


# --- The program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["demo", "train", "eval", "predict", "explain", "info", "--version"]),
        (("train",), ["DATA", "--out", "--recipe", "--resume", "KEY=VALUE"]),
        (("eval",), ["MODEL", "DATA", "--split", "--json"]),
        (("predict",), ["MODEL", "IMAGES", "--top", "--json", "--tta"]),
        (
            ("explain",),
            ["MODEL", "IMAGE", "--out", "--method", "--class", "--against", "--layers", "--heads"],
        ),
        (("probe",), ["MODEL", "DATA", "--img-size", "--layer", "--per-class", "--cache", "--out", "--json"]),
        (("info",), ["MODEL", "--device"]),
        (("demo",), ["--out"]),
    ],
    ids=str,
)
def test_help_names_what_a_command_takes(command: tuple[str, ...], words: list[str], vitral: Vitral) -> None:
    result = vitral(*command, "--help")
    assert result.status == 0
    assert all(word.lower() in result.out.lower() for word in words)


def test_short_help_is_help(vitral: Vitral) -> None:
    assert vitral("-h").out == vitral("--help").out


def test_the_version_is_the_packages(vitral: Vitral) -> None:
    assert vitral("--version") == Result(0, f"vitral {version('vitral')}\n", "")


def test_python_can_run_the_package() -> None:
    assert python("-m", "vitral", "--version").stdout == f"vitral {version('vitral')}\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]], ids=str)
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    lines = [
        "import sys",
        "import vitral.cli.app",
        f"sys.argv = ['vitral', *{words}]",
        "try: vitral.cli.app.main()",
        "except SystemExit: pass",
        "sys.exit('torch' in sys.modules)",
    ]
    assert python("-c", "\n".join(lines)).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["train"],
        ["train", "images"],
        ["train", "images", "--out", "run", "--nonsense"],
        ["eval", "run"],
        ["predict", "run"],
        ["predict", "run", "a.png", "--top", "0"],
        ["predict", "run", "a.png", "--batch-size", "many"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_two(words: list[str], vitral: Vitral) -> None:
    assert vitral(*words).status == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "nowhere", "--out", "run"], "nowhere does not exist; DATA is an image folder"),
        (
            ["train", "digits", "--out", "run", "epoch=3"],
            "there is no setting 'epoch'; did you mean 'epochs'?",
        ),
        (["train", "digits", "--out", "run", "epochs=soon"], "epochs='soon': input should be a valid number"),
        (["train", "digits", "--out", "run", "epochs=inf"], "epochs=inf"),
        (["train", "digits", "--out", "run", "img_size=0"], "img_size"),
        (["train", "digits", "--out", "run", "epochs"], "'epochs' is not a setting; write key=value"),
        (["train", "digits", "--out", "run", "model=ViT-X/16"], "there is no model 'ViT-X/16'; did you mean"),
        (["train", "digits", "--out", "run", "--recipe", "no.toml"], "there is no file no.toml"),
        (["train", "digits", "--out", "run", "--resume"], "run holds no run to resume"),
        (["eval", "nowhere", "digits"], "nowhere does not exist; a model is a folder"),
        (["predict", "nowhere", "a.png"], "nowhere does not exist; a model is a folder"),
        (["info", "ViT-X/16"], "ViT-X/16 is not a checkpoint, and there is no model"),
        (["info", "ViT-B/16", "img_size=100"], "patch_size 16 does not divide"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_failure_is_one_line_and_ends_with_one(
    words: list[str], text: str, vitral: Vitral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_failed_in_one_line(vitral(*words), text)


@pytest.mark.parametrize("option", [["--device", "abacus"], ["--precision", "float8"]], ids=" ".join)
def test_an_unknown_place_to_compute_is_wrong_usage_or_a_failure(
    option: list[str], vitral: Vitral, run: Path
) -> None:
    result = vitral("predict", run, "a.png", *option)
    assert result.status in (1, 2)
    assert option[1] in result.err
    assert "defect" not in result.err


def broken(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("two\nlines")


def test_a_defect_is_one_line_that_asks_for_a_report(vitral: Vitral, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitral.data.sources.find_images", broken)
    result = vitral("predict", "run", "a.png")
    assert result.status == 1
    assert result.err.startswith("vitral: unexpected ZeroDivisionError: two lines; this is a defect")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
    ids=["python", "torch"],
)
def test_too_little_memory_is_no_defect(
    error: Exception, vitral: Vitral, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr("vitral.data.sources.find_images", refused)
    assert_failed_in_one_line(vitral("predict", "run", "a.png"), "not enough memory for this; take a smaller")


def test_a_defect_shows_itself_under_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitral.data.sources.find_images", broken)
    monkeypatch.setenv("VITRAL_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["vitral", "predict", "run", "a.png"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_reader_that_leaves_is_no_failure_to_report() -> None:
    command = [sys.executable, "-m", "vitral", "info", "ViT-Ti/16", "--no-measure"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


# --- Train ---------------------------------------------------------------------------------------


def test_training_says_what_it_found_chose_and_made(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    result = vitral("train", image_folder, "--out", tmp_path / "run", *quick)
    assert "36 images in 3 classes (ant, bee, cat)" in result.err
    assert "2 steps; batch_size 8" in result.err
    run = tmp_path / "run"
    assert result.out.splitlines()[-2:] == [
        f"model: {run}; try: vitral predict {run} IMAGE...",
        f"report: vitral report {run} {image_folder} --out report.html",
    ]
    assert load_checkpoint(tmp_path / "run").labels == ("ant", "bee", "cat")


def test_a_test_split_is_reported(vitral: Vitral, quick: list[str], tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, {"ant": 10, "bee": 10})
    result = vitral("train", tmp_path / "images", "--out", tmp_path / "run", *quick)
    assert "test accuracy" in result.out


def test_training_says_how_it_calibrated(vitral: Vitral, quick: list[str], tmp_path: Path) -> None:
    for split, count in (("train", 12), ("val", 50)):
        write_images(tmp_path / "data" / split, {"x": count, "y": count})
    result = vitral("train", tmp_path / "data", "--out", tmp_path / "run", *quick)
    temperature = load_checkpoint(tmp_path / "run").temperature
    (line,) = (line for line in result.out.splitlines() if "calibration" in line)
    assert line.startswith("val calibration error ")
    assert line.endswith(f"% at temperature {temperature:.3f}")
    assert temperature != 1
    assert f"softmax(logits / {temperature:.3f})" in vitral("info", tmp_path / "run", "--no-measure").out


def test_a_run_says_that_no_step_beat_its_start_and_why_it_is_not_calibrated(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    assert (
        vitral("train", image_folder, "--out", tmp_path / "a", *quick, "epochs=9", "steps=default").status
        == 0
    )
    worse = [f"model={tmp_path / 'a'}", *quick[1:], "learning_rate=100", "warmup=0", "ema_decay=0"]
    lines = vitral("train", image_folder, "--out", tmp_path / "b", *worse).out.splitlines()
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["best_step"] == 0
    assert lines[0].endswith(" (the start, which no step beat)")
    assert lines[1] == "probabilities not calibrated: that takes 100 validation images"


def test_words_win_over_the_recipe_file(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("steps = 5\nseed = 7\n")
    vitral("train", image_folder, "--out", tmp_path / "run", "--recipe", recipe, *quick)
    resolved = (tmp_path / "run" / "recipe.toml").read_text()
    assert "steps = 2\n" in resolved
    assert "seed = 7\n" in resolved


def test_a_run_can_be_repeated_from_its_recipe(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    run, again = tmp_path / "my run", tmp_path / "again"
    vitral("train", image_folder, "--out", run, *quick, "seed=3")
    first = (run / "recipe.toml").read_text().splitlines()[0]
    command = first.removeprefix("# Run again with: vitral ").replace("NEW_DIR", str(again))
    assert vitral(*shlex.split(command)).status == 0
    assert (run / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_a_run_is_not_overwritten(vitral: Vitral, run: Path, image_folder: Path) -> None:
    result = vitral("train", image_folder, "--out", run)
    assert_failed_in_one_line(result, "already holds a run; go on with --resume, or choose another --out")


def stop_at_once(self: TrainingConsole, done: StepDone) -> None:
    if done.step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_command_printed_by_a_stopped_run_resumes_it(
    vitral: Vitral, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "my images", {"ant": 10, "bee": 10})
    with monkeypatch.context() as patched:
        patched.setattr(TrainingConsole, "step", stop_at_once)
        stopped = vitral("train", images, "--out", tmp_path / "my run", *quick, "seed=3", "val_fraction=0.3")
    assert stopped.status == 128 + signal.SIGTERM
    start, _, command = stopped.out.strip().partition("; go on with: vitral ")
    assert start == "stopped after step 1"
    resumed = vitral(*shlex.split(command))
    assert resumed.status == 0, resumed.err
    assert json.loads((tmp_path / "my run" / "summary.json").read_text())["steps"] == 2


# --- Eval ----------------------------------------------------------------------------------------


def test_evaluation_as_json_has_the_promised_keys(vitral: Vitral, run: Path, image_folder: Path) -> None:
    result = vitral("eval", run, image_folder, "--split", "all", "--json")
    found = json.loads(result.out)
    assert found.keys() == {"n", "top1", "top5", "loss", "ece", "ci95", "per_class", "confusion"}
    assert found["per_class"].keys() == {"ant", "bee", "cat"}
    assert sum(map(sum, found["confusion"])) == found["n"] == 36


def test_evaluation_is_the_librarys(vitral: Vitral, run: Path, image_folder: Path) -> None:
    found = json.loads(vitral("eval", run, image_folder, "--json", "--precision", "float32").out)
    _, expected = evaluate_classifier(load(run, precision="float32"), str(image_folder))
    assert found["n"] == 6
    assert found["confusion"] == expected.confusion
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)


def test_evaluation_for_people_names_the_split_and_every_class(
    vitral: Vitral, run: Path, image_folder: Path
) -> None:
    result = vitral("eval", run, image_folder)
    assert result.out.startswith(f"{run} on {image_folder}, split val (")
    assert "accuracy" in result.out
    assert "95 % interval" in result.out
    assert all(name in result.out for name in ("ant", "bee", "cat"))


def test_evaluation_says_that_it_averages_mirrors(vitral: Vitral, run: Path, image_folder: Path) -> None:
    plain = vitral("eval", run, image_folder)
    mirrored = vitral("eval", run, image_folder, "--tta", "flip")
    # A long path breaks the line where it may.
    assert "(cpu, float32)" in " ".join(plain.out.split()).replace("bfloat16", "float32")
    assert "test-time augmentation flip" in " ".join(mirrored.out.split())


def test_predictions_average_mirrors_on_request(vitral: Vitral, run: Path, image_folder: Path) -> None:
    image = image_folder / "ant" / "000.png"
    printed = json.loads(vitral("predict", run, image, "--tta", "flip", "--json").out)
    (expected,) = load(run, tta="flip").predict(image, top=3)
    assert [(item["label"], item["probability"]) for item in printed["top"]] == [
        (label, pytest.approx(value)) for label, value in expected.top
    ]


# --- probe ---------------------------------------------------------------------------------------


@pytest.fixture
def probed(vitral: Vitral, run: Path, image_folder: Path, tmp_path: Path) -> Callable[..., Result]:
    return lambda *words: vitral("probe", run, image_folder, "--cache", tmp_path / "cache", *words)


def test_a_probe_prints_both_results_and_a_model(
    probed: Callable[..., Result], vitral: Vitral, image_folder: Path, tmp_path: Path
) -> None:
    result = probed("--out", tmp_path / "probe", "--img-size", 24)
    assert result.status == 0
    assert "split val (24x24 pixels, cpu" in result.out
    assert "linear" in result.out
    assert "k-NN" in result.out
    assert (
        result.out.splitlines()[-1]
        == f"model: {tmp_path / 'probe'}; try: vitral predict {tmp_path / 'probe'} IMAGE..."
    )
    # The second time features are read, as a message says, and results are the same.
    again = probed("--img-size", 24, "--json")
    assert "the features of 30 of 30 images were in " in again.err
    found = json.loads(again.out)
    evaluation = json.loads(vitral("eval", tmp_path / "probe", image_folder, "--json").out)
    assert evaluation["top1"] == found["linear"]["evaluation"]["top1"]
    assert f"{evaluation['top1']:.2%}" in result.out
    assert vitral("predict", tmp_path / "probe", image_folder / "bee").status == 0


def test_a_probe_takes_several_layers_and_few_images(probed: Callable[..., Result]) -> None:
    result = probed(
        "--layer", -1, "--layer", 0, "--per-class", 4, "--limit", 5, "--features", "mean", "--json"
    )
    found = json.loads(result.out)
    assert (found["labelled"], found["linear"]["evaluation"]["n"]) == (12, 5)
    assert {found[kind]["features"] for kind in ("linear", "neighbours")} == {"mean"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--layer", "9"), "there is no layer 9; this model has 0 to 0"),
        (("--img-size", "23"), "23"),
    ],
    ids=str,
)
def test_a_probe_of_what_is_not_there_fails(
    words: tuple[str, ...], text: str, probed: Callable[..., Result]
) -> None:
    assert_failed_in_one_line(probed(*words), text)


def test_a_damaged_image_is_warned_of_on_standard_error(
    vitral: Vitral, run: Path, image_folder: Path
) -> None:
    (image_folder / "ant" / "000.png").write_bytes(b"no picture")
    result = vitral("eval", run, image_folder, "--split", "all", "--json", "--max-damaged", "0.1")
    assert json.loads(result.out)["n"] == 35
    assert "vitral: skipped damaged image ant/000.png: not an image" in result.err


# --- Predict -------------------------------------------------------------------------------------


def test_predictions_as_json_are_a_line_an_image(vitral: Vitral, run: Path, image_folder: Path) -> None:
    images = [image_folder / "cat" / "000.png", image_folder / "ant" / "003.png"]
    lines = vitral("predict", run, *images, "--json", "--top", "2").out.splitlines()
    for image, found in zip(images, map(json.loads, lines), strict=True):
        assert found.keys() == {"image", "top", "error"}
        assert found["image"] == str(image)
        assert found["error"] is None
        assert [row.keys() for row in found["top"]] == [{"label", "probability"}] * 2


def test_predictions_are_the_librarys(vitral: Vitral, run: Path, image_folder: Path) -> None:
    image = image_folder / "bee" / "004.png"
    found = json.loads(vitral("predict", run, image, "--json", "--precision", "float32").out)
    (expected,) = load(run, precision="float32").predict(image, top=3)
    assert [(row["label"], row["probability"]) for row in found["top"]] == list(expected.top)


def test_predictions_for_people_are_a_line_an_image(vitral: Vitral, run: Path, image_folder: Path) -> None:
    result = vitral("predict", run, image_folder / "ant")
    lines = result.out.splitlines()
    assert len(lines) == 12
    assert lines[0].startswith(f"{image_folder / 'ant' / '000.png'}: ")
    assert lines[0].count("%") == 3


def test_a_damaged_image_does_not_keep_the_others_from_their_labels(
    vitral: Vitral, run: Path, image_folder: Path
) -> None:
    damaged, sound = image_folder / "ant" / "000.png", image_folder / "ant" / "001.png"
    damaged.write_bytes(b"no picture")
    result = vitral("predict", run, damaged, sound, "--json")
    first, second = map(json.loads, result.out.splitlines())
    assert first == {"image": str(damaged), "top": [], "error": first["error"]}
    assert first["error"].startswith("not an image")
    assert len(second["top"]) == 3
    assert_failed_in_one_line(result, "1 of 2 images could not be read")


# --- Info ----------------------------------------------------------------------------------------


def test_info_of_a_name_tells_stages_and_patches(vitral: Vitral) -> None:
    result = vitral("info", "ViT-B/16", "--no-measure")
    assert result.status == 0
    # The paper's table 1 says 86M; 86,567,656 with a head of 1000 classes.
    assert "86,567,656" in result.out
    assert all(name in result.out for name in ("embedding", "layers.11", "head", "patch size"))


def test_info_of_a_folder_tells_its_labels_and_size(vitral: Vitral, run: Path) -> None:
    result = vitral("info", run, "--no-measure")
    assert result.status == 0
    assert "3 labels (ant, bee, cat)\n" in result.out
    assert "16x16 pixels" in result.out


# --- The main job --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_learns_to_read_digits(tmp_path: Path) -> None:
    result = learn_digits(tmp_path / "demo")
    assert result.evaluation.n == 359
    assert result.evaluation.top1 >= 0.97
    assert result.picture.exists()
    assert (tmp_path / "demo" / "digit-1.png").exists()


# --- What a run learns from ------------------------------------------------------------------------


def test_groups_name_every_parameter_and_train_nothing(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    result = vitral("train", image_folder, "--show-groups", *quick, "layer_decay=0.5", "learning_rate=0.01")
    assert result.status == 0
    model = load_checkpoint(tmp_path / "base").model
    told = result.out.replace("│", " ").replace("\n", " ")
    assert not [name for name, _ in model.named_parameters() if name not in told]
    # The head at the rate itself, the one layer at half of it, the embedding at a quarter.
    assert all(rate in told for rate in ("0.01", "0.005", "0.0025"))
    assert not (tmp_path / "runs").exists()


def test_groups_name_what_is_frozen(vitral: Vitral, quick: list[str], image_folder: Path) -> None:
    result = vitral("train", image_folder, "--show-groups", *quick, "trained=head")
    learns, frozen = result.out.split("not trained: ")
    assert "head.weight" in learns
    assert "layers.0.attention.qkv.weight" in frozen
    assert "head.weight" not in frozen


def test_a_run_needs_a_folder(vitral: Vitral, quick: list[str], image_folder: Path) -> None:
    result = vitral("train", image_folder, *quick)
    assert result.status == 2
    assert "--out" in result.err


def test_a_model_learns_from_another_run(
    vitral: Vitral, quick: list[str], run: Path, image_folder: Path, tmp_path: Path
) -> None:
    for number, words in enumerate(([], ["distillation=soft", "accumulate=2", "mixup=0.5"])):
        result = vitral(
            "train", image_folder, "--out", tmp_path / str(number), *quick, f"teacher={run}", *words
        )
        assert result.status == 0, result.err


def test_a_teacher_of_other_labels_is_refused(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    result = vitral("train", image_folder, "--out", tmp_path / "r", *quick, f"teacher={tmp_path / 'base'}")
    assert result.status == 1
    assert result.err.count("vitral: ") == 1
    assert "the teacher lacks the class" in result.err


def test_training_says_what_it_needs_of_memory(
    vitral: Vitral, quick: list[str], image_folder: Path, tmp_path: Path
) -> None:
    result = vitral("train", image_folder, "--out", tmp_path / "r", *quick, "accumulate=2")
    assert "4 images at a time" in result.err
    assert "GiB free" in result.err
