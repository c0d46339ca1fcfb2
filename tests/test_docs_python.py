"""Every block of docs/python.md runs, in order and in one place."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    text = PAGE.read_text()
    blocks = [(match.start(), match[1]) for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) == 13
    names: dict[str, Any] = {"__name__": "page"}
    for start, block in blocks:
        line = text.count("\n", 0, start) + 1
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + block, str(PAGE), "exec"), names)
    assert torch.allclose(names["attention"].sum(-1), torch.ones(()), atol=1e-5)
    assert names["result"].n == len(names["data"].split("val"))
