"""What a server is told: where it listens, what it takes, how long anything may last."""

from collections.abc import Callable
from dataclasses import dataclass

from vitral.runtime.errors import VitralError
from vitral.runtime.threads import cpu_count

MIB = 2**20
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """The settings of a server; times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    tokens: tuple[str, ...] = ()  # one of which a request must carry; none: no request need
    deadline: float = 1.0  # an answer that would come later is refused at once
    max_batch: int = 8
    max_body: int = 10 * MIB
    max_bodies: int = 128 * MIB  # of all requests that are being read
    max_pixels: int = 50_000_000  # of one picture, by its header
    max_images: int = 32  # of one request
    max_connections: int = 1000
    max_explanations: int = 8  # that wait
    header_timeout: float = 5.0
    body_timeout: float = 20.0
    grace: float = 30.0  # for what is under way when the server is asked to stop
    decoders: int = 0  # threads; 0: one a core, two at least
    log: Callable[[str], None] | None = None  # is given a line of JSON a request

    def __post_init__(self) -> None:
        for name in ("deadline", "max_batch", "max_body", "max_pixels", "max_images", "grace"):
            if not getattr(self, name) > 0:
                raise VitralError(f"{name}={getattr(self, name)}: it must be above 0")

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def decoding_threads(self) -> int:
        return self.decoders or max(cpu_count(), 2)
