"""Three thousand damaged and hostile pictures, and a hundred parquet files: refused in a line, or opened.

Each crowd is opened in a child process, whose peak of memory and slowest picture are measured. The seed is
fixed, so that what fails once fails again.
"""

import io
import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer

PICTURES, PREDICTED, PARQUET = 3000, 150, 100
MOST_SECONDS, MOST_BYTES = 10.0, 1_000_000_000

# Opens what stands in the folder that is named, one after the other, and says what each took.
CHILD = r"""
import json, re, sys, time
from pathlib import Path
from vitral.runtime.errors import VitralError
from vitral.data.image_data import open_data
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess

def status(key):
    return 1024 * int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

def parquet(file):
    data = open_data(str(file), val_fraction=0)
    data.describe()
    images = data.split("train").images
    for row in range(min(len(images), 3)):
        open_image(images[row])

tries = {".parquet": parquet}
preprocess = Preprocess((32, 32))
open_image(sorted(Path(sys.argv[1]).glob("sound-*"))[0])
Path("/proc/self/clear_refs").write_text("5")
before, found = status("VmRSS"), []
for file in sorted(Path(sys.argv[1]).iterdir()):
    start, text, kind = time.process_time(), "", "opened"
    try:
        tries.get(file.suffix, preprocess)(file)
    except VitralError as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        kind, text = "defect", repr(error)
    found.append((file.name, kind, text, time.process_time() - start))
print(json.dumps({"files": found, "bytes": status("VmHWM") - before}))
"""


def opened_in_a_child(folder: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_all_ended_well(report: dict[str, Any], count: int) -> None:
    files = report["files"]
    assert len(files) >= count
    assert not [file for file in files if file[1] == "defect"]
    assert not [file for file in files if "\n" in file[2] or (file[1] == "refused" and not file[2])]
    assert max(seconds for *_, seconds in files) < MOST_SECONDS
    assert report["bytes"] < MOST_BYTES


# --- Damage ----------------------------------------------------------------------------------------


def picture(draw: random.Random) -> Image.Image:
    shape = draw.randint(1, 90), draw.randint(1, 90), 3
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, shape).astype(np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(draw: random.Random) -> Image.Exif:
    tags = Image.Exif()
    tags[0x112] = draw.randint(0, 9)
    tags[0x10F] = "maker" * draw.randint(1, 1000)
    return tags


def film(draw: random.Random, kind: str) -> bytes:
    first = picture(draw)
    return encoded(first, kind, save_all=True, append_images=[first.transpose(Image.Transpose.ROTATE_180)])


SOUND: dict[str, Callable[[random.Random], bytes]] = {
    "jpeg": lambda draw: encoded(picture(draw), "JPEG", exif=exif(draw)),
    "progressive": lambda draw: encoded(picture(draw), "JPEG", progressive=True, exif=exif(draw)),
    "cmyk": lambda draw: encoded(picture(draw).convert("CMYK"), "JPEG"),
    "mpo": lambda draw: film(draw, "MPO"),
    "png": lambda draw: encoded(picture(draw), "PNG", exif=exif(draw)),
    "palette": lambda draw: encoded(picture(draw).quantize(9), "PNG", transparency=3),
    "grey16": lambda draw: encoded(Image.fromarray(np.full((9, 7), draw.randrange(2**16), np.uint16)), "PNG"),
    "apng": lambda draw: film(draw, "PNG"),
    "gif": lambda draw: film(draw, "GIF"),
    "webp": lambda draw: encoded(picture(draw), "WEBP", exif=exif(draw)),
    "webp-film": lambda draw: film(draw, "WEBP"),
    "tiff": lambda draw: encoded(picture(draw), "TIFF", exif=exif(draw)),
    "lzw": lambda draw: encoded(picture(draw), "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": lambda draw: encoded(picture(draw), "TIFF", compression="jpeg"),
    "float": lambda draw: encoded(picture(draw).convert("F"), "TIFF"),
    "bmp": lambda draw: encoded(picture(draw), "BMP"),
    "ppm": lambda draw: encoded(picture(draw), "PPM"),
    "avif": lambda draw: encoded(picture(draw), "AVIF", speed=10, exif=exif(draw)),
    "jp2": lambda draw: encoded(picture(draw), "JPEG2000"),
}


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randint(0, len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 30])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def edited_header(data: bytes, draw: random.Random) -> bytes:
    """Numbers near the start become extreme: sizes, offsets, counts."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(min(len(changed), 200))
        value = draw.choice([b"\0\0", b"\xff\xff", b"\xff\xff\xff\xff", b"\x7f\xff", b"\0\0\0\0", b"\x40\0"])
        changed[at : at + len(value)] = value
    return bytes(changed)


def repeated(data: bytes, draw: random.Random) -> bytes:
    """Some of it comes a hundred times: segments, chunks, scans, frames."""
    start = draw.randrange(len(data))
    part = data[start : start + draw.choice([8, 64, 512])]
    return data[:start] + part * 100 + data[start:]


def mixed(data: bytes, draw: random.Random) -> bytes:
    other = SOUND[draw.choice(sorted(SOUND))](draw)
    return data[: draw.randint(1, 64)] + other[draw.randint(0, 64) :]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(draw: random.Random) -> bytes:
    """A PNG that claims any size, depth and kind, with sound sums, and chunks that unpack to much."""
    sides = [draw.choice([0, 1, 100, 7000, 7000, 9000, 20_000, 65_535, 2**31 - 1]) for _ in range(2)]
    depth, colour, interlaced = (
        draw.choice([1, 8, 16, 77]),
        draw.choice([0, 2, 3, 4, 6, 9]),
        draw.randint(0, 1),
    )
    header = struct.pack(">IIBBBBB", *sides, depth, colour, 0, 0, interlaced)
    body = zlib.compress(bytes(draw.choice([10, 10_000, 30_000_000])), 9)
    extra = draw.choice([b"", chunk(b"zTXt", b"a\0\0" + body), chunk(b"iCCP", b"a\0\0" + body)])
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
    return start + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def scans_of(draw: random.Random) -> bytes:
    side = draw.choice([64, 1000, 2000])
    data = encoded(Image.new("RGB", (side, side), "grey"), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * draw.choice([10, 300, 5000]) + data[end:]


def tiff_of(draw: random.Random) -> bytes:
    """A TIFF of thousands of folders, each the next of the last, or in a circle."""
    count = draw.choice([10, 3000])
    entry = struct.pack("<HHII", draw.choice([0x100, 0x112, 0x111, 0x8769]), 4, draw.choice([1, 2**31]), 8)
    folder = struct.pack("<H", 1) + entry
    parts = [folder + struct.pack("<I", 8 + (i + 1) % count * 18) for i in range(count)]
    return b"II*\0\x08\0\0\0" + b"".join(parts)


def gif_of(draw: random.Random) -> bytes:
    data = encoded(picture(draw), "GIF")
    flags = data[10]
    at = 13 + (3 * (2 << (flags & 7)) if flags & 0x80 else 0)
    return data[:at] + b"!\xfe\x01A\0" * draw.choice([100, 100_000]) + data[at:]


def exif_of(draw: random.Random) -> bytes:
    part = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(draw.randrange(256) for _ in range(20)) * 3000
    part = part[:65_000]
    data = encoded(picture(draw), "JPEG")
    return (
        data[:2] + (b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part) * draw.choice([1, 20]) + data[2:]
    )


DAMAGE = (cut, flipped, flipped, edited_header, edited_header, repeated, mixed)
HOSTILE = (png_of, png_of, png_of, scans_of, tiff_of, gif_of, exif_of)


def pictures(count: int, seed: int) -> Iterator[bytes]:
    draw = random.Random(seed)
    stock = {name: [make(draw) for _ in range(4)] for name, make in SOUND.items()}
    for _ in range(count):
        if draw.random() < 0.1:
            yield draw.choice(HOSTILE)(draw)
        else:
            data = draw.choice(stock[draw.choice(sorted(stock))])
            yield draw.choice(DAMAGE)(data, draw)


@pytest.mark.slow
def test_damaged_pictures_are_refused_or_opened_with_little(tmp_path: Path) -> None:
    (tmp_path / "sound-0.png").write_bytes(SOUND["png"](random.Random(0)))
    for number, data in enumerate(pictures(PICTURES, seed=13)):
        (tmp_path / f"{number:05}.{('jpg', 'png', 'tif')[number % 3]}").write_bytes(data)
    report = opened_in_a_child(tmp_path)
    assert_all_ended_well(report, PICTURES)
    kinds = [kind for _, kind, *_ in report["files"]]
    assert min(kinds.count("opened"), kinds.count("refused")) > PICTURES / 10


@pytest.mark.slow
def test_predict_names_each_damaged_picture_and_ends(tmp_path: Path) -> None:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2
    )
    save_checkpoint(tmp_path / "model", Checkpoint(model, Preprocess((16, 16)), ("a", "b")))
    (tmp_path / "pictures").mkdir()
    for number, data in enumerate(pictures(PREDICTED, seed=31)):
        (tmp_path / "pictures" / f"{number:05}.jpg").write_bytes(data)
    words = ["predict", str(tmp_path / "model"), str(tmp_path / "pictures"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "vitral", *words], capture_output=True, text=True, timeout=20 * MOST_SECONDS
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == PREDICTED
    assert all(bool(answer["top"]) != bool(answer["error"]) for answer in answers)
    assert "defect" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


# --- Parquet ---------------------------------------------------------------------------------------


def parquet(table: pa.Table, features: Any = None) -> bytes:
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": features})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def any_value(draw: random.Random) -> Any:
    values = [None, -1, 2**62, float("nan"), "", "\0", "../../etc/passwd", b"\xff", True, [], [1], {"a": 1}]
    return draw.choice(values)


def any_column(draw: random.Random, count: int) -> pa.Array:
    """Values of one type, of any, or of one that is nested."""
    value = any_value(draw)
    return pa.array([draw.choice([value, None]) for _ in range(count)], type=pa.array([value]).type)


def any_parquet(draw: random.Random) -> bytes:
    sound = [SOUND["png"](draw) for _ in range(6)]
    images: Any = draw.choice([sound, [{"bytes": data, "path": "a.png"} for data in sound]])
    labels: Any = draw.choice([[0, 1] * 3, ["ant", "bee"] * 3, [[0], [1]] * 3])
    columns = {"image": images, "label": labels}
    if draw.random() < 0.6:
        columns[draw.choice(["image", "label"])] = any_column(draw, 6)
    features = draw.choice(
        [None, "", "{", "[]", "3", '{"info": 3}', '{"info": {"features": {"label": {"names": {"0": "a"}}}}}']
    )
    data = parquet(pa.table(columns), features)
    return draw.choice(DAMAGE[:-1])(data, draw) if draw.random() < 0.5 else data


@pytest.mark.slow
def test_hostile_parquet_files_end_in_a_line(tmp_path: Path) -> None:
    draw = random.Random(7)
    (tmp_path / "sound-0.png").write_bytes(SOUND["png"](draw))
    for number in range(PARQUET):
        (tmp_path / f"{number:05}.parquet").write_bytes(any_parquet(draw))
    assert_all_ended_well(opened_in_a_child(tmp_path), PARQUET)
