#!/usr/bin/env python
"""How much of a model's speed its server keeps, and how LitServe serves the same model.

    python scripts/serve_compare.py ARTIFACT PHOTOS [--rounds 5 --seconds 10 --clients 16 --form onnx]

Four contenders, each a process of its own that stands still (SIGSTOP) while another is measured:

- offline: the artifact's engine from JPEG bytes to labels, as `vitral predict` computes, without HTTP;
- vitral: `vitral serve ARTIFACT`;
- litserve: one worker that computes batches of 8, as its guide has it;
- litserve, 2 workers: without batches, a core each. Decoding and engine are Vitral's in both.

Servers are asked by a closed loop. All are read in interleaved rounds; ratios are of the same round. "a core
second" divides by the processor time that the contender took, which other work on the machine changes less.
"""

import argparse
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.servers import end, free_port, serving, vitral_server
from vitral.artifacts.open import open_artifact
from vitral.bench.serving.measure import Load, measure
from vitral.bench.serving.process import Family
from vitral.bench.serving.target import raw
from vitral.runtime.machine import describe_host

BATCH = 8


@dataclass(frozen=True)
class Reading:
    """What one contender did in one round."""

    images_a_second: float
    images_a_core_second: float
    lost: int = 0
    refused: int = 0
    generator_cores: float = 0.0


class Contender:
    """A process that is measured now and then."""

    def __init__(self, name: str, process: subprocess.Popen, url: str = "", encode: Any = raw) -> None:
        self.name, self.process, self.url, self.encode = name, process, url, encode

    @contextmanager
    def awake(self) -> Iterator[Family]:
        self.signal_all(signal.SIGCONT)
        try:
            yield Family(self.process.pid)
        finally:
            self.signal_all(signal.SIGSTOP)

    def signal_all(self, number: int) -> None:
        process = psutil.Process(self.process.pid)
        for one in (process, *process.children(recursive=True)):
            os.kill(one.pid, number)

    def read(self, photos: list[Path], clients: int, seconds: float) -> Reading:
        with self.awake() as family:
            before = family.cpu_seconds()
            if not self.url:
                return self._read_offline(seconds, family, before)
            load = Load(clients, seconds, pid=family.pid, idle=0.0, encode=self.encode)
            (phase,) = measure(self.url, photos, load).phases
            cores = phase.machine["server_cores"]
            tally = phase.tally
            speed = phase.throughput
            return Reading(
                speed,
                speed / cores,
                sum(tally.lost.values()),
                tally.begun - tally.count(200),
                phase.machine["generator_cores"],
            )

    def _read_offline(self, seconds: float, family: Family, before: float) -> Reading:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        count, took = json.loads(self.process.stdout.readline())
        return Reading(count / took, count / (family.cpu_seconds() - before))


# --- The contenders' own processes ------------------------------------------------------------------


def offline(arguments: argparse.Namespace) -> None:
    """Label the photographs again and again, for as many seconds as each line of the input says."""
    predictor = open_artifact(arguments.artifact, form=arguments.form)
    contents = [file.read_bytes() for file in photographs(arguments.photos)]
    list(predictor.predictions(contents, batch_size=BATCH))
    print("ready", flush=True)
    for line in sys.stdin:
        began_at, count = time.perf_counter(), 0
        for _ in predictor.predictions(_until(contents, began_at + float(line)), batch_size=BATCH):
            count += 1
        print(json.dumps([count, time.perf_counter() - began_at]), flush=True)


def _until(contents: list[bytes], time_to_end: float) -> Iterator[bytes]:
    for content in cycle(contents):
        if time.perf_counter() >= time_to_end:
            return
        yield content


def as_json(content: bytes, _: str) -> tuple[str, bytes]:
    """What `scripts/litserve_server.py` takes."""
    return "application/json", json.dumps({"image": base64.b64encode(content).decode()}).encode()


# --- The comparison ---------------------------------------------------------------------------------


def photographs(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    return files[:: max(len(files) // 24, 1)][:24]


def contenders(arguments: argparse.Namespace, stack: ExitStack, work: Path) -> list[Contender]:
    common = [str(arguments.artifact), str(arguments.photos), "--form", arguments.form]
    script = [sys.executable, str(Path(__file__).resolve())]
    process = subprocess.Popen(
        [*script, *common, "--as-offline"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.callback(end, process)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    found = [Contender("offline", process)]

    def add(name: str, command: list[str], port: int, ready: str, path: str, encode: Any) -> None:
        server = stack.enter_context(serving(command, port, ready, stdout=subprocess.DEVNULL, cwd=work))
        found.append(Contender(name, server.process, f"{server.url}{path}", encode))

    command, port = vitral_server(arguments.artifact, "--form", arguments.form, "--deadline", "30s")
    add("vitral", command, port, "/readyz", "/v1/predict", raw)
    for workers, name in ((1, "litserve"), (2, "litserve, 2 workers")):
        port = free_port()
        program = str(Path(__file__).with_name("litserve_server.py").resolve())
        command = [sys.executable, program, common[0], arguments.form, str(port), str(workers)]
        add(name, command, port, "/health", "/predict", as_json)
    return found


def compare(arguments: argparse.Namespace) -> dict[str, list[Reading]]:
    photos = photographs(arguments.photos)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = contenders(arguments, stack, work)
        readings: dict[str, list[Reading]] = {one.name: [] for one in found}
        for one in found:
            one.signal_all(signal.SIGSTOP)
        try:
            for number in range(arguments.rounds + 1):
                for one in reversed(found) if number % 2 else found:
                    reading = one.read(photos, arguments.clients, arguments.seconds if number else 2.0)
                    if number:  # the first warms up
                        readings[one.name].append(reading)
                        print(f"{number} {one.name:20} {reading}", file=sys.stderr, flush=True)
        finally:
            for one in found:
                one.signal_all(signal.SIGCONT)
    return readings


def summary(readings: dict[str, list[Reading]]) -> list[dict[str, Any]]:
    """Medians of each contender, and of the ratios to the offline speed of the same round."""
    rows = []
    for name, ours in readings.items():
        row: dict[str, Any] = {"contender": name}
        for field in ("images_a_second", "images_a_core_second"):
            values = [getattr(reading, field) for reading in ours]
            ratios = [
                getattr(one, field) / getattr(other, field)
                for one, other in zip(ours, readings["offline"], strict=True)
            ]
            row |= {field: statistics.median(values), f"{field}_of_offline": statistics.median(ratios)}
        row["lost"] = sum(reading.lost for reading in ours)
        row["refused"] = sum(reading.refused for reading in ours)
        row["generator_cores"] = statistics.median(reading.generator_cores for reading in ours)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--form", default="onnx")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path, help="all readings as JSON")
    parser.add_argument("--as-offline", action="store_true", help=argparse.SUPPRESS)  # a contender's process
    arguments = parser.parse_args()
    arguments.artifact, arguments.photos = arguments.artifact.resolve(), arguments.photos.resolve()
    if arguments.as_offline:
        offline(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the contenders are ended
    readings = compare(arguments)
    rows = summary(readings)
    for row in rows:
        print(
            f"{row['contender']:20} {row['images_a_second']:7.1f} images/s  "
            f"{row['images_a_second_of_offline']:5.2f} of offline  "
            f"{row['images_a_core_second']:7.1f} a core second  "
            f"{row['images_a_core_second_of_offline']:5.2f} of offline  "
            f"lost {row['lost']}  refused {row['refused']}  generator {row['generator_cores']:.2f} cores"
        )
    if arguments.out:
        report = {"machine": describe_host(), "rows": rows}
        report["readings"] = {name: [vars(one) for one in ours] for name, ours in readings.items()}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
