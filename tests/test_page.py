"""The page in a real browser: what it answers, shows and asks for, in a file and of a server."""

import base64
import gzip
import hashlib
import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

import vitral
from tests.chromium import Tab, chromium
from tests.conftest import SHARED
from tests.firefox import firefox
from tests.kinds import KINDS
from vitral.artifacts.about import About
from vitral.artifacts.engine import Answers
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.folder import save_checkpoint
from vitral.checkpoints.own import architecture
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.inference.engine import ClassifierEngine
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.ship.export.pixels import PixelsModel
from vitral.ship.export.web import can_be_looked_into, write_page
from vitral.ship.page import web
from vitral.ship.page.server import page_for_server

LABELS = ("heron", "otter", "<b>&quot;", "lynx", "newt", "ibis", "crane")
STARTED = "globalThis.vitral && vitral.started.then(() => true)"
ANSWERED = "vitral.page.items.length && vitral.page.items.every(({seen, error}) => seen || error)"
LIT = "!vitral.page.description.attention || vitral.page.looking.attention"


def classifier(*, multi_label: bool = False, **preprocess: Any) -> Classifier:
    """A small model with random weights, large enough that its answers differ."""
    torch.manual_seed(7)
    model = VisionTransformer(
        img_size=(48, 64), patch_size=16, embed_dim=24, num_layers=3, num_heads=2, num_classes=len(LABELS),
        embedding={"register_tokens": 1},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    prepared = Preprocess((48, 64), **preprocess)
    placement = Placement(torch.device("cpu"), torch.float32)
    module: Any = PixelsModel.portable(model)
    return Classifier(module, prepared, LABELS, placement, temperature=0.7, multi_label=multi_label)


def about_of(model: Classifier, abstain_below: float | None = None) -> About:
    return About(
        "a small <model>",
        model.preprocess,
        model.labels,
        model.temperature,
        model.multi_label,
        abstain_below,
        architecture=json.loads(json.dumps(architecture(model.model))),
        parameters=12_345,
        licence="MIT",
    )


@pytest.fixture(scope="module")
def small() -> Classifier:
    return classifier(crop_fraction=0.9, std=(0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def folder(small: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page")
    write_page(made, small, about_of(small), ClassifierEngine(small))
    return made


@pytest.fixture(scope="module")
def new_tab() -> Iterator[Callable[[], Tab]]:
    with chromium() as new:
        yield new


@pytest.fixture
def tab(new_tab: Callable[[], Tab], folder: Path) -> Tab:
    """The page of the small model, opened from a disk."""
    tab = new_tab()
    tab.look(1400)
    tab.open(f"file://{folder}/index.html")
    tab.wait_for(STARTED)
    return tab


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One picture of each of eleven kinds."""
    made = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[:123, :211]
    waves = np.stack([np.sin(x / 9 + c) + np.cos(y / (5 + c)) + np.sin(x * y / 900) for c in range(3)], -1)
    image = Image.fromarray(np.rint((waves + 3) / 6 * 255).astype(np.uint8))
    files = []
    for number, (ending, encode) in enumerate(KINDS.values()):
        files.append(made / f"{number:02}.{ending}")
        files[-1].write_bytes(encode(image))
    return files


def text(tab: Any, name: str) -> str:
    return tab.run(f"document.getElementById('{name}').textContent")


def give(tab: Tab, files: list[Path]) -> None:
    """Chooses files and waits until the last one is answered and looked into."""
    tab.give_files("#choose", files)
    tab.wait_for(ANSWERED)
    tab.wait_for(LIT)


def seen_by_page(tab: Any, files: list[Path]) -> list[dict[str, Any]]:
    """Pixels and probabilities of the page for files, through its door for scripts."""
    tab.run(
        "globalThis.keep ??= (vitral.page.intake.take = (files) => { globalThis.given = [...files]; }); 1"
    )
    tab.give_files("#choose", files)
    return tab.run(
        """(async () => {
          const found = [];
          for (const file of given) {
            const { pixels, probabilities } = await vitral.see(file);
            let characters = "";
            for (const byte of pixels.data) characters += String.fromCharCode(byte);
            found.push({ pixels: btoa(characters), probabilities });
          }
          return found;
        })()"""
    )


def assert_same_as_predict(
    tab: Any, model: Classifier, files: list[Path], levels: int = 0, probabilities: float = 1e-4
) -> None:
    for file, found in zip(files, seen_by_page(tab, files), strict=True):
        pixels_HWC = model.preprocess.pixels(file)
        shown_HWC = np.frombuffer(base64.b64decode(found["pixels"]), np.uint8).reshape(pixels_HWC.shape)
        assert np.abs(shown_HWC.astype(int) - pixels_HWC).max() <= levels, file.name
        with torch.inference_mode():
            expected = model.log_probabilities(model.preprocess(file)[None]).exp()[0].numpy()
        assert int(np.argmax(found["probabilities"])) == int(expected.argmax())
        np.testing.assert_allclose(found["probabilities"], expected, atol=probabilities)


# --- Without a browser -----------------------------------------------------------------------------


def test_the_policy_lets_the_page_run_its_scripts_and_ask_nobody(small: Classifier, tmp_path: Path) -> None:
    expected = Answers(np.zeros((1, 7), np.float32), np.zeros((1, 7), np.float32))
    page = web.write_web(tmp_path, about_of(small), b"a model", expected).read_text()
    rule = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0])
    assert rule.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in rule
    assert "unsafe-inline" not in rule
    assert "unsafe-eval" not in rule.replace("wasm-unsafe-eval", "")
    assert page.count("<script>") == 2
    assert "<b>&quot;" not in page  # a label is data
    assert len(page) < 6_500_000


def test_the_server_page_comes_with_its_headers() -> None:
    content, headers = page_for_server()
    assert b"http://" not in content.replace(b"http://www.w3.org", b"")
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert headers["Content-Type"].startswith("text/html")
    assert len(content) < 150_000


def test_what_is_vendored_is_what_its_list_says() -> None:
    vendor = Path(vitral.__file__).parent / "ship/page/vendor"
    for name, digest in json.loads((vendor / "versions.json").read_text())["files_sha256"].items():
        packed = vendor / f"{name}.gz"
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else (vendor / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert (packed if packed.exists() else vendor / name).stat().st_size < 5_000_000


def test_weights_too_large_for_a_page_are_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, small: Classifier, tmp_path: Path
) -> None:
    monkeypatch.setattr(web, "_MOST_MEGABYTES", 0.001)
    expected = Answers(np.zeros((1, 7), np.float32), np.zeros((1, 7), np.float32))
    with pytest.raises(VitralError, match="vitral serve"):
        web.write_web(tmp_path, about_of(small), b"0" * 2000, expected)
    assert not list(tmp_path.iterdir())


def test_attention_is_left_out_where_it_is_too_large(small: Classifier) -> None:
    assert can_be_looked_into(small)
    assert not can_be_looked_into(replace(small, preprocess=replace(small.preprocess, img_size=(2048, 2048))))


# --- The engine in the file ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_answers_as_predict_does(tab: Tab, small: Classifier, pictures: list[Path]) -> None:
    assert "Golden check passed: pixels exact" in text(tab, "state")
    assert_same_as_predict(tab, small, pictures)
    assert [url for url in tab.requests if not url.startswith(("blob:", "data:"))] == [
        tab.run("location.href")
    ]
    assert tab.complaints == []


@pytest.mark.slow
def test_firefox_answers_as_predict_does(small: Classifier, folder: Path, pictures: list[Path]) -> None:
    with firefox() as tab:
        tab.open(f"file://{folder}/index.html")
        tab.wait_for(STARTED)
        assert "Golden check passed: pixels exact" in text(tab, "state")
        # It lays transparency on white, and turns AVIF's colours to RGB, a level or two otherwise.
        others = [file for file in pictures if file.stem in ("06", "10")]
        assert_same_as_predict(tab, small, [file for file in pictures if file not in others])
        assert_same_as_predict(tab, small, others, levels=2, probabilities=1e-2)
        outside = [url for url in tab.requests if not url.startswith(("blob:", "data:"))]
        assert set(outside) <= {tab.run("location.href")}
        assert tab.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"interpolation": "bilinear", "resize": "squash"},
        {"interpolation": "lanczos", "resize": "longest"},
        {"interpolation": "nearest", "crop_rounding": "down", "crop_fraction": 0.8},
        {"mean": (0.4,), "std": (0.3,)},
    ],
)  # fmt: skip
def test_other_ways_to_prepare_pictures_are_followed(
    tab: Tab, small: Classifier, pictures: list[Path], options: dict[str, Any]
) -> None:
    """The page's own arithmetic against Pillow's: pixels alone, on the page of another model."""
    other = Preprocess((37, 53), **options)
    told = json.dumps({**asdict(other), "rows_first": web.resizes_rows_first()})
    tab.run(f"vitral.page.engine.about.preprocess = {told}; 1")
    tab.run("vitral.page.engine.run = async () => ({ probabilities: [1] }); 1")
    for file, found in zip(pictures[::3], seen_by_page(tab, pictures[::3]), strict=True):
        expected = other.pixels(file)
        shown = np.frombuffer(base64.b64decode(found["pixels"]), np.uint8).reshape(37, 53, 3)
        np.testing.assert_array_equal(shown, expected, err_msg=f"{file.name} {options}")


@pytest.mark.slow
def test_a_pane_shows_what_it_attends_to(tab: Tab, small: Classifier, pictures: list[Path]) -> None:
    give(tab, pictures[:2])
    seen = vitral.Inside(small).attention(pictures[0], layers=[0, 1, 2], queries=["class", (1, 2)])
    row = "Array.from(vitral.page.looking.attention.row(%d, %d, %d))"
    prefix = 2  # the class token and a register
    for layer in range(3):
        for head in range(2):
            for index, token in ((0, 0), (1, prefix + 1 * 4 + 2)):
                expected = seen.values[0, layer, head, index].flatten().numpy()
                found = np.array(tab.run(row % (layer, head, token)))[prefix:]
                np.testing.assert_allclose(found, expected, atol=expected.max() / 200)


@pytest.mark.slow
def test_mouse_keyboard_and_sliders_change_the_window(tab: Tab, pictures: list[Path]) -> None:
    give(tab, pictures[:1])
    light = "Array.from(vitral.page.glass.wanted)"
    x, y, width, height = tab.run(
        "(({ x, y, width, height }) => [x, y, width, height])"
        "(document.getElementById('window').getBoundingClientRect())"
    )
    assert set(tab.run(light)) == {1}
    tab.mouse(x + width * 0.3, y + height * 0.3)
    hovered = tab.wait_for(f"vitral.page.looking.query !== null && {light}")
    assert len(set(hovered)) > 3
    tab.mouse(x + width * 0.7, y + height * 0.7)
    tab.wait_for(f"JSON.stringify({light}) !== {json.dumps(json.dumps(hovered))}.replaceAll(' ', '')")
    tab.mouse(3, 3)
    tab.wait_for(f"{light}.every((value) => value === 1)")  # nothing is pinned
    tab.run("document.getElementById('window').focus()")
    tab.key("ArrowRight")
    assert "row 2, column 3 looks most at" in text(tab, "readout")
    tab.key("ArrowLeft")
    assert "row 2, column 2 looks most at" in text(tab, "said")  # a screen reader is told
    tab.key("PageDown")
    assert text(tab, "layer-value") == "2 of 3"
    assert text(tab, "readout").startswith("Layer 2, mean of 2 heads.")
    before = tab.run(light)
    tab.run("{ const head = document.getElementById('head'); head.focus(); }")
    tab.key("ArrowRight")
    tab.wait_for("document.getElementById('head-value').textContent === '1 of 2'")
    assert tab.run(light) != before
    tab.run("document.getElementById('window').focus()")
    tab.key("Home")
    assert "The class token looks most at" in text(tab, "readout")
    assert tab.run("document.querySelector('.roundel').getAttribute('aria-pressed')") == "true"
    tab.key("Escape")
    assert set(tab.run(light)) == {1}


@pytest.mark.slow
def test_labels_are_compared_by_covering_panes(tab: Tab, small: Classifier, pictures: list[Path]) -> None:
    give(tab, pictures[1:2])
    found = tab.run(
        "vitral.page.engine.compare(vitral.page.current.seen,"
        " { of: 'otter', against: 'newt', told() {}, stopped: () => false })"
        ".then(({ values, method }) => ({ values: Array.from(values), method }))"
    )
    pixels_HWC = small.preprocess.pixels(pictures[1])
    covered = np.repeat(pixels_HWC[None], 12, 0)
    for pane in range(12):
        row, column = divmod(pane, 4)
        covered[pane, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = small.preprocess.fill
    logits = ClassifierEngine(small)(np.concatenate([pixels_HWC[None], covered])).logits
    score = logits[:, 1] - logits[:, 4]
    np.testing.assert_allclose(found["values"], score[0] - score[1:], atol=1e-4 * abs(logits).max())
    assert "mean colour" in found["method"]
    tab.run("document.getElementById('compare-go').click()")
    tab.wait_for("document.getElementById('compare-method').textContent")
    assert "Amber panes speak for" in text(tab, "readout")
    assert tab.run("vitral.page.glass.signed") is True


@pytest.mark.slow
def test_several_pictures_a_bad_one_and_a_pasted_one(tab: Tab, pictures: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "words.jpg"
    bad.write_text("no picture")
    give(tab, [*pictures[:3], bad])
    assert tab.run("document.querySelectorAll('#strip li').length") == 4
    assert tab.run("document.querySelectorAll('#strip .failed').length") == 1
    assert tab.run("document.getElementById('error').hidden") is True  # the first one is shown, and is well
    tab.run("document.querySelectorAll('#strip button')[3].click()")
    assert "words.jpg is no picture that this browser can read" in text(tab, "error")
    assert "\n" not in text(tab, "error")
    tab.run(
        """(async () => {
          const canvas = Object.assign(document.createElement("canvas"), { width: 90, height: 70 });
          const blob = await new Promise((resolve) => canvas.toBlob(resolve));
          const data = new DataTransfer();
          data.items.add(new File([blob], "pasted.png", { type: "image/png" }));
          dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
          const drop = new DataTransfer();
          drop.items.add(new File([blob], "dropped.png", { type: "image/png" }));
          dispatchEvent(new DragEvent("drop", { dataTransfer: drop, cancelable: true }));
        })()"""
    )
    tab.wait_for("document.querySelectorAll('#strip li').length === 6")
    tab.wait_for(ANSWERED)
    assert tab.run("document.querySelectorAll('#strip .failed').length") == 1
    assert tab.complaints == []


@pytest.mark.slow
def test_a_changed_weight_is_noticed(new_tab: Callable[[], Tab], folder: Path, tmp_path: Path) -> None:
    page = Path(folder, "index.html").read_text()
    begin = page.index('id="model">') + len('id="model">')
    end = page.index("</script>", begin)
    content = bytearray(base64.b64decode(page[begin:end]))
    model = onnx.load_from_string(bytes(content))
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights = numpy_helper.to_array(largest).copy()
    weights.flat[weights.size // 2] += 1
    largest.raw_data = weights.tobytes()
    changed = base64.b64encode(model.SerializeToString()).decode()
    (tmp_path / "index.html").write_text(page[:begin] + changed + page[end:])
    tab = new_tab()
    tab.open(f"file://{tmp_path}/index.html")
    tab.wait_for(STARTED)
    assert "Golden check failed" in text(tab, "state")
    assert "do not trust its answers" in text(tab, "error")


@pytest.mark.slow
def test_a_model_that_is_not_sure_and_one_of_several_labels(
    new_tab: Callable[[], Tab], tmp_path: Path, pictures: list[Path]
) -> None:
    for model, below in ((classifier(), 0.999), (classifier(multi_label=True), None)):
        write_page(tmp_path, model, about_of(model, below), ClassifierEngine(model))
        tab = new_tab()
        tab.open(f"file://{tmp_path}/index.html")
        tab.wait_for(STARTED)
        give(tab, pictures[:1])
        shares = model.predict(pictures[0], top=7)[0].top
        if below:
            assert text(tab, "headline") == "Not sure"
            assert "not sure" in text(tab, "said")
        else:
            there = [label for label, probability in shares if probability >= 0.5]
            assert text(tab, "headline") == (", ".join(there) or "None of its labels")
        found = tab.run(
            "[...document.querySelectorAll('#bars li')].map((row) => Number(row.dataset.probability))"
        )
        np.testing.assert_allclose(found, [share for _, share in shares][: len(found)], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme"), [(1400, "light"), (1400, "dark"), (400, "light"), (400, "dark")]
)
def test_it_fits_and_axe_finds_nothing(
    new_tab: Callable[[], Tab], folder: Path, pictures: list[Path], width: int, scheme: str
) -> None:
    packages = Path(os.environ.get("VITRAL_AXE", ""), "node_modules/axe-core/axe.min.js")
    tab = new_tab()
    tab.look(width, 900, scheme)
    tab.send(
        "Page.setBypassCSP", enabled=True
    )  # axe is a script of ours, which the page's own policy keeps out
    tab.open(f"file://{folder}/index.html")
    tab.wait_for(STARTED)
    give(tab, pictures[:3])
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    if not packages.is_file():
        pytest.skip("it fits; axe needs VITRAL_AXE: a folder with axe-core")
    tab.run("document.querySelector('details').open = true; 1")
    tab.run(f"{packages.read_text()}; 1")
    found = tab.run(
        "axe.run({ resultTypes: ['violations'] })"
        ".then(({ violations }) => violations.map(({ id, nodes }) => `${id}: ${nodes[0].html}`))"
    )
    assert found == []


# --- A server's ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(small: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vitral serve` of the small model, in a process of its own; its address."""
    made = tmp_path_factory.mktemp("served") / "model"
    model: Any = small.model
    save_checkpoint(
        made, Checkpoint(model, small.preprocess, small.labels, {}, temperature=small.temperature)
    )
    words = [sys.executable, "-m", "vitral", "serve", str(made), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        yield next(found[0] for line in process.stdout if (found := re.search(r"http://[\w.]+:\d+", line)))
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_the_page_of_a_server_answers_looks_and_compares(
    new_tab: Callable[[], Tab], served: str, small: Classifier, pictures: list[Path]
) -> None:
    tab = new_tab()
    tab.look(1400)
    tab.open(f"{served}/")
    tab.wait_for(STARTED)
    assert "ready" in text(tab, "state")
    give(tab, pictures[:2])
    shares = small.predict(pictures[0], top=7)[0].top
    found = tab.run(
        "[...document.querySelectorAll('#bars li')].map((row) => Number(row.dataset.probability))"
    )
    np.testing.assert_allclose(found, [share for _, share in shares[:5]], atol=1e-5)
    assert text(tab, "headline") == shares[0][0]
    row = np.array(tab.run("Array.from(vitral.page.looking.attention.row(1, 1, 0))"))[2:]
    expected = vitral.Inside(small).attention(pictures[0], layers=[1]).values[0, 0, 1, 0].flatten().numpy()
    np.testing.assert_allclose(row, expected, atol=expected.max() / 200)
    tab.run("document.getElementById('compare-go').click()")
    tab.wait_for("document.getElementById('compare-method').textContent")
    light = np.array(tab.run("Array.from(vitral.page.glass.wanted)"))
    maps = vitral.Inside(small).relevance(pictures[0], target=shares[0][0], against=shares[1][0])
    values = maps.values[0].flatten().numpy()
    np.testing.assert_allclose(light, np.sign(values) * (abs(values) / abs(values).max()) ** 0.75, atol=1e-2)
    asked = {url for url in tab.requests if not url.startswith(("blob:", "data:"))}
    assert all(url.startswith(served) for url in asked)
    assert tab.complaints == []


# --- Many files ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path(SHARED, "data/photos").is_dir(), reason="needs the photographs of ../shared")
def test_photographs_of_eleven_kinds_give_the_numbers_of_predict(
    tab: Tab, small: Classifier, tmp_path: Path
) -> None:
    """VITRAL_PAGE_FILES of them, 44 if it is not set; bar 2 asks for 1,000."""
    count = int(os.environ.get("VITRAL_PAGE_FILES", "44"))
    photographs = sorted(Path(SHARED, "data/photos").iterdir())
    files = []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        ending, encode = KINDS[kind]
        files.append(tmp_path / f"{number:04}.{ending}")
        with Image.open(photographs[number // len(KINDS) % len(photographs)]) as image:
            files[-1].write_bytes(encode(image.convert("RGB")))
        if len(files) == 22 or number == count - 1:
            assert_same_as_predict(tab, small, files)
            files = []
