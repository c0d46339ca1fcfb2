"""Every block of docs/python.md runs, in order and in one place."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import pages

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    found = [block for block in pages.blocks(PAGE.read_text()) if block.runs]
    assert len(found) == 17
    names: dict[str, Any] = {"__name__": "page"}
    for block in found:
        pages.run(block, str(PAGE), names)
    assert torch.allclose(names["attention"].sum(-1), torch.ones(()), atol=1e-5)
    assert names["maps"].against == ("8", "8")
    assert names["result"].n == len(names["data"].split("val"))
