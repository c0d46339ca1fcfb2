"""Several classes per image, from parquet to probabilities, against hand-worked numbers and libraries."""

import copy
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import StopAt, settled
from tests.test_cli import Result, Vitral
from tests.test_cli import vitral as vitral
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.image_data import open_data
from vitral.data.loader import Loader
from vitral.data.randomness import Sampling
from vitral.data.split import Split
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.evaluation.multi_label import MultiLabelEvaluation, MultiLabelOutcomes
from vitral.images.augment import batch_mixer
from vitral.images.augmentation import Augmentation
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import load
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.training.loop import train
from vitral.training.objective import Objective, balanced_weights

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
SIDE, SQUARE = 24, 8


def picture(shown: Sequence[str], generator: np.random.Generator) -> bytes:
    """Squares of the colours at places of a grid of nine, on dark noise."""
    pixels = generator.integers(0, 100, (SIDE, SIDE, 3)).astype(np.uint8)
    for name, place in zip(shown, generator.permutation(9), strict=False):
        y, x = SQUARE * (place // 3), SQUARE * (place % 3)
        pixels[y : y + SQUARE, x : x + SQUARE] = COLOURS[name]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_squares(path: Path, count: int, seed: int) -> None:
    """Each colour is there with its own probability, and some pictures show none."""
    generator = np.random.default_rng(seed)
    shares = (0.6, 0.4, 0.3, 0.15)
    rows = [[c for c, p in zip(COLOURS, shares, strict=True) if generator.random() < p] for _ in range(count)]
    images = [{"bytes": picture(row, generator), "path": None} for row in rows]
    pq.write_table(pa.table({"image": images, "labels": rows}), path)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("squares")
    write_squares(folder / "train.parquet", 240, seed=0)
    write_squares(folder / "test.parquet", 80, seed=1)
    return f"{folder}/{{split}}.parquet"


def write_rows(path: Path, labels: Any, *, column: str = "label", feature: Any = None) -> str:
    """Labels as given, with black images; `feature` is what the Hugging Face metadata says of them."""
    image = picture([], np.random.default_rng(0))
    table = pa.table({"image": [{"bytes": image, "path": None}] * len(labels), column: labels})
    if feature is not None:
        info = json.dumps({"info": {"features": {"image": {"_type": "Image"}, column: feature}}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path)
    return str(path)


NAMES = {"names": ["cat", "ant", "bee"], "_type": "ClassLabel"}
INDEX_ROWS, NAME_ROWS = [[0, 2], [], [1], [2, 2]], [["cat", "bee"], [], ["ant"], ["bee", "bee"]]
IN_FILE_ORDER = ("cat", "ant", "bee"), [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
IN_ALPHABET = ("ant", "bee", "cat"), [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
KINDS = {
    "Sequence(ClassLabel)": (INDEX_ROWS, {"feature": NAMES, "_type": "Sequence"}, IN_FILE_ORDER),
    "List(ClassLabel)": (INDEX_ROWS, {"feature": NAMES, "length": -1, "_type": "List"}, IN_FILE_ORDER),
    "[ClassLabel]": (INDEX_ROWS, [NAMES], IN_FILE_ORDER),
    "text beside metadata": (NAME_ROWS, {"feature": NAMES, "_type": "Sequence"}, IN_FILE_ORDER),
    "text": (NAME_ROWS, None, IN_ALPHABET),
    "plain feature": (NAME_ROWS, {"feature": {"dtype": "string"}, "_type": "Sequence"}, IN_ALPHABET),
    "large lists": (pa.array(NAME_ROWS, pa.large_list(pa.string())), None, IN_ALPHABET),
    "numbers": (INDEX_ROWS, None, (("0", "1", "2"), IN_FILE_ORDER[1])),
    "lists of one length": (
        pa.array([["cat", "bee"], ["ant", "cat"]], pa.list_(pa.string(), 2)), None,
        (("ant", "bee", "cat"), [[0, 1, 1], [1, 0, 1]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_labels_are_read(tmp_path: Path, kind: str, column: str) -> None:
    labels, feature, (classes, shown) = KINDS[kind]
    source = write_rows(tmp_path / "a.parquet", labels, column=column, feature=feature)
    data = open_data(source, val_fraction=0)
    assert data.multi_label
    assert data.classes == classes
    assert data.split("train").labels.tolist() == np.array(shown, dtype=bool).tolist()


def test_a_column_called_labels_may_hold_one_class_an_image(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.parquet", [1, 0, 2], column="labels", feature=NAMES)
    data = open_data(source, val_fraction=0)
    assert not data.multi_label
    assert [data.classes[label] for label in data.split("train").labels] == ["ant", "cat", "bee"]
    assert data.classes == ("cat", "ant", "bee")


CLASSES = {"feature": {"names": ["ant", "bee"]}, "_type": "Sequence"}
BAD = {
    "a null list": ([["ant"], None, ["bee"]], None, "train row 1 has no list of labels; an image without"),
    "only null lists": (
        pa.array([None, None], pa.list_(pa.string())),
        None,
        "train row 0 has no list of labels",
    ),
    "only empty lists": (pa.array([[], []], pa.list_(pa.string())), None, "not one image has a label"),
    "a null in a list": ([["ant", None], ["bee"]], None, "label column has empty cells"),
    "an unknown class": ([["ant"], ["bee", "cow"]], CLASSES, "'train' has labels that the classes lack: cow"),
    "an unknown number": ([[0, 1], [5]], CLASSES, "'train' has labels that the classes lack: 5"),
    "a null beside names": ([[0, None], [1]], CLASSES, "'train' has labels that the classes lack: None"),
    "a null list beside names": ([[0, 1], None], CLASSES, "train row 1 has no list of labels"),
    "a class without images": ([[0], []], CLASSES, "no images of bee in 'train'"),
    "one class": ([["ant"], []], None, "has one class only, 'ant'"),
    "lists of lists": (
        [[["ant"]], [["bee"]]],
        None,
        "labels are list<.*; they must be numbers, text, or",
    ),
    "a record": (
        [{"a": 1}, {"a": 2}],
        None,
        "labels are struct<.*; they must be numbers, text",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_labels_are_named_in_one_line(tmp_path: Path, kind: str) -> None:
    labels, feature, text = BAD[kind]
    source = write_rows(tmp_path / "a.parquet", labels, feature=feature)
    with pytest.raises(VitralError, match=text) as caught:
        open_data(source, val_fraction=0)
    assert "\n" not in str(caught.value)


def test_lists_in_one_split_only_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", [["ant"], ["bee"]])
    write_rows(tmp_path / "test.parquet", ["ant", "bee"])
    with pytest.raises(VitralError, match="lists in some of train, test and not in others"):
        open_data(f"{tmp_path}/{{split}}.parquet")


# --- Holding out, drawing, batches -----------------------------------------------------------------


def rows_of(counts: dict[tuple[str, ...], int]) -> list[list[str]]:
    return [list(shown) for shown, count in counts.items() for _ in range(count)]


def test_the_same_share_of_each_class_is_held_out_the_rarest_first(tmp_path: Path) -> None:
    rows = rows_of({("a",): 60, ("a", "b"): 20, ("a", "b", "c"): 10, (): 40})
    source = write_rows(tmp_path / "a.parquet", rows)
    data = open_data(source, val_fraction=0.2, seed=3)
    # c has 10 images, of which 2; b has 30, of which 6, 2 of them c's; a 90, of which 18, 6 of them b's.
    assert data.split("val").labels.sum(0).tolist() == [18, 6, 2]
    assert (~data.split("val").labels.any(1)).sum() == 8
    assert data.split("train").labels.sum(0).tolist() == [72, 24, 8]
    assert set(data.split("train").names).isdisjoint(data.split("val").names)
    assert open_data(source, val_fraction=0.2, seed=3).split("val").names == data.split("val").names
    assert open_data(source, val_fraction=0.2, seed=4).split("val").names != data.split("val").names


def test_every_class_keeps_an_image_to_learn_from(tmp_path: Path) -> None:
    """Without care: c's two images may both be held out, one for a and one for b."""
    rows = [["a", "c"], ["a"], ["b", "c"], ["b"]]
    source = write_rows(tmp_path / "a.parquet", rows)
    for seed in range(20):
        data = open_data(source, val_fraction=0.5, seed=seed)
        assert data.split("train").labels.any(0).all()
        assert len(data.split("val"))


def test_what_is_found_is_described(tmp_path: Path) -> None:
    rows = rows_of({("a",): 6, ("a", "b"): 3, (): 1})
    described = open_data(write_rows(tmp_path / "a.parquet", rows), val_fraction=0).describe()
    assert "10 images in 2 classes, 1.2 per image (a, b)" in described
    assert "training images per class: 3 to 9" in described


def test_a_balanced_draw_shows_each_class_its_share(tmp_path: Path) -> None:
    rows = rows_of({("a",): 80, ("a", "b"): 15, ("c",): 3, (): 2})
    labels = open_data(write_rows(tmp_path / "a.parquet", rows), val_fraction=0).split("train").labels
    order = Sampling(balanced=True).order(labels, np.random.default_rng(0))
    shown = labels[order]
    assert len(order) == 100
    # Four groups draw 25 each; a is shown by all of its own draws and of b's.
    assert shown[:, 2].sum() == 25
    assert (~shown.any(1)).sum() == 25
    assert shown[:, 1].sum() >= 25
    assert shown[:, 0].sum() == 50


def test_batches_carry_a_column_a_class(squares: str) -> None:
    split = open_data(squares).split("train")
    preprocess = Preprocess((16, 16))
    batches = list(Loader(split.take(np.arange(10)), preprocess).evaluation_batches(4))
    assert [batch.labels.shape for batch in batches] == [(4, 4), (4, 4), (2, 4)]
    assert torch.cat([batch.labels for batch in batches]).tolist() == split.labels[:10].astype(float).tolist()
    assert batches[0].labels.dtype == torch.float32


def test_damaged_images_leave_no_row_of_labels() -> None:
    labels = np.array([[1, 0], [0, 1], [1, 1]], dtype=bool)
    good = picture(["red"], np.random.default_rng(0))
    split = Split([good, b"no image", good], labels, ["one", "two", "three"])
    (batch,) = Loader(split, Preprocess((16, 16))).evaluation_batches(3)
    assert batch.labels.tolist() == [[1, 0], [1, 1]]
    assert [name for name, _ in batch.damaged] == ["two"]
    (empty,) = Loader(split.take(np.array([1])), Preprocess((16, 16))).evaluation_batches(1)
    assert len(empty.labels) == 0


def test_a_training_batch_is_the_same_from_any_step(squares: str) -> None:
    split = open_data(squares).split("train")

    def stream(first_step: int, count: int) -> list[Tensor]:
        batches = Loader(split, Preprocess((16, 16))).training_batches(
            Augmentation(), batch_size=50, seed=0, first_step=first_step, sampling=Sampling(balanced=True)
        )
        return [batch.labels for batch in islice(batches, count)]

    assert all(torch.equal(a, b) for a, b in zip(stream(0, 8)[5:], stream(5, 3), strict=True))


# --- Mixing and the loss ---------------------------------------------------------------------------

MULTI_HOT = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]])


def test_mixup_gives_each_class_its_share() -> None:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 8, 8).clone()
    torch.manual_seed(1)
    mixed, targets = batch_mixer(0.8, 0.0, 3)(images, MULTI_HOT)
    # torchvision pairs each image with the one before it; image 1 is share * 1 + (1 - share) * 0.
    share = float(mixed[1, 0, 0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(targets[1], torch.tensor([1 - share, share, 1]))
    torch.testing.assert_close(targets[0], torch.tensor([share, 0, share]))
    torch.testing.assert_close(targets[2], torch.tensor([0, 1 - share, 1 - share]))


def test_cutmix_gives_each_class_its_share_of_the_pixels() -> None:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 8, 8).clone()
    torch.manual_seed(4)
    mixed, targets = batch_mixer(0.0, 1.0, 3)(images, MULTI_HOT)
    share = float((mixed[1, 0] == 1).float().mean())
    assert 0 < share < 1
    torch.testing.assert_close(targets[1], torch.tensor([1 - share, share, 1]))


def test_without_mixing_targets_are_the_labels() -> None:
    images = torch.rand(3, 3, 8, 8)
    same, targets = batch_mixer(0.0, 0.0, 3)(images, MULTI_HOT)
    assert same is images
    assert torch.equal(targets, MULTI_HOT)


def imbalanced() -> np.ndarray:
    return np.random.default_rng(0).random((200, 3)) < [0.05, 0.5, 0.9]


def test_balanced_weights_are_scikit_learns_of_each_class_alone() -> None:
    labels = imbalanced()
    for column, weights in zip(labels.T, balanced_weights(labels, 3).T, strict=True):
        theirs = compute_class_weight("balanced", classes=np.array([False, True]), y=column)
        np.testing.assert_allclose(weights, theirs)


def test_the_weighted_loss_is_that_of_scikit_learns_sample_weights() -> None:
    labels = imbalanced()
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.from_numpy(balanced_weights(labels, 3)).float()
    targets = torch.from_numpy(labels).float()
    found = Objective("binary", 0.0, weights)([logits], targets, torch.zeros(1))
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").numpy()
    columns = [each[:, i] * compute_sample_weight("balanced", labels[:, i]) for i in range(3)]
    assert float(found) == pytest.approx(np.mean(columns), rel=1e-5)


def test_smoothing_does_not_make_an_absent_rare_class_likely() -> None:
    """What torch's pos_weight would: the least loss lies at a probability of 0.5 and more."""
    labels = np.arange(1000)[:, None] < np.array([[1, 500]])
    objective = Objective("binary", 0.1, torch.from_numpy(balanced_weights(labels, 2)).float())
    logits = torch.zeros(1, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 1000 * objective([logits], torch.zeros(1, 2), torch.zeros(1))
        loss.backward()
        return loss

    optimizer.step(closure)  # pyrefly: ignore[bad-argument-type]
    torch.testing.assert_close(logits.sigmoid().detach(), torch.full((1, 2), 0.05), atol=1e-3, rtol=0)


# --- The evaluation --------------------------------------------------------------------------------


def evaluation(probabilities: Sequence[Sequence[float]], labels: Sequence[Sequence[int]]) -> Any:
    outcomes = MultiLabelOutcomes.of(torch.tensor(probabilities).log(), torch.tensor(labels).float())
    return MultiLabelEvaluation.of(outcomes, [f"c{i}" for i in range(len(labels[0]))])


def test_hand_worked_numbers() -> None:
    found = evaluation([[0.9, 0.2], [0.8, 0.6], [0.7, 0.3], [0.6, 0.1]], [[1, 0], [0, 1], [1, 1], [0, 0]])
    # c0: the present ones are first and third, precision 1/1 and 2/3. c1: first and second, 1 and 1.
    assert found.per_class["c0"].average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert found.per_class["c1"].average_precision == pytest.approx(1)
    assert found.mean_average_precision == pytest.approx((5 / 6 + 1) / 2)
    assert [found.per_class[name].n for name in ("c0", "c1")] == [2, 2]
    # At 0.5, c0 is said of all four and c1 of the second: 3 right, 2 too many, 1 missed.
    assert found.micro_f1 == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert found.macro_f1 == pytest.approx((2 * 2 / (2 * 2 + 2) + 2 * 1 / (2 * 1 + 1)) / 2)
    assert found.exact_match == pytest.approx(1 / 4)  # the first image alone
    right = [0.9, 0.8, 0.2, 0.6, 0.7, 0.3, 0.4, 0.9]
    assert found.loss == pytest.approx(-np.log(right).mean())
    assert found.n == 4


def test_average_precision_and_loss_are_scikit_learns_and_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        3 * torch.randn(300, 5, generator=generator),
        torch.rand(300, 5, generator=generator) < 0.3,
    )
    parts = [
        MultiLabelOutcomes.of(F.logsigmoid(a), b.float())
        for a, b in zip(logits.split(77), labels.split(77), strict=True)
    ]
    found = MultiLabelEvaluation.of(MultiLabelOutcomes.merge(parts), "abcde")
    theirs = average_precision_score(labels.numpy(), logits.numpy(), average=None)
    assert [row.average_precision for row in found.per_class.values()] == pytest.approx(list(theirs))
    assert found.mean_average_precision == pytest.approx(float(np.mean(theirs)))
    loss = F.binary_cross_entropy_with_logits(logits.double(), labels.double())
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


def test_sure_answers_have_a_finite_loss() -> None:
    logits, labels = torch.tensor([[300.0, -300.0], [300.0, -300.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = MultiLabelEvaluation.of(MultiLabelOutcomes.of(F.logsigmoid(logits), labels), "ab")
    assert found.loss == pytest.approx(50)  # half of the answers at torch's bound of 100


def test_a_class_that_no_image_shows_has_no_average_precision() -> None:
    found = evaluation([[0.9, 0.8], [0.1, 0.7]], [[1, 0], [0, 0]])
    assert found.per_class["c1"].average_precision is None
    assert found.mean_average_precision == 1
    assert found.macro_f1 == 1
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(VitralError, match="none of the 1 images shows a class"):
        evaluation([[0.9, 0.8]], [[0, 0]])


# --- Models ----------------------------------------------------------------------------------------


def save_model(folder: Path, labels: tuple[str, ...], *, multi_label: bool) -> Path:
    torch.manual_seed(0)
    model = VisionTransformer(
        SIDE, SQUARE, embed_dim=32, num_layers=2, num_heads=2, num_classes=len(labels), pooling="mean"
    )
    torch.nn.init.normal_(model.get_parameter("head.weight"))
    preprocess = Preprocess((SIDE, SIDE))
    save_checkpoint(folder, Checkpoint(model.eval(), preprocess, labels, multi_label=multi_label))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", tuple(COLOURS), multi_label=True)


def test_predictions_are_sigmoids(model: Path) -> None:
    image = picture(["red", "blue"], np.random.default_rng(0))
    classifier = load(model, device="cpu", precision="float32")
    assert classifier.multi_label
    (prediction,) = classifier.predict(image, top=4)
    logits = classifier.logits(image)[0]
    expected = dict(zip(COLOURS, torch.sigmoid(logits).tolist(), strict=True))
    assert dict(prediction.top) == pytest.approx(expected)
    assert [p for _, p in prediction.top] == pytest.approx(sorted(expected.values(), reverse=True))
    assert sum(expected.values()) != pytest.approx(1, abs=0.05)


def test_mirrors_average_the_sigmoids(model: Path) -> None:
    image = picture(["red", "blue"], np.random.default_rng(0))
    mirror = Image.open(io.BytesIO(image)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    plain = load(model, device="cpu", precision="float32")
    (prediction,) = replace(plain, tta="flip").predict(image, top=4)
    mean = torch.sigmoid(torch.stack([plain.logits(image)[0], plain.logits(mirror)[0]])).mean(0)
    assert dict(prediction.top) == pytest.approx(dict(zip(COLOURS, mean.tolist(), strict=True)))


def test_the_evaluation_is_of_the_predictions_whatever_the_order_of_labels(
    tmp_path: Path, squares: str
) -> None:
    model = save_model(tmp_path / "model", ("white", "other", *list(COLOURS)[:3]), multi_label=True)
    classifier = load(model, device="cpu", precision="float32")
    name, found = evaluate_classifier(classifier, squares)
    assert name == "test"
    test = open_data(squares, val_fraction=0).split("test")
    images = [test.images[i] for i in range(len(test))]
    scores = [dict(prediction.top) for prediction in classifier.predict(images, top=5)]  # pyrefly: ignore
    for column, colour in enumerate(sorted(COLOURS)):
        theirs = average_precision_score(test.labels[:, column], [score[colour] for score in scores])
        assert found.per_class[colour].average_precision == pytest.approx(theirs)
        assert found.per_class[colour].n == test.labels[:, column].sum()
    assert found.per_class["other"].average_precision is None


def test_a_fresh_head_is_of_one_class_an_image(model: Path) -> None:
    assert load_checkpoint(model).multi_label
    assert not load_checkpoint(model, num_classes=7).multi_label


def test_a_folder_of_before_is_of_one_class_an_image(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["multi_label"]
    (model / "config.json").write_text(json.dumps(config))
    assert not load_checkpoint(model).multi_label


def test_a_flag_that_is_none_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"multi_label": "yes"}))
    with pytest.raises(VitralError, match="multi_label is 'yes'; it must be true or false"):
        load_checkpoint(model)


# --- Runs ------------------------------------------------------------------------------------------


def test_the_loss_is_chosen_from_the_data(squares: str, image_folder: Path) -> None:
    assert settled(open_data(squares), Recipe()).criterion.loss == "binary"
    assert settled(open_data(str(image_folder)), Recipe()).criterion.loss == "cross_entropy"
    assert settled(open_data(str(image_folder)), Recipe(loss="binary")).criterion.loss == "binary"


@pytest.mark.parametrize("setting", [{"loss": "cross_entropy"}, {"teacher": "runs/teacher"}])
def test_settings_for_one_class_an_image_are_refused(squares: str, setting: dict[str, Any]) -> None:
    with pytest.raises(VitralError, match=r"is for one class per image, and .* has lists of labels"):
        settled(open_data(squares), Recipe(**setting))


def test_a_resumed_run_ends_with_the_same_bits(squares: str, model: Path, tmp_path: Path) -> None:
    data = open_data(squares)
    recipe = Recipe(
        model=str(model), steps=10, batch_size=40, mixup=0.5, cutmix=0.5, sampling="balanced",
        class_weights="balanced", drop_path=0.1, workers=0, device="cpu", precision="float32",
    )  # fmt: skip
    train(data, tmp_path / "whole", recipe)
    assert not train(data, tmp_path / "parts", recipe, listeners=[StopAt(3)]).finished
    assert train(data, tmp_path / "parts", Recipe(), resume=True).finished

    def bits(run: str) -> list[Any]:
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        files = ("model.safetensors", "last/model.safetensors")
        return [(r["step"], r["val_loss"], r["val_mean_average_precision"]) for r in records] + [
            (tmp_path / run / file).read_bytes() for file in files
        ]

    assert bits("parts") == bits("whole")


# --- The command line ------------------------------------------------------------------------------


def test_train_eval_and_predict(vitral: Vitral, squares: str, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    budget = [
        "steps=100",
        "batch_size=24",
        "val_fraction=0.5",
        "workers=0",
        "device=cpu",
        "precision=float32",
    ]
    rates = ["learning_rate=3e-3", "layer_decay=1", "ema_decay=0.9", "crop=none"]
    trained = vitral("train", squares, "--out", run, f"model={model}", *budget, *rates)
    assert trained.status == 0, trained.err
    assert "val mAP" in trained.out
    assert "test mAP" in trained.out
    assert 'loss = "binary"' in (run / "recipe.toml").read_text()

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "val_top1" not in metrics[0]
    assert metrics[0]["val_micro_f1"] < 0.6
    assert metrics[-1]["val_micro_f1"] > 0.9

    def merit(record: dict[str, float]) -> tuple[float, float]:
        return record["val_mean_average_precision"] + record["val_micro_f1"], -record["val_loss"]

    best = max(metrics, key=merit)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_step"] == best["step"]
    assert summary["val_mean_average_precision"] == best["val_mean_average_precision"]
    assert summary["calibration"] is None

    shown = vitral("eval", run, squares, "--json", "--device", "cpu", "--precision", "float32")
    result = json.loads(shown.out)
    assert result["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-4)
    assert result["per_class"].keys() == COLOURS.keys()
    # Ranked by chance, a class's average precision is its share of the images, 0.6 at most.
    assert result["mean_average_precision"] > 0.9
    assert result["micro_f1"] > 0.85
    assert result["mean_average_precision"] == pytest.approx(
        summary["test"]["mean_average_precision"], abs=1e-4
    )
    table = vitral("eval", run, squares, "--split", "val", "--device", "cpu", "--precision", "float32")
    assert "mean average precision" in table.out
    assert "exact match" in table.out
    assert table.err == ""  # these are the images that the run held out

    (tmp_path / "new.png").write_bytes(picture(["green", "red"], np.random.default_rng(9)))
    predicted = vitral("predict", run, tmp_path / "new.png", "--top", 4, "--json", "--device", "cpu")
    top = json.loads(predicted.out)["top"]
    assert {row["label"] for row in top[:2]} == {"red", "green"}
    assert "sigmoid" in vitral("info", run, "--no-measure").out


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_model(tmp_path / "single", tuple(COLOURS), multi_label=False)


def one_line(result: Result) -> str:
    assert result.status == 1
    assert result.out == ""
    (line,) = result.err.splitlines()
    return line


@pytest.mark.parametrize("command", ["eval", "doctor"])
def test_a_model_of_one_class_is_not_for_lists_of_labels(
    vitral: Vitral, squares: str, single: Path, command: str
) -> None:
    said = one_line(vitral(command, single, squares, "--device", "cpu"))
    assert "has any number of classes per image, and the model was trained for one class per image" in said


def test_a_multi_label_model_is_not_for_one_class_an_image(
    vitral: Vitral, model: Path, image_folder: Path
) -> None:
    said = one_line(vitral("eval", model, image_folder, "--device", "cpu"))
    assert "has one class per image, and the model was trained for any number of classes per image" in said


def test_doctor_and_probe_say_that_they_take_one_class_an_image(
    vitral: Vitral, model: Path, squares: str
) -> None:
    assert "this one is multi-label" in one_line(vitral("doctor", model, squares, "--device", "cpu"))
    assert "a probe takes one class per image" in one_line(vitral("probe", model, squares, "--device", "cpu"))


def test_an_evaluation_says_which_figures_it_has(squares: str, model: Path) -> None:
    _, found = evaluate_classifier(load(model, device="cpu"), squares)
    assert found.score == found.mean_average_precision
    with pytest.raises(AttributeError, match="a MultiLabelEvaluation has no 'top1'; it has n, loss, "):
        _ = found.top1
    assert copy.deepcopy(found) == found


def test_a_transformers_folder_keeps_the_sigmoid_and_others_say_that_they_do_not(
    vitral: Vitral, model: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    assert vitral("convert", model, tmp_path / "hub", "--to", "transformers").status == 0
    assert (
        transformers.AutoConfig.from_pretrained(tmp_path / "hub").problem_type == "multi_label_classification"
    )
    assert load_checkpoint(tmp_path / "hub").multi_label
    pytest.importorskip("timm")
    assert "probabilities: sigmoid -> softmax" in vitral("convert", model, tmp_path / "t", "--to", "timm").err
