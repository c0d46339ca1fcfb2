"""Requests that mean harm, for `tests/test_serve_hostile.py` and `scripts/serve_soak.py`.

Each is what a client writes to a socket, piece by piece, with the statuses that are a right answer. Nothing
of it is a secret: these are the kinds that have brought down other servers.
"""

import base64
import functools
import gzip
import io
import itertools
import json
import random
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

Piece = bytes | float  # what is written, or the seconds of a pause
QUICK = 0.1  # seconds to an answer
REFUSED = frozenset(range(400, 500))


@dataclass(frozen=True)
class Hostile:
    """One kind: what is written, and what may be answered."""

    name: str
    pieces: Callable[[], Iterator[Piece]]
    statuses: frozenset[int] = REFUSED
    seconds: float = QUICK  # more where the harm is to be slow, and a timeout ends it


class Outcome(NamedTuple):
    status: int | None  # None: the connection was closed without an answer
    seconds: float  # from the last byte that was written before the answer to the answer
    answer: bytes


# --- Writing ----------------------------------------------------------------------------------------


def post(body: bytes, media_type: str, *headers: str, path: str = "/v1/predict") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {media_type}"]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, *headers, "\r\n")).encode("latin-1") + body


def attempt(address: tuple[str, int], pieces: Iterator[Piece], patience: float = 60.0) -> Outcome:
    """Write the pieces until an answer comes, and read it."""
    with socket.create_connection(address, timeout=patience) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began_at = time.perf_counter()
        for piece in pieces:
            if isinstance(piece, float):
                if _readable_within(connection, piece):
                    break
                continue
            began_at = time.perf_counter()
            try:
                connection.sendall(piece)
            except OSError:  # closed: it has answered, or will not
                break
            if _readable_within(connection, 0.0):
                break
        answer = _answer(connection)
        seconds = time.perf_counter() - began_at
    words = answer.split(b" ", 2)
    status = int(words[1]) if answer.startswith(b"HTTP/1.") and words[1].isdigit() else None
    return Outcome(status, seconds, answer)


def _readable_within(connection: socket.socket, seconds: float) -> bool:
    import select

    return bool(select.select([connection], [], [], seconds)[0])


def _answer(connection: socket.socket) -> bytes:
    """The head of the answer, and as much of its body as came with it."""
    answer = b""
    try:
        while b"\r\n\r\n" not in answer:
            if not (part := connection.recv(65536)):
                break
            answer += part
    except OSError:
        pass
    return answer


# --- Pictures ---------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def _png(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    """Grey of 8 bits; without rows it promises more than it has."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = zlib.compress(rows or bytes(64), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(side: int = 64, seed: int = 0) -> Image.Image:
    """A picture that is well, with something in it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def _jpeg() -> bytes:
    return encoded(picture(256), "JPEG", quality=90)


def _gif_of(frames: int) -> bytes:
    """A GIF of many frames of one pixel."""
    frame = b"\x21\xf9\x04\x00\x01\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    frame += b"\x02\x02\x44\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return head + frame * frames + b"\x3b"


def _many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is told again and again."""
    content = encoded(picture(64), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def _exif_in_a_circle() -> bytes:
    """EXIF whose directory is followed by itself, with counts that no file holds."""
    entry = struct.pack("<HHII", 0x0112, 3, 0xFFFFFFFF, 8)
    tiff = b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", 3) + entry * 3 + struct.pack("<I", 8)
    exif = b"Exif\x00\x00" + tiff
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    content = _jpeg()
    return content[:2] + segment * 100 + content[2:]


@functools.cache
def _bomb(megabytes: int) -> bytes:
    return zlib.compress(bytes(megabytes * 2**20), 9)


def _zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("picture.jpg", bytes(50 * 2**20))
    return file.getvalue()


_SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>
<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="http://127.0.0.1:9/x"/>&a;</svg>"""
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"


@functools.cache
def pictures() -> dict[str, bytes]:
    """Bodies that are no pictures, damaged ones, or far too much for what they are."""
    grey16 = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
    return {
        "PNG header of 50,000 x 50,000": _png(50_000, 50_000),
        "PNG header of 2,147,483,647 squared": _png(2**31 - 1, 2**31 - 1),
        "PNG of 1 x 100,000": _png(1, 100_000, rows=bytes(200_000)),
        "PNG of 100,000 x 1": _png(100_000, 1, rows=bytes(100_001)),
        "PNG of no pixels": _png(0, 0),
        "PNG with a zTXt of 100 MB": _png(8, 8, _chunk(b"zTXt", b"a\x00\x00" + _bomb(100)), rows=bytes(72)),
        "PNG with an iCCP of 100 MB": _png(8, 8, _chunk(b"iCCP", b"a\x00\x00" + _bomb(100)), rows=bytes(72)),
        "PNG whose pixels are 100 MB": _png(8, 8, _chunk(b"IDAT", _bomb(100))),
        "JPEG header of 65,535 squared": _jpeg_of(65_535, 65_535),
        "JPEG, truncated": _jpeg()[: len(_jpeg()) // 2],
        "JPEG of 1,000 scans": _many_scans(1000),
        "JPEG with EXIF in a circle": _exif_in_a_circle(),
        "GIF of 10,000 frames": _gif_of(10_000),
        "GIF of 65,535 squared": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x3b",
        "BMP of 2 billion pixels": _bmp_header(46_000, 46_000),
        "TIFF of 16 bits": encoded(grey16, "TIFF"),
        "WebP, header alone": b"RIFF\xff\xff\xff\x7fWEBPVP8X\n\x00\x00\x00\x10\x00\x00\x00" + b"\xff" * 6,
        "SVG with an entity": _SVG,
        "EPS": _EPS,
        "zip": _zip_bomb(),
        "HTML": b"<html><img src=http://127.0.0.1:9/x></html>",
        "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "ones": b"\xff" * 100_000,
    }  # fmt: skip


def _bmp_header(width: int, height: int) -> bytes:
    fields = (54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", *fields)


def _jpeg_of(width: int, height: int) -> bytes:
    """A JPEG that says it is larger than it is."""
    content = _jpeg()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


# --- Texts ------------------------------------------------------------------------------------------


def texts(trap: int) -> dict[str, bytes]:
    """Bodies of application/json; `trap` is a port where nobody may ever knock."""
    noise = base64.b64encode(b"\x00\xff" * 999).decode()
    return {
        "JSON 100,000 deep": b"[" * 100_000,
        "JSON objects 50,000 deep": b'{"images":' * 50_000,
        "JSON with an address": json.dumps({"images": [f"http://127.0.0.1:{trap}/a.jpg"]}).encode(),
        "JSON with a field url": json.dumps({"url": f"http://127.0.0.1:{trap}/a.jpg"}).encode(),
        "JSON with a file address": b'{"images": ["file:///etc/passwd"]}',
        "JSON with a path": b'{"images": ["/etc/passwd"]}',
        "JSON with a path upwards": b'{"images": ["../../../../etc/passwd"]}',
        "JSON, base64 of nothing like it": b'{"images": ["!!!! no base64 !!!!"]}',
        "JSON, base64 of noise": json.dumps({"images": [noise]}).encode(),
        "JSON with 33 pictures": json.dumps({"images": ["aaaa"] * 33}).encode(),
        "JSON with 100,000 pictures": b'{"images": [' + b'"",' * 99_999 + b'""]}',
        "JSON with an object for the list": b'{"images": {"0": "aaaa"}}',
        "JSON with numbers for pictures": b'{"images": [1e999, NaN, null]}',
        "JSON with a number of a million digits": b'{"images": ' + b"9" * 1_000_000 + b"}",
        "JSON that is no text": b"\xff\xfe\x00\xd8",
        "JSON of surrogates": b'{"images": ["\\ud800"]}',
        "JSON with the same key 100,000 times": b"{" + b'"images": [],' * 100_000 + b'"images": []}',
    }  # fmt: skip


# --- Requests ---------------------------------------------------------------------------------------


def _once(*pieces: Piece) -> Callable[[], Iterator[Piece]]:
    return lambda: iter(pieces)


def _chunked(count: int) -> Iterator[Piece]:
    """A body without a length and without an end."""
    yield post(b"", "image/jpeg", "Transfer-Encoding: chunked")
    part = b"10000\r\n" + b"\xff" * 0x10000 + b"\r\n"
    yield from itertools.repeat(part, count)


def _drop_by_drop(content: bytes, seconds: float) -> Iterator[Piece]:
    for place in range(len(content)):
        yield content[place : place + 1]
        yield seconds


def requests(*, header_timeout: float, body_timeout: float) -> list[Hostile]:
    """What is wrong with the request, whatever its body."""
    image, get = _jpeg(), "HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    both = ("Content-Length: 5", "Transfer-Encoding: chunked")
    packed = gzip.compress(bytes(20 * 2**20))
    slow_head = post(image, "image/jpeg")[:200]
    slow_body = post(image, "image/jpeg")

    def of(name: str, *pieces: Piece, statuses: frozenset[int] = REFUSED, seconds: float = QUICK) -> Hostile:
        return Hostile(name, _once(*pieces), statuses, seconds)

    def at(path: str) -> bytes:
        return f"GET {path} {get}\r\n".encode("latin-1")

    return [
        Hostile("endless chunks", lambda: _chunked(16_384)),
        Hostile(
            "slow header", lambda: _drop_by_drop(slow_head, 0.3), frozenset([408]), header_timeout + QUICK
        ),
        Hostile(
            "slow body",
            lambda: itertools.chain([slow_body[:300]], _drop_by_drop(slow_body[300:], 0.3)),
            frozenset([408]),
            body_timeout + QUICK,
        ),
        of("a length longer than the body", post(image, "image/jpeg", f"Content-Length: {len(image) + 9}"),
           body_timeout + 5, statuses=frozenset([408]), seconds=body_timeout + QUICK),
        of("a length of ten terabytes", post(image, "image/jpeg", f"Content-Length: {10**13}")),
        of("a length below nothing", post(image, "image/jpeg", "Content-Length: -5")),
        of("a length in words", post(image, "image/jpeg", "Content-Length: many")),
        of("two lengths", post(image, "image/jpeg", "Content-Length: 5", "Content-Length: 6")),
        of("chunks and a length", post(b"0\r\n\r\n", "image/jpeg", *both)),
        of("a chunk of no number", post(b"zz\r\nabc\r\n", "image/jpeg", "Transfer-Encoding: chunked")),
        of("an empty body", post(b"", "image/jpeg")),
        of("a body of 11 MB", post(bytes(11 * 2**20), "image/jpeg")),
        of("gzip as Content-Encoding", post(packed, "image/jpeg", "Content-Encoding: gzip")),
        of("text", post(image, "text/plain")),
        of("no type", post(image, "")),
        of("SVG as its type", post(_SVG, "image/svg+xml")),
        of("a form", post(b"--b\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b")),
        of("a null byte in a header", post(image, "image/jpeg", "X-Null: a\x00b")),
        of("a null byte in a header's name", post(image, "image/jpeg", "X\x00Null: b")),
        of("a header of 100 kB", post(image, "image/jpeg", "X-Long: " + "a" * 100_000)),
        of("10,000 headers", post(image, "image/jpeg", *(f"X-{number}: a" for number in range(10_000)))),
        of("another host's name", post(image, "image/jpeg").replace(b"127.0.0.1", b"evil.example")),
        of("another site's page", post(image, "image/jpeg", "Origin: http://evil.example")),
        of("a path upwards", at("/../../../../etc/passwd")),
        of("a path upwards, escaped", at("/%2e%2e/%2e%2e/%2e%2e/etc/passwd")),
        of("a path upwards, escaped twice", at("/v1/..%252f..%252fetc/passwd")),
        of("a path with backslashes", at("/..\\..\\..\\etc\\passwd")),
        of("a path with a null byte", at("/v1/model%00.html")),
        of("a model's name upwards", at("/v2/models/..%2f..%2fetc")),
        of("a whole address for a path", at("http://127.0.0.1:9/nothing")),
        of("a method that there is not", f"TRACE /v1/predict {get}\r\n".encode()),
        of("a tunnel", b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        of("a query that is no number", post(image, "image/jpeg", path="/v1/predict?top=1e9")),
        of("a query beyond all", post(image, "image/jpeg", path=f"/v1/predict?top={'9' * 5000}")),
        of("a query that is a path", post(image, "image/jpeg", path="/v1/explain?class=/etc/passwd")),
        of("a TLS greeting", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
        of("nonsense", b"\x00\x01\x02 \r\n\r\n"),
    ]  # fmt: skip


def kinds(trap: int, *, header_timeout: float, body_timeout: float) -> list[Hostile]:
    """All kinds. Some bodies are odd and yet pictures, whose first frame or pixels may be answered.

    Args:
        trap: a port of this machine that bodies name; whoever opens it has been led astray.
        header_timeout: of the server, in seconds.
        body_timeout: of the server, in seconds.
    """
    odd = {"GIF of 10,000 frames", "JPEG with EXIF in a circle", "PNG with a zTXt of 100 MB",
           "PNG with an iCCP of 100 MB", "PNG whose pixels are 100 MB", "JPEG of 1,000 scans"}  # fmt: skip
    found = requests(header_timeout=header_timeout, body_timeout=body_timeout)
    for name, body in pictures().items():
        statuses = REFUSED | {200} if name in odd else REFUSED
        found.append(Hostile(name, _once(post(body, "image/png")), statuses))
    for name, body in texts(trap).items():
        found.append(Hostile(name, _once(post(body, "application/json"))))
    return found


# --- Mutations --------------------------------------------------------------------------------------


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The body with bytes changed, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4, 16, 64])):
        place = draw.randrange(len(changed) + 1)
        length = draw.choice([1, 1, 2, 4, 32])
        match draw.randrange(5):
            case 0:
                changed[place : place + length] = draw.randbytes(length)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length]
            case 3:
                changed[place : place + length] = draw.choice([b"\x00", b"\xff", b"\x80"]) * length
            case 4 if draw.random() < 0.2:
                del changed[place:]
    return bytes(changed)


def mutations(count: int, trap: int, seed: int = 0) -> Iterator[bytes]:
    """Whole requests whose bodies are mutations of the kinds' and of pictures that are well."""
    draw = random.Random(seed)
    sources = [(body, "image/png") for body in pictures().values() if len(body) < 300_000]
    sources += [(body, "application/json") for body in texts(trap).values() if len(body) < 300_000]
    formats = ("PNG", "GIF", "BMP", "WEBP", "AVIF", "JPEG")
    well = [encoded(picture(96, number), format) for number, format in enumerate(formats)]
    sources += [(body, "image/jpeg") for body in well for _ in range(4)]
    for _ in range(count):
        body, media_type = draw.choice(sources)
        yield post(mutated(body, draw), media_type)
