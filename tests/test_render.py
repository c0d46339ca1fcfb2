"""Maps lie where they belong on the picture, in the colours that the bar shows, always in the same bytes."""

import io
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from vitral.explain.render import Panel, Scale, Strip, enlarged, overlay, png, sheet
from vitral.runtime.errors import VitralError

GRIDS = [(16, 16), (7, 7), (37, 37), (8, 8), (3, 5), (1, 1)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def grey(width: int, height: int, value: int) -> Image.Image:
    return Image.new("RGB", (width, height), (value,) * 3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_patch_colours_exactly_its_own_pixels(grid: tuple[int, int]) -> None:
    rows, columns = grid
    patch = 11
    seen = picture(columns * patch, rows * patch)
    before = np.zeros(grid)
    after = before.copy()
    row, column = rows // 2, columns - 1
    after[row, column] = 1
    scale = Scale(0, 1)
    drawn = [np.asarray(overlay(seen, values, scale, smooth=False)) for values in (before, after)]
    changed = (drawn[0] != drawn[1]).any(axis=-1)
    expected = np.zeros_like(changed)
    expected[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = True
    assert (changed == expected).all()


@pytest.mark.parametrize(
    ("low", "high", "table"), [(0.2, 7.5, "inferno"), (-3.0, 3.0, "coolwarm")], ids=["amounts", "signed"]
)
def test_colours_are_matplotlibs_over_the_picture(low: float, high: float, table: str) -> None:
    values = np.linspace(low, high, 12).reshape(3, 4)
    on_black, on_white = (
        np.asarray(overlay(grey(4, 3, under), values, Scale(low, high), smooth=False)) / 255
        for under in (0, 255)
    )
    opacity = 1 - (on_white - on_black)
    colours = ScalarMappable(Normalize(low, high), matplotlib.colormaps[table]).to_rgba(values)[..., :3]
    assert np.allclose(on_black, opacity * colours, atol=0.004)
    if table == "inferno":
        assert opacity[0, 0, 0] < opacity[1, 1, 0] < opacity[2, 3, 0]
    else:
        assert opacity[0, 0, 0] > 3 * opacity[1, 1, 0], "what counts for nothing leaves the picture plain"
        assert np.allclose(opacity, opacity[::-1, ::-1], atol=0.01)


def test_values_of_both_signs_have_zero_in_the_middle() -> None:
    assert Scale.of([np.array([[-1.0, 2.0]]), np.array([[0.5, 4.0]])]) == Scale(-4.0, 4.0)
    assert Scale.of([np.array([[-5.0, 2.0]])]) == Scale(-5.0, 5.0)
    assert Scale.of([np.array([[1.0, 2.0]]), np.array([[0.0, 4.0]])]) == Scale(0.0, 4.0)
    assert Scale.of([np.array([[-3.0, -1.0]])]) == Scale(-3.0, -1.0)


def test_a_smooth_map_goes_through_the_values_of_its_patches() -> None:
    values = np.random.default_rng(1).random((5, 9))
    seen = picture(9, 5)
    scale = Scale.of([values])
    assert overlay(seen, values, scale) == overlay(seen, values, scale, smooth=False)
    even = np.full((4, 4), 0.3)
    assert (
        len(np.unique(np.asarray(overlay(grey(32, 32, 90), even, Scale(0, 1))).reshape(-1, 3), axis=0)) == 1
    )
    ramp = np.asarray(overlay(grey(64, 8, 0), np.arange(8.0)[None], Scale(0, 7)))[0].sum(axis=-1)
    assert (np.diff(ramp.astype(int)) >= -1).all(), "inferno grows ever brighter"
    assert len(set(ramp.tolist())) > 30


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_an_enlarged_picture_has_the_same_pixels_for_each_patch(grid: tuple[int, int]) -> None:
    shown = enlarged(picture(grid[1] * 14, grid[0] * 14), grid, 384)
    assert shown.width * grid[0] == shown.height * grid[1]
    assert shown.width % grid[1] == 0
    assert 300 < max(shown.size) < 400


def test_the_pixels_of_a_small_picture_stay_squares() -> None:
    seen = picture(32, 32)
    shown = enlarged(seen, (8, 8), 384)
    assert shown == seen.resize((384, 384), Image.Resampling.NEAREST)


def strips(count: int, grid: tuple[int, int] = (4, 4)) -> list[Strip]:
    maps = np.random.default_rng(2).random((count, *grid))
    return [
        Strip([Panel(values, f"map {i}", "of a test") for i, values in enumerate(maps)], "method", "words")
    ]


def test_a_sheet_is_the_picture_and_its_maps_on_one_scale() -> None:
    seen = picture(64, 64)
    [strip] = strips(2)
    drawn = sheet(seen, "cat.jpg", ["cat 93.1%"], [strip], ["a note"])
    shown = enlarged(seen, (4, 4), 384)
    top = 48 + 20 + 32
    for place, expected in enumerate(
        [shown, *(overlay(shown, panel.values, strip.scale) for panel in strip.panels)]
    ):
        left = 16 + place * (384 + 16)
        assert drawn.crop((left, top, left + 384, top + 384)) == expected
    bar = np.asarray(drawn)[top : top + 384, 16 + 3 * 400 + 4]
    ends = overlay(grey(1, 2, 128), np.array([[strip.scale.high], [strip.scale.low]]), strip.scale)
    assert np.abs(bar[[0, -1]].astype(int) - np.asarray(ends)[:, 0]).max() <= 1


@pytest.mark.parametrize(("count", "grid"), [(1, (4, 4)), (16, (4, 8)), (3, (30, 2)), (7, (2, 30))])
def test_a_sheet_is_no_wider_than_a_screen(count: int, grid: tuple[int, int]) -> None:
    drawn = sheet(picture(30, 30), "a name " * 100, ["labels " * 100], strips(count, grid), ["words " * 200])
    assert drawn.width < 1800


def test_the_same_maps_give_the_same_bytes_and_no_trace() -> None:
    first, second = (png(sheet(picture(64, 64), "cat.jpg", [], strips(3))) for _ in range(2))
    assert first == second
    assert Image.open(io.BytesIO(first)).info == {}


def test_a_constant_map_and_strange_names_are_drawn() -> None:
    constant = [Strip([Panel(np.zeros((2, 2)), "žába\n猫\x1b[2J", "")], "")]
    assert sheet(picture(8, 8), "", [""], constant).height > 300


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(VitralError, match=r"pip install 'vitral\[explain\]'"):
        overlay(grey(2, 2, 0), np.ones((1, 1)), Scale(0, 1))
