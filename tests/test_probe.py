"""Probes are scikit-learn's on the same features; the features are the model's, and are computed once."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from vitral.checkpoints.folder import Checkpoint, load_checkpoint
from vitral.data.batches import DamageCount
from vitral.data.image_data import open_data
from vitral.data.split import Split
from vitral.data.subsets import few_shot
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.evaluation.probing.linear import LinearHead
from vitral.evaluation.probing.neighbours import neighbour_votes
from vitral.evaluation.probing.probe import ProbeOptions, ProbeResult, probe
from vitral.evaluation.probing.usual import usual_features
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess
from vitral.inference import features as features_module
from vitral.inference.classifier import Classifier, as_classifier, load
from vitral.inference.features import PooledFeatures, extract
from vitral.model.config import ViTConfig
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.files import cache_folder

CPU = Placement.choose("cpu", "float32")
SIZE = 16
CLASSES = {"ant": 17, "bee": 13, "cat": 11}


def vit(**options: Any) -> VisionTransformer:
    tiny = {"embed_dim": 24, "num_layers": 3, "num_heads": 2, "num_classes": 0, "dropout": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer.from_config(ViTConfig(SIZE, 8, **{**tiny, **options})).eval()  # pyrefly: ignore


def classifier_of(model: VisionTransformer, labels: tuple[str, ...] = ()) -> Classifier:
    return as_classifier(Checkpoint(model, Preprocess((SIZE, SIZE)), labels), CPU)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few images are read before a process to load them has started."""
    monkeypatch.setattr("vitral.data.workers.cpu_count", lambda: 0)


@pytest.fixture
def classifier() -> Classifier:
    return classifier_of(vit())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, with train, val and test; hard enough to be wrong about some."""
    for name, seed in (("train", 0), ("val", 1), ("test", 2)):
        write_faint(tmp_path / "data" / name, CLASSES, seed)
    return tmp_path / "data"


def write_faint(folder: Path, classes: dict[str, int], seed: int) -> None:
    from PIL import Image

    generator = np.random.default_rng(seed)
    for index, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 240, (SIZE, SIZE, 3)) + 9 * (np.arange(3) == index)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03}.png")


def features_of(
    classifier: Classifier, split: Split, cache: Path, layers: tuple[int, ...] = (-1,)
) -> PooledFeatures:
    return extract(classifier, split, layers, cache, damage=DamageCount(len(split), 0.5, lambda _: None))


def by_hand(model: VisionTransformer, split: Split) -> tuple[Tensor, Tensor]:
    """Class tokens and patch means after the final norm, one image at a time."""
    prepare = Preprocess((SIZE, SIZE))
    with torch.no_grad():
        answers = [model.features(prepare(open_image(image))[None]) for image in split.images]
    tokens = torch.cat([answer.class_token for answer in answers if answer.class_token is not None])
    return tokens, torch.cat([answer.patch_tokens.mean(1) for answer in answers])


def blobs(count: int, classes: int = 4, width: int = 10) -> tuple[Tensor, np.ndarray]:
    generator = np.random.default_rng(count)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(0).normal(size=(classes, width))
    # Features of different scales and far from zero, as real ones are.
    vectors = (centres[labels] + 1.2 * generator.normal(size=(count, width))) * np.linspace(0.1, 9, width) + 5
    return torch.from_numpy(vectors.astype(np.float32)), labels


# --- The two probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_the_head_is_scikit_learns_on_standardized_vectors(classes: int, penalty: float) -> None:
    vectors, labels = blobs(120, classes)
    queries, _ = blobs(77, classes)
    mean, std = vectors.double().numpy().mean(0), vectors.double().numpy().std(0)
    theirs = LogisticRegression(C=1 / (120 * penalty), tol=1e-8, max_iter=10_000)
    theirs.fit((vectors.double().numpy() - mean) / std, labels)
    expected = theirs.predict_proba((queries.double().numpy() - mean) / std)
    found = LinearHead.fit(vectors, labels, classes, penalty)(queries).softmax(1)
    assert found.numpy() == pytest.approx(expected, abs=1e-2)


def test_the_head_is_where_the_penalized_loss_has_no_slope() -> None:
    vectors, labels = blobs(200)
    head = LinearHead.fit(vectors, labels, 4, penalty=0.03)
    mean, std = vectors.double().mean(0), vectors.double().std(0, correction=0)
    weight = (head.weight_LD.double() * std).requires_grad_()
    bias = (head.bias_L.double() + head.weight_LD.double() @ mean).requires_grad_()
    logits = ((vectors.double() - mean) / std) @ weight.T + bias
    loss = (
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)) + 0.03 / 2 * weight.square().sum()
    )
    loss.backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-3


def test_a_feature_that_never_varies_does_no_harm() -> None:
    vectors, labels = blobs(120)
    with_constant = torch.cat([vectors, torch.full((120, 1), 1e4)], dim=1)
    heads = [LinearHead.fit(v, labels, 4, 0.1) for v in (vectors, with_constant)]
    assert torch.allclose(heads[0](vectors), heads[1](with_constant), atol=1e-2)


@pytest.mark.parametrize("k", [1, 7, 20])
def test_votes_are_scikit_learns_weighted_neighbours(k: int) -> None:
    vectors, labels = blobs(150)
    queries, _ = blobs(60)

    def unit(v: Tensor) -> np.ndarray:
        return v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True)

    theirs = KNeighborsClassifier(
        k, metric="precomputed", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(np.clip(1 - unit(vectors) @ unit(vectors).T, 0, None), labels)
    expected = theirs.predict_proba(np.clip(1 - unit(queries) @ unit(vectors).T, 0, None))
    (found,) = neighbour_votes(vectors, labels, queries, 4, [k])
    assert found.exp().numpy() == pytest.approx(expected, abs=1e-4)


def test_three_votes_by_hand() -> None:
    # Cosines with (1, 0): 1 for class 0, and 0.8 and 0.6 for class 1.
    bank, labels = torch.tensor([[3.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]]), np.array([0, 1, 1, 2])
    (found,) = neighbour_votes(bank, labels, torch.tensor([[1.0, 0.0]]), 3, [3])
    weights = np.exp(np.array([1.0, 0.8, 0.6]) / 0.07)
    expected = [weights[0] / weights.sum(), weights[1:].sum() / weights.sum(), 1e-6]
    assert found.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_more_neighbours_than_images_are_all_of_them() -> None:
    vectors, labels = blobs(8)
    many, all_of_them = neighbour_votes(vectors, labels, vectors, 4, [100, 8])
    assert torch.equal(many, all_of_them)


# --- The whole, by another route -------------------------------------------------------------------------


def test_the_whole_is_scikit_learns_by_hand(classifier: Classifier, folder: Path, tmp_path: Path) -> None:
    result = probe(classifier, str(folder))
    data = open_data(str(folder))
    parts = {name: by_hand(classifier.model, split) for name, split in data.splits.items()}
    labels = {name: split.labels for name, split in data.splits.items()}
    both = {name: torch.cat(pair, 1).double().numpy() for name, pair in parts.items()}

    def fitted(names: tuple[str, ...], penalty: float) -> tuple[LogisticRegression, Any]:
        vectors = np.concatenate([both[name] for name in names])
        mean, std = vectors.mean(0), vectors.std(0)
        model = LogisticRegression(C=1 / (penalty * len(vectors)), tol=1e-8, max_iter=10_000)
        model.fit((vectors - mean) / std, np.concatenate([labels[name] for name in names]))
        return model, lambda v: (v - mean) / std

    # The penalty did best on val, of a probe that saw only train.
    scores = {}
    for penalty in 10.0 ** np.arange(-4, 1.5, 0.5):
        model, scaled = fitted(("train",), penalty)
        scores[float(penalty)] = log_loss(labels["val"], model.predict_proba(scaled(both["val"])))
    best = min(scores, key=lambda penalty: scores[penalty])
    assert result.linear.penalty == pytest.approx(best)
    assert result.linear.held_out_loss == pytest.approx(scores[best], abs=1e-3)
    # The judged one saw both, and test once.
    model, scaled = fitted(("train", "val"), result.linear.penalty)
    right = model.predict(scaled(both["test"])) == labels["test"]
    assert result.linear.evaluation.top1 == pytest.approx(right.mean())
    assert 0.3 < right.mean() < 1
    # Neighbours: class tokens alone.
    bank = np.concatenate([parts[name][0].double().numpy() for name in ("train", "val")])
    near = KNeighborsClassifier(
        result.neighbours.k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank, np.concatenate([labels["train"], labels["val"]]))
    expected = float((near.predict(parts["test"][0].double().numpy()) == labels["test"]).mean())
    assert result.neighbours.top1 == pytest.approx(expected)
    assert (result.split, result.labelled, result.linear.evaluation.n) == ("test", 82, 41)
    assert (result.linear.features, result.neighbours.features) == ("class_mean", "class")


def test_without_a_test_split_the_held_out_images_judge(classifier: Classifier, folder: Path) -> None:
    result = probe(classifier, str(folder / "train"), seed=3)
    data = open_data(str(folder / "train"), seed=3)
    assert (result.split, result.labelled) == ("val", len(data.split("train")))
    assert result.linear.evaluation.n == len(data.split("val"))


def test_of_several_layers_the_best_on_held_out_images_is_taken(classifier: Classifier, folder: Path) -> None:
    alone = {layer: probe(classifier, str(folder), layers=(layer,)) for layer in (0, 1, -1)}
    together = probe(classifier, str(folder), layers=(0, 1, -1))
    losses = [result.linear.held_out_loss for result in alone.values()]
    assert together.linear.held_out_loss == min(loss for loss in losses if loss is not None)
    assert together.linear == alone[together.linear.layer].linear
    shares = [result.neighbours.held_out_top1 for result in alone.values()]
    assert together.neighbours.held_out_top1 == max(share for share in shares if share is not None)
    assert together.neighbours == alone[together.neighbours.layer].neighbours


def test_few_shot_sees_so_many_of_each_class(classifier: Classifier, folder: Path) -> None:
    result = probe(classifier, str(folder), per_class=3)
    assert (result.labelled, result.split, result.linear.evaluation.n) == (9, "test", 41)
    assert result == probe(classifier, str(folder), per_class=3)
    assert result != probe(classifier, str(folder), per_class=3, seed=1)


def test_draws_are_nested_and_even(folder: Path) -> None:
    train = open_data(str(folder)).split("train")
    small, large = few_shot(train, 3, 0), few_shot(train, 12, 0)
    assert set(small.names) < set(large.names)
    assert np.bincount(small.labels).tolist() == [3, 3, 3]
    assert np.bincount(large.labels).tolist() == [12, 12, 11]


def test_one_image_a_class_leaves_nothing_to_choose_by(classifier: Classifier, folder: Path) -> None:
    result = probe(classifier, str(folder), per_class=1)
    assert result.linear.held_out_top1 is result.neighbours.held_out_top1 is None
    assert (result.labelled, result.linear.temperature) == (3, 1)


def test_the_limit_holds_for_every_split(classifier: Classifier, folder: Path) -> None:
    result = probe(classifier, str(folder), limit=9)
    assert (result.labelled, result.linear.evaluation.n) == (18, 9)
    # Where the number of labelled images is named, it holds for the judging ones.
    result = probe(classifier, str(folder), limit=9, per_class=5)
    assert (result.labelled, result.linear.evaluation.n) == (15, 9)


# --- Features ----------------------------------------------------------------------------------------------


def test_features_are_the_models_own(classifier: Classifier, folder: Path, cache: Path) -> None:
    split = open_data(str(folder)).split("test")
    found = features_of(classifier, split, cache)
    tokens, means = by_hand(classifier.model, split)
    assert torch.allclose(found.of(-1, "class"), tokens, atol=1e-5)
    assert torch.allclose(found.of(-1, "mean"), means, atol=1e-5)
    assert torch.equal(
        found.of(-1, "class_mean"), torch.cat([found.of(-1, "class"), found.of(-1, "mean")], 1)
    )


POOLED: list[dict[str, Any]] = [
    {"pooling": "mean", "head": {"norm": "pooled"}},
    {"pooling": "mean", "embedding": {"register_tokens": 3}},
    {"pooling": "mean", "embedding": {"register_tokens": 3}, "head": {"pool_prefix": True}},
    {"pooling": "map"},
    {"pooling": "class", "layer": {"order": "post"}},
    {"pooling": "class_mean"},
]


@pytest.mark.parametrize("options", POOLED, ids=str)
def test_the_pooled_vector_is_what_the_model_gives_its_head(
    options: dict[str, Any], folder: Path, cache: Path
) -> None:
    model = vit(**options)
    split = open_data(str(folder)).split("test")
    images = torch.stack([Preprocess((SIZE, SIZE))(open_image(image)) for image in split.images])
    with torch.no_grad():
        expected = model(images)  # without a head, the pooled vector
    found = features_of(classifier_of(model), split, cache).of(-1, model.config.pooling)
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_earlier_layer_is_normed_as_the_last(classifier: Classifier, folder: Path, cache: Path) -> None:
    split = open_data(str(folder)).split("test")
    found = features_of(classifier, split, cache, (-2, 0, 1))
    cut = vit()
    del cut.layers[2]  # the second to last layer is now the last
    assert torch.allclose(found.of(-2, "class"), by_hand(cut, split)[0], atol=1e-5)
    assert torch.equal(found.of(-2, "mean"), found.of(1, "mean"))
    assert not torch.allclose(found.of(0, "class"), found.of(1, "class"), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pooling": "class"}, ("class_mean", "class")),  # self-supervised: nothing was trained on the token
        ({"pooling": "class", "num_classes": 3}, ("class", "class")),
        ({"pooling": "class_mean", "num_classes": 3}, ("class_mean", "class")),
        ({"pooling": "mean"}, ("mean", "mean")),
        ({"pooling": "map"}, ("map", "map")),
    ],
    ids=str,
)
def test_usual_features(options: dict[str, Any], expected: tuple[str, str]) -> None:
    assert usual_features(vit(**options)) == expected


def test_an_earlier_layer_of_attention_pooling_is_averaged() -> None:
    assert usual_features(vit(pooling="map"), (-2,)) == ("mean", "mean")


# --- The cache ---------------------------------------------------------------------------------------------


class Counting:
    """Counts the images that a model encodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        original = features_module.pooled

        def counted(model: VisionTransformer, images: Tensor, layers: Any) -> Any:
            self.images += len(images)
            return original(model, images, layers)

        monkeypatch.setattr(features_module, "pooled", counted)

    def since(self) -> int:
        count, self.images = self.images, 0
        return count


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def test_a_second_run_computes_nothing_and_says_the_same(
    classifier: Classifier, folder: Path, encoded: Counting
) -> None:
    said: list[str] = []
    first = probe(classifier, str(folder), warn=said.append)
    assert encoded.since() == 123
    assert said == []
    assert probe(classifier, str(folder), warn=said.append) == first
    assert encoded.since() == 0
    assert len(said) == 3
    assert said[0].startswith("the features of 41 of 41 images were in ")


def test_a_draw_is_found_within_the_whole_and_the_other_way(
    classifier: Classifier, folder: Path, encoded: Counting, cache: Path
) -> None:
    train = open_data(str(folder)).split("train")
    features_of(classifier, few_shot(train, 3, 0), cache)
    assert encoded.since() == 9
    whole = features_of(classifier, train, cache)
    assert (encoded.since(), whole.cached) == (32, 9)
    # In the split's order whatever was computed when.
    assert torch.allclose(whole.of(-1, "class"), by_hand(classifier.model, train)[0], atol=1e-5)
    features_of(classifier, few_shot(train, 7, 5), cache)
    assert encoded.since() == 0


def test_an_image_is_known_by_its_content(
    classifier: Classifier, folder: Path, encoded: Counting, cache: Path
) -> None:
    features_of(classifier, open_data(str(folder)).split("test"), cache)
    encoded.since()
    files = sorted((folder / "test" / "ant").iterdir())
    files[0].rename(files[0].with_name("renamed.png"))
    files[1].write_bytes((folder / "val" / "ant" / "000.png").read_bytes())
    split = open_data(str(folder)).split("test")
    found = features_of(classifier, split, cache)
    assert encoded.since() == 1
    assert torch.allclose(found.of(-1, "class"), by_hand(classifier.model, split)[0], atol=1e-5)


OTHERS = {
    "weights": lambda c: classifier_of(nudged(c.model)),
    "config": lambda c: replace(
        c, model=with_weights_of(c.model, layer={"feed_forward": {"activation": "gelu_tanh"}})
    ),
    "preprocessing": lambda c: replace(c, preprocess=replace(c.preprocess, interpolation="bilinear")),
    "precision": lambda c: replace(c, placement=Placement(c.placement.device, torch.float16)),
}


def nudged(model: VisionTransformer) -> VisionTransformer:
    other = vit()
    with torch.no_grad():
        other.layers[0].get_parameter("attention_norm.weight")[0] += 1e-3
    return other


def with_weights_of(model: VisionTransformer, **options: Any) -> VisionTransformer:
    other = vit(**options)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_changes_features_has_its_own(
    what: str, classifier: Classifier, folder: Path, encoded: Counting, cache: Path
) -> None:
    split = open_data(str(folder)).split("test")
    features_of(classifier, split, cache)
    encoded.since()
    features_of(OTHERS[what](classifier), split, cache)
    assert encoded.since() == 41


def test_a_head_changes_no_features(
    classifier: Classifier, folder: Path, encoded: Counting, cache: Path
) -> None:
    split = open_data(str(folder)).split("test")
    features_of(classifier, split, cache)
    encoded.since()
    model = vit()
    model.reset_classifier(5)
    assert features_of(classifier_of(model), split, cache).cached == 41
    assert encoded.since() == 0


@pytest.mark.parametrize(("killed", "kept"), [(False, 24), (True, 16)])
def test_an_interrupted_extraction_leaves_whole_files_and_goes_on(
    killed: bool,
    kept: int,
    classifier: Classifier,
    folder: Path,
    encoded: Counting,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features_module, "SHARD_IMAGES", 16)
    monkeypatch.setattr(features_module, "_BATCH_SIZE", 8)
    split = open_data(str(folder)).split("test")

    def interrupt(done: int, _: int) -> None:
        if done >= 24:
            if killed:  # nothing more reaches the disk
                monkeypatch.setattr(features_module._Store, "flush", lambda _: None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(
            classifier,
            split,
            (-1,),
            cache,
            damage=DamageCount(41, 0, print),
            on_images=interrupt,
        )
    (model_folder,) = cache.iterdir()
    assert {file.suffix for file in model_folder.iterdir()} == {".safetensors"}
    encoded.since()
    found = features_of(classifier, split, cache)
    assert (encoded.since(), found.cached) == (41 - kept, kept)
    assert torch.allclose(found.of(-1, "class"), by_hand(classifier.model, split)[0], atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"no features", None], ids=["empty", "other", "cut"])
def test_a_damaged_file_is_named_and_computed_again(
    content: bytes | None, classifier: Classifier, folder: Path, encoded: Counting, cache: Path
) -> None:
    split = open_data(str(folder)).split("test")
    features_of(classifier, split, cache)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7] if content is None else content)
    encoded.since()
    said: list[str] = []
    extract(classifier, split, (-1,), cache, damage=DamageCount(41, 0, said.append))
    assert encoded.since() == 41
    assert len(said) == 1
    assert said[0].startswith(f"{file} is damaged")


def test_damaged_images_are_named_and_left_out(classifier: Classifier, folder: Path) -> None:
    (folder / "train" / "ant" / "003.png").write_bytes(b"no picture")
    (folder / "test" / "cat" / "001.png").write_bytes(b"")
    for _ in range(2):  # with and without the rest in the cache
        said: list[str] = []
        result = probe(classifier, str(folder), max_damaged=0.1, warn=said.append)
        assert (result.labelled, result.linear.evaluation.n) == (81, 40)
        named = [line for line in said if "skipped damaged image" in line]
        assert ["train/ant/003.png" in named[0], "test/cat/001.png" in named[1]] == [True, True]
    with pytest.raises(VitralError, match="damaged, more than the limit"):
        probe(classifier, str(folder), max_damaged=0)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder("features", tmp_path / "asked") == tmp_path / "asked"
    assert cache_folder("features") == Path(os.environ["VITRAL_CACHE"]) / "features"
    monkeypatch.delenv("VITRAL_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder("features") == tmp_path / ".cache" / "vitral" / "features"


# --- The probe as a model ----------------------------------------------------------------------------------

WRITTEN: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    ("class", {"num_classes": 5, "head": {"hidden_dim": 7}}),
    ("mean", {"head": {"norm": "pooled"}}),
    ("mean", {"pooling": "mean"}),
    ("class", {"pooling": "map", "embedding": {"class_token": True}}),
    (None, {"pooling": "map"}),
    (
        "class_mean",
        {"num_classes": 4, "embedding": {"distillation_token": True}, "head": {"distillation_head": True}},
    ),
]


@pytest.mark.parametrize(("features", "options"), WRITTEN, ids=str)
def test_the_written_model_answers_as_the_probe(
    features: Any, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    result = probe(classifier_of(vit(**options)), str(folder), features=features, out=tmp_path / "out")
    written = load(tmp_path / "out", device="cpu", precision="float32")
    assert written.labels == tuple(CLASSES)
    name, evaluation = evaluate_classifier(written, str(folder))
    assert (name, evaluation.top1, evaluation.confusion) == (
        "test",
        result.linear.evaluation.top1,
        result.linear.evaluation.confusion,
    )
    assert evaluation.loss == pytest.approx(result.linear.evaluation.loss, abs=1e-4)
    assert written.temperature == result.linear.temperature


def test_the_written_model_knows_what_was_held_out(
    classifier: Classifier, folder: Path, tmp_path: Path
) -> None:
    source = str(folder / "train")
    result = probe(classifier, source, seed=4, out=tmp_path / "out")
    said: list[str] = []
    name, evaluation = evaluate_classifier(load(tmp_path / "out"), source, warn=said.append)
    assert (name, said) == ("val", [])
    assert evaluation.top1 == result.linear.evaluation.top1


def test_the_source_and_its_licence_come_along(folder: Path, tmp_path: Path) -> None:
    base = replace(classifier_of(vit()), metadata={"source": "hf://a/b", "licence": "mit", "layout": "timm"})
    probe(base, str(folder), out=tmp_path / "out")
    metadata = load_checkpoint(tmp_path / "out").metadata
    assert (metadata["source"], metadata["licence"]) == ("hf://a/b", "mit")


REFUSED: list[tuple[dict[str, Any], dict[str, Any], bool, str]] = [
    ({"layers": (5,)}, {}, False, r"there is no layer 5; this model has 0 to 2"),
    ({"features": "class"}, {"pooling": "mean"}, False, r"features=class: layer -1 of this model has mean; "),
    ({"features": "map"}, {}, False, r"features=map: layer -1 of this model has class, mean, class_mean"),
    ({"features": "map", "layers": (0,)}, {"pooling": "map"}, False, r"features=map: layer 0 .* has mean"),
    ({"layers": (-2,)}, {}, True, r"head stands on its last layer; leave out --out"),
    ({"features": "class_mean"}, {"head": {"norm": "pooled"}}, True, r"norms one pooled vector, not two"),
    ({"limit": 2}, {}, False, r"no labelled image of 'ant' is left; allow more"),
]


@pytest.mark.parametrize(("asked", "options", "out", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_is_said(
    asked: dict[str, Any], options: dict[str, Any], out: bool, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(VitralError, match=message):
        probe(
            classifier_of(vit(**options)),
            str(folder),
            **asked,
            out=tmp_path / "out" if out else None,
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_not_overwritten(classifier: Classifier, folder: Path) -> None:
    with pytest.raises(VitralError, match="exists already; choose a new folder"):
        probe(classifier, str(folder), out=folder)


@pytest.mark.parametrize("options", [{"per_class": 0}, {"limit": 0}, {"layers": ()}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(VitralError):
        ProbeOptions(**options)


def test_a_result_is_json(classifier: Classifier, folder: Path) -> None:
    result = probe(classifier, str(folder))
    assert isinstance(result, ProbeResult)
    again = json.loads(json.dumps(result.to_dict()))
    assert again["linear"]["evaluation"]["top1"] == result.linear.evaluation.top1
    assert again["neighbours"]["ci95"] == list(result.neighbours.ci95)
