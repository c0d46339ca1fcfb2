"""The worker processes that load batches: how many there are, and what happens when they cannot go on.

Every process of ours that loads images is begun here, with one thread of its own. How many threads compute
says `runtime/threads.py`. `Classifier.predict` alone decodes in threads of this process.

Every batch is a function of its keys, so that a batch which a worker did not deliver is loaded here to
the same bits: losing a worker process costs speed alone.

Workers that are forked write into memory that is taken before they begin, and send no more than its number
(`ring`). Others hand over each batch as a file in /dev/shm, as torch does.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vitral.data.ring import Memory, Packed, Ring, new_memory, processes_share, used_again
from vitral.runtime.memory import available_bytes
from vitral.runtime.stopping import StopSignal
from vitral.runtime.threads import compute_in_one_thread, cpu_count, local_size

_WORTH_WORKERS = 5_000  # images: to start a process takes as long as to read some 2,000
_PREFETCHED = 2  # batches of each worker that wait to be taken; DataLoader's default
_IN_HAND = 3  # batches: one in use, one that is just handed over, one to spare
_SECONDS_BETWEEN_LOOKS = 1.0  # at whether the workers live
_SHARED_MEMORY = "/dev/shm"
_DOCKER_ADVICE = "in Docker, --shm-size=2g gives more room"
_SHARE_TO_TAKE = 0.9  # of it; other processes need some

Collate = Callable[[Iterator[Any], int, Memory], Any]


def worker_count(wanted: int | None = None, cores: int | None = None) -> int:
    """Processes that load images beside this one: as many as the user wants, else as the cores suit.

    On two cores, loading in the process itself was faster (docs/log.md, 2026-11-22).
    """
    if wanted is not None:
        return wanted
    cores = cpu_count() if cores is None else cores
    return 0 if cores <= 2 else min(cores - 1, 8)


def reader_count(images: int, wanted: int | None = None) -> int:
    """As `worker_count`, where nothing else computes meanwhile: of many images every core reads some."""
    if wanted is None and images >= _WORTH_WORKERS:
        return cpu_count()
    return worker_count(wanted)


@dataclass
class Loading:
    """How batches are loaded, for as long as one piece of work takes; once workers failed, there are none."""

    workers: int = 0
    warn: Callable[[str], None] = lambda _: None  # told when there are fewer than `workers`
    stop: StopSignal | None = None  # heeded while a batch is waited for: then Stopped is raised
    pin_memory: bool = False

    def batches(self, dataset: Dataset, keys: Iterable[list], collate: Collate) -> Generator[Any]:
        """One batch for each list of keys, in order; closing the generator ends the workers.

        A batch may be kept as long as one likes: memory is used again once nobody refers to it (`ring`).

        Args:
            dataset: gives the item of a key.
            keys: of each batch; may be endless.
            collate: items, how many, memory to write into -> a batch of tensors with the methods
                `share_memory` and `pin_memory`.
        """
        batch_keys, reason = iter(keys), ""
        if self.workers and (first := next(batch_keys, None)) is not None:
            batch_keys = chain([first], batch_keys)
            batch_bytes = _batch_bytes(dataset, first, collate)
            self._fit_memory(batch_bytes)
            if self.workers:
                ring = Ring.among_processes(batch_bytes, _PREFETCHED * self.workers + _IN_HAND)
                undelivered: deque[list] = deque()
                try:
                    yield from self._from_workers(dataset, batch_keys, collate, undelivered, ring)
                    return
                except _WorkersLostError as error:
                    batch_keys, reason = chain(undelivered, batch_keys), str(error)
        yield from self._from_here(dataset, batch_keys, collate, reason)

    def _from_here(
        self, dataset: Dataset, batch_keys: Iterator[list], collate: Collate, reason: str
    ) -> Generator[Any]:
        """Batches loaded in this process; `reason` is why no worker does it."""
        memory = used_again()
        for keys in batch_keys:
            with self._heeding():
                batch = collate((dataset[key] for key in keys), len(keys), memory)
            if reason:  # said once it is known that the worker was at fault, and not the image
                self._do_without(reason)
                reason = ""
            yield batch.pin_memory() if self.pin_memory else batch

    def _from_workers(
        self,
        dataset: Dataset,
        batch_keys: Iterator[list],
        collate: Collate,
        undelivered: deque[list],
        ring: Ring | None,
    ) -> Generator[Any]:
        """Raises _WorkersLostError, with the keys of what did not come in `undelivered`."""

        def noted() -> Iterator[Any]:
            for keys in batch_keys:
                undelivered.append(keys)
                yield keys if ring is None else (ring.take(), keys)

        workers = None
        try:
            with _child_handler_kept():
                workers = _Workers(self._loader(dataset, noted(), collate, ring))
            while True:
                with self._heeding():
                    batch = next(workers)
                    batch = batch.unpacked() if isinstance(batch, Packed) else batch
                undelivered.popleft()
                yield batch
        except StopIteration:
            return
        except Exception as error:  # whatever it is, loading the batch here will tell if it is the batch's
            raise _WorkersLostError(_reason(error, started=workers is not None)) from error
        finally:
            if workers is not None:
                workers._shutdown_workers()

    def _loader(
        self, dataset: Dataset, orders: Iterator[Any], collate: Collate, ring: Ring | None
    ) -> DataLoader:
        return _Loader(
            dataset if ring is None else _Packing(dataset, collate, ring),
            batch_sampler=orders,  # type: ignore[arg-type]  # pyrefly: ignore[bad-argument-type]
            num_workers=self.workers,
            collate_fn=_Shared(collate) if ring is None else _as_it_is,
            worker_init_fn=_begin_worker,
            pin_memory=self.pin_memory,
            prefetch_factor=_PREFETCHED,
            generator=torch.Generator(),  # else the caller's random numbers would move on
        )

    def _heeding(self) -> Any:
        return nullcontext() if self.stop is None else self.stop.raises()

    def _do_without(self, reason: str) -> None:
        self.workers = 0
        self.warn(f"{reason}; images are loaded without worker processes from here on (workers=0)")

    def _fit_memory(self, batch_bytes: int) -> None:
        """As many workers as there is room for: past it, the system kills them."""
        if processes_share():
            free, place, advice = available_bytes(), "memory", "a smaller batch_size needs less"
        else:
            free, place, advice = _free_shared_memory(), _SHARED_MEMORY, _DOCKER_ADVICE
        if free is None:
            return
        # Each worker's batches, and those that are being moved and used.
        room = int((_SHARE_TO_TAKE * free / local_size() / max(batch_bytes, 1) - _IN_HAND) / _PREFETCHED)
        if room >= self.workers:
            return
        needed = (_PREFETCHED * self.workers + _IN_HAND) * batch_bytes
        self.warn(
            f"{place} has {free / 2**20:,.0f} MiB free, and {self.workers} worker processes would "
            f"take {needed / 2**20:,.0f}; images are loaded with workers={max(room, 0)} ({advice})"
        )
        self.workers = max(room, 0)


def _batch_bytes(dataset: Dataset, keys: list, collate: Collate) -> int:
    """About what a batch takes, by its first sound image; a damaged one has no bytes."""
    images = (collate(iter([dataset[key]]), 1, new_memory).nbytes for key in keys)
    return next(filter(None, images), 0) * len(keys)


class _WorkersLostError(Exception):
    """Worker processes could not be started, or died."""


@dataclass
class _Packing(Dataset):
    """Loads whole batches in a worker process, each into the piece of the ring that was taken for it."""

    dataset: Dataset
    collate: Collate
    ring: Ring

    def __getitems__(self, order: tuple[int | None, list]) -> Packed:
        piece, keys = order
        items = (self.dataset[key] for key in keys)
        return self.ring.packed(piece, lambda memory: self.collate(items, len(keys), memory))


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass
class _Shared:
    """Puts a batch into shared memory as part of loading it.

    A queue would do so in a thread of its own, and lose the batch without a word where there is no room.
    """

    collate: Collate

    def __call__(self, items: list) -> Any:
        return self.collate(iter(items), len(items), _file_in_memory).share_memory()


def _file_in_memory(nbytes: int) -> Tensor:
    storage = torch.UntypedStorage._new_shared(nbytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (nbytes,))  # pyrefly: ignore


class _Loader(DataLoader):
    """DataLoader that leaves the number of workers to the user, without a warning of several lines."""

    def check_worker_number_rationality(self) -> None: ...


class _Workers(_MultiProcessingDataLoaderIter):
    """DataLoader's, except for its end: whether all are started or some, busy, dead or stuck."""

    def __init__(self, loader: DataLoader) -> None:
        self._begun_by = os.getpid()
        self._shutdown = self._worker_pids_set = False
        self._workers: list[Any] = []
        self._index_queues: list[Any] = []
        try:
            super().__init__(loader)
        except BaseException:
            self._shutdown_workers()
            raise

    def _try_get_data(self, timeout: float = _SECONDS_BETWEEN_LOOKS) -> Any:
        return super()._try_get_data(timeout)

    def _shutdown_workers(self) -> None:
        """Kills them: they keep nothing, and one that waits for a dead one's lock would never end."""
        if self._shutdown or self._begun_by != os.getpid():
            return
        self._shutdown = True
        if hasattr(self, "_pin_memory_thread_done_event"):
            self._pin_memory_thread_done_event.set()
        if self._worker_pids_set:
            _remove_worker_pids(id(self))
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for queue in self._index_queues:
            queue.close()


def _free_shared_memory() -> int | None:
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):  # not on every system
        return None
    return found.f_bavail * found.f_frsize


def _reason(error: Exception, *, started: bool) -> str:
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if not started:
        return f"worker processes cannot be started: {last}"
    # The others: a batch is there, and who should hand it over is not.
    if "exited unexpectedly" in last or isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return "a worker process was killed, perhaps because memory ran out"
    return f"a worker process failed: {last}"


def _begin_worker(_: int) -> None:
    # Ctrl-C, and the signals of `timeout` and a closed terminal, reach every process of the group; the main
    # one ends workers.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    compute_in_one_thread()


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """DataLoader's handler raises wherever the main thread is, in the middle of a step too."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
