"""Worker processes that cannot go on: batches come all the same, to the bit, and one line says why."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from vitral.data import workers as workers_module
from vitral.data.batches import Batch, LoadedImage, collate
from vitral.data.workers import Loading, worker_count
from vitral.runtime.errors import ImageError
from vitral.runtime.stopping import Stopped, stop_signal

KEYS = [list(range(first, first + 4)) for first in range(0, 40, 4)]


@dataclass
class Numbers(Dataset):
    """An item is its key, thrice and as the label; `trouble` happens in worker processes alone, at key 22."""

    trouble: Callable[[], object]
    size: int = 3

    def __getitem__(self, index: int) -> LoadedImage:
        if index == 22 and get_worker_info() is not None:
            self.trouble()
        return LoadedImage(index, np.array(index), torch.full((self.size,), float(index)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(24, "Too many open files")


def nothing() -> None: ...


def values(loading: Loading, dataset: Dataset) -> list[float]:
    return [value for batch in loading.batches(dataset, KEYS, collate) for value in batch.labels.tolist()]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text() if children.exists() else ""
    yield
    after = children.read_text() if children.exists() else ""
    assert set(after.split()) <= set(before.split())


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (die, "a worker process was killed, perhaps because memory ran out"),
        (fail, "a worker process failed: OSError: [Errno 24] Too many open files"),
    ],
)
def test_what_workers_do_not_deliver_is_loaded_here(trouble: Callable[[], object], reason: str) -> None:
    said: list[str] = []
    loading = Loading(2, said.append)
    assert values(loading, Numbers(trouble)) == list(range(40))
    assert said == [f"{reason}; images are loaded without worker processes from here on (workers=0)"]
    assert values(loading, Numbers(trouble)) == list(range(40))
    assert len(said) == 1  # none is started again


def test_an_image_that_fails_here_too_is_the_error_and_workers_are_not_blamed() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> LoadedImage:
            if index == 22:
                raise KeyError("the transform is wrong")
            return super().__getitem__(index)

    said: list[str] = []
    with pytest.raises(KeyError, match=r"^'the transform is wrong'$"):
        values(Loading(2, said.append), Broken(nothing))
    assert not said


def test_without_file_handles_for_workers_images_are_loaded_here() -> None:
    said: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert values(Loading(30, said.append), Numbers(nothing)) == list(range(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (line,) = said
    assert line.startswith(
        "worker processes cannot be started: [Errno 24] Too many open files; images are loaded"
    )


@pytest.mark.parametrize(("forked", "place"), [(True, "memory has"), (False, "/dev/shm has")])
@pytest.mark.parametrize(("free", "used"), [(10**9, 2), (250, 1), (100, 0)])
def test_no_more_workers_than_memory_has_room_for(
    free: int, used: int, forked: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is 4 times 12 bytes of numbers and 8 of label; each worker has two, and three are under way."""
    monkeypatch.setattr(workers_module, "processes_share", lambda: forked)
    monkeypatch.setattr("vitral.data.ring.processes_share", lambda: forked)
    other = "_free_shared_memory" if forked else "available_bytes"
    monkeypatch.setattr(workers_module, other, lambda: pytest.fail("it is not used"))
    asked = "available_bytes" if forked else "_free_shared_memory"
    monkeypatch.setattr(workers_module, asked, lambda: free + 80 * 3 if free < 10**9 else free)
    said: list[str] = []
    loading = Loading(2, said.append)
    assert values(loading, Numbers(nothing)) == list(range(40))
    assert loading.workers == used
    assert [line.startswith(place) and f"images are loaded with workers={used}" in line for line in said] == [
        True
    ] * (used < 2)


_LITTLE_SHARED_MEMORY = """
import sys
from tests.test_workers import Numbers, nothing, values
from vitral.data import ring, workers
if sys.argv[1] == "files":  # as where processes are not forked
    workers.processes_share = ring.processes_share = lambda: False
workers._free_shared_memory = lambda: None  # something else takes it later
loading = workers.Loading(2, print)
assert values(loading, Numbers(nothing, 500_000)) == list(range(40))
print(loading.workers)
"""


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root, to mount")
@pytest.mark.parametrize(
    ("way", "lines"),
    [
        ("files", ["images are loaded without worker processes from here on (workers=0)", "0"]),
        ("ring", ["2"]),  # needs none of it
    ],
)
def test_shared_memory_that_runs_out_ends_workers_and_not_the_work(way: str, lines: list[str]) -> None:
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "
    script = ["unshare", "-m", "sh", "-c", mount + '"$0" "$@"', sys.executable, "-c", _LITTLE_SHARED_MEMORY]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [*script, way], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path}
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(said := done.stdout.splitlines()) == len(lines)
    assert all(line.endswith(end) for line, end in zip(said, lines, strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_heeded_while_a_batch_is_waited_for(number: int) -> None:
    began = time.monotonic()
    with stop_signal() as stop:
        timer = threading.Timer(1.0, os.kill, [os.getpid(), number])
        timer.start()
        with pytest.raises(Stopped):
            values(Loading(2, stop=stop), Numbers(lambda: time.sleep(300)))
        timer.join()
    assert stop.number == number
    assert time.monotonic() - began < 60


def test_a_signal_while_an_image_is_decoded_here_is_no_damage() -> None:
    class Decoding(Numbers):
        def __getitem__(self, index: int) -> LoadedImage:
            if index == 22:
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                except Exception as error:
                    raise ImageError("cannot be decoded") from error
            return super().__getitem__(index)

    with stop_signal() as stop, pytest.raises(Stopped):
        values(Loading(0, stop=stop), Decoding(nothing))


def test_waiting_within_waiting_goes_on_raising() -> None:
    with stop_signal() as stop:
        with pytest.raises(Stopped), stop.raises():
            stopped_after(stop.raises())
        os.kill(os.getpid(), signal.SIGTERM)  # nobody waits any more


def stopped_after(inner: AbstractContextManager) -> None:
    with inner:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_asked_for_before_is_heeded_at_once() -> None:
    with stop_signal() as stop:
        stop.requested = True
        with pytest.raises(Stopped):
            values(Loading(0, stop=stop), Numbers(nothing))


def test_loading_leaves_random_numbers_and_handlers_as_they_were() -> None:
    for count in (0, 2):
        before = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
        values(Loading(count), Numbers(nothing))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert signal.getsignal(signal.SIGCHLD) == before[1]


def test_closing_ends_workers_that_are_busy() -> None:
    batches = Loading(2).batches(Numbers(lambda: time.sleep(300)), KEYS, collate)
    assert isinstance(next(batches), Batch)
    batches.close()  # the fixture sees that none is left


@pytest.mark.parametrize(
    ("wanted", "cores", "count"),
    [(None, 1, 0), (None, 2, 0), (None, 3, 2), (None, 64, 8), (5, 1, 5), (0, 9, 0)],
)
def test_as_many_workers_as_asked_for_or_as_the_cores_suit(
    wanted: int | None, cores: int, count: int
) -> None:
    assert worker_count(wanted, cores) == count
