"""Whom the requests go to, and what they are: whole HTTP requests, made before any clock runs."""

import ipaddress
import mimetypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from vitral.images.files import refuse_irregular
from vitral.runtime.errors import VitralError

PATH = "/v1/predict"
# Requests are kept in memory, so that the generator reads no files and encodes nothing while it measures.
_MOST_PICTURES, _MOST_BYTES = 1_000, 256 * 2**20

# From a file's bytes and its media type to what is sent: media type and body.
Encode = Callable[[bytes, str], tuple[str, bytes]]


def raw(content: bytes, media_type: str) -> tuple[str, bytes]:
    """Send a picture as it is."""
    return media_type, content


@dataclass(frozen=True)
class Request:
    """A whole request, and the picture's name for messages."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Target:
    """A server's address, as a URL names it."""

    url: str
    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str, *, elsewhere: bool = False) -> "Target":
        """Read ``http://127.0.0.1:8000``; without a path it is `PATH`.

        Args:
            url: of a server; its path is that of predictions.
            elsewhere: whether the server may be on another machine. A load test of a server that is not
                one's own is an attack, so that nobody sends one by a slip of the hand.

        Raises:
            VitralError: if it is no URL, or of another machine without `elsewhere`.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise VitralError(f"{url} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise VitralError(f"{url} is no URL of a server; give one such as http://127.0.0.1:8000")
        if not elsewhere and not _is_this_machine(parts.hostname):
            raise VitralError(
                f"{parts.hostname} is not this machine; if the server is yours to load, add --elsewhere"
            )
        path = parts.path if parts.path.strip("/") else PATH
        query = f"?{parts.query}" if parts.query else ""
        return cls(url, parts.scheme == "https", parts.hostname, port, f"{path}{query}")

    def request(self, media_type: str, body: bytes, token: str | None = None) -> bytes:
        """Write a POST request whole, to be sent as it is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            f"Content-Type: {media_type}",
            f"Content-Length: {len(body)}",
            "Accept: application/json",
        ]
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        return "\r\n".join((*lines, "\r\n")).encode() + body


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def requests_of(
    target: Target, pictures: Sequence[Path], *, encode: Encode = raw, token: str | None = None
) -> list[Request]:
    """Read the pictures and make a request of each.

    Args:
        target: to whom they go.
        pictures: files; of very many the first, 256 MiB of them at most.
        encode: what a server takes; by default the file itself.
        token: for a server that asks for one.

    Raises:
        VitralError: if there is none, or one cannot be read.
    """
    found: list[Request] = []
    size = 0
    for file in pictures[:_MOST_PICTURES]:
        refuse_irregular(file)
        content = file.read_bytes()
        media_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        request = target.request(*encode(content, media_type), token)
        size += len(request)
        if found and size > _MOST_BYTES:
            break
        found.append(Request(str(file), request))
    if not found:
        raise VitralError("there is no picture to send")
    return found
