#!/usr/bin/env python
"""A server for long: ten thousand requests that mean harm, a hundred thousand that do not, and its end.

    python scripts/serve_soak.py hostile MODEL [--count 10000]
    python scripts/serve_soak.py soak MODEL [--count 100000 --clients 16]
    python scripts/serve_soak.py drain MODEL [--count 10 --clients 16]

`hostile` sends mutations of the kinds of `scripts/hostile.py`, and says what was answered, how fast, how
memory grew, and whether anybody was called. `soak` says how memory went, reading by reading. `drain` ends a
loaded server with SIGTERM, again and again, and says what became of every request. Status 1: a bar is missed.
"""

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts import hostile
from scripts.servers import Server, end, serving, vitral_server
from vitral.bench.serving.connection import Connections
from vitral.bench.serving.load import Phase, Sender, closed, each
from vitral.bench.serving.target import Request, Target, requests_of
from vitral.runtime.machine import describe_host
from vitral.runtime.stopping import StopSignal

MIB = 2**20
MOST_GROWTH, FLAT = 200 * MIB, 20 * MIB  # bytes: of hostile requests; of the second half of a soak
READINGS = 20


@contextmanager
def trap() -> Iterator[tuple[int, list]]:
    """A port that bodies name, and who has knocked there."""
    knocks: list = []
    with socket.create_server((hostile_host := "127.0.0.1", 0)) as listener:

        def count() -> None:
            try:
                while True:
                    connection, address = listener.accept()
                    connection.close()
                    knocks.append(address)
            except OSError:
                return

        threading.Thread(target=count, daemon=True).start()
        yield listener.getsockname()[1], knocks
        with socket.create_connection((hostile_host, listener.getsockname()[1])):  # ends the thread's wait
            pass
        time.sleep(0.1)
        knocks.pop()


def outgoing(server: Server) -> int:
    """Connections of the server to somebody who is no client of its own."""
    found = psutil.Process(server.process.pid).net_connections(kind="inet")
    return sum(bool(one.raddr) and one.laddr.port != server.port for one in found)


def harm(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    statuses: Counter = Counter()
    seconds, called = [], 0
    well = hostile.encoded(hostile.picture(64), "PNG")
    before_answer = server.post("/v1/predict", well, "image/png")
    with trap() as (port, knocks):
        server.forget_peak()
        before = server.resident_bytes()
        for number, content in enumerate(hostile.mutations(arguments.count, port, arguments.seed)):
            outcome = hostile.attempt(server.address, iter([content]))
            statuses[outcome.status] += 1
            seconds.append(outcome.seconds)
            if number % 100 == 0:
                called += outgoing(server)
        growth = server.peak_bytes() - before
    answer = server.post("/v1/predict", well, "image/png")
    right = answer[0] == 200 and _top(answer[1]) == _top(before_answer[1])
    unexpected = {
        status: n for status, n in statuses.items() if status != 200 and not 400 <= (status or 0) < 500
    }
    cuts = [1e3 * cut for cut in statistics.quantiles(seconds, n=1000)]
    return {
        "requests": arguments.count,
        "statuses": {str(status): n for status, n in sorted(statuses.items(), key=str)},
        "ms": {"p50": cuts[499], "p99": cuts[989], "p99.9": cuts[998], "max": 1e3 * max(seconds)},
        "beyond_100_ms": sum(one > hostile.QUICK for one in seconds),
        "growth_bytes": growth,
        "connections_outwards": called + len(knocks),
        "right_afterwards": right,
        "passed": right and not unexpected and not called and not knocks and growth <= MOST_GROWTH,
    }  # fmt: skip


def _top(body: bytes) -> Any:
    first = json.loads(body)["predictions"][0]["top"][0]
    return first["label"], round(first["probability"], 4)


# --- Long, and ended --------------------------------------------------------------------------------


def pictures(folder: Path) -> list[Path]:
    """Thirty-two small pictures."""
    files = []
    for number in range(32):
        file = folder / f"{number}.png"
        hostile.picture(64, number).save(file)
        files.append(file)
    return files


def soak(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask many times over connections that stay open; memory is read between."""
    with tempfile.TemporaryDirectory() as folder:
        requests = requests_of(Target.of(server.url), pictures(Path(folder)))
    return asyncio.run(_soaked(server, requests, arguments))


async def _soaked(server: Server, requests: list[Request], arguments: argparse.Namespace) -> dict[str, Any]:
    connections = Connections(Target.of(server.url), 30.0, arguments.clients)
    sender, phase = Sender(connections, requests, arguments.seed), Phase("soak")
    await each(len(requests), sender.know, 4)
    sizes, began_at = [server.resident_bytes()], time.perf_counter()

    async def one(_: int) -> None:
        await sender.send(phase, time.perf_counter(), float("inf"))

    for number in range(READINGS):
        await each(arguments.count // READINGS, one, arguments.clients)
        sizes.append(server.resident_bytes())
        print(f"{phase.tally.begun:,} {sizes[-1] / MIB:.1f} MiB", file=sys.stderr, flush=True)
        if number == 0:
            began_at = time.perf_counter()
    await connections.close()
    tally = phase.tally
    second_half = sizes[READINGS // 2 :]
    return {
        **{key: value for key, value in tally.to_dict().items() if key != "generator_late_ms"},
        "per_second": tally.begun * (1 - 1 / READINGS) / (time.perf_counter() - began_at),
        "resident_bytes": sizes,
        "passed": tally.count(200) == tally.begun
        and not tally.otherwise
        and max(second_half) - second_half[0] <= FLAT,
    }


def drain(arguments: argparse.Namespace) -> dict[str, Any]:
    """End loaded servers: a request that was sent must be answered; one that finds nobody is not lost."""
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        files = pictures(Path(folder))
        for _ in range(arguments.count):
            command, port = vitral_server(arguments.model, "--deadline", "10s")
            with serving(command, port, stdout=subprocess.DEVNULL) as server:
                rounds.append(asyncio.run(_drained(server, files, arguments)))
                rounds[-1]["status"] = end(server.process)
                print(rounds[-1], file=sys.stderr, flush=True)
    lost = sum(count for one in rounds for reason, count in one["lost"].items() if reason != "refused")
    ended_well = all(one["status"] == 0 for one in rounds)
    return {"rounds": rounds, "lost_after_sending": lost, "passed": not lost and ended_well}


async def _drained(server: Server, files: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    target = Target.of(server.url)
    requests = requests_of(target, files)
    connections = Connections(target, 30.0, arguments.clients)
    sender, stop = Sender(connections, requests, arguments.seed), StopSignal()
    await each(len(requests), sender.know, 4)
    loop = asyncio.get_running_loop()
    loop.call_later(1.0, server.process.send_signal, signal.SIGTERM)
    phase = await closed(sender, arguments.clients, 3.0, stop)
    await connections.close()
    tally = phase.tally
    return {
        "requests": tally.begun,
        "answered": {str(status): tally.count(status) for status in sorted(tally.times)},
        "lost": dict(tally.lost),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("hostile", "soak", "drain"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the result as JSON")
    arguments = parser.parse_args()
    arguments.count = arguments.count or {"hostile": 10_000, "soak": 100_000, "drain": 10}[arguments.what]
    if arguments.what == "drain":
        found = drain(arguments)
    else:
        command, port = vitral_server(arguments.model, "--deadline", "10s")
        with serving(command, port, stdout=subprocess.DEVNULL) as server:
            found = {"hostile": harm, "soak": soak}[arguments.what](server, arguments)
    print(json.dumps(found, indent=1))
    if arguments.out:
        report = {"machine": describe_host(), "what": arguments.what, **found}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(not found["passed"])


if __name__ == "__main__":
    main()
