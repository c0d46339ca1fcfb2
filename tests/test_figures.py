"""The numbers behind the papers' figures, each by a second route, and the figures of any plain ViT."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.decomposition import PCA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import write_images
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.batches import DamageCount
from vitral.data.split import Split
from vitral.explain.figures import attention, draw, measure
from vitral.explain.figures.attention import (
    AttentionDistance,
    AttentionEntropy,
    PrefixMass,
    attention_distance,
    attention_entropy,
    patch_distances,
)
from vitral.explain.figures.draw import draw_figures, measure_figures, split_words
from vitral.explain.figures.drawing import Drawing, NotDrawn, shared_reach
from vitral.explain.figures.filters import FilterComponents, principal_components
from vitral.explain.figures.house import mosaic
from vitral.explain.figures.paint import Painted, painted
from vitral.explain.figures.positions import PositionSimilarity, cosine_similarity, position_drawings
from vitral.explain.figures.similarity import SimilarityMeter, cka
from vitral.explain.figures.tokens import TokenMeter, TokenNorms
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, load
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def build(size: tuple[int, int] = (20, 28), patch: int = 4, **options: Any) -> VisionTransformer:
    """Random weights that attend to some places more than to others."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"embed_dim": 40, "num_layers": 3, "num_heads": 5, "num_classes": 3}
    model = VisionTransformer(size, patch, **(settings | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def classifier(model: VisionTransformer) -> Classifier:
    height, width = model.embedding.img_size
    preprocess = Preprocess((height, width)).for_channels(model.config.in_channels)
    labels = ("ant", "bee", "cat")[: model.config.num_classes]
    return Classifier(model, preprocess, labels, Placement(torch.device("cpu"), torch.float32))


def images(count: int, size: tuple[int, int] = (28, 20)) -> Split:
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in pixels]
    return Split(pictures, np.zeros(count, dtype=np.int64), [f"picture {i}" for i in range(count)])


def measured(model: VisionTransformer, count: int = 7, **options: Any) -> dict[str, Drawing]:
    damage = DamageCount(count, 0, print)
    found = measure.of_images(
        classifier(model), images(count), options.pop("batch_size", 4), damage, lambda *_: None, **options
    )
    return {one.name: one for one in found.drawings if isinstance(one, Drawing)}


def explicit_attention(model: VisionTransformer, count: int) -> np.ndarray:
    """(L, B, A, T, T) by the layers' own explicit route, for a pre-norm model."""
    prepare = classifier(model).preprocess
    batch = torch.stack([prepare(image) for image in images(count).images])  # pyrefly: ignore[not-iterable]
    found = []
    with torch.no_grad():
        z = model.embedding(batch)
        layers: Any = model.layers
        for layer, relation in zip(layers, model.relations_of_layers(z), strict=True):
            normed = layer.attention_norm(z)
            found.append(layer.attention.weights(normed, normed, relation).numpy())
            z = layer(z, relation)
    return np.stack(found)


# --- Attention distance, entropy, prefix mass ------------------------------------------------------


def distances_of_the_authors(
    attention_BATT: np.ndarray, grid: tuple[int, int], patch_size: int
) -> np.ndarray:
    """google-research/vision_transformer, issue 162, one pair of patches after another: (A,)."""
    rows, columns = grid
    heads = attention_BATT.shape[1]
    totals = np.zeros(heads)
    for one_ATT in attention_BATT:
        for head in range(heads):
            by_query = []
            for query in range(rows * columns):
                walked = 0.0
                for key in range(rows * columns):
                    down = query // columns - key // columns
                    across = query % columns - key % columns
                    # The first token, the class token, is cut away after the softmax.
                    walked += one_ATT[head, 1 + query, 1 + key] * patch_size * (down**2 + across**2) ** 0.5
                by_query.append(walked)
            totals[head] += sum(by_query) / len(by_query)
    return totals / len(attention_BATT)


def test_attention_distance_is_that_of_the_authors() -> None:
    model = build()
    ours = measured(model, 3)["attention_distance"]
    assert isinstance(ours, AttentionDistance)
    weights = explicit_attention(model, 3)
    for layer in range(3):
        theirs = distances_of_the_authors(weights[layer], (5, 7), 4)
        np.testing.assert_allclose(ours.values_LA[layer], theirs, rtol=1e-5)
    assert np.ptp(ours.values_LA) > 0.1, "all heads are alike, so the test says little"


@pytest.mark.parametrize(
    ("prefix", "renormalised", "expected"),
    [(0, False, 8.5355339), (1, False, 8.5355339 * 4 / 5), (1, True, 8.5355339), (4, False, 8.5355339 / 2)],
)
def test_uniform_attention_on_four_patches_by_hand(prefix: int, renormalised: bool, expected: float) -> None:
    # From each corner: 0 to itself, 10 to two neighbours, 10 sqrt(2) across; mean (20 + 14.142) / 4.
    pixels = patch_distances((2, 2), 10)
    assert pixels[0].tolist() == pytest.approx([0, 10, 10, 10 * 2**0.5])
    tokens = 4 + prefix
    weights = torch.full((1, tokens, tokens), 1 / tokens)[:, prefix:, prefix:]
    found = attention_distance(weights, pixels, renormalised=renormalised)
    assert found[0].tolist() == pytest.approx([expected] * 4)


def test_renormalised_distance_divides_by_what_patches_get() -> None:
    model = build(embedding={"register_tokens": 2})
    ours = measured(model, 3, renormalise=True)["attention_distance"]
    assert isinstance(ours, AttentionDistance)
    patches = explicit_attention(model, 3)[..., 3:, 3:]
    weights = patches / patches.sum(-1, keepdims=True)
    expected = (weights * patch_distances((5, 7), 4).numpy()).sum(-1).mean(-1).mean(1)
    np.testing.assert_allclose(ours.values_LA, expected, rtol=1e-5)
    assert ours.uniform == pytest.approx(float(patch_distances((5, 7), 4).mean()))


def test_entropy_of_uniform_rows_is_log2_of_their_length() -> None:
    uniform = attention_entropy(torch.full((1, 2, 37), 1 / 37))
    assert uniform[0].tolist() == pytest.approx([np.log2(37)] * 2, rel=1e-6)
    assert attention_entropy(torch.eye(5)[None]).tolist() == [[0] * 5]


def test_entropy_and_prefix_mass_against_numpy() -> None:
    model = build(embedding={"register_tokens": 2})
    ours, weights = measured(model, 5), explicit_attention(model, 5).astype(np.float64)
    entropy = stats.entropy(weights, base=2, axis=-1).mean((1, 3))
    np.testing.assert_allclose(values(ours["attention_entropy"]), entropy, rtol=1e-5)
    mass = weights[..., 3:, :3].sum(-1).mean((1, 3))
    np.testing.assert_allclose(values(ours["prefix_mass"]), mass, rtol=1e-4)
    assert isinstance(ours["attention_entropy"], AttentionEntropy)
    assert ours["attention_entropy"].most == pytest.approx(np.log2(38))


def values(drawing: Drawing) -> np.ndarray:
    assert isinstance(drawing, AttentionDistance | AttentionEntropy | PrefixMass)
    return drawing.values_LA


def test_batches_and_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(embedding={"register_tokens": 2})
    whole = measured(model, 7, batch_size=7)
    monkeypatch.setattr(attention, "_NUMBERS", 2 * 38 * 2)  # rows of two queries, across the prefix tokens
    parts = measured(model, 7, batch_size=2)
    for name in ("attention_distance", "attention_entropy", "prefix_mass"):
        np.testing.assert_allclose(values(whole[name]), values(parts[name]), rtol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Sees how many numbers the largest tensor has that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                # A view is no memory of its own.
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_head_of_a_batch_is_ever_alive_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build((96, 96), 4, num_heads=5, num_layers=2)  # T = 577
    monkeypatch.setattr(attention, "_NUMBERS", 2 * 577 * 50)
    meters = measure._Meters(classifier(model), renormalise=False)
    with LargestTensor() as seen, torch.inference_mode():
        meters.add(torch.randn(2, 3, 96, 96))
    assert seen.largest < 577 * 577, "a whole (T, T) was made, of an image or of the distances"


# --- Tokens ----------------------------------------------------------------------------------------


def test_outliers_are_those_beyond_six_deviations() -> None:
    generator = np.random.default_rng(0)
    norms = generator.normal(50, 2, (2, 4000))
    norms[1, :80] = 150
    drawn = TokenNorms(norms, np.full(2, np.nan))
    deviation = stats.median_abs_deviation(norms, axis=1)
    np.testing.assert_allclose(drawn.thresholds_L, np.median(norms, axis=1) + 6 * deviation)
    assert drawn.shares_L[1] == pytest.approx(0.02, abs=1e-3)
    assert drawn.shares_L[0] < 1e-3
    assert "2.00%" in drawn.finding()


def test_norms_and_changes_are_of_what_leaves_the_layers() -> None:
    model = build(embedding={"register_tokens": 2})
    ours = measured(model, 5)
    prepare = classifier(model).preprocess
    batch = torch.stack([prepare(image) for image in images(5).images])  # pyrefly: ignore[not-iterable]
    with torch.no_grad():
        layers = model.features(batch, range(3)).layers
    norms = ours["token_norms"]
    assert isinstance(norms, TokenNorms)
    for layer, tokens in layers.items():
        expected = tokens[:, 3:].norm(dim=-1).flatten()
        np.testing.assert_allclose(np.sort(norms.norms_LM[layer]), expected.sort().values, rtol=1e-5)
        assert norms.prefix_L[layer] == pytest.approx(np.median(tokens[:, :3].norm(dim=-1).numpy()), rel=1e-5)
    change = (layers[1] - layers[0]).norm(dim=-1) / layers[0].norm(dim=-1)
    rows = list(ours["stream_change"].rows())
    assert rows[1]["patch_tokens"] == pytest.approx(np.median(change[:, 3:].numpy()), rel=1e-5)
    assert rows[1]["prefix_tokens"] == pytest.approx(np.median(change[:, :3].numpy()), rel=1e-5)


def test_a_layer_that_doubles_its_tokens_changes_them_by_one() -> None:
    meter, tokens = TokenMeter(1), torch.randn(2, 6, 8)
    meter.begin(tokens)
    meter.layer(2 * tokens)
    _, change = meter.drawings()
    assert change.patches_L == pytest.approx([1])
    assert change.prefix_L == pytest.approx([1])


# --- CKA -------------------------------------------------------------------------------------------


def hsic(ones: np.ndarray, others: np.ndarray) -> float:
    """The unbiased estimate as Song et al. (2012) write it, with traces and sums."""
    n = len(ones)
    k, other = ones @ ones.T, others @ others.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(other, 0)
    one = np.ones(n)
    sums = np.trace(k @ other) + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    return float((sums - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3)))


def grams(layers: list[np.ndarray], batch: int) -> list[list[np.ndarray]]:
    meter = SimilarityMeter()
    for first in range(0, len(layers[0]), batch):
        meter.begin()
        for layer in layers:
            meter.layer(torch.from_numpy(layer[first : first + batch, None]))
    return meter.grams_LB


@pytest.fixture
def three_layers() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    first = generator.normal(5, 1, (60, 11))
    return [first, first @ generator.normal(0, 1, (11, 7)), generator.normal(0, 1, (60, 13))]


def test_cka_of_all_examples_at_once(three_layers: list[np.ndarray]) -> None:
    ours = cka(grams(three_layers, 60), grams(three_layers, 60))
    for i, one in enumerate(three_layers):
        for j, other in enumerate(three_layers):
            expected = hsic(one, other) / (hsic(one, one) * hsic(other, other)) ** 0.5
            assert ours[i, j] == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(np.diag(ours), 1)
    assert abs(ours[0, 2]) < 0.1, "independent layers are not alike"


def test_cka_of_minibatches_is_a_ratio_of_means(three_layers: list[np.ndarray]) -> None:
    ours = cka(grams(three_layers, 20), grams(three_layers, 20))
    one, other = three_layers[:2]
    parts = [slice(first, first + 20) for first in (0, 20, 40)]
    means = [
        np.mean([hsic(a[p], b[p]) for p in parts]) for a, b in ((one, other), (one, one), (other, other))
    ]
    assert ours[0, 1] == pytest.approx(means[0] / (means[1] * means[2]) ** 0.5, abs=1e-4)


def test_cka_knows_no_rotation_and_no_scale(three_layers: list[np.ndarray]) -> None:
    one = three_layers[0]
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(11, 11)))
    turned = 3.7 * one @ rotation + 2
    np.testing.assert_allclose(cka(grams([one], 15), grams([turned], 15)), 1, atol=1e-5)


def test_too_few_images_make_no_cka() -> None:
    assert "cka" not in measured(build(), 3)
    assert "cka" in measured(build(), 4)


# --- Filters, positions, colours -------------------------------------------------------------------


def test_components_are_those_of_sklearn() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 12)) @ np.diag(np.arange(1, 13))
    components, shares = principal_components(rows, 5)
    theirs = PCA(5).fit(rows)
    np.testing.assert_allclose(shares, theirs.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(np.abs((components * theirs.components_).sum(1)), 1, atol=1e-6)
    largest = components[np.arange(5), np.abs(components).argmax(1)]
    assert (largest > 0).all()
    np.testing.assert_allclose(principal_components(-rows, 5)[0], components, atol=1e-9)


def test_filters_of_the_patch_projection_and_of_a_stem() -> None:
    model = build()
    drawn = FilterComponents.of(model)
    weight = model.embedding.patches.projection.weight.detach().flatten(1).numpy()
    theirs = PCA(28).fit(weight)
    ours = drawn.components_MChw.reshape(28, -1)
    np.testing.assert_allclose(np.abs((ours * theirs.components_).sum(1)), 1, atol=1e-3)
    assert "patch projection" in drawn.finding()
    hybrid = FilterComponents.of(build(stem=(8, 12), position="none"))
    assert "first convolution of the stem" in hybrid.finding()
    assert hybrid.components_MChw.shape[1:] == (3, 3, 3)


def test_similarity_of_positions_is_that_of_a_plain_loop() -> None:
    model = build()
    (drawn,) = position_drawings(model)
    assert isinstance(drawn, PositionSimilarity)
    positions: Any = model.embedding.positions
    table = positions.table.detach()[1:]
    for row in list(drawn.rows())[::13]:
        one = table[row["row"] * 7 + row["column"]]
        other = table[row["other_row"] * 7 + row["other_column"]]
        cosine = float(one @ other / (one.norm() * other.norm()))
        assert row["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert len(list(drawn.rows())) == 35 * 35


def test_rotary_similarity_is_the_mean_cosine_of_differences() -> None:
    options = {"rotary": {}}
    model = build(position="none", layer={"attention": options}, num_heads=5, embed_dim=40)
    (drawn,) = position_drawings(model)
    assert isinstance(drawn, PositionSimilarity)
    frequencies = 10_000.0 ** -(np.arange(2) / 2)  # heads of 8 channels: two for rows, two for columns
    for one, other in ((0, 34), (3, 18), (20, 20)):
        down, across = (abs(a - b) for a, b in zip(divmod(one, 7), divmod(other, 7), strict=True))
        expected = np.mean([np.cos(down * frequencies), np.cos(across * frequencies)])
        assert drawn.cosines_NN[one, other] == pytest.approx(expected, abs=1e-5)


def test_relative_biases_are_those_of_the_query_in_the_middle() -> None:
    model = build(position="none", layer={"attention": {"relative_bias": "layer"}})
    drawn: Any = position_drawings(model)[0]
    rows = {(r["layer"], r["head"], r["row"], r["column"]): r["value"] for r in drawn.rows()}
    assert len(rows) == 3 * 5 * 5 * 7
    for layer, head, row, column in ((0, 0, 0, 0), (2, 4, 4, 1), (1, 3, 2, 3)):
        # Differences of rows, then of columns, counted from -4 and -6.
        index = (2 - row + 4) * 13 + (3 - column + 6)
        relation: Any = model.relations[layer]
        expected = float(relation.table.detach()[index, head])
        assert rows[layer, head, row, column] == pytest.approx(expected, abs=1e-6)


def test_learned_rotary_has_a_tile_a_head() -> None:
    model = build(position="none", layer={"attention": {"rotary": {"kind": "mixed"}}})
    drawn: Any = position_drawings(model)[0]
    rows = {(r["layer"], r["head"], r["row"], r["column"]): r["value"] for r in drawn.rows()}
    relation: Any = model.relations[1]
    frequencies = relation.frequencies.detach()[:, 4]
    angle = -2 * frequencies[0] - 3 * frequencies[1]  # from (2, 3) to (0, 0)
    assert rows[1, 4, 0, 0] == pytest.approx(float(angle.cos().mean()), abs=1e-5)
    assert rows[1, 4, 2, 3] == pytest.approx(1)


def test_a_model_without_positions_says_so() -> None:
    (missing,) = position_drawings(build(position="none"))
    assert isinstance(missing, NotDrawn)
    assert "no positions" in missing.reason


def test_a_vector_of_zeros_is_like_nothing() -> None:
    assert cosine_similarity(torch.zeros(2, 3)).tolist() == [[0, 0], [0, 0]]


def test_mosaic_leaves_gaps() -> None:
    made = mosaic(np.arange(24.0).reshape(2, 3, 2, 2) + 1)
    shown = made.pixels[~np.isnan(made.pixels)]
    assert sorted(set(shown.tolist())) == list(range(1, 25))
    assert np.isnan(made.pixels).any()
    top, left = round(made.row_middles[1]), round(made.column_middles[2])
    assert made.pixels[top, left] in {21, 22, 23, 24}


# --- Any plain ViT ---------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"embedding": {"distillation_token": True}, "head": {"distillation_head": True}},
    "registers": {"embedding": {"register_tokens": 4, "positioned": "class"}},
    "no class token": {"pooling": "mean"},
    "attention pooling": {"pooling": "map"},
    "both": {"pooling": "class_mean"},
    "one layer, one head": {"num_layers": 1, "num_heads": 1},
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal in 2-D": {"position": "sinusoidal_2d"},
    "rotary": {"position": "none", "layer": {"attention": {"rotary": {}}}},
    "mixed rotary": {"layer": {"attention": {"rotary": {"kind": "mixed"}}}},
    "relative": {"position": "none", "layer": {"attention": {"relative_bias": "shared"}}},
    "hybrid": {"stem": (8,), "position": "none", "pooling": "mean"},
    "grey": {"in_channels": 1},
    "no head": {"num_classes": 0},
    "post-norm": {"layer": {"order": "post"}},
    "parallel": {"layer": {"order": "parallel"}},
    "sub-norm": {"layer": {"order": "residual_post", "attention": {"norm": True, "qk_norm": True}}},
}


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_every_family_has_its_figures(options: dict[str, Any]) -> None:
    figures = measure_figures(classifier(build(**options)), images(5), images=5, shown=2)
    drawn = {name for kind in figures.kinds() for name in [next(iter(kind.values())).name]}
    expected = {"filters", "attention_distance", "attention_entropy", "token_norms", "stream_change", "cka"}
    assert expected | {"feature_colours"} <= drawn
    prefixed = options.get("pooling") not in ("mean", "map")
    assert ("prefix_mass" in drawn) == prefixed
    for kind in figures.kinds():
        for one in kind.values():
            numbers = [v for row in one.rows() for v in row.values() if not isinstance(v, str)]
            assert numbers
            assert np.isfinite([n for n in numbers if prefixed or n == n]).all()
            assert re.search(r"\d", one.finding()) or options.get("num_layers") == 1


def test_the_views_of_other_channels_are_grey_tiles() -> None:
    drawn = FilterComponents.of(build(in_channels=5))
    assert drawn.components_MChw.shape == (28, 5, 4, 4)
    assert painted(drawn, {}).png.startswith(b"\x89PNG")


# --- Files and page --------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page refers to, and the words of its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [found[name] or "" for name in ("src", "srcset", "href") if name in found]
        if tag == "img":
            self.words.append(found["alt"] or "")


def test_one_model_is_drawn_whole(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"ant": 6, "bee": 6}, (28, 20))
    told: list[tuple[int, int]] = []
    draw_figures(
        classifier(build()), tmp_path / "out", folder, images=9, shown=3, on_images=lambda *n: told.append(n)
    )
    files = {file.name for file in (tmp_path / "out").iterdir()}
    names = {file.removesuffix(".png") for file in files if file.endswith(".png")}
    assert {f"{name}.csv" for name in names} | {f"{name}.png" for name in names} | {"index.html"} == files
    assert names >= {"filters", "positions", "attention_distance", "token_norms", "feature_colours", "cka"}
    assert told[-1] == (9, 9)
    text = (tmp_path / "out" / "index.html").read_text()
    page = Page(text)
    assert len(page.words) == len(names)
    assert all(re.search(r"\d", words) for words in page.words), "a picture without its numbers in words"
    for address in page.addresses:
        if not address.startswith(("data:image/webp;base64,", "#")):
            assert (tmp_path / "out" / address).is_file()
    assert "default-src 'none'" in text
    assert "<script" not in text
    for file in (tmp_path / "out").glob("*.csv"):
        assert len(list(csv.DictReader(io.StringIO(file.read_text())))) >= 3


def test_the_same_numbers_make_the_same_bytes() -> None:
    drawn = measured(build())["attention_distance"]
    once, again = (painted(drawn, shared_reach([drawn])) for _ in range(2))
    assert once == again
    assert once.light != once.dark
    with Image.open(io.BytesIO(once.png)) as picture:
        assert picture.width == 1056


def test_two_models_share_scales_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "painted", lambda *_: Painted(b"png", b"light", b"dark"))
    one, other = build(), build(num_layers=2, num_heads=4)
    with torch.no_grad():
        layers: Any = other.layers
        for layer in layers:
            layer.attention.qkv.weight.mul_(0)  # uniform attention
    for name, model in (("a/run", one), ("b/run", other)):
        checkpoint = Checkpoint(model, Preprocess((20, 28)), ("ant", "bee", "cat"))
        save_checkpoint(tmp_path / name, checkpoint)
    models = [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    figures = draw_figures(models, tmp_path / "out", images(8), images=8, shown=2)
    assert figures.names == ("run", "run (2)")
    kinds = {next(iter(kind.values())).name: kind for kind in figures.kinds()}
    uniform = kinds["attention_distance"]["run (2)"]
    assert isinstance(uniform, AttentionDistance)
    np.testing.assert_allclose(uniform.values_LA, uniform.uniform, rtol=1e-5)
    both = shared_reach(kinds["attention_distance"].values())
    assert all(
        both["value"][1] >= drawn.reach()["value"][1] for drawn in kinds["attention_distance"].values()
    )
    assert (tmp_path / "out" / "run (2)" / "cka.csv").is_file()
    across = list(csv.DictReader((tmp_path / "out" / "cka_across.csv").read_text().splitlines()))
    assert len(across) == 3 * 2
    assert "run (2)/cka.csv" in (tmp_path / "out" / "index.html").read_text().replace("%20%282%29", " (2)")


def test_a_model_beside_itself_is_the_same(tmp_path: Path) -> None:
    same = classifier(build())
    figures = measure_figures([same, same], images(8), images=8)
    (across,) = figures.across
    np.testing.assert_allclose([r["cka"] for r in across.rows() if r["layer"] == r["other_layer"]], 1)
    assert figures.names == ("model 1", "model 2")


def test_without_images_what_is_missing_is_said(tmp_path: Path) -> None:
    figures = draw_figures(classifier(build(position="none")), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "filters.png",
        "filters.csv",
        "index.html",
    }
    assert [reason for _, reason in figures.not_drawn()] == [
        "the model has no positions: to it an image is a set of patches, in no order",
        "they need images: name a folder of some",
    ]
    assert "need images" in (tmp_path / "out" / "index.html").read_text()


def test_a_folder_without_classes_will_do(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"ant": 5}, (28, 20)) / "ant"
    (folder / "005.png").write_bytes(b"no picture")
    told: list[str] = []
    figures = measure_figures(
        classifier(build()), folder, images=6, shown=6, max_damaged=0.5, warn=told.append
    )
    assert figures.count == 5
    assert len(told) == 1
    kinds = {next(iter(kind.values())).name: kind for kind in figures.kinds()}
    assert {row["image"] for row in kinds["feature_colours"]["model 1"].rows()} == {
        str(folder / f"00{i}.png") for i in range(5)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "full"}, "exists already"),
        ({"folder": "file"}, "exists already"),
        ({"models": 3}, "two side by side"),
        ({"images": 0}, "images"),
        ({"imagse": 3}, "imagse"),
        ({"damaged": True}, "damaged"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    pictures = images(3)
    if change.pop("damaged", False):
        bad: list[Any] = [b"no picture"] * 3
        pictures = Split(bad, pictures.labels, pictures.names)
    model = classifier(build())
    models = [model] * change.pop("models", 1)
    folder = tmp_path / change.pop("folder", "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VitralError, match=message):
        draw_figures(models, folder, pictures, **change)
    assert sorted(tmp_path.rglob("*")) == before


def test_whoever_stops_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(draw, "painted", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_figures(classifier(build()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_words_are_models_and_then_data(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", Checkpoint(build(), Preprocess((20, 28)), ("ant", "bee", "cat")))
    a = str(tmp_path / "a")
    assert split_words([a]) == ([a], None)
    assert split_words([a, "photos"]) == ([a], "photos")
    assert split_words([a, a, "photos"]) == ([a, a], "photos")
    assert split_words([a, "1.jpg", "2.jpg"]) == ([a], ["1.jpg", "2.jpg"])
    with pytest.raises(VitralError, match="not 3"):
        split_words([a, a, a])


# --- Real weights ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_trends_on_real_weights(shared: Path) -> None:
    """Fig. 7 right: the lowest layers have both local and global heads, and the mean grows with depth."""
    with pytest.warns(UserWarning, match="does not say how its images were prepared"):
        real = load(shared / "weights" / "dinov2-small-focus", img_size=98, device="cpu", precision="float32")
    figures = measure_figures(real, shared / "data" / "photos", images=32, shown=1)
    kinds = {next(iter(kind.values())).name: kind["model 1"] for kind in figures.kinds()}
    distance = kinds["attention_distance"]
    assert isinstance(distance, AttentionDistance)
    means, spreads = distance.values_LA.mean(axis=1), distance.values_LA.std(axis=1)
    assert stats.spearmanr(means, range(12)).statistic > 0.7
    assert means[6:].min() > means[1:6].max()
    assert spreads[0] == spreads.max()
    assert distance.values_LA[0].min() < 14  # less than a patch away
    assert distance.values_LA[0].max() > 0.9 * distance.uniform
    # A small model without registers that needs none: outliers are rare, and gone at the end.
    norms = kinds["token_norms"]
    assert isinstance(norms, TokenNorms)
    assert norms.shares_L.max() < 0.02
    assert norms.shares_L[-1] < 0.001
