"""Augmentations: each result is looked for among the pictures that the original can become by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from vitral.data.randomness import seeded
from vitral.images.augment import batch_mixer, training_transform
from vitral.images.augmentation import Augmentation, Crop
from vitral.images.preprocess import Preprocess

# mean 0 and std 1: a tensor holds value / 255 of the picture.
PLAIN = Preprocess((16, 24), mean=(0, 0, 0), std=(1, 1, 1))


def transform(crop: Crop = "none", **options: Any) -> Callable[..., Tensor]:
    return training_transform(PLAIN, Augmentation(crop=crop, **options))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def coordinates(side: int) -> Image.Image:
    """Red tells the column and green the row, so that a crop shows where it was taken."""
    columns = np.tile(np.linspace(0, 255, side), (side, 1))
    return Image.fromarray(np.stack([columns, columns.T, 0 * columns], -1).astype(np.uint8))


def pixels(tensor: Tensor) -> np.ndarray:
    return (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def drawn(augment: Callable[..., Tensor], image: Image.Image, times: int) -> list[np.ndarray]:
    results = []
    for seed in range(times):
        with seeded(seed):
            results.append(pixels(augment(image)))
    return results


def equal_to_one_of(result: np.ndarray, candidates: list[np.ndarray]) -> bool:
    return any(np.array_equal(result, candidate) for candidate in candidates)


# --- Pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["padded", "resized", "simple", "none"])
@pytest.mark.parametrize("size", [(24, 16), (7, 5), (90, 40), (1, 60)])
def test_every_crop_gives_the_size_asked_for(crop: Crop, size: tuple[int, int]) -> None:
    every = {"rand_augment": 9, "three_augment": True, "color_jitter": 0.3, "erasing": 0.9}
    result = transform(crop, flip=True, **every)(noise(*size))
    assert result.shape == (3, 16, 24)
    assert result.dtype == torch.float32


def test_none_only_preprocesses() -> None:
    image = noise(50, 31)
    assert torch.equal(transform()(image), PLAIN(image))


def test_padded_shifts_by_up_to_an_eighth_over_mirrored_edges() -> None:
    image = noise(24, 16)
    wide = np.pad(np.asarray(image), ((2, 2), (3, 3), (0, 0)), mode="reflect")
    shifts = [wide[top : top + 16, left : left + 24] for top in range(5) for left in range(7)]
    results = drawn(transform("padded"), image, 60)
    assert all(equal_to_one_of(result, shifts) for result in results)
    assert len({result.tobytes() for result in results}) > 20


@pytest.mark.parametrize(("crop_scale", "smallest", "largest"), [(0.6, 0.55, 0.7), (0.1, 0.08, 0.3)])
def test_resized_keeps_at_least_the_asked_share_of_the_area(
    crop_scale: float, smallest: float, largest: float
) -> None:
    areas = []
    for result in drawn(transform("resized", crop_scale=crop_scale), coordinates(256), 60):
        height, width = np.ptp(result[..., 1]), np.ptp(result[..., 0])
        areas.append(float(height) * float(width) / 255**2)
    # The outermost half pixels of the result are lost to the measure.
    assert smallest < min(areas) < largest
    assert max(areas) > 0.75


def test_without_flip_nothing_is_mirrored() -> None:
    image = noise(24, 16)
    assert all(np.array_equal(result, np.asarray(image)) for result in drawn(transform(), image, 20))


def test_flip_mirrors_every_other_image() -> None:
    image = noise(24, 16)
    upright, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    results = drawn(transform(flip=True), image, 200)
    assert all(equal_to_one_of(result, [upright, mirrored]) for result in results)
    # Half of 200, give or take four standard deviations.
    assert 72 < sum(np.array_equal(result, mirrored) for result in results) < 128


def test_rand_augment_alters_pictures() -> None:
    image = noise(24, 16)
    results = drawn(transform(rand_augment=9), image, 20)
    assert sum(np.array_equal(result, np.asarray(image)) for result in results) < 5
    assert len({result.tobytes() for result in results}) > 12


@pytest.mark.parametrize("crop", ["padded", "resized", "simple"])
def test_the_seed_decides_everything(crop: Crop) -> None:
    every = {"rand_augment": 9, "three_augment": True, "color_jitter": 0.3, "erasing": 0.5}
    augment, image = transform(crop, flip=True, **every), noise(50, 40)
    once = drawn(augment, image, 10)
    torch.manual_seed(99)
    again = drawn(augment, image, 10)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({result.tobytes() for result in once}) == 10


def test_the_result_is_normalized_as_in_evaluation() -> None:
    preprocess = Preprocess((16, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    augment = training_transform(preprocess, Augmentation(crop="resized", flip=True))
    image = Image.new("RGB", (30, 30), (10, 20, 30))
    torch.testing.assert_close(augment(image), preprocess(image))


# --- What the recipes of the papers need ------------------------------------------------------------


def test_simple_is_the_shorter_side_and_a_shift_over_mirrored_edges() -> None:
    # 24x16 is the model's size; an eighth of it is less than DeiT-III's 4 pixels.
    image = noise(60, 32)
    reduced = np.asarray(image.resize((30, 16), Image.Resampling.BICUBIC))
    wide = np.pad(reduced, ((2, 2), (3, 3), (0, 0)), mode="reflect")
    shifts = [wide[top : top + 16, left : left + 24] for top in range(5) for left in range(13)]
    results = drawn(transform("simple"), image, 80)
    assert all(equal_to_one_of(result, shifts) for result in results)
    assert len({result.tobytes() for result in results}) > 30


def test_simple_is_the_authors_composition_at_their_size() -> None:
    preprocess = Preprocess((224, 224), mean=(0, 0, 0), std=(1, 1, 1), crop_fraction=0.9)
    image = noise(300, 260)
    # facebookresearch/deit, augment.py, with --src.
    theirs = v2.Compose(
        [v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.RandomCrop(224, padding=4, padding_mode="reflect")]
    )
    with seeded(1):
        ours = pixels(training_transform(preprocess, Augmentation(crop="simple"))(image))
    with seeded(1):
        assert np.array_equal(ours, np.asarray(theirs(image)))


def test_three_augment_takes_one_of_its_three_evenly() -> None:
    image = noise(24, 16)
    grey, solarized = image.convert("L").convert("RGB"), ImageOps.solarize(image, 128)
    results = drawn(transform(three_augment=True), image, 300)
    counts = [
        sum(np.array_equal(result, np.asarray(known)) for result in results) for known in (grey, solarized)
    ]
    # A third of 300, give or take four standard deviations; the rest is blurred.
    assert all(67 < count < 133 for count in [*counts, 300 - sum(counts)])


def test_three_augment_blurs_as_pillow_does() -> None:
    image = noise(24, 16).resize((96, 64), Image.Resampling.BICUBIC)
    preprocess = Preprocess((64, 96), mean=(0, 0, 0), std=(1, 1, 1))
    augment = training_transform(preprocess, Augmentation(three_augment=True))
    known = [np.asarray(image.convert("L").convert("RGB")), np.asarray(ImageOps.solarize(image, 128))]
    blurred = [result for result in drawn(augment, image, 90) if not equal_to_one_of(result, known)]
    radii = [0.05 * step for step in range(2, 41)]  # the authors' 0.1 to 2
    inner = np.s_[8:-8, 8:-8]  # edges are mirrored here and repeated in Pillow
    candidates = [np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), int)[inner] for radius in radii]
    found = []
    for result in blurred:
        distances = [np.abs(result[inner] - candidate).mean() for candidate in candidates]
        assert min(distances) < 1
        found.append(radii[int(np.argmin(distances))])
    assert np.abs(candidates[0] - candidates[-1]).mean() > 15
    assert min(found) < 0.6
    assert max(found) > 1.7


def test_colour_jitter_changes_what_it_says_by_no_more_than_it_says() -> None:
    # Of a grey picture without contrast only the brightness can change.
    image = Image.new("RGB", (24, 16), (100, 100, 100))
    shades = [int(result[0, 0, 0]) for result in drawn(transform(color_jitter=0.3), image, 100)]
    assert min(shades) in range(70, 76)
    assert max(shades) in range(125, 131)
    assert all(np.ptp(result) == 0 for result in drawn(transform(color_jitter=0.3), image, 5))


def test_colour_jitter_is_pillows_enhancers_in_some_order() -> None:
    image = noise(24, 16)
    jitter = v2.ColorJitter(0.3, 0.3, 0.3)
    with seeded(4):
        order, brightness, contrast, saturation, _ = jitter.make_params([image]).values()
    kinds: list[Any] = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    factors = [brightness, contrast, saturation]
    expected = image
    for index in [int(index) for index in order if index < 3]:
        expected = kinds[index](expected).enhance(factors[index])
    with seeded(4):
        assert np.array_equal(pixels(transform(color_jitter=0.3)(image)), np.asarray(expected))


def test_erasing_lays_noise_on_one_rectangle_with_its_probability() -> None:
    preprocess = Preprocess((32, 40))
    augment = training_transform(preprocess, Augmentation(erasing=0.25))
    image = Image.new("RGB", (40, 32), (128, 128, 128))
    clean = preprocess(image)
    erased, noises = 0, []
    for seed in range(200):
        with seeded(seed):
            changed = (augment(image) - clean).abs().amax(0) > 0
        rows, columns = torch.nonzero(changed, as_tuple=True)
        if len(rows):
            erased += 1
            height, width = (int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
            assert changed.sum() == height * width
            assert 0.015 < height * width / (32 * 40) < 0.36
            assert 0.25 < height / width < 4
            with seeded(seed):
                noises.append(augment(image)[:, changed].flatten())
    # A quarter of 200, give or take four standard deviations.
    assert 26 < erased < 74
    values = torch.cat(noises)
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03


def test_erasing_has_timms_ranges() -> None:
    timm = pytest.importorskip("timm.data.random_erasing").RandomErasing(0.25, mode="pixel")
    ours = v2.RandomErasing(0.25, value="random")  # type: ignore[arg-type]
    assert ours.scale == pytest.approx((timm.min_area, timm.max_area), abs=0.004)
    assert torch.exp(ours._log_ratio).tolist() == pytest.approx(np.exp(timm.log_aspect_ratio), rel=0.02)


@pytest.mark.parametrize(("ops", "share"), [(1, 0.5), (2, 0.5), (3, 0.2)])
def test_rand_augments_operations_act_with_their_probability(ops: int, share: float) -> None:
    # One operation, Identity or AutoContrast for example, may leave this picture as it is; how often is
    # measured first.
    image = noise(24, 16)
    augment = transform(rand_augment=30, rand_augment_ops=ops, rand_augment_share=share)
    always = transform(rand_augment=30, rand_augment_ops=1)
    idle = sum(np.array_equal(result, np.asarray(image)) for result in drawn(always, image, 600)) / 600
    untouched = sum(np.array_equal(result, np.asarray(image)) for result in drawn(augment, image, 600)) / 600
    expected = (1 - share * (1 - idle)) ** ops
    assert abs(untouched - expected) < 0.09


def test_without_a_share_all_operations_of_rand_augment_act() -> None:
    image = noise(24, 16)
    with seeded(2):
        ours = pixels(transform(rand_augment=9, rand_augment_ops=3)(image))
    with seeded(2):
        theirs = v2.RandAugment(num_ops=3, magnitude=9, fill=[0, 0, 0])(image)
    assert np.array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("level", [1, 5, 9, 10])
def test_three_times_a_level_of_timm_is_the_magnitude_here(level: int) -> None:
    levels = pytest.importorskip("timm.data.auto_augment").LEVEL_TO_ARG
    space: dict[str, Any] = v2.RandAugment._AUGMENTATION_SPACE
    for ours, theirs in [("Rotate", "Rotate"), ("ShearX", "ShearX"), ("TranslateX", "TranslateXRel")]:
        magnitude = float(space[ours][0](31, 100, 1)[3 * level])
        assert magnitude == pytest.approx(abs(levels[theirs](level, {})[0]), rel=0.01)
    change = float(space["Color"][0](31, 1, 1)[3 * level])
    assert abs(levels["ColorIncreasing"](level, {})[0] - 1) == pytest.approx(change)


# --- Batches ---------------------------------------------------------------------------------------

LABELS = torch.tensor([2, 0, 1, 4, 3, 0])
# Image i is wholly of its label's value: a mixture's mean is the labels' mean, weighted as the targets say.
IMAGES = LABELS.float().reshape(6, 1, 1, 1).expand(6, 3, 16, 24).contiguous()


def mixed(mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    with seeded(seed):
        return batch_mixer(mixup, cutmix, num_classes=5)(IMAGES, LABELS)


def test_without_mixing_images_stay_and_targets_are_certain() -> None:
    images, targets = mixed(0, 0, seed=0)
    assert torch.equal(images, IMAGES)
    assert targets.dtype == torch.float32
    assert targets.tolist()[:2] == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert torch.equal(targets.argmax(1), LABELS)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0, 0), (0.8, 0), (0, 1), (0.8, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_targets_are_probabilities_in_proportion_to_what_is_seen(
    mixup: float, cutmix: float, seed: int
) -> None:
    images, targets = mixed(mixup, cutmix, seed)
    assert targets.shape == (6, 5)
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.testing.assert_close(images.mean((1, 2, 3)), targets @ torch.arange(5.0))


def test_mixup_blends_whole_pictures() -> None:
    for seed in range(10):
        images, _ = mixed(0.8, 0, seed)
        assert (images == images[:, :, :1, :1]).all()


def test_cutmix_pastes_a_rectangle_of_one_other_picture() -> None:
    pasted = 0
    for seed in range(10):
        images, _ = mixed(0, 1, seed)
        for image, label in zip(images, LABELS, strict=True):
            rows, columns = torch.nonzero(image[0] != label, as_tuple=True)
            if len(rows):
                pasted += 1
                patch = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                assert len(patch.unique()) == 1
                assert patch[0].numel() == len(rows)
    assert pasted > 20


def test_with_both_each_batch_takes_one() -> None:
    blended = [bool((images % 1 != 0).any()) for images, _ in (mixed(0.8, 1, seed) for seed in range(30))]
    assert 5 < sum(blended) < 25


def test_with_both_each_takes_half_of_the_batches_as_in_deit() -> None:
    mixup = pytest.importorskip("timm.data").Mixup(
        0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.0, num_classes=5
    )
    np.random.seed(0)
    theirs = sum(bool(mixup._params_per_batch()[1]) for _ in range(400)) / 400
    ours = 0
    for seed in range(400):
        images, _ = mixed(0.8, 1.0, seed)
        ours += not (images % 1 != 0).any()
    # Each is a half, give or take four standard deviations.
    assert 0.4 < theirs < 0.6
    assert 0.4 < ours / 400 < 0.6
