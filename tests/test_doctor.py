"""Doctor names the setting that was broken, and no other; its tests give the textbooks' numbers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import write_images
from vitral.data.image_data import open_data
from vitral.data.split import Split
from vitral.data.subsets import sample
from vitral.evaluation.diagnosis import doctor
from vitral.evaluation.diagnosis.doctor import diagnose
from vitral.evaluation.diagnosis.paired_tests import mcnemar, paired
from vitral.evaluation.diagnosis.report import Diagnosis, Finding
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.config import ViTConfig
from vitral.model.positions.resize import RESIZE
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

CPU = Placement.choose("cpu", "float32")
LABELS = tuple("abcdef")
IMAGES = 120
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(autouse=True, scope="module")
def _alone() -> Iterator[None]:
    """In one thread of this process: so small a model only waits for other threads, and loaders to start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitral.data.workers.cpu_count", lambda: 0)
        yield
    torch.set_num_threads(threads)


# --- A model to which every setting matters, and images that it labelled itself -----------------------


def sensitive(**options: Any) -> VisionTransformer:
    """A random model whose answers hang on each of its settings; the same weights for any options.

    Large weights make it chaotic. Embeddings as small as the norms' eps make that count, hidden units
    around -2, where GELU and its cheap forms differ most, the activation, and a table larger than the
    patches' tokens the rule that resizes it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            24, 8, embed_dim=32, num_layers=2, num_heads=2, num_classes=len(LABELS), dropout=0.0, **options
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.3)
            for parameter in model.embedding.parameters():
                parameter.mul_(1e-3)
            model.get_parameter("embedding.positions.table").mul_(8)
            for layer in model.layers:
                feed_forward = cast(Any, layer).feed_forward
                feed_forward.expand.bias.fill_(-2)
                feed_forward.expand.weight.mul_(0.3)
                feed_forward.contract.weight.mul_(10)
    return model.eval()


def picture(generator: np.random.Generator) -> Image.Image:
    """Smooth random colours, of any aspect from 1:3 to 3:1."""
    width, height = generator.integers(20, 60, 2).tolist()
    pixels = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Truth:
    """A classifier with the right settings, and a folder of images of which it knows four in five."""

    classifier: Classifier
    folder: str

    def with_preprocess(self, **fields: Any) -> Classifier:
        return replace(self.classifier, preprocess=replace(self.classifier.preprocess, **fields))

    def with_model(self, **options: Any) -> Classifier:
        model = sensitive(**options)
        model.load_state_dict(self.classifier.model.state_dict())
        return replace(self.classifier, model=model)


def make_truth(folder: Path, preprocess: Preprocess) -> Truth:
    generator, model = np.random.default_rng(0), sensitive()
    images = [picture(generator) for _ in range(IMAGES)]
    with torch.inference_mode():
        logits_BL = model(torch.stack([preprocess(image) for image in images]))
        # Even out the labels.
        model.get_parameter("head.bias").sub_(logits_BL.mean(0))
        answers = (logits_BL - logits_BL.mean(0)).argmax(1).tolist()
    for number, (image, answer) in enumerate(zip(images, answers, strict=True)):
        label = LABELS[(answer + (number % 5 == 0)) % len(LABELS)]
        (folder / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / label / f"{number:03}.png")
    return Truth(Classifier(model, preprocess, LABELS, CPU), str(folder))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """At 32 pixels, so that the table for 24 is resized."""
    return make_truth(tmp_path_factory.mktemp("truth"), Preprocess((32, 32)))


@pytest.fixture(scope="module")
def right(truth: Truth) -> Diagnosis:
    return diagnose(truth.classifier, truth.folder)


def by_name(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnosis.findings}


def assert_named(diagnosis: Diagnosis, name: str) -> None:
    """The true value is found, and no other setting is suspected."""
    assert diagnosis.likely is not None, diagnosis.conclusion()
    assert diagnosis.likely.name == name
    assert {rival.setting for rival in diagnosis.rivals} <= {diagnosis.likely.setting}
    assert diagnosis.likely.top1 == 0.8
    assert diagnosis.conclusion().startswith(
        f"likely mismatch: {diagnosis.likely.setting}; with {name} top-1"
    )


def test_right_settings_look_right(right: Diagnosis) -> None:
    assert (right.top1, right.n, right.damaged, right.split) == (0.8, IMAGES, 0, "all")
    assert right.likely is None
    assert right.rivals == ()
    assert {finding.verdict for finding in right.findings} <= {"worse", "unclear"}
    assert right.conclusion().startswith(
        f"the settings look right: none of {right.tried} changes is surely better on 120 images, "
        f"which cannot prove a rise of top-1 by less than {100 * right.least_rise:.1f} points; "
        "what would cost most: mean/std 0 and 1"
    )


def test_the_least_rise_that_can_be_proved_by_hand(right: Diagnosis) -> None:
    # 24 changes, 10 images gained and none lost: 24 * 2 / 2^10 = 0.047; with 9 images it is twice that.
    assert replace(right, tried=24, n=200).least_rise == 0.05


def test_what_would_cost_most_is_the_worst_of_each_setting_in_order(right: Diagnosis) -> None:
    settings = [finding.setting for finding in right.costliest]
    assert len(settings) == len(set(settings))
    assert {"mean/std", "crop fraction", "resize", "channel order", "activation", "norm eps"} <= set(settings)
    costs = [finding.top1 for finding in right.costliest]
    assert costs == sorted(costs)
    worst = min(f.top1 for f in right.findings if f.setting == "mean/std")
    assert right.costliest[settings.index("mean/std")].top1 == worst


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (IMAGENET, "mean/std 0.5 and 0.5"),
        (PLAIN, "mean/std 0.5 and 0.5"),
        ({"mean": (0.3, 0.4, 0.5), "std": (0.1, 0.2, 0.3)}, "mean/std 0.5 and 0.5"),
        ({"resize": "squash"}, "resize shortest"),
        ({"resize": "longest"}, "resize shortest"),
        ({"crop_fraction": 0.875}, "crop fraction 1"),
        ({"interpolation": "nearest"}, "interpolation bicubic"),
    ],
    ids=str,
)
def test_wrong_preprocessing_is_named(broken: dict[str, Any], name: str, truth: Truth) -> None:
    assert_named(diagnose(truth.with_preprocess(**broken), truth.folder), name)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ({"layer": {"feed_forward": {"activation": "quick_gelu"}}}, "activation gelu"),
        ({"norm": {"eps": 1e-12}}, "norm eps 1e-06"),
        ({"norm": {"eps": 1e-5}}, "norm eps 1e-06"),
        ({"embedding": {"resize": "bicubic_corners"}}, "position resize bicubic_antialias"),
    ],
    ids=str,
)
def test_wrong_models_are_named(broken: dict[str, Any], name: str, truth: Truth) -> None:
    assert_named(diagnose(truth.with_model(**broken), truth.folder), name)


def swap_channels(folder: str, out: Path) -> str:
    for path in sorted(Path(folder).rglob("*.png")):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(open_image(path))[..., ::-1].copy()).save(target)
    return str(out)


def test_images_with_their_channels_swapped_are_named(truth: Truth, tmp_path: Path) -> None:
    assert_named(diagnose(truth.classifier, swap_channels(truth.folder, tmp_path)), "channel order BGR")


# --- A model that was trained -----------------------------------------------------------------------


def paint(folder: Path, count: int, seed: int) -> str:
    """Pictures warm or cold, dark or bright, not all of them clearly."""
    generator = np.random.default_rng(seed)
    for name, (red, blue), level in (
        ("warm dark", (1.2, 0.8), 80),
        ("warm bright", (1.2, 0.8), 130),
        ("cold dark", (0.8, 1.2), 80),
        ("cold bright", (0.8, 1.2), 130),
    ):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            light = level + generator.normal(0, 20)
            tint = np.array([red, 1, blue]) + generator.normal(0, 0.15, 3)
            pixels = light * tint + generator.normal(0, 30, (20, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number:03}.png")
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """A ViT after a second of training on pictures other than those it is tested on."""
    data = open_data(paint(tmp_path_factory.mktemp("train"), 60, seed=1), val_fraction=0)
    preprocess, split = Preprocess((16, 16), **cast(Any, IMAGENET)), data.split("train")
    images_BCHW = torch.stack([preprocess(split.images[index]) for index in range(len(split))])
    labels_B = torch.from_numpy(split.labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=4, dropout=0.0, pooling="mean"
        )
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(images_BCHW), labels_B).backward()
            optimizer.step()
    return Classifier(model.eval(), preprocess, data.classes, CPU)


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return paint(tmp_path_factory.mktemp("test"), 40, seed=2)


@pytest.fixture(scope="module")
def trained_right(trained: Classifier, painted: str) -> Diagnosis:
    return diagnose(trained, painted)


def test_a_trained_model_looks_right(trained_right: Diagnosis) -> None:
    assert 0.7 < trained_right.top1 < 0.97
    assert trained_right.likely is None, trained_right.conclusion()
    assert by_name(trained_right)["channel order BGR"].verdict == "worse"


@pytest.mark.parametrize("wrong", [PLAIN, {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}], ids=str)
def test_a_trained_models_wrong_mean_is_named(
    wrong: Any, trained: Classifier, painted: str, trained_right: Diagnosis
) -> None:
    broken = replace(trained, preprocess=replace(trained.preprocess, **wrong))
    diagnosis = diagnose(broken, painted)
    assert diagnosis.likely is not None
    assert diagnosis.likely.setting == "mean/std"
    assert "mean/std of ImageNet" in [f.name for f in (diagnosis.likely, *diagnosis.rivals)]
    assert by_name(diagnosis)["mean/std of ImageNet"].top1 == trained_right.top1


def test_a_trained_models_swapped_images_are_named(trained: Classifier, painted: str, tmp_path: Path) -> None:
    diagnosis = diagnose(trained, swap_channels(painted, tmp_path))
    assert diagnosis.likely is not None
    assert diagnosis.likely.name == "channel order BGR"
    assert diagnosis.rivals == ()


# --- The numbers ------------------------------------------------------------------------------------


def test_mcnemars_test_by_hand() -> None:
    # Of 12 fair coins at most 2 on one side: (1 + 12 + 66) / 2^12, and as much on the other side.
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(158 / 4096)
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(7, 7) == pytest.approx(1)
    assert mcnemar(0, 0) == 1


def test_the_paired_test_by_hand() -> None:
    # With two degrees of freedom Student's distribution is elementary: p = 1 - t / sqrt(t^2 + 2).
    mean, error, p = paired(np.array([1.0, 2.0, 3.0]))
    assert (mean, error) == pytest.approx((2, 1 / 3**0.5))
    assert p == pytest.approx(1 - 12**0.5 / 14**0.5)


def test_paired_differences_without_spread() -> None:
    assert paired(np.zeros(4)) == (0, 0, 1)
    assert paired(np.full(4, 0.5)) == (0.5, 0, 0)
    assert paired(np.array([0.5])) == (0.5, float("inf"), 1)


def test_numbers_are_those_of_an_evaluation(truth: Truth, right: Diagnosis) -> None:
    _, evaluation = evaluate_classifier(truth.classifier, truth.folder, batch_size=32)
    assert (right.top1, right.ci95) == (evaluation.top1, evaluation.ci95)
    assert right.loss == pytest.approx(evaluation.loss, abs=1e-6)
    found = by_name(right)
    changed = {
        "mean/std of ImageNet": truth.with_preprocess(**IMAGENET),
        "resize longest": truth.with_preprocess(resize="longest"),
        "activation silu": truth.with_model(layer={"feed_forward": {"activation": "silu"}}),
        "norm eps 1e-05": truth.with_model(norm={"eps": 1e-5}),
        "position resize bilinear_corners": truth.with_model(embedding={"resize": "bilinear_corners"}),
    }
    for name, classifier in changed.items():
        _, evaluation = evaluate_classifier(classifier, truth.folder, batch_size=32)
        assert found[name].top1 == evaluation.top1, name
        assert found[name].loss == pytest.approx(evaluation.loss, abs=1e-5), name
        assert found[name].top1_change == pytest.approx(found[name].top1 - right.top1)
        assert found[name].loss_change == pytest.approx(found[name].loss - right.loss)
        assert found[name].gained - found[name].lost == round(found[name].top1_change * right.n)


def test_p_values_are_corrected_for_the_number_of_changes(right: Diagnosis) -> None:
    assert right.tried == sum(finding.verdict != "no effect" for finding in right.findings)
    for finding in right.findings:
        assert finding.p_top1 == min(1, right.tried * mcnemar(finding.gained, finding.lost))


class Tint(nn.Module):
    """Logits are the mean red, green and blue, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.config = factor, ViTConfig(8, 8, position="none")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.factor * images_BCHW.mean((2, 3))


def tint(factor: float, **preprocess: Any) -> Classifier:
    model = cast(Any, Tint(factor))
    return Classifier(model, Preprocess((8, 8), **preprocess), ("ant", "bee", "cat"), CPU)


def test_less_confidence_alone_is_no_improvement(tmp_path: Path) -> None:
    """With these values every logit is halved: a much lower loss for a model that is far too sure."""
    folder = write_images(tmp_path, {"ant": 30, "bee": 30, "cat": 30})
    for number in range(0, 30, 4):
        (folder / "ant" / f"{number:03}.png").rename(folder / "bee" / f"ant {number}.png")
    diagnosis = diagnose(tint(20.0), str(folder))
    halved = by_name(diagnosis)["mean/std 0 and 1 (0..1)"]
    assert halved.loss_change < -0.5
    assert halved.top1_change == 0
    assert halved.verdict == "unclear"
    assert diagnosis.likely is None


def test_a_better_loss_counts_where_top1_ties(image_folder: Path) -> None:
    """Means that differ by channel favour a class, not so much that an answer turns."""
    diagnosis = diagnose(tint(0.5, mean=(0.3, 0.5, 0.7), std=(0.5, 0.5, 0.5)), str(image_folder))
    assert diagnosis.top1 == 1
    assert diagnosis.likely is not None
    assert (diagnosis.likely.setting, diagnosis.likely.p_top1) == ("mean/std", 1)
    assert "the loss falls from" in diagnosis.conclusion()


# --- What is tried ----------------------------------------------------------------------------------


def tried(diagnosis: Diagnosis, setting: str) -> list[str]:
    return [finding.value for finding in diagnosis.findings if finding.setting == setting]


def test_every_other_value_is_tried(right: Diagnosis) -> None:
    settings = list(dict.fromkeys(finding.setting for finding in right.findings))
    assert settings == [
        "mean/std", "crop fraction", "interpolation", "resize", "channel order", "activation", "norm eps",
        "position resize",
    ]  # fmt: skip
    assert len(tried(right, "mean/std")) == 4
    assert tried(right, "crop fraction") == ["0.875", "0.9", "0.95"]
    assert tried(right, "interpolation") == ["nearest", "bilinear", "lanczos"]
    assert tried(right, "resize") == ["squash", "longest"]
    assert tried(right, "activation") == ["gelu_tanh", "quick_gelu", "silu"]
    assert tried(right, "norm eps") == ["1e-05", "1e-12"]
    assert "geometric" not in tried(right, "position resize")
    assert len(tried(right, "position resize")) == len(RESIZE) - 2


def small(**options: Any) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=3, **options)
    return Classifier(model.eval(), Preprocess((16, 16)), ("ant", "bee", "cat"), CPU)


def test_what_cannot_matter_says_why(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("L", (16, 16), 60 * number).save(tmp_path / name / f"{number}.png")
    diagnosis = diagnose(small(), str(tmp_path))
    verdicts = {f.name: (f.verdict, f.reason) for f in diagnosis.findings}
    assert verdicts["channel order BGR"] == ("no effect", "the images are grey")
    assert verdicts["resize squash"] == ("no effect", "the images come out the same")
    assert verdicts["interpolation nearest"] == ("no effect", "the images come out the same")
    assert verdicts["position resize -"] == (
        "no effect",
        "the model runs at the 2x2 patches of its table as it was loaded",
    )
    assert diagnosis.likely is None


@pytest.mark.parametrize(
    ("options", "resizes"),
    [
        ({"position": "sinusoidal_2d"}, "the model has no table of positions"),
        (
            {"position": "none", "layer": {"attention": {"rotary": {"kind": "axial"}}}},
            "the model has no table of positions",
        ),
        ({"position": "none", "layer": {"attention": {"relative_bias": "layer"}}}, None),
    ],
    ids=str,
)
def test_positions_of_other_kinds(options: Any, resizes: str | None, image_folder: Path) -> None:
    classifier = small(**options)
    at_another_size = replace(classifier, preprocess=Preprocess((24, 24)))
    diagnosis = diagnose(at_another_size, str(image_folder), limit=6)
    found = [finding for finding in diagnosis.findings if finding.setting == "position resize"]
    if resizes:
        assert [(finding.value, finding.reason) for finding in found] == [("-", resizes)]
    else:
        assert {finding.now for finding in found} == {"geometric"}
        assert len(found) == len(RESIZE) - 1


def test_gated_models_and_rms_norms_are_changed_too(image_folder: Path) -> None:
    options: Any = {"norm": {"kind": "rms", "eps": 1e-5}, "pooling": "map"}
    options["layer"] = {"feed_forward": {"gated": True, "activation": "silu"}}
    diagnosis = diagnose(small(**options), str(image_folder), limit=6)
    assert tried(diagnosis, "activation") == ["gelu", "gelu_tanh", "quick_gelu"]
    assert tried(diagnosis, "norm eps") == ["1e-06", "1e-12"]
    assert all(f.loss_change for f in diagnosis.findings if f.setting in ("activation", "norm eps"))


# --- What is left behind ----------------------------------------------------------------------------


def state_of(classifier: Classifier) -> tuple[Any, ...]:
    model = classifier.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits_BL = model(torch.randn(3, 3, 32, 32, generator=generator)).numpy().tobytes()
    modules = [(name, id(part), getattr(part, "eps", None)) for name, part in model.named_modules()]
    rules = [getattr(part, "resize", None) for part in model.modules()]
    return logits_BL, modules, rules, classifier.preprocess, model.training


@pytest.mark.parametrize("training", [False, True])
def test_model_and_preprocessing_are_as_they_were(training: bool, truth: Truth) -> None:
    classifier = truth.with_model()
    classifier.model.train(training)
    before, weights = state_of(classifier), [p.clone() for p in classifier.model.parameters()]
    diagnose(classifier, truth.folder, limit=20)
    assert state_of(classifier) == before
    assert all(torch.equal(*pair) for pair in zip(weights, classifier.model.parameters(), strict=True))


@pytest.mark.parametrize("calls", [16, 18, 20])
def test_they_are_after_a_failure_too(calls: int, truth: Truth) -> None:
    """Runs 15 to 17 have another activation, 18 and 19 another eps, the last another rule of resizing."""
    classifier = truth.with_model()
    before, ran = state_of(classifier), 0

    def fail(*_: Any) -> None:
        nonlocal ran
        ran += 1
        if ran == calls:
            raise KeyboardInterrupt

    with classifier.model.head.register_forward_hook(fail), pytest.raises(KeyboardInterrupt):
        diagnose(classifier, truth.folder, limit=20)
    assert state_of(classifier) == before


def test_each_image_is_decoded_once(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        "vitral.images.preprocess.open_image", lambda source: opened.append(source) or open_image(source)
    )
    diagnose(truth.classifier, truth.folder, limit=20)
    assert len(opened) == len(set(opened)) == 20


# --- The choice of images ----------------------------------------------------------------------------


def split_of(counts: dict[int, int]) -> Split:
    labels = np.repeat(list(counts), list(counts.values()))
    names = [f"{label} {number}" for number, label in enumerate(labels)]
    return Split([Path(name) for name in names], labels, names)


def test_a_sample_is_even_over_the_classes() -> None:
    chosen = sample(split_of({0: 100, 2: 30, 5: 50}), 30, seed=0)
    assert np.unique(chosen.labels, return_counts=True)[1].tolist() == [10, 10, 10]
    assert list(chosen.names) == sorted(chosen.names, key=lambda name: int(name.split()[1]))
    assert [str(chosen.images[index]) for index in range(30)] == list(chosen.names)


def test_large_classes_fill_up_what_small_ones_lack() -> None:
    chosen = sample(split_of({0: 100, 1: 4, 2: 50}), 44, seed=0)
    assert np.bincount(chosen.labels).tolist() == [20, 4, 20]


def test_fewer_images_than_classes_are_of_different_classes() -> None:
    assert len(set(sample(split_of(dict.fromkeys(range(50), 3)), 20, seed=0).labels)) == 20


def test_a_sample_is_a_function_of_its_seed() -> None:
    split = split_of({0: 100, 1: 100})
    assert sample(split, 20, seed=3).names == sample(split, 20, seed=3).names
    assert sample(split, 20, seed=3).names != sample(split, 20, seed=4).names


def test_a_limit_above_all_images_takes_them_all() -> None:
    split = split_of({0: 5, 1: 6})
    assert sample(split, 400, seed=0).names == split.names


def test_loading_processes_give_the_same(truth: Truth) -> None:
    alone = diagnose(truth.classifier, truth.folder, limit=20)
    assert diagnose(truth.classifier, truth.folder, limit=20, workers=1) == alone


def test_diagnoses_repeat(truth: Truth) -> None:
    first, second = (diagnose(truth.classifier, truth.folder, limit=30) for _ in range(2))
    assert first == second
    assert first.n == 30


# --- Input that is not as it should be ---------------------------------------------------------------


def test_damaged_images_are_named_counted_and_left_out(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_BATCH_SIZE", 10)
    for name in ("ant/003.png", "cat/011.png"):
        (image_folder / name).write_bytes(b"no picture")
    warnings: list[str] = []
    calls: list[tuple[int, int]] = []
    told = lambda done, total: calls.append((done, total))  # noqa: E731
    diagnosis = diagnose(tint(50), str(image_folder), warn=warnings.append, on_images=told)
    assert (diagnosis.n, diagnosis.damaged) == (34, 2)
    assert [warning.split(":")[0] for warning in warnings] == [
        "no record says which images this model was trained on; all are judged, and some of them it may have "
        "learned by heart",
        "skipped damaged image ant/003.png",
        "skipped damaged image cat/011.png",
    ]
    assert calls == [(10, 36), (20, 36), (30, 36), (36, 36)]


def test_damaged_images_alone_are_refused(image_folder: Path) -> None:
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(VitralError, match="none of the images could be read"):
        diagnose(tint(50), str(image_folder))


def test_classes_are_matched_by_name(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "bee")
    diagnosis = diagnose(tint(50), str(image_folder))
    assert (diagnosis.n, diagnosis.top1) == (24, 1.0)


def test_a_model_without_labels_is_refused(image_folder: Path) -> None:
    with pytest.raises(VitralError, match="doctor needs a classifier, and this model has no labels"):
        diagnose(replace(tint(50), labels=()), str(image_folder))


def test_no_images_are_refused(image_folder: Path) -> None:
    with pytest.raises(VitralError, match="limit=0: it must be a whole number from 1"):
        diagnose(tint(50), str(image_folder), limit=0)


# --- What it says ------------------------------------------------------------------------------------


def test_a_diagnosis_is_json(right: Diagnosis) -> None:
    read = json.loads(json.dumps(right.to_dict()))
    assert read["conclusion"] == right.conclusion()
    assert read["likely"] is None
    assert read["findings"][0]["setting"] == "mean/std"
    assert read["costliest"][0]["verdict"] == "worse"


def test_rows_are_text(right: Diagnosis) -> None:
    rows = right.rows()
    assert len(rows) == len(right.findings)
    assert {len(row) for row in rows} == {8}
    assert rows[0][:3] == ("mean/std", "0.5 and 0.5", "of ImageNet")
    assert rows[0][7].startswith("worse: top-1, p = ")
    assert {row[7] for row, f in zip(rows, right.findings, strict=True) if f.verdict == "unclear"} == {
        "unclear"
    }
    assert rows[0][3:7] == tuple(
        f"{value:{form}}"
        for value, form in zip(
            (
                right.findings[0].top1,
                100 * right.findings[0].top1_change,
                right.findings[0].loss,
                right.findings[0].loss_change,
            ),
            (".1%", "+.1f", ".3f", "+.3f"),
            strict=True,
        )
    )
