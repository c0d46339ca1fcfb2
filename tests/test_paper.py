"""docs/paper.md says what is so: its quotations, numbers and figures; and docs/paper.ipynb is the same."""

import ast
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts import pages, paper
from tests.conftest import write_images

TEXT = paper.PAGE.read_text()
FIRST_PART = TEXT.partition(paper.EXERCISES)[0]


def test_every_quotation_is_in_the_source() -> None:
    quoted = [block for block in pages.blocks(TEXT) if block.quoted]
    assert len(quoted) > 10
    stale = {block.quoted: lines for block in quoted if (lines := pages.stale_lines(block))}
    assert not stale, "quote the source anew in docs/paper.md, then run `scripts/paper.py notebook`"


def test_the_notebook_is_made_of_the_page() -> None:
    assert paper.NOTEBOOK.read_text() == paper.notebook(TEXT), "run `scripts/paper.py notebook`"


# matplotlib hands `copy` to torch's tensors, which do not know it yet.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_walk_prints_and_draws_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(paper.DOCS)
    differences = []
    for ran in paper.run(FIRST_PART):
        differences += [f"line {ran.cell.block.line}: {text}" for text in told(ran.cell, ran.printed)]
        if bool(ran.figure) != bool(ran.cell.figure):
            differences.append(f"line {ran.cell.block.line}: a figure is shown or drawn, not both")
        elif ran.cell.figure:
            paper.save(ran.figure, tmp_path / "again.png")
            if not same_picture(tmp_path / "again.png", paper.DOCS / ran.cell.figure):
                differences.append(f"{ran.cell.figure} is not what the page draws")
    assert not differences, "see them, then run `scripts/paper.py first`"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """In a folder of its own, and in five minutes of work: what the clock says depends on other processes."""
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(paper.WEIGHTS, tmp_path / paper.WEIGHTS.name)
    notebook: Any = nbformat.read(paper.NOTEBOOK, as_version=4)
    before = seconds_of_children()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert 0 < seconds_of_children() - before < 300
    differences = []
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, run in zip(paper.cells(TEXT), ran, strict=True):
        printed = "".join(output.text for output in run.outputs if output.output_type == "stream")
        differences += [f"line {cell.block.line}: {text}" for text in told(cell, printed)]
        drawn = [output for output in run.outputs if "image/png" in output.get("data", {})]
        assert len(drawn) == bool(cell.figure), cell.block.text
    assert not differences, "see them, then run `scripts/paper.py run`"


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def told(cell: paper.Cell, printed: str) -> list[str]:
    """In which lines a cell's output is not the page's."""
    shown = cell.printed
    return pages.differences(shown.text if shown else "", printed, numbers=not (shown and shown.note))


def same_picture(one: Path, other: Path) -> bool:
    """Up to a thousandth of the pixels: another processor may move the edge of a bar."""
    first, second = (np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in (one, other))
    return first.shape == second.shape and (abs(first - second).max(-1) > 16).mean() < 1e-3


def test_every_figure_is_shown_and_small() -> None:
    shown = [cell.figure for cell in paper.cells(TEXT) if cell.figure]
    files = sorted((paper.DOCS / "images").glob("paper-*.png"))
    assert sorted(shown) == [f"images/{file.name}" for file in files]
    assert max(file.stat().st_size for file in files) < 100_000


def test_no_cell_ends_in_a_value_that_a_notebook_would_show() -> None:
    for cell in paper.cells(TEXT):
        last = ast.parse(cell.block.text).body[-1]
        if isinstance(last, ast.Expr):
            assert ast.unparse(last).split("(")[0] in ("print", "tiles", "name_axes"), ast.unparse(last)


# --- What compares them can tell a difference ------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("loss 2.30 of 10", "loss 2.302 of 10"),
        ("loss 2.30", "loss 2.31"),  # one in the last digit
        ("loss 1.2e-05", "loss 1.3e-05"),
        ("81,946 parameters", "81,946 parameters"),
    ],
)
def test_outputs_agree_to_the_digits_that_are_shown(shown: str, printed: str) -> None:
    assert not pages.differences(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("loss 2.30", "loss 2.32"),
        ("loss 1.2e-05", "loss 1.2e-04"),
        ("right 99 of 100", "right 98 of 100"),
        ("81,946 parameters", "81,947 parameters"),
        ("right 9%", "right 10%"),
    ],
)
def test_other_numbers_are_told_unless_they_are_of_one_run(shown: str, printed: str) -> None:
    assert pages.differences(shown, printed)
    assert not pages.differences(shown, printed, numbers=False)


@pytest.mark.parametrize(
    ("shown", "printed"), [("(1, 64) True", "(1, 64) False"), ("(1, 64)", "(1, 64, 2)"), ("a\nb", "a")]
)
def test_other_words_are_told_in_any_case(shown: str, printed: str) -> None:
    assert pages.differences(shown, printed)
    assert pages.differences(shown, printed, numbers=False)


def quotation(text: str) -> pages.Block:
    page = f"In [this file](../tests/test_paper.py), `same_picture`:\n\n```python\n{text}\n```\n"
    (block,) = pages.blocks(page)
    assert block.quoted == ("tests.test_paper", "same_picture")
    assert not block.runs
    return block


def test_a_quotation_is_of_lines_that_are_there_in_that_order() -> None:
    begin = "def same_picture(one: Path, other: Path) -> bool:"
    end = "    return first.shape == second.shape and (abs(first - second).max(-1) > 16).mean() < 1e-3"
    assert not pages.stale_lines(quotation(f"{begin}\n    ...\n{end}"))
    assert pages.stale_lines(quotation(f"{begin}\n{end}"))
    assert pages.stale_lines(quotation(f"{end}\n...\n{begin}"))
    assert pages.stale_lines(quotation(end.replace("16", "17")))


def test_pictures_of_other_content_are_told_apart(tmp_path: Path) -> None:
    first, second, *_ = sorted(write_images(tmp_path, {"ant": 2}, size=(40, 30)).rglob("*.png"))
    assert same_picture(first, first)
    assert not same_picture(first, second)


def test_a_cell_has_its_fold_its_output_and_its_figure() -> None:
    page = (
        "text\n\n<details>\n<summary>Draw</summary>\n\n```python\nprint(1)\n```\n\n</details>\n\n"
        "```text one run\n1\n```\n\n![alt](images/paper-a.png)\n\n```python\npass\n```\n\nends\n"
    )
    first, second = paper.cells(page)
    assert (first.summary, first.figure, second.printed, second.figure) == (
        "Draw",
        "images/paper-a.png",
        None,
        None,
    )
    assert first.printed is not None
    assert (first.printed.text, first.printed.note) == ("1\n", "one run")
    assert pages.run(first.block, "page", {}) == "1\n"
    for piece in ("text", "# Draw", "source_hidden", "pass", "ends"):
        assert piece in paper.notebook(page)
    assert "images" not in paper.notebook(page)
    assert "one run" not in paper.notebook(page)
