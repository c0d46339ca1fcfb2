"""What a process is set to before torch is loaded, and that a user's own settings win."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import vitral
from vitral.runtime.process import keep_freed_memory
from vitral.runtime.threads import set_how_threads_wait, thread_count, threads_wait_as_they_come
from vitral.runtime.version import vitral_version


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "5000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_spin_for_a_moment_unless_the_user_says_how(
    before: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    set_how_threads_wait()
    assert os.environ.get("GOMP_SPINCOUNT") == after


@pytest.mark.parametrize(("value", "inside"), [("5000", None), ("7", "7")])
def test_another_process_gets_what_the_user_set_and_not_what_we_did(
    value: str, inside: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", value)
    with threads_wait_as_they_come():
        assert os.environ.get("GOMP_SPINCOUNT") == inside
    assert os.environ["GOMP_SPINCOUNT"] == value


def test_the_user_decides_how_many_threads_compute_then_the_run_then_torch() -> None:
    assert thread_count(3, began_with=2) == 3
    assert thread_count(0, began_with=2) == 2
    assert thread_count(None, None) == torch.get_num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults that Linux reports")
def test_memory_that_was_freed_is_there_for_the_next_step() -> None:
    """A block of 40 MiB, which glibc gives back: its pages are fetched once rather than each time."""
    code = """if True:
        import ctypes, resource, sys
        from vitral.runtime.process import keep_freed_memory
        if sys.argv[1] == "kept":
            keep_freed_memory()
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        def step():
            block = libc.malloc(40 << 20)
            ctypes.memset(block, 1, 40 << 20)
            libc.free(block)
        step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {}
    for how in ("given back", "kept"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    if faults["given back"] < 1000:
        pytest.skip("this system's malloc keeps memory, or its pages are huge")
    assert faults["kept"] < faults["given back"] / 10


def test_keeping_memory_may_be_asked_for_twice() -> None:
    keep_freed_memory()
    keep_freed_memory()


def test_a_checkout_that_was_never_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("vitral.runtime.version.version_of", unknown)
    assert vitral_version() == vitral.__version__ == "0+source"
