"""What is measured of maps, against models whose right answer is known, and against second routes."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from vitral.explain.faithfulness import curves
from vitral.explain.faithfulness.perturb import Curves, ends, saco, take_away
from vitral.explain.faithfulness.redrawn import STAGES, rank_correlation, redrawn
from vitral.explain.faithfulness.removal import Fill, Removal
from vitral.explain.faithfulness.statistics import Estimate, Pair, compare, estimates, holm, letters
from vitral.explain.target import Question
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.positions.relation import Relation
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement

CPU = Placement.choose("cpu", "float32")
ROWS, COLUMNS, PATCH, BATCH, CLASSES = 3, 5, 4, 2, 7
N = ROWS * COLUMNS
SIZE = ROWS * PATCH, COLUMNS * PATCH


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(**options: Any) -> VisionTransformer:
    """A small model with large weights, so that every patch counts."""
    numbers: dict[str, Any] = {
        "embed_dim": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_classes": CLASSES,
        "dropout": 0.0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = VisionTransformer(SIZE, PATCH, **{**numbers, **options})
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.3)
    return made.eval()


def removal_of(made: VisionTransformer, images_BCHW: Tensor | None = None) -> Removal:
    images_BCHW = images() if images_BCHW is None else images_BCHW
    classifier = Classifier(made, Preprocess(SIZE), tuple("abcdefg"), CPU)
    return Removal(classifier, images_BCHW, Question(torch.tensor([5, 2])[: len(images_BCHW)]))


def images() -> Tensor:
    return torch.randn(BATCH, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def drawn(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


# --- A model whose logit is a sum over patches, so that every curve is known --------------------------


def additive() -> tuple[VisionTransformer, Tensor]:
    """A model without attention or MLP, and each patch's share of the logits asked for, (B, N)."""
    made = model(pooling="mean", position="none", head={"norm": "none"}, embedding={"class_token": False})
    with torch.no_grad():
        for layer in made.layers:
            for part in (cast(Any, layer).attention.out, cast(Any, layer).feed_forward.contract):
                part.weight.zero_()
                part.bias.zero_()
        for name in ("embedding.patches.projection.bias", "head.bias"):
            made.get_parameter(name).zero_()
        tokens_BND = made.embedding(images())
        shares_BNL = cast(Tensor, made.head(tokens_BND))
    return made, torch.stack([shares_BNL[0, :, 5], shares_BNL[1, :, 2]])


def curves_of(removal: Removal, fill: Fill, maps_BN: Tensor, steps: int = N) -> Curves:
    order_BN = curves.most_first(maps_BN, range(len(maps_BN)))
    return take_away(removal, fill, order_BN, ends(removal, fill), steps)


def saco_of(removal: Removal, maps_BN: Tensor) -> np.ndarray:
    order_BN = curves.most_first(maps_BN, range(len(maps_BN)))
    return saco(removal, "mean", maps_BN, order_BN, ends(removal, "mean"))


def srg(found: Curves, counts: list[int]) -> np.ndarray:
    return curves.area(found.least_first_RS, counts) - curves.area(found.most_first_RS, counts)


def test_the_curves_of_a_sum_are_its_partial_sums() -> None:
    made, shares_BN = additive()
    found = curves_of(removal_of(made), "mean", shares_BN)
    falling_BN = shares_BN.sort(dim=1, descending=True).values
    kept_BS = [(falling_BN[:, count:].sum(1) / N) for count in range(N + 1)]
    assert_close(torch.from_numpy(found.most_first_RS), torch.stack(kept_BS, 1).double(), rtol=0, atol=1e-5)
    kept_BS = [(falling_BN[:, : N - count].sum(1) / N) for count in range(N + 1)]
    assert_close(torch.from_numpy(found.least_first_RS), torch.stack(kept_BS, 1).double(), rtol=0, atol=1e-5)


def test_a_mean_pool_averages_over_what_is_left() -> None:
    made, shares_BN = additive()
    found = curves_of(removal_of(made), "drop", shares_BN)
    falling_BN = shares_BN.sort(dim=1, descending=True).values
    kept_BS = [falling_BN[:, count:].mean(1) for count in range(N)]
    # Without a token nothing can be read, and the last point is that of the mean fill.
    expected = torch.stack([*kept_BS, torch.zeros(BATCH)], 1).double()
    assert_close(torch.from_numpy(found.most_first_RS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fill", ["drop", "mean"])
def test_the_true_shares_are_the_best_map_and_random_ones_gain_nothing(fill: Fill) -> None:
    made, shares_BN = additive()
    removal, counts = removal_of(made), list(range(N + 1))
    best = srg(curves_of(removal, fill, shares_BN), counts)
    others = np.stack([srg(curves_of(removal, fill, drawn((BATCH, N), seed)), counts) for seed in range(25)])
    assert (others < best).all()
    assert 0 in estimates(others.reshape(1, -1))[0]


@pytest.mark.parametrize("fill", ["drop", "mean"])
def test_a_map_upside_down_has_the_srg_with_the_other_sign(fill: Fill) -> None:
    removal, maps_BN = removal_of(model()), drawn((BATCH, N))
    found, turned = (curves_of(removal, fill, maps, steps=5) for maps in (maps_BN, -maps_BN))
    counts = curves.removed_counts(N, 5)
    np.testing.assert_array_equal(srg(found, counts), -srg(turned, counts))
    np.testing.assert_array_equal(found.most_first_RS, turned.least_first_RS)


def test_the_true_shares_of_a_sum_have_the_whole_saco_and_turned_ones_none_of_it() -> None:
    made, shares_BN = additive()
    np.testing.assert_allclose(saco_of(removal_of(made), shares_BN), 1)
    np.testing.assert_allclose(saco_of(removal_of(made), -shares_BN), -1)


# --- Removing patches, against running the model by hand ----------------------------------------------

POSITIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal_2d": {"position": "sinusoidal_2d"},
    "none": {"position": "none"},
    "rotary axial": {"position": "none", "layer": {"attention": {"rotary": {"kind": "axial"}}}},
    "rotary mixed": {"position": "none", "layer": {"attention": {"rotary": {"kind": "mixed"}}}},
    "relative shared": {"position": "none", "layer": {"attention": {"relative_bias": "shared"}}},
    "relative layer": {"position": "none", "layer": {"attention": {"relative_bias": "layer"}}},
    "registers, mean": {"embedding": {"register_tokens": 2}, "pooling": "mean"},
    "distilled": {"embedding": {"distillation_token": True}, "head": {"distillation_head": True}},
    "map pool": {"pooling": "map"},
    "class and mean": {"pooling": "class_mean"},
}


@pytest.fixture(params=POSITIONS)
def placed(request: pytest.FixtureRequest) -> VisionTransformer:
    return model(**POSITIONS[request.param])


def masked_logits(made: VisionTransformer, image_1CHW: Tensor, kept: list[int]) -> Tensor:
    """Logits (L,) of one image whose other patches are there, but nobody attends to them."""
    prefix = made.config.num_prefix_tokens
    tokens = [*range(prefix), *(prefix + patch for patch in kept)]
    z_1TD = made.embedding(image_1CHW)
    unseen_T = torch.full((z_1TD.shape[1],), -torch.inf).index_fill(0, torch.tensor(tokens), 0.0)
    heads = made.config.num_heads
    mask_ATT = unseen_T.expand(heads, len(unseen_T), -1)
    for layer, relation in zip(made.layers, made.relations_of_layers(z_1TD), strict=True):
        bias_ATT = mask_ATT if relation.bias_ATT is None else relation.bias_ATT + mask_ATT
        z_1TD = layer(z_1TD, Relation(relation.rotation, bias_ATT))
    return made.classify(made.norm(z_1TD)[:, tokens])[0]


@pytest.mark.parametrize("count", [1, 6, N])
def test_dropping_is_as_if_nobody_attended_to_the_others(placed: VisionTransformer, count: int) -> None:
    removal = removal_of(placed)
    kept_RK = torch.stack([torch.randperm(N)[:count] for _ in range(5)])
    images_R = torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        expected_R = torch.stack(
            [
                masked_logits(placed, images()[image][None], kept)[[5, 2][image]]
                for image, kept in zip(images_R.tolist(), kept_RK.tolist(), strict=True)
            ]
        )
    assert_close(removal.scores("drop", images_R, kept_RK), expected_R, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fill", ["drop", "mean"])
def test_with_every_patch_the_score_is_the_logit(placed: VisionTransformer, fill: Fill) -> None:
    with torch.no_grad():
        logits_BL = placed(images())
    found = ends(removal_of(placed), fill)
    assert_close(found.whole_B, logits_BL[[0, 1], [5, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", [(), (8,)])
def test_the_mean_fill_is_the_image_with_pixels_at_their_mean(stem: tuple[int, ...]) -> None:
    made = model(stem=stem)
    image_CHW, kept = images()[1], [0, 7, 14]
    filled_CHW = torch.zeros_like(image_CHW)
    for patch in kept:
        row, column = PATCH * (patch // COLUMNS), PATCH * (patch % COLUMNS)
        place = (slice(None), slice(row, row + PATCH), slice(column, column + PATCH))
        filled_CHW[place] = image_CHW[place]
    with torch.no_grad():
        expected = made(filled_CHW[None])[0, 2]
        dropped = masked_logits(made, filled_CHW[None], kept)[2]
    removal, kept_RK = removal_of(made), torch.tensor([kept])
    assert_close(removal.scores("mean", torch.tensor([1]), kept_RK)[0], expected, rtol=1e-5, atol=1e-5)
    # Under a stem the dropped patches' pixels are filled first, or the stem would show them to neighbours.
    assert_close(removal.scores("drop", torch.tensor([1]), kept_RK)[0], dropped, rtol=1e-4, atol=1e-5)


def test_rows_have_the_score_that_each_has_alone_and_in_any_order() -> None:
    removal, kept_RK = removal_of(model()), torch.stack([torch.randperm(N)[:4] for _ in range(6)])
    images_R = torch.tensor([0, 1] * 3)
    together_R = removal.scores("drop", images_R, kept_RK)
    alone_R = torch.cat(
        [removal.scores("drop", images_R[[row]], kept_RK[[row]].flip(1)) for row in range(len(kept_RK))]
    )
    assert_close(together_R, alone_R, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fill", ["drop", "mean"])
def test_a_curve_is_that_of_a_loop_over_images_and_counts(fill: Fill) -> None:
    made, maps_BN = model(), drawn((BATCH, N))
    found = curves_of(removal_of(made), fill, maps_BN, steps=4)
    for image, map_N in enumerate(maps_BN):
        falling = sorted(range(N), key=lambda patch: -float(map_N[patch]))
        for point, count in enumerate([0, 4, 8, 11, 15]):
            kept = falling[count:]
            with torch.no_grad():
                if fill == "drop":
                    logits_L = masked_logits(made, images()[image][None], kept)
                else:
                    filled_CHW = images()[image].clone()
                    for patch in falling[:count]:
                        row, column = PATCH * (patch // COLUMNS), PATCH * (patch % COLUMNS)
                        filled_CHW[:, row : row + PATCH, column : column + PATCH] = 0
                    logits_L = made(filled_CHW[None])[0]
            expected = float(logits_L[[5, 2][image]])
            assert found.most_first_RS[image, point] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_deletion_by_mean_fill_is_the_pixel_flipping_of_quantus() -> None:
    quantus = pytest.importorskip("quantus", reason="pip install quantus, and its scikit-image")
    side, count = 4 * PATCH, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Of several channels Quantus flips one value at a time, and not a patch.
        made = VisionTransformer(side, PATCH, 1, 24, 2, 2, num_classes=CLASSES, dropout=0.0).eval()
        images_BCHW = torch.randn(BATCH, 1, side, side)
    maps_BN = drawn((BATCH, count))
    found = curves_of(removal_of(made, images_BCHW), "mean", maps_BN, steps=count)
    pixels_B1HW = (
        maps_BN.unflatten(1, (4, 4))[:, None].repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    )
    flipping = quantus.PixelFlipping(
        features_in_step=PATCH**2, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True
    )
    arrays = {"x_batch": images_BCHW.numpy(), "y_batch": np.array([5, 2]), "a_batch": pixels_B1HW.numpy()}
    theirs_BS = np.array(flipping(model=made, device="cpu", softmax=False, **arrays))
    np.testing.assert_allclose(found.most_first_RS[:, 1:], theirs_BS, rtol=1e-4, atol=1e-5)


# --- Orders, areas, SaCo: worked by hand --------------------------------------------------------------


def test_equal_values_are_in_an_order_of_the_seed_and_others_in_theirs() -> None:
    maps_RN = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]).repeat(200, 1)
    order_RN = curves.most_first(maps_RN, range(200))
    assert (order_RN[:, 3] == 0).all()
    assert (order_RN[:, 4] == 4).all()
    assert {tuple(order.tolist()) for order in order_RN[:, :3]} == {
        (1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)
    }  # fmt: skip
    again_RN = curves.most_first(maps_RN[:3], range(3))
    assert torch.equal(again_RN, order_RN[:3])


def test_a_map_of_no_numbers_has_no_order() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        curves.most_first(torch.tensor([[1.0, torch.nan]]), [0])


def test_the_area_is_the_mean_height_by_trapezoids() -> None:
    # (4 + 2) / 2 over the first quarter, (2 + 0) / 2 over the rest.
    np.testing.assert_allclose(curves.area(np.array([[4.0, 2.0, 0.0]]), [0, 2, 8]), [3 * 0.25 + 1 * 0.75])


def test_the_points_of_a_curve_are_whole_patches_from_none_to_all() -> None:
    assert curves.removed_counts(49, 5) == [0, 10, 20, 29, 39, 49]
    assert curves.removed_counts(3, 10) == [0, 1, 2, 3]


def saco_of_the_paper(maps_N: Sequence[float], drops_G: Sequence[float]) -> float:
    """Algorithm 1, in its own words, for groups of one size."""
    size = len(maps_N) // len(drops_G)
    falling = sorted(maps_N, reverse=True)
    given = [sum(falling[group * size : (group + 1) * size]) for group in range(len(drops_G))]
    faithfulness = total = 0.0
    for i in range(len(drops_G) - 1):
        for j in range(i + 1, len(drops_G)):
            weight = given[i] - given[j] if drops_G[i] >= drops_G[j] else -(given[i] - given[j])
            faithfulness += weight
            total += abs(weight)
    return faithfulness / total


def test_saco_is_algorithm_1() -> None:
    generator = np.random.default_rng(0)
    maps_RN, drops_RG = generator.normal(size=(6, 30)), generator.normal(size=(6, 10))
    order_RN = np.argsort(-maps_RN, axis=1)
    expected = [saco_of_the_paper(list(of), list(drops)) for of, drops in zip(maps_RN, drops_RG, strict=True)]
    np.testing.assert_allclose(curves.saco(maps_RN, order_RN, drops_RG), expected)


def test_a_constant_map_claims_nothing() -> None:
    assert curves.saco(np.ones((1, 20)), np.arange(20)[None], np.arange(10.0)[None]) == 0


# --- What the numbers prove ---------------------------------------------------------------------------


def test_intervals_are_those_of_scipys_percentile_bootstrap() -> None:
    values_MN = np.random.default_rng(3).gamma(2, size=(2, 150))
    for values_N, found in zip(values_MN, estimates(values_MN), strict=True):
        theirs = stats.bootstrap((values_N,), np.mean, n_resamples=20_000, method="percentile", rng=0)
        assert found.mean == pytest.approx(values_N.mean())
        assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
        assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_pairs_are_compared_on_the_same_images() -> None:
    generator = np.random.default_rng(0)
    of_image_N = generator.normal(scale=10, size=300)
    values_MN = np.stack([of_image_N, of_image_N + generator.normal(0.3, 0.1, 300), of_image_N[::-1]])
    sure, _, unsure = compare(["one", "two", "three"], values_MN)
    # Images differ a hundred times more than the two methods do.
    assert sure.differ
    assert sure.difference.mean == pytest.approx(-0.3, abs=0.02)
    assert -0.32 < sure.difference.low < sure.difference.high < -0.28
    assert not unsure.differ


def test_holm_is_the_textbooks() -> None:
    # 4 x .005, 3 x .01, 2 x .03, and .04 no less than the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]


def test_two_share_a_letter_exactly_if_they_do_not_differ() -> None:
    generator = np.random.default_rng(0)
    names = [f"m{place}" for place in range(7)]
    for _ in range(50):
        pairs = [
            Pair(one, other, Estimate(0, 0, 0), float(generator.choice([0.001, 0.9])))
            for place, one in enumerate(names)
            for other in names[place + 1 :]
        ]
        found = letters(names, pairs)
        for pair in pairs:
            assert bool(set(found[pair.first]) & set(found[pair.second])) != pair.differ
        assert all(found.values())


def test_letters_of_a_chain() -> None:
    """Neighbours do not differ, the ends do: the middle has both letters."""
    nothing = Estimate(0, 0, 0)
    pairs = [Pair("x", "y", nothing, 1), Pair("x", "z", nothing, 0.001), Pair("y", "z", nothing, 1)]
    assert letters(["x", "y", "z"], pairs) == {"x": "a", "y": "ab", "z": "b"}


# --- Redrawn weights ----------------------------------------------------------------------------------


def changed(before: VisionTransformer, after: VisionTransformer) -> set[str]:
    """The parts whose weights differ."""
    pairs = zip(before.named_parameters(), after.named_parameters(), strict=True)
    names = [name for (name, old), (_, new) in pairs if not torch.equal(old, new)]
    return {
        ".".join(name.split(".")[:2]) if name[:2] in ("la", "re") else name.split(".")[0] for name in names
    }


def test_the_cascade_goes_from_the_head_down() -> None:
    made = model(num_layers=4, layer={"attention": {"relative_bias": "layer"}})
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    found = [changed(made, redrawn(made, stage)) for stage in STAGES]
    tops = [0, 1, 2, 4, 4]
    for parts, top in zip(found, tops, strict=True):
        places = range(4 - top, 4)
        layers = {f"{kind}.{place}" for kind in ("layers", "relations") for place in places}
        assert parts - {"embedding"} == {"head"} | layers  # the norms' weights are ones and zeros still
    assert ["embedding" in parts for parts in found] == [False] * 4 + [True]
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.named_parameters())


def test_redrawn_weights_keep_their_values_and_a_stage_redraws_as_the_one_before() -> None:
    made = model()
    half, everything = redrawn(made, "top half"), redrawn(made, "everything")
    for name in ("head.weight", "layers.1.attention.qkv.weight"):
        old, new = made.get_parameter(name), half.get_parameter(name)
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
        assert torch.equal(new, everything.get_parameter(name))


def test_rank_correlation_is_scipys() -> None:
    first_RN, second_RN = (drawn((4, 30), seed).mul(8).round() for seed in (0, 1))
    expected = [stats.spearmanr(one, other).statistic for one, other in zip(first_RN, second_RN, strict=True)]
    np.testing.assert_allclose(rank_correlation(first_RN, second_RN), expected)
    assert rank_correlation(torch.ones(1, 30), second_RN[:1]) == 0
