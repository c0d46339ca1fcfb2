"""What people see fits their terminal, and tells of training what was measured on what."""

import io
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.text import Text

from vitral.bench.report import Report, Row
from vitral.cli import training
from vitral.cli.commands import bench, doctor, eval, info, probe, recipe, train
from vitral.cli.console import warn
from vitral.evaluation.diagnosis.report import Diagnosis, Finding
from vitral.evaluation.multi_label import MultiLabelEvaluation, MultiLabelOutcomes
from vitral.evaluation.probing.linear import LinearResult
from vitral.evaluation.probing.neighbours import NeighboursResult
from vitral.evaluation.probing.probe import ProbeResult
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes
from vitral.model.cost import PatchCost, stages
from vitral.model.variants import parse
from vitral.model.vit import VisionTransformer
from vitral.recipes.packaged import diff, read
from vitral.recipes.schema import Resolved
from vitral.runtime.devices import Placement
from vitral.runtime.plainjson import to_json
from vitral.training.events import Evaluated, StepDone
from vitral.training.listeners import Progress
from vitral.training.optimizers import parameter_groups
from vitral.training.run import schedule_of
from vitral.training.step import RunningMean, StepResult

NAMES = [
    "Staffordshire bullterrier, Staffordshire bull terrier", "n01440764", "a [/b] c", "[bold]red[",
    *(f"class {index}" for index in range(30)),
]  # fmt: skip
TITLE = "runs/photos on photos/, split val (cpu, float32)"


def evaluation() -> SingleLabelEvaluation:
    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(0, len(NAMES), (2, 3000))
    numbers = (draw.random(3000) < 0.3, draw.random(3000), draw.random(3000))
    return SingleLabelEvaluation.of(SingleLabelOutcomes(labels, predictions, *numbers), NAMES)


def multi_label_evaluation() -> MultiLabelEvaluation:
    draw = np.random.default_rng(0)
    shown, logs = draw.random((50, len(NAMES))) < 0.2, np.log(draw.random((50, len(NAMES))))
    return MultiLabelEvaluation.of(MultiLabelOutcomes(shown, logs, draw.random(50)), NAMES)


def diagnosis() -> Diagnosis:
    finding = Finding(
        "mean/std", "(0.4802, 0.4481, 0.3975) and (0.2770, 0.2691, 0.2821)", "0 and 1/255 (0..255)",
        0.912, 0.345, -0.0123, -0.123, 0.01, 3, 9, 0.01, 0.03, "worse", "top-1, p = 0.0003",
    )  # fmt: skip
    resize = replace(finding, setting="position resize", now="bicubic_antialias", value="bilinear")
    idle = replace(finding, setting="channel order", verdict="no effect", reason="the images are grey")
    findings = (finding, replace(finding, value="of CLIP"), resize, idle)
    return Diagnosis("val", 400, 3, 0.91, (0.9, 0.92), 0.3, 20, findings, None, ())


def probed() -> ProbeResult:
    linear = LinearResult("class_mean", -1, 1e-3, 0.987, 0.1, 1.2, evaluation())
    near = NeighboursResult("class_mean", 11, 20, 0.98, 1234, 0.8, (0.78, 0.82))
    return ProbeResult("val", 1234, linear, near)


def report() -> Report:
    libraries = ("vitral", "timm", "transformers", "torchvision", "vit-pytorch")
    agreement = {"loss": 1e-7, "gradient": 2e-5}
    rows = [
        Row("train, batch 64", library, kind, "torch.compile", (0.5, 0.6), 64, 1.23, 0.45, agreement)
        for library in libraries
        for kind in ("default", "best documented")
    ]  # fmt: skip
    machine = {"gpu": None, "cpu": "a processor", "threads": 2, "cores": 2, "versions": {"vitral": "0.1"}}
    peaks = {"gemm_flops_per_second": {"train, batch 64": 10**12}}
    return Report("train", "ViT-Ti/4 at 32x32 pixels", "cpu, float32", tuple(rows), machine, peaks)


def groups() -> None:
    model = VisionTransformer.from_config(parse("ViT-Ti/16"))
    groups = parameter_groups(model, layer_decay=0.75, weight_decay=0.05, orthogonal=True)
    found = [{**group, "lr": 1e-4 * group["scale"]} for group in groups]
    train.print_groups(found, ["embedding.positions.table"])


def patch_costs() -> None:
    costs = [
        PatchCost(8, 784, 29 * 10**9, 130 * 10**9, 12345.6),
        PatchCost(16, 196, 14 * 10**8, 33 * 10**9, None),
    ]
    info.print_patch_costs(parse("ViT-B/16"), costs, Placement.choose("cpu", "float32"))


PRINTED: dict[str, Callable[[], None]] = {
    "eval": lambda: eval.print_evaluation(evaluation(), TITLE),
    "eval, several labels": lambda: eval.print_evaluation(multi_label_evaluation(), TITLE),
    "doctor": lambda: doctor.print_diagnosis(diagnosis(), TITLE),
    "probe": lambda: probe.print_probe(probed(), TITLE),
    "bench": lambda: bench.print_report(report()),
    "info": lambda: info.print_stages(parse("Conv+ViT-Ti/16"), stages(parse("Conv+ViT-Ti/16"))),
    "info, patches": patch_costs,
    "train --show-groups": groups,
    "recipe diff": lambda: recipe.print_recipe_diff(diff("deit", "deit3"), "deit", "deit3"),
}


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_fits_and_nothing_is_cut_off(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    PRINTED[name]()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed


def test_brackets_in_names_are_no_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    columns = [0, 1, 0], [1, 0, 1], [1, 1, 1], [0.5] * 3, [1.0] * 3
    few = SingleLabelOutcomes(*map(np.array, columns))
    eval.print_evaluation(SingleLabelEvaluation.of(few, ["a [/b] c", "[bold]red["]), "[/title]")
    printed = capsys.readouterr().out
    assert printed.startswith("[/title]: 3 images")
    (first, second) = (line for line in printed.splitlines() if line.startswith((" a ", " [b")))
    assert first.split("%")[-1].strip() == "[bold]red[ (2)"
    assert second.split("%")[-1].strip() == "a [/b] c (1)"


# --- Of a run --------------------------------------------------------------------------------------


def a_run(**settings: Any) -> Any:
    """What the console reads of a run in its middle."""
    resolved = {**read("small"), "model": "ViT-Ti/16", "img_size": 128, "loss": "cross_entropy"}
    resolved |= {"epochs": 200.0, "batch_size": 64, "learning_rate": 5e-4, "weight_decay": 0.05}
    resolved |= {"cutmix": 0.0, "crop": "none", "flip": False, "rand_augment": 0.0}
    recipe = Resolved.of({**resolved, **settings})
    return SimpleNamespace(
        recipe=recipe,
        schedule=schedule_of(recipe),
        model=VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2),
        checkpoint=SimpleNamespace(preprocess=SimpleNamespace(img_size=(128, 128))),
        placement=Placement.choose("cpu", "float32"),
    )


@pytest.mark.parametrize("measured", [evaluation, multi_label_evaluation])
def test_lines_of_training_fit_eighty_columns(
    measured: Callable[[], Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, recent = training.TrainingConsole(), RunningMean()
    recent.add(StepResult(torch.tensor(1.234), torch.tensor(711)), 1000)
    told.epochs, told.batch_size = 200.0, 64
    told(StepDone(12_345, 123.4, 0.617, 4500.0, recent))
    told.shown_at = -math.inf
    told(StepDone(13_000, 123.4, 0.9, 9500.0, recent))
    told(Evaluated(13_000, 123.4, 9500.0, recent, measured(), 0.001, is_best=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80
    assert lines[1].endswith("  best")
    assert "71.1%" in lines[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("width", "numbers"),
    [
        (40, "29:27 left"),
        (60, "loss 1.234  29:27 left"),
        (80, "loss 1.234  71.1% right  8 images/s  29:27 left"),
    ],
)
def test_a_narrow_bar_shows_the_share_and_the_time_left(
    width: int, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, recent = on_terminal(width, monkeypatch), RunningMean()
    recent.add(StepResult(torch.tensor(1.234), torch.tensor(711)), 1000)
    told.epochs, told.batch_size = 200.0, 64
    told(StepDone(12_345, 123.4, 0.617, 4500.0, recent))
    told.shown_at = -math.inf
    told(StepDone(13_000, 123.4, 0.9, 9500.0, recent))
    assert re.fullmatch(rf"epoch 123\.4/200 \S+  90% {re.escape(numbers)}", bar(told, width))


@pytest.mark.parametrize(("width", "numbers"), [(40, ""), (60, " 500,000 of 1,000,000 images")])
def test_a_narrow_bar_shows_the_share_of_what_is_prepared(
    width: int, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = on_terminal(width, monkeypatch)
    told(Progress("the head's start", 500_000, 1_000_000))
    assert re.fullmatch(rf"the head's start \S+  50%{numbers}", bar(told, width))


def bar(told: training.TrainingConsole, width: int) -> str:
    with told.console.capture() as captured:
        told.console.print(told.progress.get_renderable())
    (line,) = Text.from_ansi(captured.get()).plain.strip().splitlines()
    assert len(line) <= width
    return line.rstrip()


def on_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> training.TrainingConsole:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    return training.TrainingConsole()


LONG = (
    "the loss rose, and stayed up: back to the weights of step 1,200, half the rate; /a/path/of/" + "x" * 50
)


def test_messages_are_wrapped_at_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    told = on_terminal(40, monkeypatch)
    told.message(LONG)
    told.print("model: ViT-Ti/16\n       634,627 parameters; a processor of some kind, float32")
    warn(LONG)
    written = cast("Terminal", sys.stderr).getvalue()
    lines = written.splitlines()
    assert all(len(line) <= 40 or line.split() == [LONG.split()[-1]] for line in lines)
    assert " ".join(written.split()).count(LONG) == 2
    first = lines.index("model: ViT-Ti/16")
    assert lines[first : first + 3] == [
        "model: ViT-Ti/16",
        "       634,627 parameters; a processor",
        "         of some kind, float32",
    ]


def test_messages_are_whole_lines_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    training.TrainingConsole().message(LONG)
    warn(LONG)
    assert capsys.readouterr().err == f"vitral: {LONG}\n" * 2


@pytest.mark.parametrize(
    ("settings", "augmented"),
    [
        ({}, False),
        ({"flip": True}, True),
        ({"crop": "resized"}, True),
        ({"erasing": 0.1}, True),
        ({"mixup": 0.2}, True),
        ({"cutmix": 1.0, "crop": "padded"}, True),
    ],
    ids=str,
)
def test_that_training_images_are_augmented_is_told_where_they_are(
    settings: dict[str, Any],
    augmented: bool,
) -> None:
    assert training._is_augmented(a_run(**settings)) == augmented


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "learning_rate 0.0005"),
        ({"learning_rate_batch": 64}, "learning_rate 0.0005"),
        ({"learning_rate_batch": 512}, "learning_rate 6.25e-05 (0.0005 for 512 images)"),
    ],
    ids=str,
)
def test_the_rate_that_is_told_is_the_one_that_is_taken(settings: dict[str, Any], text: str) -> None:
    assert training._peak_rate(a_run(**settings)) == text


def test_json_has_no_number_that_json_has_not() -> None:
    content = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf}, "d": "NaN"}
    assert to_json(content) == '{"a": [null, 1.5, [null, 2]], "b": {"c": null}, "d": "NaN"}'
