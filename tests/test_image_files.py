"""What is a picture, what it may cost and which way up it is: files of every kind, and bombs made here."""

import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitral.data.sources import find_images
from vitral.images import files as image_files
from vitral.images.files import IMAGE, kind_of_content
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import ImageError, VitralError

HANG_SECONDS = 30  # generous: a hang lasts for ever


def picture(width: int = 32, height: int = 24, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def flat_png(width: int, height: int, depth: int, colour_type: int, *extra: bytes) -> bytes:
    """A PNG of zeros, compressed a thousand times."""
    channels = {0: 1, 2: 3, 6: 4}[colour_type]
    line = b"\0" + bytes(width * channels * depth // 8)
    packer = zlib.compressobj(9)
    data = b"".join([*(packer.compress(line) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def many_scans(scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(picture(*size), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * scans + data[end:]


# --- Metadata ------------------------------------------------------------------------------------


def with_exif(exif: bytes, kind: str) -> bytes:
    data = encoded(picture(), kind)
    if kind == "PNG":
        at = data.index(b"IDAT") - 4
        return data[:at] + chunk(b"eXIf", exif) + data[at:]
    part = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part + data[2:]


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", 0)


TURNED, UPRIGHT = (0x112, 3, 1, 6), (0x112, 3, 1, 1)
MAKE_OF_A_WRONG_TYPE = (0x10F, 5, 1, 8)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (with_exif(b"\x00\x08\x00\x02\x01\x12\x00\x03" + bytes(20), "PNG"), (32, 24)),
        (with_exif(b"Exif\0\0garbage", "PNG"), (32, 24)),
        (with_exif(tiff(MAKE_OF_A_WRONG_TYPE, TURNED), "JPEG"), (24, 32)),
        (with_exif(tiff(MAKE_OF_A_WRONG_TYPE, UPRIGHT), "JPEG"), (32, 24)),
        (with_exif(tiff((0x112, 2, 1, 6)), "JPEG"), (32, 24)),
        (with_exif(tiff((0x112, 3, 1, 77)), "JPEG"), (32, 24)),
    ],
    ids=["no TIFF", "garbage", "make, turned", "make, upright", "text", "no orientation"],
)
def test_metadata_cannot_hide_pixels(data: bytes, size: tuple[int, int]) -> None:
    assert open_image(data).size == size


def test_a_turned_picture_has_the_pixels_of_pillows_own_turning() -> None:
    data = with_exif(tiff(TURNED), "JPEG")
    with Image.open(io.BytesIO(data)) as stored:
        expected = stored.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert open_image(data).tobytes() == expected.tobytes()


def test_a_picture_of_the_callers_stays_as_it_is() -> None:
    theirs = picture()
    ours = open_image(theirs)
    ours.putpixel((0, 0), (1, 2, 3))
    assert theirs.tobytes() == picture().tobytes()


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "F"])
def test_pictures_of_many_bands_are_scaled_by_one_scale(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest value, in the last band, decides for all."""
    values = np.linspace(0, 60_000, 40 * 30).reshape(30, 40)
    kind = {"I": np.int32, "I;16": "<u2", "I;16B": ">u2", "F": np.float32}[mode]
    image = Image.fromarray(values.astype(kind))
    whole = open_image(image).tobytes()
    monkeypatch.setattr("vitral.images.picture._BAND_PIXELS", 130)
    assert open_image(image).tobytes() == whole


def test_transparent_pictures_of_many_bands_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 4)).astype(np.uint8))
    paletted = encoded(picture(40, 30).quantize(16), "PNG", transparency=3)
    for source in (clear, paletted):
        whole = open_image(source).tobytes()
        with monkeypatch.context() as patch:
            patch.setattr("vitral.images.picture._BAND_PIXELS", 130)
            assert open_image(source).tobytes() == whole


# --- Formats -------------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def test_postscript_called_jpg_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *words, **_: started.append(words))
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    for name in ("photo.jpg", "photo.eps"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        with pytest.raises(
            ImageError, match=r"not an image, or of a format that Vitral does not read \(JPEG"
        ):
            open_image(tmp_path / name)
    assert not started


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"])
def test_known_formats_are_known_by_their_content(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(encoded(picture(), kind))
    assert open_image(file).size == (32, 24)
    assert kind_of_content(str(file)) == IMAGE
    assert find_images([str(tmp_path)]).files == [str(file)]


def test_mpo_is_read(tmp_path: Path) -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert open_image(data).size == (32, 24)


HEIC_START = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"


def test_heic_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "heif_is_there", lambda: False)
    (tmp_path / "a.heic").write_bytes(HEIC_START)
    (tmp_path / "b.jpg").write_bytes(HEIC_START)
    (tmp_path / "c.png").write_bytes(encoded(picture(), "PNG"))
    with pytest.raises(ImageError, match=r"HEIC image; .* pip install 'vitral\[heif\]'"):
        open_image(tmp_path / "b.jpg")
    found = find_images([str(tmp_path)])
    assert [Path(file).name for file in found.files] == ["b.jpg", "c.png"]
    (note,) = found.notes
    assert note == (
        "skipped files that are not images: 1 HEIC; to open HEIC, install pillow-heif: "
        "pip install 'vitral[heif]'"
    )


def test_heic_is_read_and_upright_where_its_package_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x112] = 6
    file = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(file, exif=exif.tobytes())
    before = dict(Image.OPEN)
    assert open_image(file.getvalue()).size == (24, 32)
    assert before == Image.OPEN


def test_suffixes_in_any_case() -> None:
    assert {kind_of_content(name) for name in ("a.JPE", "b.mpo", "c.JFIF", "d.apng", "e.pbm", "f.jpx")} == {
        IMAGE
    }
    others = ["a.TXT", "b.eps", "c.svg", "d.pdf"]
    assert [kind_of_content(name) for name in others] == [".txt", ".eps", ".svg", ".pdf"]
    assert kind_of_content("there is no such file") == "without a suffix"


# --- Regular files -------------------------------------------------------------------------------


@pytest.fixture
def irregular(tmp_path: Path) -> Iterator[dict[str, Path]]:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        before = Path.cwd()
        os.chdir(tmp_path)  # a socket's path may have some hundred bytes
        listening.bind("socket.png")
        os.chdir(before)
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        yield {name: tmp_path / f"{name}.png" for name in ("pipe", "folder", "socket", "zero")}


def test_only_regular_files_are_opened(irregular: dict[str, Path]) -> None:
    kinds = {"pipe": "a named pipe", "folder": "a folder", "socket": "a socket", "zero": "a device"}
    for name, kind in kinds.items():
        with pytest.raises(ImageError, match=f"is {kind}; only regular files are read"):
            open_image(irregular[name])


def test_irregular_files_in_a_folder_are_passed_over_and_counted(irregular: dict[str, Path]) -> None:
    root = irregular["pipe"].parent
    (root / "good.png").write_bytes(encoded(picture(), "PNG"))
    for word in (str(root), f"{root}/*"):
        found = find_images([word])
        assert found.files == [str(root / "good.png")]
        assert found.notes[0].startswith("skipped files that are not images: ")
        assert {"1 named pipe", "1 socket", "1 device"} <= set(re.split(": |, ", found.notes[0]))


def test_missing_permission_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("PIL.Image.open", denied)
    with pytest.raises(ImageError, match=r"^may not be read: permission is missing$"):
        open_image(tmp_path / "a.png")


# --- What it may cost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "colour_type"), [(16, 0), (8, 6), (8, 2)], ids=["16-bit grey", "RGBA", "RGB"]
)
def test_a_png_of_few_bytes_and_many_pixels_is_refused_by_its_header(depth: int, colour_type: int) -> None:
    bomb = flat_png(8, 8, depth, colour_type).replace(
        struct.pack(">II", 8, 8), struct.pack(">II", 13_000, 13_000)
    )
    at = bomb.index(b"IHDR")
    bomb = bomb[: at + 17] + struct.pack(">I", zlib.crc32(bomb[at : at + 17])) + bomb[at + 21 :]
    with pytest.raises(ImageError, match=r"is too large for what is in it: 13,000x13,000 pixels in .* bytes"):
        open_image(bomb)


def test_a_picture_that_takes_more_than_the_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_ROOM_BYTES", 32 * 24 * 8 - 1)
    with pytest.raises(ImageError, match=r"is too large: to decode 32x24 pixels of PNG takes some"):
        open_image(encoded(picture().convert("RGBA"), "PNG"))
    assert open_image(encoded(picture(), "PNG")).size == (32, 24)


def test_a_jpeg_of_many_scans_is_refused_and_one_of_some_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_MOST_SCANNED_PIXELS", 64 * 64 * 50)
    assert open_image(many_scans(20)).size == (64, 64)
    with pytest.raises(ImageError, match=r"is too slow to decode: 64x64 pixels in 1,0.. scans"):
        open_image(many_scans(1000))
    # A comment that holds the end's marker hides no scans.
    data = many_scans(1000)
    at = data.index(b"\xff\xda")
    with pytest.raises(ImageError, match="too slow"):
        open_image(data[:at] + b"\xff\xfe\x00\x06\xff\xd9\xff\xd9" + data[at:])


def test_what_follows_the_end_of_a_jpeg_is_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telephones append films to their photographs."""
    monkeypatch.setattr(image_files, "_MOST_SCANNED_PIXELS", 64 * 64 * 30)
    data = encoded(picture(64, 64), "JPEG", progressive=True) + b"\xff\xda\0\x02" * 1000
    assert open_image(data).size == (64, 64)


def test_a_narrow_picture_is_not_enlarged_to_gigabytes() -> None:
    with pytest.raises(ImageError, match="too narrow"):
        Preprocess((224, 224))(Image.new("L", (1, 60_000)))


def test_chunks_that_unpack_to_much_are_no_pixels(tmp_path: Path) -> None:
    """Pillow itself refuses them; what matters is one reason and little memory."""
    text = b"comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    profile = b"profile\0\0" + zlib.compress(bytes(50_000_000), 9)
    for extra in (chunk(b"zTXt", text), chunk(b"iCCP", profile)):
        start = time.monotonic()
        with suppress(ImageError):
            assert open_image(flat_png(8, 8, 8, 2, extra)).size == (8, 8)
        assert time.monotonic() - start < HANG_SECONDS


def test_together_no_more_is_decoded_than_there_is_room_for() -> None:
    room, inside, most = image_files._Room(100), [0], [0]

    def decode(wanted: int) -> None:
        with room.taken(wanted):
            inside[0] += wanted
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= wanted

    threads = [threading.Thread(target=decode, args=(wanted,)) for wanted in (40, 50, 60, 90, 30, 20) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert 40 <= most[0] <= 100


def test_many_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    data = with_exif(b"Exif\0\0garbage", "PNG")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [open_image(data) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# --- Channels --------------------------------------------------------------------------------------


def classifier_of(channels: int) -> Classifier:
    model = VisionTransformer(
        img_size=16,
        patch_size=8,
        in_channels=channels,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        num_classes=2,
    )
    preprocess = Preprocess((16, 16), mean=(0.4,) * channels, std=(0.2,) * channels)
    return Classifier(model.eval(), preprocess, ("a", "b"), Placement.choose("cpu", "float32"))


def test_a_grey_model_sees_the_grey_of_any_picture() -> None:
    preprocess = Preprocess((24, 24), resize="squash", mean=(0.5,), std=(0.5,))
    tensor = preprocess(picture())
    grey = picture().convert("L").resize((24, 24), Image.Resampling.BICUBIC)
    expected = (np.asarray(grey) / 255 - 0.5) / 0.5
    assert tensor.shape == (1, 24, 24)
    np.testing.assert_allclose(tensor[0].numpy(), expected, atol=1e-6)
    held = preprocess.normalize_pixels(preprocess_pixels(preprocess))
    np.testing.assert_array_equal(held[0].numpy(), tensor.numpy())


def preprocess_pixels(preprocess: Preprocess) -> Any:
    import torch

    return torch.from_numpy(np.array(preprocess.fit(preprocess.open(picture()))))[None]


def test_a_grey_model_answers() -> None:
    for source in (picture(), picture().convert("L"), np.zeros((20, 30), np.uint8)):
        (prediction,) = classifier_of(1).predict(source)
        assert prediction.error is None


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_other_channels_are_refused_in_true_words(channels: int) -> None:
    with pytest.raises(VitralError, match=f"the model takes {channels} channels, and pictures have 3"):
        classifier_of(channels).predict(picture())


def test_one_mean_for_each_channel() -> None:
    colour = Preprocess((8, 8), mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4))
    grey = colour.for_channels(1)
    np.testing.assert_allclose([*grey.mean, *grey.std], [0.2, 0.3])
    assert colour.for_channels(3) is colour
    with pytest.raises(ValueError, match="of the same channels"):
        Preprocess((8, 8), mean=(0.5,))


def test_pictures_open_in_a_child_while_a_thread_of_its_parent_decodes() -> None:
    """A fork copies a lock that is held, and none who would free it."""
    code = (
        "import io, os, threading, time\n"
        "from PIL import Image\n"
        "from vitral.images import files as image_files\n"
        "from vitral.images.picture import open_image\n"
        "file = io.BytesIO(); Image.new('RGB', (8, 8)).save(file, 'PNG')\n"
        "def hold():\n"
        "    with image_files._room.taken(image_files._ROOM_BYTES): time.sleep(60)\n"
        "threading.Thread(target=hold, daemon=True).start(); time.sleep(0.2)\n"
        "child = os.fork()\n"
        "if not child: open_image(file.getvalue()); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True); os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS * 2
    )
    assert done.stdout.strip() == "7", done.stderr
