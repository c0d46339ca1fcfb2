"""The fastest honest form: what is measured, what is refused, and that the ledger's numbers are true."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn

import vitral
from tests.conftest import write_images
from vitral.artifacts.engines import onnx, openvino
from vitral.artifacts.manifest import Form
from vitral.artifacts.open import open_artifact
from vitral.bench import rounds
from vitral.data.image_data import open_data
from vitral.evaluation.task import MULTI_LABEL, SINGLE_LABEL
from vitral.runtime.threads import cpu_count
from vitral.ship.optimize import by_nncf, by_onnxruntime, processor, search
from vitral.ship.optimize.candidates import (
    EAGER,
    LAST_RESORTS,
    STRENGTHS,
    Candidate,
    candidates,
    merged_counts,
)
from vitral.ship.optimize.frontier import frontier
from vitral.ship.optimize.hardest import hardest
from vitral.ship.optimize.images import Pixels, choose_images
from vitral.ship.optimize.judge import judge, least_images, refitted
from vitral.ship.optimize.lab import Contender, batch_for, speed
from vitral.ship.optimize.ledger import Goal, Ledger, Row
from vitral.ship.optimize.optimize import optimize
from vitral.ship.optimize.process import Process
from vitral.ship.optimize.processor import Processor
from vitral.ship.optimize.search import Search, Subject

DIGITS = Path(__file__).parents[1] / "docs" / "digits-vit"
CLASSES = ("ant", "bee", "cat")
WITHOUT_VNNI = Processor(None, bfloat16=False, threads=1, quota=None)


# --- Judging ---------------------------------------------------------------------------------------


def logits_of(n: int, right: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits (n, 3) that are right for about this share of the images."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    logits_BL = generator.normal(size=(n, 3)).astype(np.float32)
    logits_BL[np.arange(n), labels] += 4 * (generator.random(n) < right)
    return labels, logits_BL


def test_a_judgement_is_what_other_routes_compute() -> None:
    labels, eager_BL = logits_of(3000, 0.9)
    form_BL = eager_BL + np.random.default_rng(1).normal(scale=0.4, size=eager_BL.shape).astype(np.float32)
    found = judge(SINGLE_LABEL, CLASSES, labels, eager_BL, form_BL, 1.3, 1.0)
    ours, theirs = eager_BL.argmax(1), form_BL.argmax(1)
    assert found.n == 3000
    assert found.score == pytest.approx(accuracy_score(labels, theirs))
    assert found.agreement == pytest.approx((ours == theirs).mean())
    assert found.loss == pytest.approx(accuracy_score(labels, ours) - accuracy_score(labels, theirs))
    # Agresti and Min's interval, by hand: half an image more in each cell of the table of pairs.
    lost, gained = (ours == labels) & (theirs != labels), (ours != labels) & (theirs == labels)
    b, c, n = lost.sum() + 0.5, gained.sum() + 0.5, 3002
    reach = 1.96 * np.sqrt((b + c) / n - ((b - c) / n) ** 2) / np.sqrt(n)
    assert found.loss_high == pytest.approx((b - c) / n + reach, abs=1e-6)
    assert found.loss_low == pytest.approx((b - c) / n - reach, abs=1e-6)
    exponentials = np.exp(form_BL / 1.3)
    confidences = (exponentials / exponentials.sum(1, keepdims=True)).max(1)
    bins = np.digitize(confidences, np.linspace(0, 1, 16)[1:-1], right=True)
    gaps = [abs(((theirs == labels) - confidences)[bins == place].sum()) for place in range(15)]
    assert found.ece == pytest.approx(sum(gaps) / 3000, abs=1e-6)


def test_the_same_numbers_need_no_luck_and_others_need_images() -> None:
    labels, eager_BL = logits_of(50, 0.9)
    eager = judge(SINGLE_LABEL, CLASSES, labels, eager_BL, eager_BL, 1.0, 1.0)
    assert eager.loss_high > 0.005
    assert eager.too_lossy(0.005, eager) is None
    other_BL = eager_BL * 1.01
    other = judge(SINGLE_LABEL, CLASSES, labels, eager_BL, other_BL, 1.0, 1.0)
    assert not other.same_numbers
    refused = other.too_lossy(0.005, eager)
    assert refused is not None
    assert "held-out images might show" in refused
    assert f"{other.images_needed(0.005):,}" in refused
    # With so many images of the same kind, the bound is reached; and not with a tenth fewer than need be.
    needed = least_images(0.005)
    many = []
    for count in (needed, int(0.9 * needed)):
        truth, ours_BL, theirs_BL = (
            np.resize(x, (count, *x.shape[1:])) for x in (labels, eager_BL, other_BL)
        )
        many.append(judge(SINGLE_LABEL, CLASSES, truth, ours_BL, theirs_BL, 1.0, 1.0))
    assert many[0].too_lossy(0.005, many[0]) is None
    assert many[1].too_lossy(0.005, many[1]) is not None


def test_a_form_that_is_wrong_is_refused_for_its_loss_and_one_that_is_too_sure_for_its_calibration() -> None:
    labels, eager_BL = logits_of(4000, 0.9)
    eager = judge(SINGLE_LABEL, CLASSES, labels, eager_BL, eager_BL, 1.0, 1.0)
    rolled = judge(SINGLE_LABEL, CLASSES, labels, eager_BL, np.roll(eager_BL, 1, axis=1), 1.0, 1.0)
    assert "it loses" in (rolled.too_lossy(0.005, eager) or "")
    assert "images might" not in (rolled.too_lossy(0.005, eager) or "")
    sure_BL, temperature = eager_BL * 20, refitted(SINGLE_LABEL, eager_BL, labels, 1.0)
    eager = judge(SINGLE_LABEL, CLASSES, labels, eager_BL, eager_BL, temperature, temperature)
    sure = judge(SINGLE_LABEL, CLASSES, labels, eager_BL, sure_BL, temperature, temperature)
    assert "calibration error" in (sure.too_lossy(0.005, eager) or "")
    own = refitted(SINGLE_LABEL, sure_BL, labels, 1.0)
    assert own / temperature == pytest.approx(20, rel=1e-3)
    assert (
        judge(SINGLE_LABEL, CLASSES, labels, eager_BL, sure_BL, own, temperature).too_lossy(0.005, eager)
        is None
    )
    assert refitted(SINGLE_LABEL, sure_BL[:99], labels[:99], 1.5) == 1.5


def test_of_several_labels_an_answer_is_right_if_all_are() -> None:
    generator = np.random.default_rng(0)
    eager_BL = generator.normal(size=(500, 3)).astype(np.float32)
    labels = (eager_BL > 0).astype(np.float32)
    wrong_BL = eager_BL.copy()
    wrong_BL[:100, 1] *= -1
    found = judge(MULTI_LABEL, CLASSES, labels, eager_BL, wrong_BL, 1.0, 1.0)
    assert found.loss == pytest.approx(0.2)
    assert found.agreement == pytest.approx(0.8)
    assert found.ece is None
    assert refitted(MULTI_LABEL, eager_BL, labels, 0.7) == 0.7


# --- Searching, with a lab whose forms are made up -------------------------------------------------


class MadeUp:
    """Forms with speeds and logits of their own, in the place of `Lab`."""

    def __init__(self, forms: Mapping[str, tuple[float, np.ndarray]], eager_BL: np.ndarray) -> None:
        self.forms, self.eager_BL, self.goal = forms, eager_BL, "latency"
        self.processor = WITHOUT_VNNI
        self.asked: dict[str, int] = {}  # images that each form was judged on

    def contender(self, candidate: Candidate, seconds: float) -> Contender:
        if candidate != EAGER and candidate.name not in self.forms:
            raise vitral.VitralError("it is not made up")
        return Contender(candidate, DIGITS)

    def open(self, contender: Contender, seconds: float | None = None) -> None: ...

    def build(self, name: str, seconds: float, **values: Any) -> list[list[Any]]:
        assert name == "hardest"
        return [[f"linear_{place}", 1.0] for place in range(9)]

    def seconds(self, contender: Contender, batch: int, seconds: float | None, calls: int = 1) -> float:
        times = 1.0 if contender.candidate == EAGER else self.forms[contender.name][0]
        return 0.01 * batch / times

    def time(self, contenders: list[Contender], batch: int, seconds: float) -> None:
        for contender in contenders:
            own, eager = (
                {size: [self.seconds(one, size, None)] * 3 for size in (1, batch)}
                for one in (contender, contenders[0])
            )
            contender.speed = speed(own, eager, batch, "latency")

    def logits(self, contender: Contender, pixels: Pixels, batch: int, on_images: Any = None) -> np.ndarray:
        logits_BL = self.eager_BL if contender.candidate == EAGER else self.forms[contender.name][1]
        if pixels.file.name != "judging":
            return logits_BL[: len(pixels)]
        for last in range(250, len(pixels) + 1, 250):
            self.asked[contender.name] = last
            if on_images is not None and not on_images(last, logits_BL[:last]):
                return logits_BL[:last]
        return logits_BL[: len(pixels)]


def searched(
    forms: Mapping[str, tuple[float, np.ndarray]], **options: Any
) -> tuple[Search, Contender | None, MadeUp]:
    labels, eager_BL = logits_of(4000, 0.9)
    lab: Any = MadeUp(forms, eager_BL)
    subject = Subject(
        SINGLE_LABEL, CLASSES, 1.0, patches=64, layers=4,
        trying=Pixels(Path("trying"), labels[:50]), fitting=Pixels(Path("fitting"), labels[:500]),
        judging=Pixels(Path("judging"), labels), max_drop=0.005,
    )  # fmt: skip
    minutes = options.pop("minutes", 10)
    found_by = Search(lab, subject, time.monotonic() + 60 * minutes, 10, **options)
    return found_by, found_by.run(), lab


def noisy(scale: float) -> np.ndarray:
    _, eager_BL = logits_of(4000, 0.9)
    return eager_BL + np.random.default_rng(5).normal(scale=scale, size=eager_BL.shape).astype(np.float32)


def verdicts(found_by: Search) -> dict[str, str]:
    return {row.name: row.verdict for row in found_by.rows.values()}


def test_the_fastest_form_that_fits_is_taken_and_a_wrong_one_is_refused() -> None:
    forms = {
        "openvino int8": (4.0, np.roll(noisy(0), 1, axis=1)),  # the fastest, and wrong
        "onnxruntime int8": (3.0, noisy(0.001)),
        "openvino float32": (2.0, noisy(0)),
        "onnxruntime float32": (0.5, noisy(0)),
    }
    found_by, taken, lab = searched(forms)
    assert taken is not None
    assert taken.name == "onnxruntime int8"
    found = verdicts(found_by)
    assert found["openvino int8"] == "too lossy"
    assert found["onnxruntime int8"] == "chosen"
    assert found["openvino float32"] == "not judged"
    assert found["onnxruntime float32"] == "slower"
    assert found["openvino int8, 2 layers float32"] == "left out"  # the next rung, not made up
    # What is hopeless is not asked about all images; what is taken is.
    assert lab.asked["openvino int8"] == 500
    assert lab.asked["onnxruntime int8"] == 4000
    judged = found_by.rows["onnxruntime int8"].judgement
    assert judged is not None
    assert judged.temperature != 1.0  # its own


def test_layers_stay_in_float_until_the_loss_fits() -> None:
    wrong = np.roll(noisy(0), 1, axis=1)
    forms = {
        "openvino int8": (4.0, wrong),
        "openvino int8, 2 layers float32": (3.5, wrong),
        "openvino int8, 4 layers float32": (3.2, noisy(0.001)),
        "openvino float32": (2.0, noisy(0)),
    }
    found_by, taken, _ = searched(forms)
    assert taken is not None
    assert taken.candidate.in_float == ("linear_0", "linear_1", "linear_2", "linear_3")
    assert set(found_by.rows["openvino int8"].tried) == {str(strength) for strength in STRENGTHS}


def test_a_form_slower_than_eager_is_never_taken() -> None:
    forms = {name: (0.99, noisy(0)) for name in ("openvino float32", "onnxruntime float32")}
    found_by, taken, _ = searched(forms)
    assert taken is None
    assert {verdicts(found_by)[name] for name in forms} == {"slower"}


def test_a_faster_way_of_torch_is_no_file_and_nothing_slower_is_saved_for_it() -> None:
    compiled = LAST_RESORTS[1]
    found_by, taken, _ = searched({compiled.name: (1.5, noisy(0)), "openvino float32": (1.01, noisy(0))})
    assert taken is None
    assert verdicts(found_by)[compiled.name] == "fits"


def test_when_time_is_over_forms_with_other_numbers_are_not_judged() -> None:
    forms = {"openvino float32": (2.0, noisy(0)), "openvino int8": (4.0, noisy(0))}
    found_by, taken, lab = searched(forms, minutes=2)  # less than the quarter of ten that is kept
    assert taken is not None
    assert taken.name == "openvino float32"
    assert "openvino int8" not in lab.asked
    found_by, taken, _ = searched(forms, minutes=0)
    assert taken is None
    assert verdicts(found_by)["openvino float32"] == "not judged"


def test_fewer_images_judge_where_time_is_short() -> None:
    # Eager answers 100 images a second; a tenth of a minute is left, and 0.15 of ten minutes is more.
    found_by, _, _ = searched({}, minutes=0.1)
    assert len(found_by.judging) == 4000
    lab = found_by.lab
    short = Search(lab, found_by.subject, time.monotonic() + 12, 0.2)
    short.run()
    assert 400 < len(short.judging) <= 480  # 0.4 of what is left of 12 s


def test_all_forms_are_judged_where_that_is_asked_for() -> None:
    forms = {
        "openvino float32": (2.0, noisy(0)),
        "onnxruntime float32": (0.9, noisy(0)),
        "onnxruntime int8": (1.5, np.roll(noisy(0), 1, axis=1)),
    }
    found_by, taken, lab = searched(forms, judge_all=True)
    assert taken is not None
    assert taken.name == "openvino float32"
    assert all(lab.asked[name] == 4000 for name in forms)
    found = verdicts(found_by)
    assert found["onnxruntime float32"] == "slower"
    assert found["onnxruntime int8"] == "too lossy"


# --- What is tried ---------------------------------------------------------------------------------


def test_the_table_of_candidates_follows_the_processor() -> None:
    tried = {candidate.name: why for candidate, why in candidates(WITHOUT_VNNI)}
    assert tried["openvino float32"] is None
    assert "bfloat16" in (tried["openvino bfloat16"] or "")
    other = Processor("avx512_vnni", bfloat16=True, threads=2, quota=1.5)
    assert not any(why for _, why in candidates(other))
    assert "VNNI" in WITHOUT_VNNI.notes()[0]
    assert "quota of 1.5" in other.notes()[0]
    assert merged_counts(196, 12) == (13, 7)
    assert merged_counts(64, 12) == ()


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx2", "fma"}, None), ({"avx2", "avx_vnni"}, "avx_vnni"), ({"asimddp", "i8mm"}, "i8mm")],
)
def test_a_processor_is_known_by_its_instructions(
    features: set[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_features", lambda: features)
    assert processor.Processor.here().int8 == expected


def test_batches_are_a_seconds_worth() -> None:
    assert [batch_for(seconds) for seconds in (0.001, 0.1, 0.3, 2.0)] == [32, 8, 4, 4]


def test_images_serve_one_purpose_each() -> None:
    classifier = vitral.load(DIGITS, device="cpu")
    found = choose_images(classifier, "digits", lambda _: None)
    assert found.judging_name == "val"
    sets = [set(split.names) for split in (found.training, found.fitting, found.judging)]
    assert [len(names) for names in sets] == [400, 72, 287]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]
    assert sets[1] | sets[2] == set(open_data("digits").split("val").names)
    assert np.bincount(found.training.labels).tolist() == [40] * 10


# --- int8 ------------------------------------------------------------------------------------------


def test_the_hardest_layer_is_the_one_whose_rounding_changes_most() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(pixels.float()) ** 7)  # outliers

    torch.manual_seed(0)
    model = Two().requires_grad_(requires_grad=False)
    pixels = torch.randint(0, 256, (5, 3), dtype=torch.uint8)
    program = torch.export.export(model, (pixels,))
    ranked = dict(hardest(program, pixels.numpy()))
    assert list(ranked) == ["linear_1", "linear"]
    # By hand, of whole numbers 0..255 that include both ends nothing is rounded but the weights.
    x = pixels.double()
    weight = model.first.weight.double()
    step = weight.abs().amax(1, keepdim=True) / 127
    low, high = min(float(x.min()), 0.0), float(x.max())
    levels = ((x - low) / ((high - low) / 255)).round() * ((high - low) / 255) + low
    bias = model.first.bias.double()
    given = x @ weight.T + bias
    change = levels @ ((weight / step).round() * step).T + bias - given
    assert ranked["linear"] == pytest.approx(float(change.square().sum() / given.square().sum()), rel=1e-3)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builds forms of the digits model; its folder has the pixels of 16 training images."""
    from vitral.ship.optimize.build import Builder

    folder = tmp_path_factory.mktemp("built")
    split = open_data("digits").split("train")
    preprocess = vitral.load(DIGITS, device="cpu").preprocess
    pixels = np.stack([preprocess.pixels(split.images[place]) for place in range(16)])
    np.save(folder / "pixels.npy", pixels)
    return Builder(DIGITS, folder / "pixels.npy", 16)


def folder_of(builder: Any, candidate: Candidate) -> Path:
    """Where a form is, which is built once."""
    folder = builder.pixels_NHWC.filename.parent / candidate.name.replace(", ", "-").replace(" ", "-")
    if not folder.exists():
        builder.build(candidate, folder, int8=False)
    return folder


def engine(folder: Path, precision: Any = "float32") -> Any:
    if (folder / "model.xml").exists():
        return openvino.open_engine(folder, Form("openvino", {"model.xml": ""}, precision))
    return onnx.open_engine(folder, Form("onnx", {"model.onnx": ""}, precision))


@pytest.mark.parametrize(
    ("library", "precision"),
    [
        ("openvino", "float32"),
        pytest.param("onnxruntime", "float32", marks=pytest.mark.slow),
        pytest.param("openvino", "int8", marks=pytest.mark.slow),
        pytest.param("onnxruntime", "int8", marks=pytest.mark.slow),
    ],
)
def test_a_forms_own_temperature_is_in_its_graph(
    library: Any, precision: Any, builder: Any, tmp_path: Path
) -> None:
    strength = 0.95 if (library, precision) == ("openvino", "int8") else None
    folder = folder_of(builder, Candidate(library, precision, strength=strength))
    before, about = engine(folder, precision)
    module = by_nncf if library == "openvino" else by_onnxruntime
    module.with_about(folder, tmp_path, replace(about, temperature=2.5))
    after, described = engine(tmp_path, precision)
    assert described == replace(about, temperature=2.5)
    pixels_BHWC = builder.pixels_NHWC[:3]
    logits_BL, found = before(pixels_BHWC).logits, after(pixels_BHWC)
    np.testing.assert_allclose(found.logits, logits_BL, atol=1e-5)
    exponentials = np.exp(logits_BL.astype(float) / 2.5)
    np.testing.assert_allclose(
        found.probabilities, exponentials / exponentials.sum(1, keepdims=True), atol=1e-5
    )


@pytest.mark.slow
def test_int8_is_near_and_layers_stay_in_float(builder: Any) -> None:
    pixels_BHWC = np.array(builder.pixels_NHWC)
    expected = engine(folder_of(builder, Candidate("openvino")))[0](pixels_BHWC).logits
    hard = tuple(name for name, _ in builder.hardest(EAGER))
    counts = []
    for in_float in ((), hard[:2]):
        folder = folder_of(builder, Candidate("openvino", "int8", strength=0.95, in_float=in_float))
        logits_BL = engine(folder, "int8")[0](pixels_BHWC).logits
        assert not np.array_equal(logits_BL, expected)
        assert np.abs(logits_BL - expected).max() < 0.2 * np.abs(expected).max()
        counts.append((folder / "model.xml").read_text().count('type="FakeQuantize"'))
    assert 10 < counts[1] < counts[0]


@pytest.mark.slow
def test_weights_have_seven_bits_where_sums_saturate(builder: Any) -> None:
    import onnx

    folder = folder_of(builder, Candidate("onnxruntime", "int8"))
    weights = [
        onnx.numpy_helper.to_array(tensor).astype(int)
        for tensor in onnx.load(folder / "model.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(weights) > 10
    assert max(np.abs(weight).max() for weight in weights) <= 64


def test_throughput_gives_the_numbers_of_latency(builder: Any) -> None:
    folder, pixels_BHWC = folder_of(builder, Candidate("openvino")), np.array(builder.pixels_NHWC)
    options = {"hint": "THROUGHPUT", "threads": 2, "batch_sizes": [1, 2, 4]}
    many, _ = openvino.open_engine(folder, Form("openvino", {"model.xml": ""}, options=options))
    one, _ = engine(folder)
    for count in (1, 2, 3, 7, 16):
        found, expected = many(pixels_BHWC[:count]), one(pixels_BHWC[:count])
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)


# --- The whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    out = tmp_path_factory.mktemp("optimized") / "fast"
    with pytest.MonkeyPatch.context() as patch:  # one form beside eager torch; all of them in the slow test
        patch.setattr(search, "candidates", lambda _: [(Candidate("openvino"), None)])
        patch.setattr(rounds, "_SECONDS_A_READING", 0.03)
        found = optimize(DIGITS, "digits", out)
    return out, found.ledger


def test_the_artifact_answers_as_the_ledger_says(optimized: tuple[Path, Ledger]) -> None:
    out, ledger = optimized
    chosen = ledger.chosen
    assert chosen is not None, ledger.to_dict()
    assert chosen.speed is not None
    assert chosen.judgement is not None
    assert chosen.speed.times_eager.median >= 1.05
    assert json.loads((out / "ledger.json").read_text()) == json.loads(json.dumps(ledger.to_dict()))
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    # The judged images, asked again by other ways: the artifact's own door, and torch.
    split = choose_images(vitral.load(DIGITS, device="cpu"), "digits", lambda _: None).judging
    pictures = [split.images[place] for place in range(len(split))]
    labels = open_data("digits").classes
    for model, row in ((open_artifact(out), chosen), (vitral.load(DIGITS, device="cpu"), ledger.eager)):
        said: Any = model.predict(pictures)
        top1 = np.mean([one.label == labels[truth] for one, truth in zip(said, split.labels, strict=True)])
        assert row.judgement is not None
        assert top1 == pytest.approx(row.judgement.score, abs=1e-9)
        assert row.judgement.n == len(split)
    assert chosen.load_s
    assert chosen.memory_mb
    on_disk = sum(
        (out / name).stat().st_size
        for name in ("model.xml", "model.bin", "model.onnx")
        if (out / name).exists()
    )
    assert chosen.disk_mb == pytest.approx(on_disk / 2**20, rel=0.05)


def test_few_images_are_said_to_be_too_few(optimized: tuple[Path, Ledger]) -> None:
    note = next(note for note in optimized[1].notes if "held-out" in note)
    assert "287 held-out images cannot show" in note
    assert f"{least_images(0.005):,} could" in note


def test_a_ledger_is_drawn(optimized: tuple[Path, Ledger]) -> None:
    ledger = optimized[1]
    for goal in ("latency", "throughput"):
        assert frontier(replace(ledger, goal=goal)).startswith(b"\x89PNG")
    nothing = replace(ledger, rows=(ledger.eager,))
    assert nothing.chosen is None
    assert "nothing is saved" in nothing.conclusion()


def test_the_command_prints_the_ledger(
    optimized: tuple[Path, Ledger], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitral.cli.commands.optimize import print_ledger

    monkeypatch.setenv("COLUMNS", "40")
    print_ledger(optimized[1])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "times as fast as eager" in " ".join(shown.split())
    assert "chosen" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0}, "max_drop=0"),
        ({"goal": "speed"}, "goal=speed"),
        ({"minutes": float("nan")}, "minutes=nan"),
    ],
)
def test_options_are_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vitral.VitralError, match=message):
        optimize(DIGITS, "digits", **options)


def test_what_cannot_be_optimized_is_refused_in_a_line(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", {"ant": 6, "bee": 6})
    with pytest.raises(vitral.VitralError, match="classes that the model lacks"):
        optimize(DIGITS, tmp_path / "photos")
    with pytest.raises(vitral.VitralError, match="exists already"):
        optimize(DIGITS, "digits", tmp_path)
    with pytest.raises(vitral.VitralError, match="without tta"):
        optimize(vitral.load(DIGITS, device="cpu", tta="flip"), "digits")
    with pytest.raises(vitral.VitralError, match="merge"):
        optimize(vitral.load(DIGITS, device="cpu", merge=2), "digits")


# --- Processes ------------------------------------------------------------------------------------


def test_a_process_fails_in_a_line_and_is_ended_when_it_takes_too_long(tmp_path: Path) -> None:
    process = Process(tmp_path / "log", 1)
    try:
        values = {"folder": str(tmp_path), "candidate": {"library": "onnxruntime"}, "options": {}}
        with pytest.raises(vitral.VitralError, match=r"model.onnx"):
            process.ask("open", **values)
        with pytest.raises(vitral.VitralError, match="FileNotFoundError"):
            process.ask("seconds", pixels=str(tmp_path / "none.npy"), batch=1, calls=1)
        with pytest.raises(vitral.VitralError, match="no time was left"):
            process.ask("seconds", -1)
        os.kill(process._process.pid, signal.SIGSTOP)
        with pytest.raises(vitral.VitralError, match="took longer"):
            process.ask("open", 0.2, **values)
        with pytest.raises(vitral.VitralError, match="ended with status"):
            process.ask("open", **values)
    finally:
        process.end()


def test_other_libraries_report_nothing_and_write_nothing_to_the_home(tmp_path: Path) -> None:
    code = (
        "import sys; from vitral.runtime.telemetry import import_silently; o = import_silently('openvino'); "
        "n = import_silently('nncf'); import_silently('onnxruntime'); "
        "import openvino.tools.ovc.convert_impl as c; "
        "print('openvino_telemetry' in sys.modules, c.tm.__name__, type(n.telemetry.telemetry).__name__)"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    for name in ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["False", "openvino.tools.ovc.telemetry_stub", "MagicMock"]
    assert not (tmp_path / "intel").exists()  # OpenVINO's and NNCF's identity
    assert not (tmp_path / ".cache" / "Microsoft").exists()  # ONNX Runtime's events
    assert not (tmp_path / ".ses").exists()  # its session


@pytest.mark.slow
def test_every_form_is_built_timed_and_judged(tmp_path: Path) -> None:
    ledger = optimize(DIGITS, "digits", tmp_path / "fast", minutes=8, judge_all=True).ledger
    for row in ledger.rows:
        if row.candidate in LAST_RESORTS and row.judgement is None:
            continue  # not installed, or the last of a full machine's time
        if row.verdict == "left out":
            assert "bfloat16" in row.reason or row.candidate.in_float, row
        else:
            assert row.judgement is not None, row
            assert row.judgement.agreement > 0.9, row
    assert {"openvino int8", "onnxruntime int8", "onnxruntime float32"} <= {row.name for row in ledger.rows}
    assert open_artifact(tmp_path / "fast")


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 15, 30])
def test_ctrl_c_ends_a_search_within_two_seconds_and_leaves_nothing(tmp_path: Path, after: int) -> None:
    words = ["optimize", str(DIGITS), "digits", "--out", str(tmp_path / "fast"), "--all"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    command = subprocess.Popen(
        [sys.executable, "-m", "vitral", *words], env=environment, stderr=subprocess.PIPE
    )
    time.sleep(after)
    assert command.poll() is None
    begun = time.monotonic()
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=10)
    took = time.monotonic() - begun
    assert took < 2 * max(os.getloadavg()[0] / cpu_count(), 1)  # as others compute beside it
    assert command.returncode == 130
    assert said.decode().splitlines()[-1] == "vitral: interrupted"
    assert not (tmp_path / "fast").exists()
    assert not list(scratch.glob("vitral-optimize-*"))


def test_the_goal_decides_by_which_time_a_form_is_faster() -> None:
    own: dict[int, list[float]] = {1: [0.5, 0.4], 8: [4.0, 4.0]}
    eager: dict[int, list[float]] = {1: [1.0, 1.0], 8: [2.0, 2.0]}
    goals: tuple[Goal, ...] = ("latency", "throughput")
    found = [speed(own, eager, 8, goal) for goal in goals]
    assert [one.times_eager.median for one in found] == [2.25, 0.5]
    assert found[0].latency_ms.median == pytest.approx(450)
    assert found[0].images_per_s.median == pytest.approx(2)
    row = Row(EAGER, "eager", speed=found[0])
    assert row.speed is not None
    assert row.speed.images_a_second("latency").median == pytest.approx(1000 / 450)
