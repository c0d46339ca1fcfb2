"""The benchmarks: who competes, in which order, with which weights, and what the report says; not speed."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.spinning import tell_spinning
from tests.test_cli import Vitral
from tests.test_cli import vitral as vitral  # the fixture
from vitral.bench import rounds, speed, start, steps
from vitral.bench.processes import processes
from vitral.bench.report import Report, Row, with_ratios
from vitral.bench.rounds import Settings, interleaved
from vitral.bench.run import run
from vitral.bench.workload import choose_workload
from vitral.checkpoints import peers
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import load
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

TINY = ("ViT-Ti/4", "img_size=8", "embed_dim=12", "num_layers=2", "num_classes=5", "batch_size=3")
CPU = Placement.choose("cpu", "float32")
EAGER = Settings(CPU, rounds=2, compiled=False)
SHARING = ("timm", "transformers", "torchvision")


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GEMM is not what is tested."""
    a = torch.ones(2, 2)
    monkeypatch.setattr(speed, "matrix_product", lambda _: (lambda: a @ a, 16))
    monkeypatch.setattr(rounds, "_SECONDS_A_READING", 0.0)


# --- Rounds ----------------------------------------------------------------------------------------


class Clock:
    """Stands still but for what contenders let pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def contender(self, name: str, *seconds: float) -> Callable[[], None]:
        passing = iter(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += next(passing)

        return call


def test_rounds_warm_up_then_run_forwards_and_backwards_in_turn() -> None:
    clock = Clock()
    contenders = {"a": clock.contender("a", 9, 1, 2, 4), "b": clock.contender("b", 90, 10, 20, 40)}
    seconds = interleaved(contenders, 3, clock=lambda: clock.now)
    assert clock.calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": (1, 2, 4), "b": (10, 20, 40)}


def test_a_quick_contender_is_called_often_in_a_reading_and_the_device_waited_for_around_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "_SECONDS_A_READING", 0.2)
    clock = Clock()
    quick, slow = clock.contender("quick", *[0.0625] * 9), clock.contender("slow", *[0.5] * 3)

    def synchronize() -> None:
        clock.calls.append("|")

    seconds = interleaved({"quick": quick, "slow": slow}, 2, synchronize=synchronize, clock=lambda: clock.now)
    # 0.2 seconds are 3.2 calls of 0.0625.
    of_quick, of_slow = ["|", *["quick"] * 4, "|"], ["|", "slow", "|"]
    warm_up = ["|", "quick", "|", *of_slow]
    assert clock.calls == [*warm_up, *of_quick, *of_slow, *of_slow, *of_quick]
    assert seconds == {"quick": (0.0625, 0.0625), "slow": (0.5, 0.5)}


def test_median_spread_images_and_ratio_by_hand() -> None:
    rows = [
        Row("t", "ours", "eager", seconds=(1.0, 2.0, 5.0), images=8),
        Row("t", "slow", "default", seconds=(9.0, 9.0, 9.0), images=8),
        Row("t", "fast", "default", seconds=(3.0, 4.0, 4.0), images=8),
        Row("t", "fast", "best documented", seconds=(0.5, 0.5, 0.5), images=8),
        Row("t", "gone", "default", reason="not installed"),
    ]
    ours, slow, fast, best, gone = with_ratios(rows)
    assert (ours.median, ours.spread, ours.images_per_second) == (2, 2, 4)
    ratios = [row.speed_ratio for row in (ours, slow, fast, best, gone)]
    assert ratios == [2, pytest.approx(4 / 9), 1, 8, None]
    assert gone.to_dict() == {
        "task": "t",
        "contender": "gone",
        "configuration": "default",
        "reason": "not installed",
    }


# --- Models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    for library in peers.LIBRARIES:
        if not peers.is_installed(library):
            pytest.skip(f"{library} is not installed")
    return {what: run(what, TINY, EAGER) for what in ("infer", "train")}


def row_of(report: Report, contender: str, configuration: str) -> Row:
    return next(r for r in report.rows if (r.contender, r.configuration) == (contender, configuration))


@pytest.mark.parametrize("what", ["infer", "train"])
@pytest.mark.parametrize("library", SHARING)
def test_other_libraries_answer_alike_with_our_weights(
    reports: dict[str, Report], what: str, library: str
) -> None:
    row = row_of(reports[what], library, "default")
    assert len(row.seconds) == EAGER.rounds
    agreement = dict(row.agreement)
    assert agreement.pop("top1", 1.0) == 1
    assert set(agreement) == ({"logits"} if what == "infer" else {"loss", "gradient"})
    assert max(agreement.values()) < 1e-5


@pytest.mark.parametrize("what", ["infer", "train"])
def test_vit_pytorch_runs_with_weights_of_its_own(reports: dict[str, Report], what: str) -> None:
    row = row_of(reports[what], "vit-pytorch", "default")
    assert row.seconds
    assert not row.agreement


def test_agreement_tells_another_model_from_ours() -> None:
    workload = choose_workload("infer", TINY, CPU)
    other = choose_workload("infer", TINY, CPU).checkpoint.model
    with torch.no_grad():
        other.layers[1].attention.qkv.bias.add_(0.1)  # pyrefly: ignore
    forward = steps.Forward(torch.ones(2, 3, 8, 8), CPU)
    ours, theirs = (forward.outcome(model, CPU) for model in (workload.checkpoint.model, other))
    assert speed._agreement(ours, ours) == {"logits": 0, "top1": 1}
    assert speed._agreement(theirs, ours)["logits"] > 1e-4


def test_share_of_peak_is_of_flops_counted_by_hand(reports: dict[str, Report]) -> None:
    tokens, width, hidden = 5, 12, 48
    patches = 2 * 4 * (3 * 4 * 4) * width
    attention = 2 * tokens * width * 4 * width + 4 * tokens**2 * width  # q, k, v, out; q k^T and the mixing
    flops = patches + 2 * (attention + 2 * 2 * tokens * width * hidden) + 2 * width * 5
    for what, factor in (("infer", 1), ("train", 3)):
        report = reports[what]
        assert report.facts["flops_an_image"] == factor * flops
        row = row_of(report, "vitral", "eager")
        peak = report.facts["gemm_flops_per_second"][f"{what}, batch 3"]
        assert row.peak_share == pytest.approx(factor * 3 * flops / row.median / peak)


def test_a_training_step_is_one_of_adamw_by_hand() -> None:
    """The first step moves a weight by the learning rate, against its gradient's sign, after decay."""
    linear = nn.Linear(4, 2, bias=False)
    model = nn.Sequential(nn.Flatten(), linear)
    before = linear.weight.detach().clone()
    images, labels = torch.tensor([[[[1.0, 2], [3, 4]]]]), torch.tensor([1])
    steps.TrainingStep(images, labels, CPU).call(model)()
    signs = torch.tensor([[1.0], [-1.0]])  # softmax - one-hot, times positive pixels
    expected = before * (1 - 1e-4 * 0.05) - 1e-4 * signs
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=0, atol=1e-7)
    assert linear.weight.grad is None


def test_what_cannot_compile_is_listed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def compiles_not(self: nn.Module, **options: Any) -> None:
        raise RuntimeError("no C++ compiler found\non this machine")

    monkeypatch.setattr(nn.Module, "compile", compiles_not)
    monkeypatch.setattr(peers, "LIBRARIES", ())
    report = run("infer", TINY, Settings(CPU, rounds=1))
    row = row_of(report, "vitral", "compiled")
    assert row.reason == "RuntimeError: no C++ compiler found on this machine"
    assert not row.seconds
    assert row_of(report, "vitral", "eager").seconds


@pytest.mark.slow
@pytest.mark.parametrize("what", ["infer", "train"])
def test_isolated_the_same_contenders_give_the_same(
    what: str, reports: dict[str, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LIBRARIES", ("timm",))
    report = run(what, TINY, Settings(CPU, rounds=1, compiled=False, isolated=True))
    for library, configuration in (("vitral", "eager"), ("timm", "default")):
        row, together = (row_of(r, library, configuration) for r in (report, reports[what]))
        assert row.agreement == pytest.approx(dict(together.agreement), abs=1e-6)
        assert row.seconds[0] > 0
    assert not multiprocessing.active_children()


def test_isolated_a_contender_that_fails_says_why_and_another_s_process_is_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "5000")
    task = steps.Task("infer", 1, choose_workload("infer", TINY, CPU).checkpoint.model.config, CPU)
    for library, expected in (("vitral", "5000"), ("timm", "None")):
        with processes(task) as begin, pytest.raises(VitralError, match=f"KeyError: '{expected}'"):
            begin(steps.Contender(library, "", "", tell_spinning))
    assert os.environ["GOMP_SPINCOUNT"] == "5000"


def test_libraries_that_are_absent_or_cannot_hold_the_model_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vit_pytorch")
    monkeypatch.setattr(peers, "LIBRARIES", ("timm", "torchvision", "vit-pytorch"))
    monkeypatch.setattr(peers, "is_installed", lambda name: name != "timm")
    report = run("infer", (*TINY, "layer.layer_scale=0.1"), EAGER)
    reasons = {row.contender: row.reason for row in report.rows if not row.configuration}
    assert reasons["timm"] == "not installed"
    assert "torchvision cannot hold this model" in (reasons["torchvision"] or "")
    assert reasons["vit-pytorch"] == "its ViT is the paper's model only"


def test_a_checkpoint_is_measured_with_its_own_weights(tmp_path: Path) -> None:
    model = VisionTransformer(8, 4, 3, 12, 1, 3, 2, 7, 0.5)
    save_checkpoint(tmp_path / "saved", Checkpoint(model, Preprocess((8, 8)), tuple("abcdefg")))
    workload = choose_workload("train", [str(tmp_path / "saved"), "batch_size=[2, 5]"], CPU)
    assert workload.batch_sizes == (2, 5)
    assert workload.checkpoint.labels == tuple("abcdefg")
    assert workload.checkpoint.model.config.dropout == 0
    read = workload.checkpoint.model.state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())


# --- Cold start ------------------------------------------------------------------------------------


def test_our_program_predicts_in_a_fresh_process_what_a_classifier_does_in_this_one(tmp_path: Path) -> None:
    workload = choose_workload("start", ("ViT-Ti/16", "img_size=32", "num_layers=1"), CPU)
    process = next(start._processes(workload, tmp_path, EAGER, []))
    process.run()
    label, probability = (
        load(tmp_path / "vitral", device="cpu", precision="float32").predict(tmp_path / "photo.jpg")[0].top[0]
    )
    (answer,) = process.answers
    assert answer["label"] == label
    assert answer["probability"] == pytest.approx(probability, rel=1e-4)
    row = process.measured((60.0,), process.answers, workload.checkpoint.labels)
    assert row.agreement == {"probability": 0, "top1": 1}
    assert min(row.parts.values()) > 0
    if sys.platform == "linux":
        assert 2**26 < (row.peak_bytes or 0) < 2**32  # torch alone is above 64 MiB


@pytest.mark.slow
def test_every_librarys_program_predicts_what_ours_does() -> None:
    report = run("start", ("ViT-Ti/16", "num_classes=5"), Settings(CPU, rounds=1))
    measured = [row for row in report.rows if row.task == "first prediction"]
    assert {row.contender for row in measured} == {"vitral", *SHARING}
    for row in measured:
        assert row.reason is None
        assert row.agreement["top1"] == 1
        assert row.agreement["probability"] < 1e-2
    assert row_of(report, "vitral", "--help").seconds


def test_a_program_that_fails_says_its_last_line() -> None:
    process = start._Process(Row("", "x"), [*start._PYTHON, "-c", "raise OSError('no such model')"])
    with pytest.raises(VitralError, match=r"^OSError: no such model$"):
        process.run()


# --- The command -----------------------------------------------------------------------------------


def test_the_report_is_json_and_names_the_machine(
    vitral: Vitral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LIBRARIES", ("torchvision",))
    file = tmp_path / "bench.json"
    words = (
        "bench",
        "infer",
        *TINY,
        "--rounds",
        2,
        "--no-compile",
        "--device",
        "cpu",
        "--precision",
        "float32",
    )
    result = vitral(*words, "--json", "--out", file)
    assert result.status == 0
    report = json.loads(result.out)
    assert report == json.loads(file.read_text())
    machine = report["machine"]
    assert machine["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cpu"]
    assert machine["command"].startswith("vitral bench infer ViT-Ti/4 img_size=8")
    ours = next(row for row in report["rows"] if row["contender"] == "vitral" and "seconds" in row)
    assert ours["images_per_second"] == pytest.approx(3 / ours["median_seconds"])
    table = vitral(*words)
    assert "infer, batch 3" in table.out
    assert "without numbers: torchvision best documented: left out with --no-compile" in table.out
    assert "writing the model for torchvision" in table.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["infer", "ViT-Q/16"],
            "ViT-Q/16 is not a checkpoint, and there is no model 'ViT-Q/16'; did you mean",
        ),
        (["infer", "ViT-Ti/4", "img_sise=32"], "ViT-Ti/4: there is no setting 'img_sise'; did you mean"),
        (["train", "ViT-Ti/4", "img_size=30"], "ViT-Ti/4: img_size is 30x30, which patch_size 4 does not"),
        (
            ["train", "batch_size=0"],
            "batch_size=0: give one number of images or a list, each from 1 to 1,048,576",
        ),
        (["train", "batch_size=many"], "batch_size='many': "),
        (["infer", "num_classes=0"], "ViT-S/16 has no head to compare; add num_classes=1000"),
        (["kernels", "ViT-Ti/4"], "bench kernels takes no model and no setting; you gave 'ViT-Ti/4'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(vitral: Vitral, words: list[str], line: str) -> None:
    result = vitral("bench", *words, "--device", "cpu", "--precision", "float32")
    assert result.status == 1
    assert result.out == ""
    assert result.err.startswith(f"vitral: {line}")
    assert result.err.count("\n") == 1


def test_the_kernels_are_still_compared(vitral: Vitral, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitral.bench import kernels

    monkeypatch.setattr(kernels, "_PATCH_TASKS", ((2, 8, 4, 6),))
    monkeypatch.setattr(kernels, "_ATTENTION_TASKS", ((2, 3, 5, 4),))
    result = vitral("bench", "kernels", "--rounds", 1, "--json", "--device", "cpu", "--precision", "float32")
    rows = json.loads(result.out)["rows"]
    routes = [(row["task"].partition(" ")[0], row["contender"]) for row in rows]
    once = [
        ("patches", "convolution"),
        ("patches", "linear"),
        ("attention", "fused"),
        ("attention", "explicit"),
    ]
    assert routes == once * 2  # forward, and with backward


def test_only_the_named_peers_compete() -> None:
    settings = Settings(CPU, rounds=1, compiled=False, peers=("torchvision",))
    report = run("infer", ("ViT-B/16", "img_size=32", "num_layers=1", "batch_size=1"), settings)
    assert {row.contender for row in report.rows} == {"vitral", "torchvision"}


def test_an_unknown_peer_is_named() -> None:
    with pytest.raises(VitralError, match=r"peer=tim: it must be one of timm, transformers"):
        run("train", TINY, Settings(CPU, peers=("tim",)))
