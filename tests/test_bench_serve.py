"""A load test counts every request once, and times each from when it was due."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_images
from tests.test_cli import Vitral, assert_failed_in_one_line
from tests.test_cli import vitral as vitral  # the fixture
from vitral.bench.serving.connection import Reply
from vitral.bench.serving.load import Rate, each, rates_of
from vitral.bench.serving.measure import Load, measure
from vitral.bench.serving.tally import Answer, Tally, percentiles
from vitral.bench.serving.target import Target, requests_of
from vitral.runtime.errors import VitralError

pytest.importorskip("httptools")


def answer(label: str = "ant", status: str = "200 OK", headers: str = "", probability: float = 0.5) -> bytes:
    body = json.dumps({"predictions": [{"top": [{"label": label, "probability": probability}]}]})
    return f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n{body}".encode()


Say = Callable[[int], bytes | float | None]


class Stub:
    """A server that answers request number n by `say(n)`: bytes, seconds of a stall of all, None: hang up."""

    def __init__(self, say: Say) -> None:
        self.say, self.requests = say, 0
        self.url, self.stalled_until = "", 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                number, self.requests = self.requests, self.requests + 1
                said = self.say(number)
                if said is None:
                    return
                if isinstance(said, float):
                    self.stalled_until, said = time.monotonic() + said, answer()
                await asyncio.sleep(max(self.stalled_until - time.monotonic(), 0))
                writer.write(said)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@contextmanager
def serving(say: Say) -> Iterator[Stub]:
    stub, loop = Stub(say), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(stub.serve, "127.0.0.1", 0))
    stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def end() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # in which the sockets are closed

    try:
        yield stub
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return sorted(write_images(tmp_path / "pictures", {"ant": 3}).rglob("*.*"))


# --- What is sent -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", (False, "127.0.0.1", 8000, "/v1/predict")),
        ("http://localhost/", (False, "localhost", 80, "/v1/predict")),
        ("https://[::1]:9/predict?top=1", (True, "::1", 9, "/predict?top=1")),
    ],
)
def test_a_url_names_a_server_and_what_it_is_asked(url: str, expected: tuple) -> None:
    target = Target.of(url)
    assert (target.secure, target.host, target.port, target.path) == expected


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:x",
                                 "http://me:secret@127.0.0.1"])  # fmt: skip
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(VitralError, match="no URL"):
        Target.of(url)


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "127.0.0.1.example.org", "0.0.0.0"])
def test_another_machine_is_loaded_only_if_that_is_said(host: str) -> None:
    with pytest.raises(VitralError, match="--elsewhere"):
        Target.of(f"http://{host}:80")
    assert Target.of(f"http://{host}:80", elsewhere=True).host == host


def test_a_request_is_whole_before_the_clock_runs(pictures: list[Path]) -> None:
    """Read by the parser of uvicorn, which no code here shares."""
    import httptools

    seen: dict[str, Any] = {"headers": {}, "body": b""}

    class Reader:
        def on_url(self, url: bytes) -> None:
            seen["url"] = url

        def on_header(self, name: bytes, value: bytes) -> None:
            seen["headers"][name.lower()] = value

        def on_body(self, body: bytes) -> None:
            seen["body"] += body

        def on_message_complete(self) -> None:
            seen["complete"] = True

    (request, *_) = requests_of(Target.of("http://localhost:8000"), pictures, token="secret")
    parser = httptools.HttpRequestParser(Reader())
    parser.feed_data(request.content)
    assert seen["complete"]
    assert (parser.get_method(), seen["url"], seen["body"]) == (
        b"POST",
        b"/v1/predict",
        pictures[0].read_bytes(),
    )
    assert seen["headers"][b"authorization"] == b"Bearer secret"
    assert seen["headers"][b"content-type"] in (b"image/png", b"image/jpeg")


def test_rates_are_requests_a_second_or_multiples() -> None:
    assert rates_of("100") == (Rate(100, False),)
    assert rates_of("0.5x, 1x,3x") == (Rate(0.5, True), Rate(1, True), Rate(3, True))
    assert [rate.per_second(40) for rate in rates_of("0.5x,7")] == [20, 7]


@pytest.mark.parametrize("text", ["", "x", "0", "0x", "-1", "1e3", "fast", "1,,2", "100001", "1001x", "nan"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(VitralError, match="rate"):
        rates_of(text)


# --- What is counted --------------------------------------------------------------------------------


def test_every_request_is_counted_once_and_timed_by_hand() -> None:
    tally = Tally(begun=6)
    for number in range(3):
        tally.answered(Reply(200, b"", retry_after=False), due=0, sent=1, ended=2 + number)
    tally.answered(Reply(503, b"", retry_after=True), due=0, sent=0, ended=0.25)
    tally.answered(Reply(429, b"", retry_after=False), due=0, sent=0, ended=0.5)
    assert tally.unfinished == 1
    tally.lost["closed"] += 1
    assert tally.unfinished == 0
    found = tally.to_dict()
    accepted = found["answers"]["200"]
    assert (accepted["requests"], accepted["share"]) == (3, 0.5)
    assert (accepted["ms"]["p50"], accepted["ms"]["max"]) == (3000, 4000)
    assert accepted["ms_from_sending"]["p50"] == 2000
    assert found["answers"]["503"]["ms"]["p99"] == 250
    assert found["refused_without_retry_after"] == 1


def test_percentiles_are_those_of_the_standard_library() -> None:
    import statistics

    seconds = [(number * 37 % 101) / 101 for number in range(101)]
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    found = percentiles(seconds)
    assert found is not None
    for name, place in (("p50", 49), ("p95", 94), ("p99", 98)):
        assert found[name] == pytest.approx(1e3 * cuts[place])


def test_answers_that_say_the_same_agree_and_swapped_ones_do_not() -> None:
    first, other = Answer.of(answer("ant").partition(b"\r\n\r\n")[2]), Answer("bee", 0.5)
    assert first is not None
    assert first == Answer("ant", 0.5)
    assert first.agrees(Answer("ant", 0.5005))
    assert other.agrees(first)  # as likely: rounding decides which comes first
    assert not first.agrees(Answer("ant", 0.6))
    assert not first.agrees(None)
    assert Answer.of(b"[]") is None
    assert Answer.of(b"\xff") is None


# --- Closed and open --------------------------------------------------------------------------------


def test_a_closed_loop_counts_what_the_server_counts(pictures: list[Path]) -> None:
    with serving(lambda _: answer()) as stub:
        report = measure(stub.url, pictures, Load(clients=3, seconds=0.4, pid=None))
    (phase,) = report.phases
    assert phase.tally.begun == stub.requests - len(pictures)  # each was sent once before
    assert phase.tally.begun > 20
    assert phase.tally.count(200) == phase.tally.begun
    assert not phase.tally.otherwise
    assert phase.seconds == pytest.approx(0.4, abs=0.05)
    assert phase.throughput == pytest.approx(phase.tally.begun / 0.4, rel=0.2)


def test_a_stall_is_seen_by_all_who_came_during_it(pictures: list[Path]) -> None:
    """Of 100 a second that are held for 0.4 s some 40 wait, 0.2 s on average; a closed loop would say one."""
    with serving(lambda number: 0.4 if number == 30 else answer()) as stub:
        report = measure(stub.url, pictures, Load(seconds=1.0, rates=rates_of("100")))
    (phase,) = report.phases
    waits = sorted(phase.tally.times[200].from_due)
    held = [wait for wait in waits if wait > 0.05]
    assert phase.rate == 100
    assert 60 < phase.tally.begun < 140  # four deviations of a Poisson process
    assert 15 < len(held) < 60
    assert sum(held) / len(held) == pytest.approx(0.22, abs=0.07)


def test_an_open_loop_of_a_multiple_measures_what_the_server_can_do_first(pictures: list[Path]) -> None:
    with serving(lambda _: answer()) as stub:
        report = measure(stub.url, pictures, Load(clients=1, seconds=0.3, rates=rates_of("0.1x,0.2x")))
    capacity, slow, quick = report.phases
    assert capacity.rate is None
    assert slow.rate == pytest.approx(0.1 * capacity.throughput)
    assert quick.rate == pytest.approx(0.2 * capacity.throughput)


def test_what_is_refused_lost_or_answered_otherwise_is_told_apart(pictures: list[Path]) -> None:
    def say(number: int) -> bytes | None:
        match number % 5 if number > 2 else 0:
            case 1:
                return answer(status="503 Service Unavailable", headers="Retry-After: 1\r\n")
            case 2:
                return answer(status="429 Too Many Requests")
            case 3:
                return None
            case 4:
                return answer("bee", probability=0.9)
        return answer()

    with serving(say) as stub:
        report = measure(stub.url, pictures, Load(clients=1, seconds=1.0))
    tally = report.phases[0].tally
    rounds = tally.begun // 5
    for count in (tally.count(503), tally.count(429), tally.lost["closed"], tally.otherwise):
        assert count in (rounds, rounds + 1)
    assert rounds > 2
    assert tally.without_retry_after == tally.count(429)
    assert tally.unfinished == 0


def test_a_request_without_an_answer_is_lost_in_time(pictures: list[Path]) -> None:
    with serving(lambda number: 9.0 if number > 2 else answer()) as stub:
        report = measure(stub.url, pictures, Load(clients=2, seconds=0.3, timeout=0.2))
    tally = report.phases[0].tally
    assert tally.lost["timed out"] == tally.begun
    assert 2 <= tally.begun <= 6


def test_nonsense_for_an_answer_is_lost(pictures: list[Path]) -> None:
    with serving(lambda number: b"nonsense\r\n\r\n" if number > 2 else answer()) as stub:
        report = measure(stub.url, pictures, Load(clients=1, seconds=0.2))
    assert report.phases[0].tally.lost["not HTTP"] == report.phases[0].tally.begun > 0


# --- The command ------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_json(
    vitral: Vitral, pictures: list[Path], tmp_path: Path
) -> None:
    with serving(lambda _: answer()) as stub:
        words = ["bench", "serve", stub.url, pictures[0].parent, "--seconds", 0.2, "--pid", os.getpid()]
        result = vitral(*words, "--rate", "0.1x", "--out", tmp_path / "load.json")
        assert result.status == 0
        printed = vitral(*words[:-2], "--json")
    for word in ("closed loop, 16 clients", "open loop, 0.1x", "idle", "p99", "MiB"):
        assert word in result.out
    report = json.loads((tmp_path / "load.json").read_text())
    assert [phase["lost"] for phase in report["phases"]] == [{}, {}]
    assert report["phases"][0]["server_bytes_before"] > 2**20
    assert report["machine"]["cpu"]
    assert report["machine"]["command"].startswith("vitral bench serve http")
    assert json.loads(printed.out)["benchmark"] == "serve"


def test_of_many_calls_that_fail_at_once_each_is_seen() -> None:
    """Asyncio would log the others when they are collected, which can be in the middle of anything."""
    unseen: list[dict] = []

    async def fail(number: int) -> None:
        raise VitralError(f"call {number}")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        with pytest.raises(VitralError, match="call 0"):
            await each(5, fail, 3)
        gc.collect()

    asyncio.run(main())
    assert not unseen


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["http://127.0.0.1:1"], "nothing answers at http://127.0.0.1:1"),
        (["http://192.0.2.1"], "--elsewhere"),
        (["http://127.0.0.1:1", "--rate", "fast"], "rate 'fast'"),
        (["http://127.0.0.1:1", "--seconds", "0"], "seconds=0"),
        (["http://127.0.0.1:1", "--rate", "100000", "--seconds", "1000"], "more than 10,000,000 requests"),
        (["http://127.0.0.1:1", "--pid", 2**22 + 1], "no such process"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said_in_one_line(
    words: list, text: str, vitral: Vitral, pictures: list[Path]
) -> None:
    result = vitral("bench", "serve", words[0], pictures[0].parent, *words[1:])
    assert_failed_in_one_line(result, text)


def test_a_picture_that_the_server_refuses_is_named(vitral: Vitral, pictures: list[Path]) -> None:
    with serving(lambda _: answer(status="415 Unsupported Media Type")) as stub:
        result = vitral("bench", "serve", stub.url, pictures[0])
    assert_failed_in_one_line(result, f"{pictures[0]}: the server answered 415")


def test_a_busy_server_is_asked_again_before_the_clock_runs(pictures: list[Path]) -> None:
    refused = answer(status="503 Service Unavailable", headers="Retry-After: 1\r\n")
    with serving(lambda number: refused if number < 2 else answer()) as stub:
        report = measure(stub.url, pictures, Load(clients=1, seconds=0.2))
    assert report.phases[0].tally.count(200) == report.phases[0].tally.begun > 0


def test_ctrl_c_prints_what_was_measured(pictures: list[Path]) -> None:
    with serving(lambda _: answer()) as stub:
        command = [sys.executable, "-m", "vitral", "bench", "serve", stub.url, str(pictures[0].parent)]
        process = subprocess.Popen(
            [*command, "--seconds", "600", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while stub.requests < 100 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        asked_at = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - asked_at < 2.5
    assert process.returncode == 130, err
    (phase,) = json.loads(out)["phases"]
    assert phase["requests"] >= 90
    assert phase["seconds"] < 60
    assert phase["lost"] == {}
