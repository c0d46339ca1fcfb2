"""Each recipe that comes with Vitral is complete, sourced and usable; two recipes differ where they say."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import settled, write_images
from vitral import create
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.image_data import ImageData, open_data
from vitral.data.randomness import seeded
from vitral.data.split import Split
from vitral.images.augment import training_transform
from vitral.images.preprocess import Preprocess
from vitral.model.variants import parse
from vitral.model.vit import VisionTransformer
from vitral.recipes import packaged as recipes
from vitral.recipes.packaged import Setting
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base, start
from vitral.recipes.schema import FIELDS
from vitral.runtime import settings as config
from vitral.runtime.errors import VitralError
from vitral.training.loop import train

ROOT = Path(__file__).parents[1]
# What belongs to a paper and not to the machine or to the data at hand; a recipe of a paper says all of it.
OF_THE_PAPER = {
    "model", "img_size", "pooling", "batch_size", "optimizer", "betas", "learning_rate",
    "learning_rate_batch", "schedule", "warmup", "final_share", "weight_decay", "layer_decay", "clip_norm",
    "loss", "label_smoothing", "dropout", "drop_path", "ema_decay", "crop", "crop_scale", "crop_fraction",
    "flip", "three_augment", "color_jitter", "rand_augment", "erasing", "repeats", "mixup", "cutmix",
    "whiten", "small_images", "probe_head", "mix_passes",
}  # fmt: skip
PAPERS = ("augreg", "big_vision", "deit", "deit3", "mae-finetune", "vit", "vit-finetune")

every_recipe = pytest.mark.parametrize("name", recipes.names())
every_paper = pytest.mark.parametrize("name", PAPERS)


def pictures(count: int, side: int = 40) -> ImageData:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)
    images = [Image.fromarray(picture) for picture in pixels]
    split = Split(images, np.arange(count) % 2, [f"{number}.png" for number in range(count)])
    return ImageData("noise", ("ant", "bee"), {"train": split, "val": split})


def built(name: str) -> Recipe:
    return Recipe(**recipes.read(name))


# --- The files -------------------------------------------------------------------------------------


def test_every_paper_has_its_recipe() -> None:
    assert set(PAPERS) <= set(recipes.names())


def test_the_folder_stands_at_the_root_too() -> None:
    assert (ROOT / "recipes").resolve() == recipes.FOLDER.resolve()


@every_paper
def test_a_recipe_leaves_nothing_of_its_paper_to_our_defaults(name: str) -> None:
    values = recipes.read(name)
    assert not OF_THE_PAPER - values.keys()
    assert sum(budget in values for budget in ("epochs", "steps", "minutes")) == 1


@every_paper
def test_a_paper_decides_neither_the_machine_nor_the_split(name: str) -> None:
    ours = {"workers", "device", "precision", "checkpoint_steps", "seed", "val_fraction", "max_damaged"}
    assert not ours & recipes.read(name).keys()


@every_paper
def test_every_setting_names_its_source(name: str) -> None:
    path = recipes.find(name)
    text = path.read_text()
    known = r"\b(paper|code|weights|DeiT)\b"
    for key, setting in recipes.settings(name).items():
        if key in config.flat(config.read_toml(path)):
            assert re.search(known, setting.source), f"{key}: {setting.source!r}"
    # And by the lines themselves: no number stands on a line without a comment.
    for line in text.splitlines():
        if re.match(r"\w+ *=", line):
            assert re.search(r"# .*" + known, line), line


@every_paper
def test_a_recipe_says_what_to_type_and_what_to_expect(name: str) -> None:
    header = recipes.find(name).read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    assert "arXiv:" in header[0]
    said = dict(re.findall(r"^# ([A-Z][a-z ]+): *(.*)$", "\n".join(header), re.MULTILINE))
    assert {"Command", "Time", "Accuracy", "Sources", "Batch size", "Deviations"} <= said.keys()
    assert re.search(r"\d\d(\.\d+)? %", said["Accuracy"])
    words = shlex.split(said["Command"])
    assert words[:2] == ["vitral", "train"]
    assert words[words.index("--recipe") + 1] == name


@every_recipe
def test_words_that_a_header_offers_are_settings(name: str) -> None:
    header = recipes.find(name).read_text().split("\n\n")[0]
    for word in re.findall(r"(?<=[\s(])[a-z_]+=[\w./+-]+", header):
        if word.split("=")[0] in FIELDS:
            Recipe().with_words([word.rstrip(".,")])


@every_recipe
def test_a_recipe_comes_back_from_the_file_that_a_run_writes(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(config.to_toml(built(name).given, "again"))
    assert Recipe(**config.read_toml(file)) == built(name)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("vit", 3e-3), ("vit-finetune", 0.03), ("augreg", 1e-3), ("deit", 1e-3), ("big_vision", 1e-3),
     ("mae-finetune", 2e-3), ("deit3", 2e-3)],
)  # fmt: skip
def test_the_rate_scaled_to_the_batch_is_the_papers(name: str, peak: float) -> None:
    recipe = built(name)
    scaled = recipe.get("learning_rate") * recipe.get("batch_size") / recipe.get("learning_rate_batch")
    assert scaled == pytest.approx(peak)


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("deit", 5), ("deit3", 5), ("mae-finetune", 5)],
)
def test_a_warm_up_in_epochs_is_its_share_of_the_budget(name: str, epochs: float) -> None:
    recipe = built(name)
    assert recipe.get("warmup") * recipe.get("epochs") == pytest.approx(epochs, rel=1e-3)


@pytest.mark.parametrize("name", ["vit", "augreg", "big_vision"])
def test_a_warm_up_in_steps_is_its_share_of_imagenets(name: str) -> None:
    recipe = built(name)
    steps = round(recipe.get("epochs") * (1_281_167 // recipe.get("batch_size")))
    assert recipe.get("warmup") * steps == pytest.approx(10_000, rel=1e-3)


@pytest.mark.parametrize(("name", "lowest"), [("deit", 1e-5), ("deit3", 1e-5), ("mae-finetune", 1e-6)])
def test_the_rate_ends_where_the_authors_does(name: str, lowest: float) -> None:
    recipe = built(name)
    peak = recipe.get("learning_rate") * recipe.get("batch_size") / recipe.get("learning_rate_batch")
    assert recipe.get("final_share") * peak == pytest.approx(lowest)


# --- Their use -------------------------------------------------------------------------------------


@every_recipe
def test_a_recipe_resolves_and_alters_images(name: str) -> None:
    data = pictures(8)
    recipe = built(name).changed(model="ViT-Ti/16", img_size=32, batch_size=4)
    resolved = settled(data, recipe)
    given = built(name).given.keys() - {"probe_head"}  # there is nothing to probe from scratch
    assert all(resolved.settings().get(key) == recipe.given[key] for key in given)
    augment = training_transform(Preprocess((32, 32)), resolved.alteration.augmentation)
    with seeded(0):
        results = [augment(data.split("train").images[0]) for _ in range(8)]
    assert {tuple(result.shape) for result in results} == {(3, 32, 32)}
    assert all(torch.isfinite(result).all() for result in results)
    if resolved.alteration.crop != "none":
        assert len({result.numpy().tobytes() for result in results}) > 4


def small_of(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe's model, with the sizes of a tiny one."""
    shrunk = {"img_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_classes": 3}
    return config.deep_merge({"pooling": recipe.get("pooling"), **recipe.get("architecture")}, shrunk)


@every_recipe
def test_a_recipes_model_can_be_built(name: str) -> None:
    recipe = built(name)
    variant = recipe.get("model") if recipe.get("model") and "://" not in recipe.get("model") else "ViT-B/16"
    if recipe.get("pooling") is None:
        pytest.skip("the data decides the model")
    config_of_it = parse(variant)
    model = create(variant, **small_of(recipe))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    hidden = recipe.get("architecture").get("head", {}).get("hidden_dim")
    assert hidden in (None, config_of_it.embed_dim)


def test_the_architectures_are_the_authors() -> None:
    def options(name: str) -> VisionTransformer:
        return create("ViT-S/16", **small_of(built(name)))

    deit3, big_vision, vit = options("deit3"), options("big_vision"), options("vit")
    # Two layers with two scales each, of 16 numbers.
    assert scales(deit3) == pytest.approx([1e-4] * 64)
    # Four patches, and no row for the class token.
    assert deit3.state_dict()["embedding.positions.table"].numel() == 4 * 16
    assert vit.state_dict()["embedding.positions.table"].numel() == 5 * 16
    assert not any("positions" in name for name, _ in big_vision.named_parameters())
    assert not big_vision.config.class_token
    assert vit.config.head.hidden_dim == 768


def scales(model: VisionTransformer) -> list[float]:
    found = [value for name, value in model.state_dict().items() if "scale" in name]
    return torch.cat(found).tolist()


@every_paper
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    data = open_data(str(write_images(tmp_path / "data", {"ant": 6, "bee": 6}, size=(40, 40))))
    machine: dict[str, Any] = {"workers": 0, "device": "cpu", "precision": "float32"}
    small: dict[str, Any] = {
        "model": "ViT-Pico/16",
        "img_size": 32,
        "batch_size": 4,
        "epochs": None,
        "steps": 3,
    }
    summary = train(data, tmp_path / "run", built(name).changed(**small, **machine))
    assert summary.finished
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1:]
    assert np.isfinite(json.loads(line)["train_loss"])
    ran = Recipe(**config.read_toml(tmp_path / "run" / "recipe.toml"))
    changed = {key for key, value in built(name).given.items() if value != ran.given.get(key)}
    assert changed <= {*small, *machine, "trained"}


def test_fine_tuning_recipes_start_from_a_checkpoint(tmp_path: Path) -> None:
    model = VisionTransformer(32, 16, embed_dim=16, num_layers=2, num_heads=2, num_classes=0)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((32, 32)), ()))
    for name in ("vit-finetune", "mae-finetune"):
        recipe = built(name).changed(model=str(tmp_path / "base"), img_size=32, batch_size=4)
        checkpoint = start(settled(pictures(8), recipe), ("ant", "bee"), load_base(recipe))
        assert checkpoint.model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
        assert checkpoint.preprocess.crop_fraction == recipe.get("crop_fraction")


# --- Finding -------------------------------------------------------------------------------------


def test_a_name_a_file_and_a_run_are_recipes(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("epochs = 2\n")
    assert recipes.find("deit3") == recipes.FOLDER / "deit3.toml"
    assert recipes.read(str(tmp_path / "recipe.toml")) == {"epochs": 2}
    assert recipes.read(str(tmp_path)) == {"epochs": 2}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("diet", "'deit'"), ("deit4", "'deit3'"), ("big-vision", "'big_vision'"), ("zz", "'vit'")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(VitralError, match=f"there is no recipe '{name}'; did you mean .*{nearest}"):
        recipes.find(name)


@pytest.mark.parametrize("name", ["gone.toml", "gone/deit", "gone/run"])
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(VitralError, match=f"there is no file {name}"):
        recipes.read(name)


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=r"there is no file .*recipe\.toml"):
        recipes.read(str(tmp_path))


# --- Comparing -----------------------------------------------------------------------------------

ONE = """# One
#
epochs = 2  # a book, page 1
seed = 3
mixup = 0.8  # a book, page 2;
             # the code has 0.7
model = "a#b"  # with a mark
betas = [0.9, 0.99]  # a list
# about nothing

[architecture]
position = "none"  # the code

[architecture.layer]
layer_scale = 1e-4  # a paper
"""
OTHER = """
epochs = 2.0  # the same number
mixup = 0.2  # elsewhere
crop = "none"
betas = [0.9, 0.999]

[architecture.layer]
layer_scale = 1e-5
"""


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "one.toml").write_text(ONE)
    (tmp_path / "other.toml").write_text(OTHER)
    return str(tmp_path / "one.toml"), str(tmp_path / "other.toml")


def test_comments_are_read_from_the_ends_of_lines() -> None:
    assert recipes.comments(ONE) == {
        "epochs": "a book, page 1",
        "seed": "",
        "mixup": "a book, page 2; the code has 0.7",
        "model": "with a mark",
        "betas": "a list",
        "architecture.position": "the code",
        "architecture.layer.layer_scale": "a paper",
    }


def test_a_difference_has_both_values_and_both_sources(two: tuple[str, str]) -> None:
    found = {item.name: (item.a, item.b) for item in recipes.diff(*two)}
    absent = Setting(None, "as the model has it")
    assert found == {
        "model": (Setting("a#b", "with a mark"), Setting(None, "chosen from the data")),
        "betas": (Setting((0.9, 0.99), "a list"), Setting((0.9, 0.999), "")),
        "mixup": (Setting(0.8, "a book, page 2; the code has 0.7"), Setting(0.2, "elsewhere")),
        "crop": (Setting(None, "chosen from the data"), Setting("none", "")),
        "seed": (Setting(3, ""), Setting(0, "the default")),
        "architecture.position": (Setting("none", "the code"), absent),
        "architecture.layer.layer_scale": (Setting(1e-4, "a paper"), Setting(1e-5, "")),
    }
    order = list(FIELDS)
    places = [order.index(name.split(".")[0]) for name in found]
    assert places == sorted(places)


def test_turned_around_the_same_differs(two: tuple[str, str]) -> None:
    there = {item.name: (item.a, item.b) for item in recipes.diff(*two)}
    back = {item.name: (item.b, item.a) for item in recipes.diff(two[1], two[0])}
    assert there == back


@every_recipe
def test_a_recipe_does_not_differ_from_itself(name: str) -> None:
    assert recipes.diff(name, name) == []
    assert recipes.diff(name, str(recipes.find(name))) == []


def test_what_deit3_changed_in_deit() -> None:
    changed = {item.name for item in recipes.diff("deit", "deit3")}
    # DeiT III's paper, the table of training procedures: the rows in which its ImageNet-1k column is not
    # DeiT's, those where we deviate (optimizer, rate) or take the code (decay, clipping) left out.
    assert {"batch_size", "loss", "label_smoothing", "three_augment", "rand_augment", "erasing"} <= changed
    assert {"color_jitter", "crop_fraction", "architecture.layer.layer_scale"} <= changed
    assert not {"mixup", "cutmix", "repeats", "dropout", "schedule", "crop"} & changed


def test_a_run_is_compared_with_the_recipe_that_it_began_with(tmp_path: Path) -> None:
    data = open_data(str(write_images(tmp_path / "data", {"ant": 10, "bee": 10})))
    base = str(tmp_path / "base")
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(Path(base), Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    recipe = built("vit").changed(model=base, img_size=16, batch_size=4, architecture={})
    recipe = recipe.changed(steps=1, epochs=None, workers=0, device="cpu", precision="float32")
    train(data, tmp_path / "run", recipe)
    changed = {item.name: item.b.value for item in recipes.diff("vit", str(tmp_path / "run"))}
    assert changed.pop("architecture.head.hidden_dim") is None
    assert changed == {
        "model": base, "img_size": 16, "batch_size": 4, "steps": 1, "epochs": None, "workers": 0,
        "device": "cpu", "precision": "float32", "trained": "all", "decoding": "fast", "sampling": "shuffled",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["epoch = 2", "epochs = 'soon'", "epochs : 2"])
def test_a_file_that_no_run_would_take_is_not_compared(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(VitralError):
        recipes.diff("vit", str(tmp_path / "bad.toml"))


# --- The commands ----------------------------------------------------------------------------------


@pytest.fixture
def vitral(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command in this process: status, standard output, standard error."""
    from vitral.cli import app as cli

    monkeypatch.setenv("COLUMNS", "200")

    def command(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vitral", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int | None)
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return command


def test_list_names_every_recipe_with_its_paper(vitral: Callable[..., Any]) -> None:
    status, out, _ = vitral("recipe", "list")
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines.keys() == set(recipes.names())
    assert "arXiv:2204.07118" in lines["deit3"]


def test_show_prints_the_file(vitral: Callable[..., Any]) -> None:
    status, out, err = vitral("recipe", "show", "deit3")
    assert (status, err) == (0, "")
    assert out == recipes.find("deit3").read_text()


def test_diff_prints_what_differs_with_the_sources(vitral: Callable[..., Any], two: tuple[str, str]) -> None:
    status, out, err = vitral("recipe", "diff", *two)
    assert (status, err) == (0, "")
    for text in ("mixup", "0.8", "a book, page 2", "0.2", "elsewhere", "layer_scale", "chosen from the data"):
        assert text in out
    assert "epochs" not in out


def test_diff_as_json_is_the_same_table(vitral: Callable[..., Any], two: tuple[str, str]) -> None:
    status, out, _ = vitral("recipe", "diff", *two, "--json")
    assert status == 0
    told = {item["name"]: item for item in json.loads(out)["differences"]}
    assert told.keys() == {item.name for item in recipes.diff(*two)}
    assert told["mixup"]["b"] == {"value": 0.2, "source": "elsewhere"}


def test_recipes_that_are_equal_say_so(vitral: Callable[..., Any]) -> None:
    assert vitral("recipe", "diff", "deit", "deit") == (0, "deit and deit have the same settings\n", "")


@pytest.mark.parametrize(
    "words", [("recipe", "show", "diet"), ("recipe", "diff", "vit", "diet"),
              ("train", "digits", "--out", "run", "--recipe", "diet")]
)  # fmt: skip
def test_an_unknown_recipe_ends_in_one_line(words: tuple[str, ...], vitral: Callable[..., Any]) -> None:
    status, out, err = vitral(*words)
    assert (status, out) == (1, "")
    assert err.startswith("vitral: there is no recipe 'diet'; did you mean 'deit'")
    assert err.count("\n") == 1


def test_train_takes_a_recipe_by_name_and_words_win(
    vitral: Callable[..., Any], image_folder: Path, tmp_path: Path
) -> None:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    words = [
        f"model={tmp_path / 'base'}",
        "img_size=16",
        "batch_size=8",
        "steps=1",
        "workers=0",
        "device=cpu",
    ]
    out = tmp_path / "run"
    status, _, err = vitral(
        "train", image_folder, "--out", out, "--recipe", "mae-finetune", *words, "mixup=0.5"
    )
    assert status == 0, err
    ran = Recipe(**config.read_toml(out / "recipe.toml"))
    assert tuple(map(ran.get, ("mixup", "cutmix", "layer_decay", "erasing"))) == (0.5, 1.0, 0.65, 0.25)


def test_a_word_changes_one_field_of_a_recipes_architecture(
    vitral: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []

    def remember(data: Any, folder: Any, recipe: Recipe, **_: Any) -> None:
        asked.append(recipe)
        raise VitralError("enough")

    monkeypatch.setattr("vitral.training.loop.train", remember)
    words = ["--recipe", "deit3", "architecture.layer.order=post"]
    assert vitral("train", "digits", "--out", tmp_path / "run", *words)[0] == 1
    expected = built("deit3").get("architecture")
    assert asked[0].get("architecture") == config.deep_merge(expected, {"layer": {"order": "post"}})
    assert asked[0].get("architecture")["layer"] == {"layer_scale": 1e-4, "order": "post"}
