"""Every command and snippet of the README and of docs/ works, in the order of its page, in one folder.

The rule:

- A block `console` has commands of `vitral`, one a line; `python` is run as it is; `toml` is a file that its
  first line names; `text` is output; a block without a language is the set-up, which `.ci/run` runs.
- A command runs in this process, with small numbers: two steps of eight images in place of a budget, a tiny
  model in place of one on the hub, small images. In the folder are `photos/` and `new/`.
- A command that needs what is not here (`_ONLY_PARSED`: large data sets, other libraries, uploads) is parsed
  as the command line parses it, and its settings are checked; it is not run. So is one within a line of text.
"""

import ast
import dataclasses
import json
import re
import shlex
import signal
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer

from scripts import pages
from tests.conftest import write_images
from tests.test_cli import Vitral, stop_at_once
from tests.test_cli import vitral as vitral  # the fixture
from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli.app import app
from vitral.cli.training import TrainingConsole
from vitral.images.preprocess import Preprocess, open_image
from vitral.model.vit import VisionTransformer
from vitral.recipes import packaged, schema
from vitral.recipes.recipe import Recipe

ROOT = Path(__file__).parents[1]
# docs/python.md and docs/paper.md have tests of their own; docs/log.md is a diary, of commands of their day.
PAGES = sorted({"README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))})
PAGES = [page for page in PAGES if page not in ("docs/python.md", "docs/paper.md", "docs/log.md")]

# `vitral serve` does not end, what `vitral optimize` finds depends on the machine, figures take long.
_ONLY_PARSED = (
    "imagenet/", "cifar10/", "clip.pth", "adapter/", "vitral push", "vitral bench", "vitral demo",
    "vitral serve", "vitral optimize", "--engine ray", "vitral sweep", "--figures", "track=", "://datasets",
)  # fmt: skip
# A server asked by other programs; a search of minutes. tests/test_serve.py and test_optimize.py run them.
_ONLY_PARSED_PAGES = ("docs/serve.md", "docs/optimize.md")
_SMALLER = (
    (r"\b(minutes|epochs|steps)=[\d.]+", "steps=2 batch_size=8 workers=0"),
    (r"\bhf://\S+", "tiny"),
    (r"\bimg_size=\d+", "img_size=48"),
    (r"(vitral info \S+)", r"\1 --no-measure"),
    (r"model=auto.*", "model=auto 'candidates=[\"tiny\"]' minutes=0.02 workers=0"),
    (r"(vitral explain .*--score).*", r"\1 --images 4 --method legrad --fill drop"),
    (r"\bfrog\b", "ant"),
    (r"\bbird\b", "bee"),
    (r"(vitral doctor \S+ \S+)", r"\1 --limit 6"),
    (r"--to onnx,openvino,web", "--to onnx"),  # tests/test_export.py and test_page.py write the others
    (r"(vitral report .*)", r"\1 --maps 1 --score 0 --no-figures"),
)  # fmt: skip


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The language and the text of each fenced block."""
    for block in pages.blocks((ROOT / page).read_text()):
        yield block.language, block.text


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: str) -> list[str]:
    """The commands that stand in a line of text."""
    return [span for span in re.findall(r"`([^`]+)`", prose(page)) if re.match(r"vitral \w+ \S", span)]


def parse(command: str) -> None:
    """Raises if the command line, or the recipe of a run, would refuse the words."""
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
    parser: Any = typer.main.get_command(app)
    while hasattr(parser, "commands"):
        parser, words = parser.commands[words[0]], words[1:]
    parser.make_context(parser.name, list(words))
    if parser.name == "train":
        Recipe().with_words(word for word in words[1:] if "=" in word)
    if "--recipe" in words and not words[words.index("--recipe") + 1].endswith(".toml"):
        packaged.read(words[words.index("--recipe") + 1])


def smaller(command: str) -> str:
    for pattern, small in _SMALLER:
        command = re.sub(pattern, small, command)
    if command.endswith(".toml"):  # its budget is in the file
        command += " epochs=0.5 batch_size=8 workers=0"
    return command


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photographs, a tiny model, and the run `runs/photos` of the first command."""
    write_images(tmp_path / "photos", {"ant": 20, "bee": 20, "cat": 20})
    (tmp_path / "new").mkdir()
    for number, file in enumerate(sorted((tmp_path / "photos" / "ant").iterdir())[:3]):
        open_image(file).save(tmp_path / "new" / f"{number}.jpg")
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=3, dropout=0.0)
    save_checkpoint(tmp_path / "ours", Checkpoint(model, Preprocess((16, 16)), ("ant", "bee", "cat")))
    convert(str(tmp_path / "ours"), tmp_path / "tiny", "timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_snippet_of_a_page_works(
    page: str, desk: Path, vitral: Vitral, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(blocks(page))
    if page in _ONLY_PARSED_PAGES:
        parse_all(found, page)
        return
    if "runs/photos" in "".join(text for _, text in found):
        # Of the tiny model: these pages are about what is done with a run.
        first = "train photos/ --out runs/photos model=tiny steps=2 batch_size=8 workers=0"
        if "vitral train photos/ --out runs/photos minutes" not in "".join(text for _, text in found):
            assert vitral(*first.split()).status == 0
    names: dict[str, Any] = {"__name__": page}  # a later block knows those of the blocks before
    for language, text in found:
        if language == "console":
            for line in text.splitlines():
                with monkeypatch.context() as patched:
                    if goes_on(line, page):
                        patched.setattr(TrainingConsole, "step", stop_at_once)
                    run(line, vitral)
        elif language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "toml":
            (desk / text.partition("\n")[0].removeprefix("# ")).write_text(text)
        else:
            assert language == "text" or "scripts/test" in text, f"{page}: say what this block is:\n{text}"


def parse_all(found: list[tuple[str, str]], page: str) -> None:
    """Parses the commands of ours and the code of a page, and runs none."""
    for language, text in found:
        for line in text.splitlines() if language == "console" else ():
            if line.startswith("vitral "):
                parse(line)
        if language == "python":
            compile(text, page, "exec")


def goes_on(line: str, page: str) -> bool:
    """Whether a later command of the page goes on with the run that this one begins."""
    begun = re.match(r"vitral train \S+ --out \S+", line)
    return bool(begun) and "--resume" not in line and f"{begun[0]} --resume" in (ROOT / page).read_text()


def run(line: str, vitral: Vitral) -> None:
    assert line.startswith("vitral "), line
    if any(word in line for word in _ONLY_PARSED):
        parse(line)
        return
    words = shlex.split(smaller(line.partition("  #")[0].rstrip()))
    result = vitral(*words[1:])
    stopped = TrainingConsole.step is stop_at_once
    assert result.status == (128 + signal.SIGTERM if stopped else 0), (
        f"{line}\n{shlex.join(words)}\n{result.err}"
    )


@pytest.mark.parametrize("page", [*PAGES, "docs/paper.md"])
def test_every_command_in_a_line_of_text_can_be_parsed(page: str) -> None:
    for command in spans(page):
        parse(command)


@pytest.mark.parametrize("page", [*PAGES, "docs/python.md", "docs/paper.md", "CONTRIBUTING.md"])
def test_every_link_and_script_of_a_page_is_there(page: str) -> None:
    file = ROOT / page
    if not file.exists():
        pytest.skip("not written yet")
    text = file.read_text()
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    links = [link.partition("#")[0] for link in found if "://" not in link]
    missing = [link for link in links if link and not (file.parent / link).exists()]
    missing += [
        name
        for name in re.findall(r"\b(?:scripts|tests)/[\w/]+(?:\.py)?", text)
        if not (ROOT / name).exists()
    ]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190


# --- The table of all settings ---------------------------------------------------------------------


def comments_of(file: Path) -> dict[str, str]:
    """What a class's file says of each field: the comment at its line's end, else those right above it."""
    with file.open("rb") as opened:
        tokens = list(tokenize.tokenize(opened.readline))
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    lines = file.read_text().splitlines()
    found = {}
    for group in ast.parse("\n".join(lines)).body:
        for part in getattr(group, "body", []):
            if not (isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)):
                continue
            first = part.lineno
            while part.lineno not in comments and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            numbers = range(first, part.lineno + 1)
            found[part.target.id] = " ".join(
                comments[line].lstrip("# ") for line in numbers if line in comments
            )
    return found


def default_of(part: dataclasses.Field) -> str:
    """As one types it; in words where there is none."""
    value = part.default_factory() if callable(part.default_factory) else part.default
    if value is dataclasses.MISSING or part.metadata.get("chosen"):
        return "chosen"
    if part.metadata.get("unset") or value == {}:
        return "-"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def words_of(hint: Any) -> list[str]:
    """The words that a setting may be."""
    if get_origin(hint) is Literal:
        return [word for word in get_args(hint) if word]
    if hint is bool:
        return ["true", "false"]
    return [word for part in get_args(hint) for word in words_of(part)]


def settings_table() -> str:
    """Every setting of `recipes/schema.py` with its default and its comment, a table a group."""
    comments = comments_of(Path(schema.__file__))
    text = ""
    for group in dataclasses.fields(schema.Resolved):
        kind: Any = group.type
        hints = get_type_hints(kind)
        text += f"\n**{kind.__doc__.removesuffix('.')}**\n\n"
        text += "| setting | default | meaning |\n| --- | --- | --- |\n"
        for part in dataclasses.fields(kind):
            meaning = comments[part.name].rstrip(".")
            words = words_of(hints[part.name])
            one_of = f". One of `{'`, `'.join(words)}`" if words and hints[part.name] is not bool else ""
            text += f"| `{part.name}` | {default_of(part)} | {meaning[0].upper()}{meaning[1:]}{one_of} |\n"
    return text


def test_the_table_of_settings_is_the_schemas() -> None:
    """If it is not, paste what the test prints into docs/recipes.md."""
    page = (ROOT / "docs/recipes.md").read_text()
    shown = page.partition("<!-- from recipes/schema.py -->\n")[2]
    comments = comments_of(Path(schema.__file__))
    assert not [name for name in schema.FIELDS if not comments[name]]
    assert shown == settings_table(), settings_table()
