"""From the bytes of a picture to the model's answer: threads decode, one computes, the event loop waits."""

import asyncio
import base64
import binascii
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vitral.artifacts.predictor import Predictor
from vitral.images.files import opened
from vitral.runtime.errors import ImageError
from vitral.ship.serve.batching import Answer, Batcher, Item, Look, Outcome, Watch
from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.refusal import Refusal, too_late

# Formats that a stranger may send. TIFF, JPEG 2000 and PPM have large, old decoders and no place on the web.
_TAKEN = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "AVIF", "HEIF")
_NAMES = "JPEG, PNG, WebP, AVIF, GIF, BMP"
_NEWEST = 0.1  # of the moving mean of decoding

# A picture: its file's bytes, base64 of them, or the pixels that the model sees, uint8 (H, W, 3).
Picture = bytes | str | np.ndarray


class PipelineWatch(Watch):
    """What is told of decoding too."""

    def decoded(self, seconds: float) -> None: ...


class Pipeline:
    """Decodes pictures in threads, and has them computed in batches.

    All methods but those that say otherwise are the event loop's.
    """

    def __init__(
        self,
        predictor: Predictor,
        options: ServeOptions,
        watch: PipelineWatch | None = None,
    ) -> None:
        self._predictor, self._options = predictor, options
        self._watch = watch or PipelineWatch()
        self._decoders = options.decoding_threads  # asked once: it reads the container's quota
        self._pool = ThreadPoolExecutor(self._decoders, thread_name_prefix="decode")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._decoding = 0
        self._decode_seconds = 0.0
        self.batcher = Batcher(
            predictor.answers,
            predictor.engine.batch_sizes,
            options.max_batch,
            options.deadline,
            self._deliver,
            self._watch,
        )

    def start(self, first: Callable[[], None] = lambda: None) -> None:
        """Begins to compute; the thread that does it calls `first` before all else."""
        self._loop = asyncio.get_running_loop()
        self.batcher.start(first)

    def close(self) -> None:
        """Ends the threads. Whatever is in hand is finished."""
        self._pool.shutdown(cancel_futures=True)
        self.batcher.close()

    @property
    def waiting(self) -> int:
        """Pictures that are being decoded or wait for it, or for the model."""
        return self._decoding + len(self.batcher)

    def seconds_for(self, count: int) -> float:
        """How long so many pictures take, whichever is slower, decoding or the model."""
        decoding = self._decode_seconds * count / self._decoders
        return max(decoding, self.batcher.seconds_for(count))

    def begin(self, picture: Picture, deadline: float) -> Item:
        """Lets a picture be decoded and computed; `item.ticket` is a future of an `Answer`.

        The future's exception is an ImageError if it cannot be read, a Refusal if there is no time left.
        """
        item = Item(asyncio.get_running_loop().create_future(), deadline)
        if isinstance(picture, np.ndarray):
            item.pixels_HWC = picture
            self.batcher.put(item)
        else:
            self._decoding += 1
            self._pool.submit(self._decode, picture, item)
        return item

    async def pixels(self, picture: Picture) -> np.ndarray:
        """What the model sees of a picture, (H, W, 3). Raises ImageError or Refusal."""
        if isinstance(picture, np.ndarray):
            return picture
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, picture)

    async def call(self, work: Callable[[], Any]) -> Any:
        """Does what takes a while in a thread that decodes, so that the event loop does not wait."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def look(self, work: Callable[[], Any], deadline: float) -> Look:
        """Lets other work wait for the thread that owns the model. Raises Refusal if too much waits."""
        if self.batcher.looks_waiting >= self._options.max_explanations:
            raise Refusal(503, "too many explanations wait; come again later", "overloaded", retry_after=2)
        look = Look(asyncio.get_running_loop().create_future(), deadline, work)
        self.batcher.put_look(look)
        return look

    # --- In other threads -------------------------------------------------------------------------

    def _decode(self, picture: bytes | str, item: Item) -> None:
        began_at = time.monotonic()
        outcome: Exception | None = None
        try:
            if item.dropped or began_at > item.deadline:
                outcome = too_late(self._options.deadline)
            else:
                item.pixels_HWC = self._read(picture)
        except Exception as error:
            outcome = error
        seconds = time.monotonic() - began_at
        self._decode_seconds += (_NEWEST if self._decode_seconds else 1) * (seconds - self._decode_seconds)
        self._watch.decoded(seconds)
        if outcome is None:
            item.since = time.monotonic()
            self.batcher.put(item)
            self._tell(self._one_decoded)
        else:
            self._tell(self._one_decoded)
            self._deliver([(item.ticket, outcome)])

    def _read(self, picture: bytes | str) -> np.ndarray:
        content = _from_base64(picture) if isinstance(picture, str) else picture
        width, height, format = _header(content)
        if format not in _TAKEN:
            raise ImageError(f"is {format}; this server takes {_NAMES}")
        if width * height > self._options.max_pixels:
            raise ImageError(
                f"is too large: {width:,}x{height:,} pixels; this server takes {self._options.max_pixels:,}"
            )
        return self._predictor.pixels(content)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        self._tell(_settle, outcomes)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():  # at the very end nobody waits
            self._loop.call_soon_threadsafe(call, *arguments)

    def _one_decoded(self) -> None:
        self._decoding -= 1


def _settle(outcomes: list[Outcome]) -> None:
    for future, outcome in outcomes:
        if future.done():  # its client has gone
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _header(content: bytes) -> tuple[int, int, str | None]:
    """Width, height and format of a picture, none of whose pixels is decoded. Raises ImageError."""
    try:
        with opened(content) as image:
            return image.width, image.height, image.format
    except ImageError:
        raise
    # Pillow's plugins raise almost anything on damaged bytes, and an error of its own on far too many pixels.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"cannot be decoded: {reason}") from error


def _from_base64(text: str) -> bytes:
    """Raises ImageError for what is no base64, such as an address: nothing that a request names is opened."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("is not base64 of a picture; addresses and paths are never opened") from None


__all__ = ["Answer", "Picture", "Pipeline", "PipelineWatch"]
