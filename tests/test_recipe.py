"""What a run chooses from its data, that the user's word wins, and what it starts from."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import by_name, settled
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.image_data import ImageData
from vitral.data.split import Split
from vitral.images.preprocess import Preprocess
from vitral.model.variants import parse
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base, start
from vitral.recipes.schema import OptimizerName, Trained
from vitral.runtime.errors import VitralError

LABELS = ("ant", "bee", "cat")
TRAINED = get_args(Trained)


def pictures(count: int = 60, size: tuple[int, int] = (32, 32), *, mirror_safe: bool = True) -> ImageData:
    """Blank images of one size, (width, height)."""
    return data_of([Image.new("RGB", size)] * count, mirror_safe=mirror_safe)


def data_of(images: list[Image.Image], *, mirror_safe: bool = True) -> ImageData:
    names = [f"{number}.png" for number in range(len(images))]
    split = Split(images, np.arange(len(images)) % 2, names)
    return ImageData("blank", ("ant", "bee"), {"train": split, "val": split}, mirror_safe=mirror_safe)


def resolved(data: ImageData, *, cpu_count: int = 1, **settings: Any) -> Any:
    return by_name(settled(data, Recipe(**settings), cpu_count))


def started(recipe: Recipe, labels: tuple[str, ...] = ("ant", "bee", "cat")) -> Checkpoint:
    """What a run of a recipe begins with."""
    data = replace(pictures(), classes=labels)
    return start(settled(data, recipe), labels, load_base(recipe))


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A trained model's folder: 12x20 pixels in patches of 4, a grid of 3x5."""
    model = VisionTransformer((12, 20), 4, embed_dim=16, num_layers=2, num_heads=2, num_classes=3)
    save_checkpoint(tmp_path, Checkpoint(model, Preprocess((12, 20), crop_fraction=0.8), LABELS))
    return str(tmp_path)


# --- Choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "img_size"), [(28, 28), (31, 32), (32, 32), (45, 44), (48, 48)])
def test_small_images_keep_their_size_to_the_nearest_patch(side: int, img_size: int) -> None:
    assert resolved(pictures(size=(side, side))).img_size == img_size


def test_large_images_are_reduced_and_tiny_ones_enlarged() -> None:
    assert resolved(pictures(size=(500, 500))).img_size == 128
    assert resolved(pictures(size=(8, 8))).img_size == 16


@pytest.mark.parametrize("side", [1, 8, 12, 13, 32, 49, 64, 100, 101, 4000])
def test_the_chosen_model_is_a_hybrid_with_a_grid_worth_attending_to(side: int) -> None:
    recipe = settled(pictures(2, size=(side, side)), Recipe(batch_size=1))
    model = start(recipe, LABELS, None).model
    assert model.config.stem
    assert all(3 <= cells <= 12 for cells in model.config.grid_size)


@pytest.mark.parametrize("size", [(64, 28), (28, 64)], ids=["wide", "tall"])
def test_the_shorter_side_decides(size: tuple[int, int]) -> None:
    assert resolved(pictures(size=size)).img_size == 28


def test_the_typical_image_decides() -> None:
    images = [Image.new("RGB", (32, 32))] * 51 + [Image.new("RGB", (800, 800))] * 49
    assert resolved(data_of(images)).img_size == 32


@pytest.mark.parametrize(
    ("side", "crop"), [(28, "padded"), (64, "padded"), (96, "resized"), (300, "resized")]
)
def test_only_images_with_room_to_spare_are_zoomed_into(side: int, crop: str) -> None:
    assert resolved(pictures(size=(side, side))).crop == crop


def test_crops_are_chosen_for_the_size_asked_for() -> None:
    assert resolved(pictures(size=(64, 64)), img_size=32).crop == "resized"


@pytest.mark.parametrize("mirror_safe", [True, False])
def test_only_what_keeps_its_label_is_mirrored(mirror_safe: bool) -> None:
    assert resolved(pictures(mirror_safe=mirror_safe)).flip is mirror_safe


@pytest.mark.parametrize(
    ("count", "batch_size"), [(10, 8), (240, 8), (480, 16), (1437, 64), (4000, 64), (50_000, 64)]
)
def test_batches_grow_with_the_data(count: int, batch_size: int) -> None:
    assert resolved(pictures(count)).batch_size == batch_size


@pytest.mark.parametrize(("count", "epochs"), [(100, 200), (10_000, 150), (25_000, 60), (60_000, 30)])
def test_a_small_data_set_is_passed_over_more_often(count: int, epochs: float) -> None:
    assert resolved(pictures(count)).epochs == epochs


@pytest.mark.parametrize(("cpu_count", "workers"), [(1, 0), (2, 0), (3, 2), (64, 8)])
def test_workers_leave_a_core_to_the_training(cpu_count: int, workers: int) -> None:
    assert resolved(pictures(), cpu_count=cpu_count).workers == workers


def test_a_few_images_fit_in_one_batch() -> None:
    batch_size = resolved(pictures(6)).batch_size
    assert batch_size is not None
    assert batch_size <= 6


def test_tuning_is_gentler_than_training(base: str) -> None:
    fresh, tuned = resolved(pictures()), resolved(pictures(), model=base)
    assert fresh.learning_rate is not None
    assert tuned.learning_rate is not None
    assert tuned.learning_rate < fresh.learning_rate
    assert (fresh.layer_decay, tuned.layer_decay) == (1.0, 0.75)
    assert (fresh.epochs, tuned.epochs) == (200, 20)


def test_adapters_and_heads_learn_at_a_higher_rate(base: str) -> None:
    rates = {trained: resolved(pictures(), model=base, trained=trained).learning_rate for trained in TRAINED}
    assert rates == {"all": 2e-4, "head": pytest.approx(1.5e-3), "lora": pytest.approx(1.5e-3)}
    assert resolved(pictures(), model=base, trained="lora", learning_rate=0.1).learning_rate == 0.1


def test_tuning_keeps_the_models_size(base: str) -> None:
    assert resolved(pictures(), model=base).img_size == (12, 20)


COLUMNS = {f"{kind}_column" for kind in ("image", "label", "split", "group")} | {
    "label_delimiter",
    "image_root",
}


def test_nothing_that_a_run_needs_stays_open() -> None:
    recipe = resolved(pictures())
    still_open = {name for name, value in vars(recipe).items() if value is None}
    not_needed = {"steps", "minutes", "pooling", "checkpoint_steps", "crop_fraction", "teacher"}
    assert still_open <= not_needed | {"learning_rate_batch", "compile", "threads"} | COLUMNS


# --- The user's word -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "ViT-Ti/8"),
        ("img_size", 40),
        ("img_size", (24, 40)),
        ("batch_size", 3),
        ("learning_rate", 0.5),
        ("layer_decay", 0.9),
        ("ema_decay", 0.0),
        ("crop", "none"),
        ("flip", False),
        ("workers", 0),
        ("epochs", 1.0),
        ("steps", 1),
        ("minutes", 1.0),
        ("pooling", "mean"),
    ],
)
def test_what_the_user_says_is_kept(name: str, value: Any) -> None:
    assert getattr(resolved(pictures(), **{name: value}), name) == value


@pytest.mark.parametrize("budget", ["steps", "minutes"])
def test_a_budget_of_another_kind_leaves_epochs_open(budget: str) -> None:
    assert resolved(pictures(), **{budget: 1}).epochs is None


def test_a_named_models_patch_divides_the_chosen_size() -> None:
    assert resolved(pictures(size=(30, 30)), model="ViT-Ti/16").img_size == 32
    assert resolved(pictures(size=(300, 300)), model="ViT-B/14").img_size == 126


def test_a_size_in_the_models_name_is_kept() -> None:
    recipe = resolved(pictures(), model="ViT-Ti/8@48x64")
    assert recipe.img_size == (48, 64)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(VitralError, match="batch_size=64 is more than the 60 training images"):
        resolved(pictures(60), batch_size=64)


@pytest.mark.parametrize("count", [9, 60, 500, 1651])
def test_the_batch_that_is_advised_instead_is_taken(count: int) -> None:
    rates = {"learning_rate": 5e-4, "learning_rate_batch": 512}
    with pytest.raises(VitralError) as refused:
        resolved(pictures(count), batch_size=2048, **rates)
    text = str(refused.value)
    assert text.endswith("learning_rate, 0.0005 for 512, follows by itself")
    usual = resolved(pictures(count)).batch_size
    for number in re.findall(r"set batch_size=(\d+)|or (\d+) at most", text):
        assert resolved(pictures(count), batch_size=int("".join(number)), **rates)
    assert f"set batch_size={usual}, as Vitral would here" in text
    with pytest.raises(VitralError, match=r"learning_rate stays 0\.0005 unless you change it"):
        resolved(pictures(count), batch_size=2048, learning_rate=5e-4)


@pytest.mark.parametrize("name", ["ViT-X/16", "runs/none"])
def test_an_unknown_model_is_answered_with_the_nearest(name: str) -> None:
    with pytest.raises(
        VitralError, match=rf"model={name} is not a checkpoint, and .* (did you mean 'ViT-|Known: ViT-)"
    ):
        resolved(pictures(), model=name)


# --- The start -----------------------------------------------------------------------------------


def test_a_fresh_model_is_the_recipes(base: str) -> None:
    recipe = Recipe(model="ViT-Pico/4", img_size=(12, 20), dropout=0.2, drop_path=0.3, pooling="mean")
    checkpoint = started(recipe, LABELS)
    config = checkpoint.model.config
    assert (config.img_size, config.num_classes) == ((12, 20), 3)
    assert (config.dropout, config.drop_path, config.pooling) == (0.2, 0.3, "mean")
    assert checkpoint.labels == LABELS
    assert checkpoint.preprocess.img_size == (12, 20)


def test_a_setting_within_a_group_leaves_the_rest_as_the_model_has_it(tmp_path: Path) -> None:
    hybrid = parse("Conv+ViT-Pico/4").layer
    expected = replace(hybrid, attention=replace(hybrid.attention, relative_start="zero"))
    recipe = Recipe(
        model="Conv+ViT-Pico/4", img_size=16, architecture={"layer.attention.relative_start": "zero"}
    )
    fresh = started(recipe, LABELS)
    assert fresh.model.config.layer == expected
    save_checkpoint(tmp_path, started(recipe.changed(architecture={}), LABELS))
    assert started(recipe.changed(model=str(tmp_path)), LABELS).model.config.layer == expected


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        ({"depth": 3}, "there is no setting 'depth'"),
        ({"num_layers": "few"}, "num_layers='few': input should be a valid integer"),
        ({"layer": 3}, "layer=3: input should be"),
        ({"layer.attention.relative_start": "far"}, "layer.attention.relative_start='far': input should be"),
    ],
    ids=str,
)
def test_an_architecture_that_cannot_be_used_is_refused(architecture: dict[str, Any], text: str) -> None:
    with pytest.raises(VitralError, match=f"^model=ViT-Pico/4: {re.escape(text)}"):
        started(Recipe(model="ViT-Pico/4", img_size=16, architecture=architecture), LABELS)


@pytest.mark.parametrize(("crop", "kept"), [("padded", 1.0), ("none", 1.0), ("resized", 0.9)])
def test_zoomed_training_is_judged_on_the_middle_of_images(crop: Any, kept: float) -> None:
    checkpoint = started(Recipe(model="ViT-Pico/4", img_size=16, crop=crop), LABELS)
    assert checkpoint.preprocess.crop_fraction == kept


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_the_centre_that_evaluation_keeps_can_be_named(crop: Any, base: str) -> None:
    fresh = started(Recipe(model="ViT-Pico/4", img_size=16, crop=crop, crop_fraction=0.7), LABELS)
    assert fresh.preprocess.crop_fraction == 0.7
    assert tuned(base, crop=crop).preprocess.crop_fraction == 0.8
    assert tuned(base, crop=crop, crop_fraction=0.7).preprocess.crop_fraction == 0.7


def head(checkpoint: Checkpoint) -> Tensor:
    return checkpoint.model.state_dict()["head.weight"]


def positions(checkpoint: Checkpoint) -> Tensor:
    return checkpoint.model.state_dict()["embedding.positions.table"]


def tuned(base: str, labels: tuple[str, ...] = LABELS, **settings: Any) -> Checkpoint:
    recipe = Recipe(model=base, img_size=(12, 20))
    return started(recipe.changed(**settings), labels)


def test_tuning_starts_from_the_models_weights(base: str) -> None:
    before, after = load_checkpoint(base).model.state_dict(), tuned(base, ("dog", "elk")).model.state_dict()
    assert after["head.weight"].shape == (2, 16)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("head."))


def test_the_same_classes_keep_the_head(base: str) -> None:
    assert torch.equal(head(tuned(base)), head(load_checkpoint(base)))


@pytest.mark.parametrize("labels", [("ant", "bee"), ("bee", "ant", "cat"), ("dog", "elk", "fox")], ids=str)
def test_other_classes_get_a_fresh_head(base: str, labels: tuple[str, ...]) -> None:
    checkpoint = tuned(base, labels)
    old = head(load_checkpoint(base))[: len(labels)]
    assert checkpoint.labels == labels
    assert head(checkpoint).shape == (len(labels), 16)
    assert not torch.equal(head(checkpoint), old)


@pytest.mark.parametrize("size", [(24, 40), (32, 16), (8, 12)], ids=str)
def test_tuning_at_another_size_stretches_positions_as_timm_does(base: str, size: tuple[int, int]) -> None:
    layers = pytest.importorskip("timm.layers")
    before = positions(load_checkpoint(base))[None]
    checkpoint = tuned(base, img_size=size)
    grid = [size[0] // 4, size[1] // 4]
    expected = layers.resample_abs_pos_embed(before, new_size=grid, old_size=[3, 5])
    torch.testing.assert_close(positions(checkpoint)[None], expected)
    assert checkpoint.preprocess == Preprocess(size, crop_fraction=0.8)


def test_tuning_takes_the_recipes_regularization(base: str) -> None:
    checkpoint = tuned(base, dropout=0.25, drop_path=0.3)
    rates = {module.p for module in checkpoint.model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.25}
    assert checkpoint.model.config.drop_path == 0.3
    assert checkpoint.model.training


def test_a_size_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(VitralError, match="model=ViT-Pico/4: img_size is 30x30, which patch_size 4 does not"):
        started(Recipe(model="ViT-Pico/4", img_size=30), LABELS)


def test_tuning_at_a_size_that_the_patch_does_not_divide_is_refused(base: str) -> None:
    with pytest.raises(VitralError, match="img_size is 30x30, which patch_size 4 does not divide"):
        tuned(base, img_size=30)


def test_tuning_with_another_pooling_is_refused(base: str) -> None:
    with pytest.raises(
        VitralError, match=r"with .*pooling=mean: embedding\.class_token is not of this model"
    ):
        tuned(base, pooling="mean")


@pytest.mark.parametrize("trained", ["head", "lora"])
def test_what_adapts_a_trained_model_needs_one(trained: Any) -> None:
    with pytest.raises(VitralError, match=f"trained={trained} adapts a trained model; name one"):
        resolved(pictures(), trained=trained)


def test_a_trained_stem_is_not_whitened(base: str) -> None:
    with pytest.raises(VitralError, match="whiten=true begins a new stem"):
        resolved(pictures(), model=base, whiten=True)


def test_few_pictures_are_altered_more_where_they_train_a_model_from_scratch(base: str) -> None:
    assert resolved(pictures(5000)).rand_augment == 9
    assert resolved(pictures(5001)).rand_augment == 0
    assert resolved(pictures(), rand_augment=0.0).rand_augment == 0
    assert resolved(pictures(mirror_safe=False)).rand_augment == 0  # a digit may become another
    assert resolved(pictures(), model=base).rand_augment == 0


def test_only_a_new_head_begins_as_a_probe(tmp_path: Path) -> None:
    for labels, probed in ((("ant", "bee"), False), (("bee", "ant"), True), ((), True)):
        model = VisionTransformer(8, 4, embed_dim=16, num_layers=1, num_heads=2, num_classes=len(labels))
        save_checkpoint(tmp_path, Checkpoint(model, Preprocess((8, 8)), labels))
        for asked in (None, True):
            assert resolved(pictures(), model=str(tmp_path), probe_head=asked).probe_head == probed
    assert resolved(pictures(), probe_head=True).probe_head is False
    assert resolved(pictures(), model=str(tmp_path), probe_head=False).probe_head is False


def test_no_probe_where_a_class_has_no_image_or_an_image_several(base: str) -> None:
    data = pictures()
    absent = replace(data, classes=("ant", "bee", "dog"))
    assert resolved(absent, model=base).probe_head is False
    several = replace(data.split("train"), labels=np.eye(2, dtype=bool)[data.split("train").labels])
    many = replace(data, splits={"train": several, "val": several})
    assert resolved(many, model=base).probe_head is False


def test_a_teacher_sees_images_of_one_size(base: str) -> None:
    assert resolved(pictures(), device="cpu", teacher=base).small_images == 0
    assert resolved(pictures(), device="cpu").small_images == 0.5


def test_what_is_compiled_has_one_size_unless_the_user_wants_others() -> None:
    assert resolved(pictures(), compile=True).small_images == 0
    assert resolved(pictures(), device="cuda").small_images == 0  # whether there is one here or not
    assert resolved(pictures(), device="cuda", compile=False).small_images == 0.5
    assert resolved(pictures(), compile=True, small_images=0.3).small_images == 0.3


def test_the_data_decides_how_many_classes_there_are() -> None:
    recipe = Recipe(architecture={"num_classes": 7})
    with pytest.raises(VitralError, match="number of the data's classes"):
        started(recipe, ("ant", "bee"))


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_an_optimizer_brings_its_own_rate(optimizer: Any, base: str) -> None:
    from_scratch = resolved(pictures(), optimizer=optimizer)
    tuned = resolved(pictures(), optimizer=optimizer, model=base)
    assert from_scratch.schedule == ("constant" if optimizer == "schedule_free" else from_scratch.schedule)
    usual = resolved(pictures())
    assert (from_scratch.learning_rate == usual.learning_rate) == (optimizer == "muon")
    assert tuned.learning_rate is not None
    assert from_scratch.learning_rate is not None
    assert tuned.learning_rate < from_scratch.learning_rate
    # What the user says stands.
    assert resolved(pictures(), optimizer=optimizer, learning_rate=0.5).learning_rate == 0.5
