"""Wrong words end in one line that says what came and what was expected; a table of them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.conftest import write_images
from vitral.bench.run import _OF_MODELS
from vitral.checkpoints.convert import LAYOUTS
from vitral.checkpoints.dtypes import STORABLE
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli import app as cli
from vitral.data.split import SPLITS
from vitral.explain.faithfulness.removal import Fill
from vitral.explain.pictures import Look
from vitral.images.preprocess import Decoding, Preprocess
from vitral.inference.classifier import TestTimeAugmentation
from vitral.model.config import Pooling, ViTConfig
from vitral.model.vit import VisionTransformer
from vitral.recipes.schema import FIELDS
from vitral.runtime import devices, limits
from vitral.runtime.spelling import meant, near

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def vitral(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command line, in this process, in a folder with ``model``, ``photos`` and ``file.jpg``."""
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "model", Checkpoint(model, Preprocess((16, 16)), ("ant", "bee")))
    write_images(tmp_path / "photos", {"ant": 10, "bee": 10})
    (tmp_path / "file.jpg").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        # Not shlex, so that "" is an empty word in the tables below.
        words = [word.strip('"') if word == '""' else word for word in line.split()]
        monkeypatch.setattr(sys, "argv", ["vitral", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        assert isinstance(status, int | None)
        out, err = capsys.readouterr()
        return status or 0, out, err

    return run


def assert_one_line(
    result: tuple[int, str, str], status: int, text: str, there: set[Path], folder: Path
) -> None:
    got, out, err = result
    assert (got, out) == (status, ""), err
    assert err.startswith("vitral: ")
    assert err.count("\n") == 1
    assert text in err
    assert "defect" not in err
    assert set(folder.rglob("*")) == there, "something was written"


TRAIN = "train photos --out run"

WRONG_USAGE = [
    ("trian", "there is no command 'trian'; did you mean 'train'? See `vitral --help`"),
    ("evaluate model photos", "there is no command 'evaluate'; did you mean 'eval'?"),
    ("resnet50", "there is no command 'resnet50'; see `vitral --help`"),
    ("--verbose", "there is no option --verbose"),
    ("recipe shwo deit", "there is no command 'shwo'; did you mean 'show'? See `vitral recipe --help`"),
    ("train", "DATA is missing; see `vitral train --help`"),
    ("train photos", "--out: name a folder for the run"),
    ("train photos --out", "'--out' requires an argument"),
    ('train photos --out ""', "--out: it is empty"),
    ('train "" --out run', "DATA: it is empty"),
    ("train photos --out file.jpg", "file.jpg is a file; name a new folder"),
    ("train photos --out file.jpg/run", "file.jpg is a file; name a new folder"),
    (f"train photos --out {'x' * 300}", "File name too long"),
    (f'{TRAIN} --recipe ""', "--recipe: it is empty"),
    (f"{TRAIN} --resum", "there is no option --resum; did you mean '--resume'?"),
    (f"{TRAIN} --epochs 5", "there is no option --epochs; a setting is written epochs=VALUE"),
    (f"{TRAIN} --json", "there is no option --json; see"),
    (f"{TRAIN} --resume=yes", "--resume"),
    ("demo --out file.jpg", "file.jpg is a file"),
    ("demo extra", "unexpected extra argument"),
    ("eval model", "DATA is missing"),
    ('eval "" photos', "MODEL: it is empty"),
    ("eval model photos --split validation",
     "'validation' is not one of train, val, test, all; did you mean 'val'?"),
    ("eval model photos --split foo", "--split: 'foo' is not one of train, val, test, all; see"),
    ("eval model photos --tta up", "--tta: 'up' is not one of none, flip"),
    ("eval model photos --device abacus", "--device: 'abacus' is not one of auto, cpu, cuda, mps"),
    ("eval model photos --precision float8", "--precision: 'float8' is not one of"),
    ("eval model photos --max-damaged nan", "--max-damaged: nan is not a share from 0 to 1"),
    ("eval model photos --max-damaged 1.5", "--max-damaged: 1.5 is not a share"),
    ("eval model photos --max-damaged few", "--max-damaged: input should be a valid number"),
    ("eval model photos --seed 3", "there is no option --seed; see `vitral eval --help`"),
    ("eval model photos --wrong wrong.txt", "'wrong.txt' does not end in .csv or .json"),
    ("eval model photos --wrong photos", "'photos' does not end in .csv or .json"),
    ("eval model photos --wrong no/wrong.csv", "no/wrong.csv cannot be written: No such file or directory"),
    ('eval model photos --wrong ""', "--wrong: it is empty"),
    ("eval model photos --sheet wrong.gif", "'wrong.gif' does not end in .png, .jpg, .jpeg or .webp"),
    ("eval model photos --sheet /proc/wrong.png", "/proc/wrong.png cannot be written"),
    ("predict model", "IMAGE... is missing"),
    ('predict model ""', "IMAGE...: it is empty"),
    ("predict model file.jpg --top 0", "--top: 0 is not a whole number from 1 to 1,000,000"),
    (f"predict model file.jpg --top {10**9}", "--top: 1000000000 is not a whole number"),
    ("predict model file.jpg --top 1.5", "--top: input should be a valid integer"),
    ("predict model file.jpg --batch-size many", "--batch-size: input should be a valid integer"),
    (f"predict model file.jpg --batch-size {10**12}", "--batch-size: 1000000000000 is not a whole number"),
    ("doctor model photos --seed -1", "--seed: -1 is not a whole number from 0 to 4,294,967,295"),
    ("eval model photos --workers -1", "--workers: -1 is not a whole number from 0 to 1,024"),
    ("probe model photos --workers 1000000", "--workers: 1000000 is not a whole number from 0 to 1,024"),
    ("doctor model photos --limit 0", "--limit: 0 is not a whole number from 1 to"),
    (f"doctor model photos --limit {10**30}", "is not a whole number from 1 to"),
    ("probe model photos --img-size 0", "--img-size: 0 is not a whole number from 1 to 8,192"),
    (f"probe model photos --img-size {10**9}", "--img-size: 1000000000 is not a whole number"),
    (f"probe model photos --seed {2**32}", "--seed: 4294967296 is not a whole number"),
    ("probe model photos --features best", "--features: 'best' is not one of class, mean, class_mean, map"),
    ("probe model photos --per-class 0", "--per-class: 0 is not a whole number"),
    (f"probe model photos --layer {10**9}", "--layer: 1000000000 is not a whole number"),
    ("probe model photos --out file.jpg", "file.jpg is a file"),
    ("probe model photos --cache file.jpg", "--cache: "),
    ('probe model photos --cache ""', "--cache: it is empty"),
    ("convert model", "OUT is missing"),
    ('convert model ""', "OUT: it is empty"),
    ("convert model file.jpg", "OUT: "),
    ("convert model out --to jax",
     "--to: 'jax' is not one of vitral, timm, transformers, torchvision, google"),
    ("bench speed", "there is no command 'speed'"),
    ("bench serv", "there is no command 'serv'; did you mean 'serve'"),
    ("bench serve", "URL is missing"),
    ("bench serve http://localhost", "IMAGES... is missing"),
    ("bench serve http://localhost photos --clients 0", "--clients: 0 is not a whole number from 1 to 1,000"),
    ("bench serve http://localhost photos --rounds 3", "there is no option --rounds"),
    ("bench infer --rounds 0", "--rounds: 0 is not a whole number from 1 to 1,000"),
    (f"bench infer --rounds {10**9}", "--rounds: 1000000000 is not a whole number"),
    ("bench infer --out no/report.json", "no/report.json cannot be written"),
    ("bench infer --out photos", "photos is a folder; name a file in it"),
    ("push model", "hf://ORG/NAME is missing"),
    ('info ""', "MODEL: it is empty"),
    ("info model --json", "there is no option --json; see"),
    ("recipe show", "NAME_OR_FILE is missing"),
    ("recipe show deit deit3", "unexpected extra argument"),
    ('recipe diff deit ""', "NAME_OR_FILE: it is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "text"), WRONG_USAGE, ids=[line for line, _ in WRONG_USAGE])
def test_wrong_usage_is_one_line_and_ends_with_two(line: str, text: str, vitral: Run, tmp_path: Path) -> None:
    there = set(tmp_path.rglob("*"))
    assert_one_line(vitral(line), 2, text, there, tmp_path)


WRONG_SETTINGS = [
    ("epochs", "'epochs' is not a setting; write key=value, for example epochs=20"),
    ("patch_size=8", "there is no setting 'patch_size'; did you mean 'architecture.patch_size'?"),
    ("patience=3", "there is no setting 'patience'\n"),
    ("lr=0.1", "there is no setting 'lr'; did you mean 'lora_rank' or 'learning_rate'"),
    ("steps=0", "steps=0: it must be a whole number from 1 to 1,000,000,000"),
    ("epochs=0", "epochs=0: it must be a number from 0.001 to 1,000,000"),
    ("epochs=1e308", "epochs=1e+308: it must be a number from 0.001 to 1,000,000"),
    ("epochs=nan", "epochs=nan: it must be a number from 0.001 to"),
    ("epochs=true", "epochs=true: it must be a number from 0.001 to"),
    ("minutes=1e300", "minutes=1e+300: it must be a number"),
    ("minutes=-1", "minutes=-1: it must be a number from 0.001"),
    ("mixup=true", "mixup=true: it must be a number from 0 to 100"),
    ("mixup=1e-320", "it must be 0 (off), or a number of 0.001 or more"),
    ("cutmix=inf", "cutmix=inf: it must be a number from 0 to 100"),
    ("img_size=1000000", "img_size=1000000: it must be a whole number from 1 to 8,192"),
    ("img_size=[32,0]", "img_size=[32, 0]: "),
    ("img_size=[true,32]", "img_size=[True, 32]: "),
    (f"repeats={10**20}", "it must be a whole number from 1 to 1,000"),
    ("rand_augment_ops=1000000", "rand_augment_ops=1000000: it must be a whole number from 1 to 20"),
    (f"batch_size={10**12}", "it must be a whole number from 1 to 1,048,576"),
    ("workers=1000000", "workers=1000000: it must be a whole number from 0 to 1,024"),
    (f"lora_rank={10**9}", "it must be a whole number from 1 to 4,096"),
    (f"checkpoint_steps={10**15}", "it must be a whole number from 1 to 1,000,000,000"),
    ("seed=-1", "seed=-1: it must be a whole number from 0 to 4,294,967,295"),
    (f"seed={2**32}", "it must be a whole number from 0 to 4,294,967,295"),
    ("max_damaged=nan", "max_damaged=nan: it must be a number from 0 to below 1"),
    ("crop_fraction=1e-300", "crop_fraction=1e-300: it must be a number from 0.01 to 1"),
    ("betas=[0.9,nan]", "betas=[0.9, nan]: it must be a number from 0 to below 1"),
    ("learning_rate=-inf", "learning_rate=-inf: it must be a number from 1e-12 on"),
    ("optimizer=adam", "optimizer='adam': input should be 'adamw', 'muon', 'lion'"),
    ("architecture.depth=3", "there is no setting 'depth'"),
    ("architecture.num_heads=5 model=ViT-B/16", "num_heads is 5; it must divide embed_dim 768"),
    ("architecture=3", "architecture=3: "),
    ("model=nothing", "model=nothing is not a checkpoint"),
    ("batch_size=17", "batch_size=17 is more than the 16 training images; set batch_size=8, as Vitral would"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "text"), WRONG_SETTINGS, ids=[words for words, _ in WRONG_SETTINGS])
def test_a_setting_that_cannot_be_meant_is_one_line(
    words: str, text: str, vitral: Run, tmp_path: Path
) -> None:
    there = set(tmp_path.rglob("*"))
    assert_one_line(vitral(f"{TRAIN} {words}"), 1, text, there, tmp_path)


WRONG_ARCHITECTURES = [
    ("info ViT-B/16 img_size=1000000 --no-measure", "img_size is (1000000, 1000000); height and width"),
    (f"info ViT-B/16 embed_dim={10**9} --no-measure", "embed_dim is 1000000000; it must be from 1 to"),
    ("info ViT-B/16 num_heads=5 --no-measure", "num_heads is 5; it must divide embed_dim 768"),
    ("info ViT-B/16 num_layers=1000000 --no-measure", "num_layers is 1000000; it must be from 1 to"),
    ("info ViT-B/16 num_heads=true --no-measure", "num_heads=true: this takes no true or false"),
    ("info ViT-B/16 dropout=nan --no-measure", "dropout=nan: it must be a finite number"),
    ("info Conv+ViT-Ti/2@16384 --no-measure", "patches of 2 pixels; a model takes 262,144 at most"),
    ("info ViT-B/16@99999999 --no-measure", "height and width must be from 1 to 16,384"),
    (f"train photos --out run model=ViT-Pico/4 architecture.embed_dim={10**9}", "embed_dim is 1000000000"),
    ("bench infer ViT-Ti/4 img_size=1000000", "img_size is (1000000, 1000000)"),
    ("convert model out num_heads=5", "num_heads is 5; it must divide embed_dim 16"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "text"), WRONG_ARCHITECTURES, ids=[line for line, _ in WRONG_ARCHITECTURES])
def test_a_model_that_cannot_be_meant_is_one_line(line: str, text: str, vitral: Run, tmp_path: Path) -> None:
    there = set(tmp_path.rglob("*"))
    assert_one_line(vitral(line), 1, text, there, tmp_path)


# --- What is near ------------------------------------------------------------------------------------

SETTINGS = [*FIELDS, *(f"architecture.{name}" for name in vars(ViTConfig(num_classes=1)))]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("epoch", "epochs"), ("Epochs", "epochs"), ("eopchs", "epochs"), ("num_epochs", "epochs"),
        ("learning_rte", "learning_rate"), ("learning-rate", "learning_rate"),
        ("lerning_rate", "learning_rate"), ("lr", "learning_rate"), ("wd", "weight_decay"),
        ("bs", "batch_size"), ("weight_deacy", "weight_decay"), ("lr_decay", "layer_decay"),
        ("image_size", "img_size"), ("img_sise", "img_size"), ("batch", "batch_size"),
        ("batchsize", "batch_size"), ("batch_sizes", "batch_size"), ("num_workers", "workers"),
        ("worker", "workers"), ("patch_size", "architecture.patch_size"),
        ("num_heads", "architecture.num_heads"), ("optim", "optimizer"), ("optimiser", "optimizer"),
        ("mixup_alpha", "mixup"), ("rand_aug", "rand_augment"), ("cut_mix", "cutmix"),
        ("dropuot", "dropout"), ("smoothing", "label_smoothing"), ("ema", "ema_decay"), ("seeds", "seed"),
    ],
)  # fmt: skip
def test_a_slip_is_answered_with_what_was_meant(wrong: str, right: str) -> None:
    assert right in near(wrong, SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "known"),
    [
        ("patch_size", "batch_size"), ("batch_size", "patch_size"), ("crop", "drop"), ("steps", "epochs"),
        ("patience", "passes"), ("test", "train"), ("list", "flip"), ("flip", "clip"), ("foo", "flip"),
        ("export", "epochs"), ("serve", "seed"), ("a", "accumulate"), ("", "seed"), ("_", "seed"),
        ("mlp_ratio", "val_fraction"), ("hidden_dim", "embed_dim"), ("minutes", "mixup"),
        ("resnet50", "resume"),
    ],
)  # fmt: skip
def test_what_is_another_word_is_not_near(wrong: str, known: str) -> None:
    assert near(wrong, [known]) == []
    assert meant(wrong, [known]) == ""


def test_a_known_name_is_nearest_to_itself() -> None:
    for name in SETTINGS:
        assert near(name.rpartition(".")[2], SETTINGS)[0].endswith(name.rpartition(".")[2])


def test_three_names_at_most_are_offered() -> None:
    assert len(near("size", [f"{word}_size" for word in "abcdef"])) == 3


# --- The command line's own lists ------------------------------------------------------------------


def test_what_options_may_be_is_what_the_library_takes() -> None:
    kinds: list[tuple[tuple[str, ...], Any]] = [
        (limits.DEVICES, get_args(devices.Device)),
        (limits.PRECISIONS, get_args(devices.Precision)),
        (limits.TTA, get_args(TestTimeAugmentation)),
        (limits.DECODINGS, get_args(Decoding)),
        (limits.SPLITS, (*SPLITS, "all")),
        (limits.FEATURES, get_args(Pooling)),
        (limits.FILLS, get_args(Fill)),
        (limits.LOOKS, get_args(Look)),
        (limits.BENCHMARKS, (*_OF_MODELS, "data", "kernels")),
        (limits.LAYOUTS, LAYOUTS),
        (limits.DTYPES, STORABLE),
    ]
    assert all(set(ours) == set(theirs) for ours, theirs in kinds)


def test_no_word_at_all_is_answered_with_the_help(vitral: Run) -> None:
    status, out, err = vitral("")
    assert status == 2
    assert "Commands" in out
    assert err == ""


def test_help_shows_what_stands_in_brackets(vitral: Run) -> None:
    assert "[@revision]" in vitral("eval --help")[1].replace("\n", "")
