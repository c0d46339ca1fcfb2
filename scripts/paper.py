#!/usr/bin/env python
"""Makes what goes with docs/paper.md: its outputs, its figures, its notebook, and the weights it looks into.

    scripts/paper.py notebook    # docs/paper.ipynb from docs/paper.md; seconds
    scripts/paper.py run         # run the page; write its outputs and figures, then the notebook; minutes
    scripts/paper.py first       # the same, up to the exercises
    scripts/paper.py train OUT   # train the small model of docs/digits-vit afresh; ten minutes

docs/paper.md is the source. A block `python` is run; a block `text` after it is what it prints ("one run":
numbers that differ from machine to machine), and a picture after it is the figure that it leaves open. A
block under a line that links a file and names a part of it is a quotation, not run. What stands in <details>
is a folded cell.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts import pages  # found from whatever folder this file is called

DOCS = Path(__file__).parents[1] / "docs"
PAGE, NOTEBOOK, WEIGHTS = DOCS / "paper.md", DOCS / "paper.ipynb", DOCS / "digits-vit"
EXERCISES = "\n## Exercises\n"
_IMAGE = re.compile(r"\s*!\[[^\]]*\]\((images/paper-[\w-]+\.png)\)\n?")
_FOLD_BEGINS = re.compile(r"<details>\s*<summary>([^<]*)</summary>\s*\Z")
_FOLD_ENDS = re.compile(r"\s*</details>\n?")
DPI = 100


@dataclass(frozen=True)
class Cell:
    """A block that is run, with what follows from it."""

    block: pages.Block
    begin: int  # of all that belongs to it in the page
    end: int
    summary: str  # of a folded cell; "" where it is not folded
    printed: pages.Block | None
    figure: str | None  # a path beneath docs/


def cells(page: str) -> Iterator[Cell]:
    """The blocks that run, in order, each with its output and its figure."""
    found = list(pages.blocks(page))
    for block, following in zip(found, [*found[1:], None], strict=True):
        if not block.runs:
            continue
        begin, end, printed = block.begin, block.end + 1, None
        fold = _FOLD_BEGINS.search(page, 0, begin)
        if fold and (closing := _FOLD_ENDS.match(page, end)):
            begin, end = fold.start(), closing.end()
        if following and following.language == "text" and not page[end : following.begin].strip():
            printed, end = following, following.end + 1
        image = _IMAGE.match(page, end)
        end = image.end() if image else end
        yield Cell(block, begin, end, fold[1] if fold else "", printed, image[1] if image else None)


# --- The page --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What became of a cell that was run."""

    cell: Cell
    printed: str
    figure: Any | None  # of matplotlib


def run(page: str) -> Iterator[Ran]:
    """Runs the cells of a page one by one, in this process and folder; figures are closed after use."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    with mpl.rc_context({"backend": "agg", "figure.dpi": DPI}):
        names: dict[str, Any] = {"__name__": "page"}
        for cell in cells(page):
            printed = pages.run(cell.block, str(PAGE), names)
            open_figures = [plt.figure(number) for number in plt.get_fignums()]
            if len(open_figures) > 1:
                raise SystemExit(f"paper.md, line {cell.block.line}: leaves {len(open_figures)} figures open")
            yield Ran(cell, printed, open_figures[0] if open_figures else None)
            plt.close("all")


def save(figure: Any, file: Path) -> None:
    # Without the version of matplotlib, so that the same figure is the same file.
    figure.savefig(file, dpi=DPI, bbox_inches="tight", metadata={"Software": None})


def written_again(page: str, docs: Path) -> str:
    """The page with what its cells print now; the figures go into `docs`."""
    parts, done = [], 0
    for ran in run(page):
        cell = ran.cell
        print(f"line {cell.block.line}: {ran.printed[:60]!r}", flush=True)
        if bool(ran.printed) != bool(cell.printed) or bool(ran.figure) != bool(cell.figure):
            raise SystemExit(
                f"paper.md, line {cell.block.line}: show what it prints and draws, and only that"
            )
        if cell.printed:
            fence = f"```text {cell.printed.note}".rstrip()
            parts += [page[done : cell.printed.begin], f"{fence}\n{ran.printed.rstrip()}\n```"]
            done = cell.printed.end
        if cell.figure:
            save(ran.figure, docs / cell.figure)
    return "".join(parts) + page[done:]


# --- The notebook ----------------------------------------------------------------------------------


def notebook(page: str) -> str:
    """The same text and code as a notebook without outputs."""
    import nbformat
    from nbformat import v4

    found, done = [], 0
    for cell in cells(page):
        found.append(_text(page[done : cell.begin]))
        folded = {"jupyter": {"source_hidden": True}} if cell.summary else {}
        title = f"# {cell.summary}\n" if cell.summary else ""
        found.append(v4.new_code_cell(title + cell.block.text.rstrip(), metadata=folded))
        done = cell.end
    found.append(_text(page[done:]))
    kept = [cell for cell in found if cell["source"]]
    for number, cell in enumerate(kept):
        cell["id"] = f"cell-{number}"
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.writes(v4.new_notebook(cells=kept, metadata=kernel)) + "\n"


def _text(markdown: str) -> Any:
    from nbformat import v4

    return v4.new_markdown_cell(markdown.strip())


# --- The weights -----------------------------------------------------------------------------------


def train(out: Path) -> float:
    """Trains the model of docs/digits-vit into the folder `out`; gives its accuracy on held-out digits."""
    import vitral

    shape = {"embed_dim": 48, "num_layers": 4, "num_heads": 3, "mlp_ratio": 2}
    result = vitral.train(
        "digits", out, model="ViT-Ti/4", img_size=32, architecture=shape, steps=2400, batch_size=64,
        optimizer="adamw", learning_rate=2e-3, weight_decay=0.5, ema_decay=0.99, cutmix=0.0, small_images=0.0,
        precision="float32", compile=False, workers=0, threads=1, eval_epochs=5,
    )  # fmt: skip
    assert result.val_top1 is not None
    return result.val_top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("notebook", "run", "first", "train"))
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/digits-vit"))
    asked = parser.parse_args()
    if asked.what == "train":
        print(f"{train(asked.out):.1%} of the held-out digits are right")
        return
    page = PAGE.read_text()
    if asked.what != "notebook":
        first, heading, exercises = page.partition(EXERCISES)
        wanted, rest = (page, "") if asked.what == "run" else (first, heading + exercises)
        os.chdir(DOCS)
        page = written_again(wanted, DOCS) + rest
        PAGE.write_text(page)
    NOTEBOOK.write_text(notebook(page))


if __name__ == "__main__":
    main()
