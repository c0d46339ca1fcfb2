"""Causes faults in runs of several processes, and says how each ended.

    python scripts/faults.py                    # all 20
    python scripts/faults.py --only SIGKILL     # those whose name has this in it

Each run has two processes (gloo, one thread each). A row says: the fault, whether the run ended with the
bits of a calm one (a sharded run: within 1e-6 of it) or with how many lines on standard error before that,
and the seconds from the start to that end. What was stopped is taken up by a second start.
"""

import argparse
import functools
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import load_file

from tests.conftest import write_images
from tests.processes import (
    ALL_THAT_IS_RANDOM,
    ENVIRONMENT,
    SMALL,
    assert_same_run,
    torchrun,
    words,
)

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    **SMALL, **ALL_THAT_IS_RANDOM, "parts": 2, "batch_size": 12, "steps": 20, "checkpoint_steps": 3,
}  # fmt: skip
SECONDS = 150  # for one start; a run that hangs is ended
ROOM = 6 << 20  # bytes of the disk that becomes full


# --- In a process of the run ---------------------------------------------------------------------------


def suffer(kind: str, rank: int, step: int, marker: Path) -> None:
    """Let this process meet a fault after a step, once; -1 is any rank."""
    from vitral.training import saving
    from vitral.training.run import Run

    if kind.startswith("pieces"):
        saving.LARGE = 0
    if rank not in (-1, int(os.environ.get("RANK", "0"))):
        return
    if kind == "pieces killed":
        kill_while_writing(marker)
        return
    counted = Run.count_step

    def count_step(run: Run) -> None:
        counted(run)
        if run.state.step == step and not marker.exists():
            marker.touch()
            meet(kind, run)

    Run.count_step = count_step


def meet(kind: str, run: Any) -> None:
    match kind:
        case "SIGTERM" | "SIGKILL":
            os.kill(os.getpid(), getattr(signal, kind))
        case "agent":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        case "NaN":
            next(run.model.parameters()).data.fill_(math.nan)


def kill_while_writing(marker: Path) -> None:
    """End the process in the middle of its second folder of pieces, some of which are written by then."""
    from torch.distributed.checkpoint import FileSystemWriter

    write, calls = FileSystemWriter.write_data, [0]

    def write_data(*args: Any) -> Any:
        written = write(*args)
        calls[0] += 1
        if calls[0] == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    FileSystemWriter.write_data = write_data


# --- Starts --------------------------------------------------------------------------------------------


class Start:
    """A command in a group of its own, which is ended if it takes too long."""

    def __init__(self, command: list[str], fault: tuple[str, int, int, Path] | None = None) -> None:
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)]))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        if fault:
            environment["FAULT"] = "|".join(map(str, fault))
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def ended(self) -> tuple[int | None, str]:
        """Its status, and what it said; None if it hung."""
        try:
            status = self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            status = None
        self._errors.seek(0)
        return status, self._errors.read()


def training(data: Path, out: Path, **settings: Any) -> list[str]:
    return [__file__, "--process", "train", str(data), "--out", str(out), *words(**{**SETTINGS, **settings})]


def resuming(data: Path, out: Path) -> list[str]:
    return [__file__, "--process", "train", str(data), "--out", str(out), "--resume"]


def lines_of(said: str) -> int:
    return sum(
        line.startswith("vitral:") and "holds this run already" not in line for line in said.splitlines()
    )


# --- Faults: each gives how the start with the fault ended ----------------------------------------------


class Place:
    """Where the runs of one table lie, and the calm ones to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_images(folder / "sound", {"ant": 37, "bee": 37, "cat": 37})

    def damaged(self, every: int) -> Path:
        """The same images, of which some are cut short."""
        data = self.folder / f"damaged-{every}"
        if not data.exists():
            write_images(data, {"ant": 37, "bee": 37, "cat": 37})
            for image in sorted(data.rglob("*.png"))[5::every]:
                image.write_bytes(image.read_bytes()[:60])
        return data

    @functools.cache  # noqa: B019 - it lives as long as the program
    def calm(self, data: Path, **settings: Any) -> Path:
        """A run of one process that nothing happens to."""
        out = self.folder / f"calm-{abs(hash((data, *settings.items())))}"
        status, said = Start([sys.executable, *training(data, out, **settings)]).ended()
        if status != 0:
            raise SystemExit(f"the calm run ended with {status}: {said}")
        return out


def one_process(kind: str, rank: int, step: int, place: Place, out: Path, **settings: Any) -> str:
    """A fault in one of two processes; the elastic agent starts all again, or a second start goes on."""
    restarts = 1 if "kill" in kind.lower() else 0
    command = [*torchrun(2, f"--max-restarts={restarts}"), *training(place.data, out, **settings)]
    status, said = Start(command, (kind, rank, step, out.with_suffix(".met"))).ended()
    if status is None:
        return "HUNG"
    if status == 0:
        return "went on by itself"
    again, what = Start([*torchrun(2), *resuming(place.data, out)]).ended()
    stopped = f"status {status}, lines {lines_of(said)}"
    return f"{stopped}; then resumed" if again == 0 else f"{stopped}; RESUME FAILED {what[-300:]}"


def agents(first_alone: bool, place: Place, out: Path) -> str:  # noqa: FBT001
    """Two agents of which one dies with its process, or one that another joins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    elastic = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
    elastic += ["--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    elastic += [f"--rdzv-id={out.name}", "--local-addr=127.0.0.1", "--rdzv-conf=last_call_timeout=8"]
    command = [*elastic, *training(place.data, out, **({"steps": 400} if first_alone else {}))]
    one = Start(command)
    if first_alone:
        until = time.monotonic() + SECONDS
        while not (out / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.1)
        two = Start(command)
    else:
        time.sleep(1)
        two = Start(command, ("agent", -1, 7, out.with_suffix(".met")))
    (status, said), (other, _) = one.ended(), two.ended()
    joined = f", {said.count('holds this run already')} restarts"
    why = f": {said[-1500:]}" if status else ""
    return f"status {status} and {other}{joined}{why}"


def images(every: int, place: Place, out: Path, **settings: Any) -> str:
    status, _ = Start([*torchrun(2), *training(place.damaged(every), out, **settings)]).ended()
    return f"status {status}"


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(pieces: bool, place: Place, out: Path, **settings: Any) -> str:  # noqa: FBT001
    """No room for a second state; then there is, and the run goes on. Needs to be root."""
    kind = "pieces" if pieces else "none"
    command = [*torchrun(2), *training(place.data, out, **settings)]
    status, said = Start(command, (kind, -1, 0, out.with_suffix(".met"))).ended()
    subprocess.run(["mount", "-o", f"remount,size={ROOM * 40}", str(out.parent)], check=True)
    again, what = Start([*torchrun(2), *resuming(place.data, out)]).ended()
    stopped = f"status {status}, lines {lines_of(said)}"
    return f"{stopped}; then resumed" if again == 0 else f"{stopped}; RESUME FAILED {what[-300:]}"


def weights_apart(one: Path, other: Path) -> float:
    """The relative difference of the averaged weights; a state may be in pieces."""
    ours, theirs = (load_file(run / "last" / "model.safetensors") for run in (one, other))
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return math.sqrt(apart / sum(float(of.double().square().sum()) for of in theirs.values()))


def same(place: Place, out: Path, data: Path, **settings: Any) -> str:
    """Whether a run is the calm one."""
    try:
        if settings.pop("shard", False):
            found = weights_apart(out, place.calm(data, **settings))
            return f"within {found:.0e}" if found < 1e-6 else f"DIFFERENT {found:.0e}"
        assert_same_run(place.calm(data, **settings), out)
    except (AssertionError, OSError) as error:
        return f"DIFFERENT {str(error)[:80]}"
    return "equal bits"


Fault = Callable[[Place, Path], str]


def faults(seed: int) -> dict[str, tuple[Fault, dict[str, Any], int]]:
    """By name: what causes it, the settings that it changes, and of so many images one is damaged."""
    drawn = random.Random(seed)
    table: dict[str, tuple[Fault, dict[str, Any], int]] = {}
    for repeat in range(3):
        for kind in ("SIGTERM", "SIGKILL"):
            for rank in (0, 1):
                step = drawn.randint(2, 18) if repeat else 7
                table[f"{kind} to rank {rank} after step {step}" + (" (drawn)" if repeat else "")] = (
                    functools.partial(one_process, kind, rank, step), {}, 0
                )  # fmt: skip
    table["2 agents to 1"] = functools.partial(agents, False), {}, 0
    table["1 agent to 2"] = functools.partial(agents, True), {"steps": 400}, 0
    table["NaN in rank 1"] = functools.partial(one_process, "NaN", 1, 7), {}, 0
    table["one image damaged"] = functools.partial(images, 1000), {}, 1000
    bad = {"batch_size": 4, "max_damaged": 0.5}
    table["parts wholly damaged"] = functools.partial(images, 3, **bad), bad, 3
    table["disk full"] = functools.partial(full_disk, False), {}, 0
    shard = {"shard": True}
    table["disk full, pieces"] = functools.partial(full_disk, True, **shard), shard, 0
    table["SIGKILL while pieces are written"] = (
        functools.partial(one_process, "pieces killed", 1, 0, **shard), shard, 0
    )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="of the faults, those with this in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the steps that are drawn")
    asked = parser.parse_args()
    good = 0
    with tempfile.TemporaryDirectory() as there:
        place = Place(Path(there))
        chosen = {name: row for name, row in faults(asked.seed).items() if asked.only in name}
        for number, (name, (cause, settings, every)) in enumerate(chosen.items()):
            data = place.damaged(every) if every else place.data
            place.calm(data, **{key: value for key, value in settings.items() if key != "shard"})
            folder = Path(there) / f"run-{number}"
            disk = small_disk(folder) if "disk" in name else None
            folder.mkdir() if disk is None else disk.__enter__()
            begun = time.monotonic()
            try:
                how = cause(place, folder / "out")
                seconds = time.monotonic() - begun
                verdict = same(place, folder / "out", data, **settings)
            finally:
                if disk is not None:
                    disk.__exit__(None, None, None)
            good += verdict.startswith(("equal", "within"))
            print(f"{name:34} {seconds:5.0f} s  {verdict:14} {how}", flush=True)
        print(f"{good} of {len(chosen)} as they should")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        from vitral.cli.app import main as vitral

        if "FAULT" in os.environ:
            met_kind, met_rank, met_step, met = os.environ["FAULT"].split("|")
            suffer(met_kind, int(met_rank), int(met_step), Path(met))
        sys.argv = ["vitral", *sys.argv[2:]]
        vitral()
    else:
        main()
