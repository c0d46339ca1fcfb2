"""Servers as processes of their own, for the scripts and tests that load them; each is ended by its id."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

HOST = "127.0.0.1"
_SECONDS_TO_BEGIN, _SECONDS_TO_END = 120.0, 60.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen
    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.port

    def get(self, path: str) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=30)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def post(self, path: str, body: bytes, media_type: str) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=30)) as connection:
            connection.request("POST", path, body, {"Content-Type": media_type})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def resident_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def peak_bytes(self) -> int:
        """The most that was resident since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def serving(command: Sequence[str], port: int, ready: str = "/readyz", **options: object) -> Iterator[Server]:
    """Start a server and wait until it is ready; end it with SIGTERM.

    Args:
        command: what starts it.
        port: where it will listen.
        ready: a path that answers 200 once it is ready.
        options: of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]
    server = Server(process, port)
    try:
        _wait(server, ready)
        yield server
    finally:
        end(process)


def vitral_server(model: str | Path, *words: str, port: int | None = None) -> tuple[list[str], int]:
    """The command that serves a model, and its port."""
    port = free_port() if port is None else port
    return [sys.executable, "-m", "vitral", "serve", str(model), "--port", str(port), *words], port


def _wait(server: Server, path: str) -> None:
    deadline = time.monotonic() + _SECONDS_TO_BEGIN
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode} before it was ready")
        try:
            if server.get(path)[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {_SECONDS_TO_BEGIN:g} s")


def end(process: subprocess.Popen) -> int:
    """Ask a server to end, and after a minute end it with all that it started; gives its status."""
    family = [process.pid]
    with suppress(psutil.Error):
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in family[1:]:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return process.returncode
