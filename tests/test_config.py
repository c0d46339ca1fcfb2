"""Settings from words and files; what is wrong is named, with the nearest thing that is right."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vitral.evaluation.probing.probe import ProbeOptions
from vitral.model.config import ViTConfig
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import build, deep_merge, flat, nested, parse_overrides, read_toml, to_toml


@dataclass(frozen=True)
class Oven:
    degrees: int = 180
    fan: bool = False
    rack: str | None = None
    tray: tuple[int, int] = (30, 40)


# --- Words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("k=15", 15),
        ("k=1.5", 1.5),
        ("k=2e-3", 0.002),
        ("k=true", True),
        ("k=[32, 48]", [32, 48]),
        ("k='quoted'", "quoted"),
        ('k="15"', "15"),
        ("k=plain", "plain"),
        ("k=runs/my model", "runs/my model"),
        ("k=a=b", "a=b"),
        ("k=", ""),
        (" k = 3 ", 3),
        ("k=True", "True"),
    ],
)
def test_a_word_is_read_as_toml_or_else_as_text(word: str, value: Any) -> None:
    parsed = parse_overrides([word])
    assert parsed == {"k": value}
    assert type(parsed["k"]) is type(value)


def test_the_later_word_wins() -> None:
    assert parse_overrides(["k=1", "j=2", "k=3"]) == {"k": 3, "j": 2}


def test_a_word_without_equals_is_no_setting() -> None:
    with pytest.raises(
        VitralError, match=r"'epochs' is not a setting; write key=value, for example epochs=20"
    ):
        parse_overrides(["epochs"])


def test_dotted_words_become_groups_and_back() -> None:
    words = {"seed": 1, "architecture.layer.layer_scale": 1e-4, "architecture.layer.order": "post"}
    groups = {"seed": 1, "architecture": {"layer": {"layer_scale": 1e-4, "order": "post"}}}
    assert nested(words) == groups
    assert flat(groups) == words


@pytest.mark.parametrize("words", [["steps=2", "steps.x=3"], ["a.b=1", "a.b.c=2"]])
def test_a_value_has_no_fields(words: list[str]) -> None:
    with pytest.raises(VitralError, match="which was given a value of its own"):
        nested(parse_overrides(words))


def test_changes_are_laid_over_groups_without_dropping_their_rest() -> None:
    file = {"seed": 1, "architecture": {"position": "none", "layer": {"layer_scale": 1e-4, "order": "post"}}}
    words = {"epochs": 2, "architecture": {"layer": {"layer_scale": 1e-5}}}
    assert deep_merge(file, words) == {
        "seed": 1,
        "epochs": 2,
        "architecture": {"position": "none", "layer": {"layer_scale": 1e-5, "order": "post"}},
    }
    assert file["architecture"]["layer"]["layer_scale"] == 1e-4


# --- Building ------------------------------------------------------------------------------------


def test_values_become_the_types_of_their_fields() -> None:
    oven = build(Oven, {"degrees": 200, "fan": True, "rack": "top", "tray": [20, 30]})
    assert oven == Oven(200, True, "top", (20, 30))


def test_what_is_not_named_keeps_its_default() -> None:
    assert build(Oven, {}) == Oven()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learning_rte", "learning_rate"), ("epoch", "epochs"), ("lr_decay", "layer_decay"), ("Seed", "seed")],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(VitralError, match=rf"there is no setting '{key}'; did you mean '{nearest}'\?"):
        Recipe(**{key: 1})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"degrees": "hot"}, "degrees='hot': input should be a valid integer"),
        ({"degrees": 1.5}, "degrees=1.5: input should be a valid integer"),
        ({"fan": "maybe"}, "fan='maybe': input should be a valid boolean"),
        ({"rack": 2024}, "rack=2024: input should be a valid string"),
        ({"tray": [1]}, r"tray=\[1\]: field required"),
    ],
)
def test_an_unfit_value_is_named_with_what_fits(values: dict[str, Any], text: str) -> None:
    with pytest.raises(VitralError, match=text):
        build(Oven, values)


def test_what_a_dataclass_itself_refuses_is_said_in_its_words() -> None:
    with pytest.raises(VitralError, match=r"^dropout is 2\.0; it must be from 0 to below 1$"):
        build(ViTConfig, {"dropout": 2})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("steps", 0),
        ("steps", 1.5),
        ("minutes", -1),
        ("learning_rate", float("nan")),
        ("batch_size", 0),
        ("warmup", 1),
        ("layer_decay", 1.1),
        ("dropout", 1),
        ("mixup", -0.1),
        ("rand_augment", 31),
        ("rand_augment_ops", 0),
        ("rand_augment_share", 0),
        ("erasing", 1),
        ("color_jitter", -0.1),
        ("repeats", 0),
        ("clip_norm", -1),
        ("crop_fraction", 0),
        ("betas", [0.9]),
        ("architecture", "big"),
        ("seed", -1),
        ("workers", -1),
        ("crop", "square"),
        ("device", "tpu"),
        ("precision", "float16"),
        ("pooling", "max"),
        ("img_size", [32]),
    ],
)
def test_a_recipe_refuses_what_no_run_can_do(key: str, value: Any) -> None:
    with pytest.raises(VitralError, match=f"^{key}="):
        Recipe(**{key: value})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"degrees": True}, "degrees=true: this takes no true or false"),
        ({"tray": [True, 3]}, "tray=.*: this takes no true or false"),
        ({"rack": float("nan")}, "rack=nan: it must be a finite number"),
        ({"fan": 1}, None),
    ],
)
def test_truth_values_and_what_is_no_number_are_no_numbers(values: dict[str, Any], text: str | None) -> None:
    if text is None:
        assert build(Oven, values).fan is True
        return
    with pytest.raises(VitralError, match=f"^{text}"):
        build(Oven, values)


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        (Recipe, {"epochs": 1e308}, "epochs=1e+308: it must be a number from 0.001 to 1,000,000"),
        (Recipe, {"mixup": True}, "mixup=true: it must be a number from 0 to 100"),
        (Recipe, {"mixup": 1e-320}, "mixup=1e-320: it must be 0 (off), or a number of 0.001 or more"),
        (Recipe, {"repeats": 10**20}, f"repeats={10**20}: it must be a whole number from 1 to 1,000"),
        (Recipe, {"img_size": 1_000_000}, "img_size=1000000: it must be a whole number from 1 to 8,192"),
        (Recipe, {"max_damaged": float("nan")}, "max_damaged=nan: it must be a number from 0 to below 1"),
        (
            Recipe,
            {"crop": "square"},
            "crop='square': input should be 'padded', 'resized', 'simple' or 'none'",
        ),
        (Recipe, {"architecture": {"norm": {"eps": float("inf")}}}, "architecture={'norm': {'eps': inf}}: "),
        (ProbeOptions, {"seed": -1}, "seed=-1: it must be a whole number from 0 to 4,294,967,295"),
        (ProbeOptions, {"limit": 0}, "limit=0: it must be a whole number from 1 to 1,000,000,000"),
        (ProbeOptions, {"max_damaged": float("nan")}, "max_damaged=nan: it must be a number from 0 to 1"),
        (
            ProbeOptions,
            {"layers": (10**9,)},
            "layers=(1000000000,): it must be a whole number from -1,000 to 999",
        ),
    ],
    ids=str,
)
def test_python_is_refused_what_the_command_line_is(kind: Any, values: dict[str, Any], text: str) -> None:
    change = kind().changed if kind is Recipe else partial(replace, kind())
    for made in (lambda: kind(**values), lambda: change(**values)):
        with pytest.raises(VitralError, match=f"^{re.escape(text)}"):
            made()


# --- Files ---------------------------------------------------------------------------------------


def written(folder: Path, settings: Mapping[str, Any], header: str = "how to run this again") -> Path:
    file = folder / "settings.toml"
    file.write_bytes(to_toml(settings, header).encode())
    return file


FULL_RECIPE = Recipe(
    model="ViT-B/16",
    img_size=(32, 48),
    epochs=1.5,
    steps=7,
    learning_rate=1e-5,
    layer_decay=0.75,
    crop="resized",
    flip=False,
    seed=2**31,
    device="cpu",
    betas=(0.9, 0.95),
    architecture={
        "stem": [32, 64],
        "norm": {"eps": 1e-5},
        "layer": {"layer_scale": 1e-4, "attention": {"biases": "qv"}, "feed_forward": {}},
        "a key with spaces": {'and "quotes"': True},
        "position": "none",
    },
)


@pytest.mark.parametrize("recipe", [Recipe(), FULL_RECIPE], ids=["default", "full"])
def test_a_recipe_comes_back_from_its_file(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe(**read_toml(written(tmp_path, recipe.settings))) == recipe


@pytest.mark.parametrize(
    "text", ['a "quoted" run', "it's", r"C:\runs", "vitrô", "🪟", "tab\tnewline\n", "# no comment", ""]
)
def test_any_text_comes_back_from_a_file(text: str, tmp_path: Path) -> None:
    recipe = FULL_RECIPE.changed(model=text)
    assert read_toml(written(tmp_path, recipe.settings))["model"] == text


def test_a_file_has_what_was_given_and_nothing_else(tmp_path: Path) -> None:
    assert read_toml(written(tmp_path, Recipe(epochs=3, steps=None, seed=0).given)) == {
        "epochs": 3,
        "seed": 0,
    }


def test_what_a_file_cannot_say_is_refused_and_not_dropped() -> None:
    recipe = Recipe(architecture={"layer": {"layer_scale": None}})
    with pytest.raises(VitralError, match="layer_scale is None, which a TOML file cannot say"):
        to_toml(recipe.settings, "")


def test_the_header_is_a_comment(tmp_path: Path) -> None:
    lines = written(tmp_path, vars(Oven(rack="top")), "one\n\ntwo").read_text().splitlines()
    assert lines[:3] == ["# one", "#", "# two"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=r"there is no file .*nowhere\.toml"):
        read_toml(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"seed == 3", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(VitralError, match=r"bad\.toml is not TOML"):
        read_toml(file)
