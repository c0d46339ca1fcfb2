"""What a page of the documentation contains: its fenced blocks, and what running one prints and draws.

The tests of the pages and `scripts/paper.py` read pages through this module alone.
"""

import contextlib
import importlib
import inspect
import io
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A line that links the file and names what is quoted: In [FILE](../src/FILE), `NAME`:
_QUOTED = re.compile(r"\]\((?:\.\./)?(?:src/)?([\w/]+)\.py\), `([\w.]+)`:\s*\Z")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands in it, and where."""

    language: str  # "python", "console", "text", "toml" or ""
    note: str  # what follows the language on the fence
    text: str
    begin: int  # of the block in the page, in characters
    end: int
    line: int  # of the page, on which the text begins; the first is 1
    quoted: tuple[str, str] | None = None  # module and name that it is quoted from; then it is not run

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.quoted is None


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page's text, in order."""
    for match in _FENCE.finditer(page):
        line = page.count("\n", 0, match.start()) + 2
        source = _QUOTED.search(page, 0, match.start())
        quoted = (source[1].replace("/", "."), source[2]) if source else None
        yield Block(match[1], match[2].strip(), match[3], match.start(), match.end(), line, quoted)


def run(block: Block, page: str, names: dict[str, Any]) -> str:
    """Runs a block among the names of those before it; gives what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
    return printed.getvalue()


# --- What a page shows, and what is so -------------------------------------------------------------


def differences(shown: str, printed: str, *, numbers: bool = True) -> list[str]:
    """Says in which lines what a page shows is not what was printed.

    A number agrees if it is the same to the digits that the page shows, give or take one in the last: another
    processor adds in another order. Without `numbers`, the words alone are compared.
    """
    lines, found = shown.splitlines(), printed.splitlines()
    if len(lines) != len(found):
        return [f"the page shows {len(lines)} lines, and {len(found)} were printed:\n{printed}"]
    return [
        f"the page shows {line!r}; printed was {other!r}"
        for line, other in zip(lines, found, strict=True)
        if not _agree(line, other, numbers=numbers)
    ]


def _agree(shown: str, printed: str, *, numbers: bool) -> bool:
    if [" ".join(words.split()) for words in _NUMBER.split(shown)] != [
        " ".join(words.split()) for words in _NUMBER.split(printed)
    ]:
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return not numbers or all(_near(number, other) for number, other in pairs)


def _near(shown: str, printed: str) -> bool:
    if "." not in shown and "e" not in shown:
        return shown == printed
    mantissa, _, exponent = shown.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(shown.replace(",", "")) - float(printed.replace(",", ""))) <= 1.01 * last


def source_of(quoted: tuple[str, str]) -> str:
    """The source of a name in a module, without indentation."""
    found: Any = importlib.import_module(quoted[0])
    for name in quoted[1].split("."):
        found = getattr(found, name)
    return textwrap.dedent(inspect.getsource(found))


def stale_lines(block: Block) -> list[str]:
    """The lines of a quotation that are not in its source, in this order; "..." stands for lines left out."""
    assert block.quoted is not None
    rest = [line.rstrip() for line in source_of(block.quoted).splitlines()]
    pieces = re.split(r"^\s*\.\.\.\n", block.text, flags=re.MULTILINE)
    for piece in pieces:
        lines = [line.rstrip() for line in piece.splitlines()]
        starts = [start for start in range(len(rest)) if rest[start : start + len(lines)] == lines]
        if not starts:
            return lines
        rest = rest[starts[0] + len(lines) :]
    return []
