"""simplejpeg beside Pillow: the same bytes at each scale, and Pillow's word on what is damaged."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitral.images import picture, turbo
from vitral.images.picture import undecoded
from vitral.runtime.errors import ImageError

pytest.importorskip("simplejpeg")


def photograph(height: int, width: int, mode: str = "RGB", **options: Any) -> bytes:
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(coarse) + rng.normal(0, 12, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def pixels_of(content: bytes, scale: int) -> np.ndarray:
    with undecoded(content) as found:
        return found.pixels(scale)


def without(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(picture, "turbo_pixels", lambda *_: None)
        return do()


TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("options", "decodes"),
    [
        *(({"subsampling": kind, "quality": 90}, True) for kind in (0, 1, 2)),
        ({"progressive": True}, True),
        ({"quality": 20, "optimize": True}, True),
        ({"restart_marker_blocks": 4}, True),
        ({"mode": "L"}, False),
        ({"mode": "CMYK"}, False),
        ({"exif": TURNED}, False),
    ],
)
def test_pixels_are_pillow_s_to_the_bit(
    options: dict[str, Any], decodes: bool, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ((64, 64), (67, 129), (375, 500), (512, 301)):
        content = photograph(*size, **options)
        with Image.open(io.BytesIO(content)) as image:
            assert (turbo.turbo_pixels(image, scale) is not None) == decodes
        wanted = without(monkeypatch, lambda content=content: pixels_of(content, scale))
        assert np.array_equal(pixels_of(content, scale), wanted)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("scale", [1, 2])
def test_what_is_torn_is_told_of_as_without(
    share: float, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = photograph(375, 500)
    torn = content[: int(share * len(content))]

    def told() -> str:
        with pytest.raises(ImageError) as raised:
            pixels_of(torn, scale)
        return str(raised.value)

    assert told() == without(monkeypatch, told)


def test_bytes_that_are_changed_give_what_they_give_without(monkeypatch: pytest.MonkeyPatch) -> None:
    content, rng = photograph(120, 160), np.random.default_rng(1)

    def outcome(changed: bytes) -> np.ndarray | str:
        try:
            return pixels_of(changed, 2)
        except ImageError as error:
            return str(error)

    for _ in range(200):
        changed = bytearray(content)
        for place in rng.integers(2, len(content), 3):
            changed[place] = rng.integers(256)
        found = outcome(bytes(changed))
        wanted = without(monkeypatch, lambda changed=changed: outcome(bytes(changed)))
        assert np.array_equal(found, wanted) if isinstance(wanted, np.ndarray) else found == wanted
