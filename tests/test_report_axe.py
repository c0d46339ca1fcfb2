"""The page in a real browser: axe-core finds nothing, nothing is asked of a network, no image is broken.

It needs Chromium (VITRAL_CHROMIUM, else `chromium` on the path), Node, and a folder with axe-core and
puppeteer-core: `npm install axe-core puppeteer-core` there, and VITRAL_AXE names it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vitral as library
from tests.test_cli import quick as quick  # fixtures
from tests.test_cli import run as run
from tests.test_cli import vitral as vitral

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> dict[str, str]:
    """The programs, and where Node finds its packages."""
    chromium = os.environ.get("VITRAL_CHROMIUM") or shutil.which("chromium")
    node, packages = shutil.which("node"), os.environ.get("VITRAL_AXE", "")
    if not chromium or not node or not Path(packages, "node_modules", "axe-core").is_dir():
        pytest.skip("needs Chromium, Node, and VITRAL_AXE: a folder with axe-core and puppeteer-core")
    return {"chromium": chromium, "node": node, "packages": str(Path(packages, "node_modules"))}


def looked_at(browser: dict[str, str], page: Path) -> list[dict[str, Any]]:
    words = [browser["node"], str(Path(__file__).with_name("axe.js")), str(page), browser["chromium"]]
    environment = {**os.environ, "NODE_PATH": browser["packages"]}
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=True)
    return json.loads(shown.stdout)


def assert_faultless(seen: list[dict[str, Any]]) -> None:
    assert [(each["scheme"], each["width"]) for each in seen if each["scripted"]] == [
        ("light", 1400), ("light", 400), ("dark", 1400), ("dark", 400),
    ]  # fmt: skip
    for each in seen:
        assert each["violations"] == []
        assert each["complaints"] == []
        assert each["opened"] == 1  # the file itself
        assert not each["wide"]
        assert each["broken"] == 0
    with_script, without = seen[1]["words"], seen[-1]["words"]
    assert without >= 0.99 * with_script  # all of it is there without JavaScript


def test_a_report_is_faultless_in_a_browser(
    browser: dict[str, str], run: Path, image_folder: Path, tmp_path: Path
) -> None:
    library.report(run, str(image_folder), maps=2, score=4).write(tmp_path / "report.html")
    assert_faultless(looked_at(browser, tmp_path / "report.html"))


def test_a_comparison_is_faultless_in_a_browser(
    browser: dict[str, str], run: Path, image_folder: Path, tmp_path: Path
) -> None:
    library.report([run, run / "last"], str(image_folder)).write(tmp_path / "report.html")
    assert_faultless(looked_at(browser, tmp_path / "report.html"))


def test_a_report_without_images_is_faultless_in_a_browser(
    browser: dict[str, str], run: Path, tmp_path: Path
) -> None:
    library.report(run).write(tmp_path / "report.html")
    assert_faultless(looked_at(browser, tmp_path / "report.html"))
