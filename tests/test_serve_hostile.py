"""No request can do worse than be refused: at once, in one line, and without a word of the machine.

A server of its own process is asked what `scripts/hostile.py` has, and watched from outside: how long it
took, how its memory grew, which connections it opened. `scripts/serve_soak.py` does so with 10,000 mutations.
"""

import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts import hostile
from scripts.hostile import Hostile, attempt, post
from scripts.servers import Server, serving, vitral_server
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import load
from vitral.model.vit import VisionTransformer
from vitral.ship.serve.options import ServeOptions

for _name in ("starlette", "uvicorn", "httptools", "prometheus_client"):
    pytest.importorskip(_name)

MOST_GROWTH = 200 * 2**20  # bytes
# The machine's cores are shared with others, so that the quickest of some refusals counts.
TRIES = 4
_OPTIONS = ServeOptions()


class Trap:
    """A port that requests name and nobody may open."""

    def __init__(self) -> None:
        self.knocks = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        try:
            while True:
                self._listener.accept()[0].close()
                self.knocks += 1
        except OSError:
            return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    trap.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    options = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_classes": 3, "dropout": 0.0}
    labels = ("ant", "bee", "cat")
    save_checkpoint(folder, Checkpoint(VisionTransformer(32, 8, **options), Preprocess((32, 32)), labels))
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    command, port = vitral_server(model, "--deadline", "10s")
    with serving(command, port, stdout=subprocess.DEVNULL) as running:
        for _ in range(20):  # caches, threads and the allocator are as they will be
            assert running.post("/v1/predict", well(), "image/png")[0] == 200
        yield running


def well(seed: int = 0) -> bytes:
    return hostile.encoded(hostile.picture(64, seed), "PNG")


def outgoing(server: Server) -> list:
    """Connections to somebody who is no client of the server's."""
    found = psutil.Process(server.process.pid).net_connections(kind="inet")
    return [one for one in found if one.raddr and one.laddr.port != server.port]


def leaks(answer: bytes) -> list[str]:
    """What an answer must not say: where files are, or which code failed."""
    words = ("traceback", ".py", "/usr", "/home", "/root", "/tmp", "site-packages", "root:x:", "errno")
    return [word for word in words if word in answer.lower().decode("latin-1")]


KINDS = hostile.kinds(9, header_timeout=_OPTIONS.header_timeout, body_timeout=_OPTIONS.body_timeout)
SLOW = {kind.name for kind in KINDS if kind.seconds > hostile.QUICK}


def test_the_kinds_are_those_of_the_bar() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) > 60
    page = Path(__file__).parents[1] / "docs" / "benchmarks.md"
    assert f"**Hostile**: {len(KINDS)} kinds of requests" in page.read_text()


@pytest.fixture(scope="module")
def kinds(trap: Trap) -> dict[str, Hostile]:
    """With the trap's port in them."""
    options = {"header_timeout": _OPTIONS.header_timeout, "body_timeout": _OPTIONS.body_timeout}
    return {kind.name: kind for kind in hostile.kinds(trap.port, **options)}


@pytest.mark.parametrize(
    "name", [pytest.param(k.name, marks=pytest.mark.slow) if k.name in SLOW else k.name for k in KINDS]
)
def test_what_means_harm_is_refused_at_once(
    name: str, server: Server, trap: Trap, kinds: dict[str, Hostile]
) -> None:
    kind = kinds[name]
    server.forget_peak()
    before = server.resident_bytes()
    for left in reversed(range(1 if name in SLOW else TRIES)):
        outcome = attempt(server.address, kind.pieces())
        assert outcome.status in kind.statuses, outcome.answer[:300]
        if outcome.seconds <= kind.seconds:
            break
        assert left, f"{outcome.seconds:.3f} s"
    assert server.peak_bytes() - before <= MOST_GROWTH
    assert not leaks(outcome.answer)
    assert not outgoing(server)
    assert trap.knocks == 0
    status, answer = server.post("/v1/predict", well(), "image/png")
    assert status == 200
    assert json.loads(answer)["predictions"][0]["top"]


def test_every_refusal_is_one_line_of_json(server: Server, trap: Trap) -> None:
    for name, body in {**hostile.texts(trap.port), **hostile.pictures()}.items():
        media_type = "application/json" if name.startswith("JSON ") and "{" in str(body) else "image/png"
        status, answer = server.post("/v1/predict", body, media_type)
        if status == 200:
            continue
        said = json.loads(answer)
        assert set(said) == {"error"}, name
        assert said["error"], name
        assert "\n" not in said["error"], name
        assert len(said["error"]) < 400, name


def test_mutations_are_answered_or_refused_and_the_server_stays_right(
    server: Server, trap: Trap, model: Path
) -> None:
    server.forget_peak()
    before, counts = server.resident_bytes(), {}
    for content in hostile.mutations(300, trap.port):
        outcome = attempt(server.address, iter([content]))
        assert outcome.status is not None, content[:200]
        assert outcome.status == 200 or 400 <= outcome.status < 500, outcome.answer[:300]
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    assert counts[200] > 10  # some are pictures still
    assert counts[422] > 50
    assert server.peak_bytes() - before <= MOST_GROWTH
    assert trap.knocks == 0
    classifier = load(model, device="cpu", precision="float32")
    for seed in range(3):
        said = json.loads(server.post("/v1/predict", well(seed), "image/png")[1])["predictions"][0]["top"][0]
        label, probability = classifier.predict(well(seed))[0].top[0]
        assert said["label"] == label
        assert said["probability"] == pytest.approx(probability, abs=1e-5)


def test_one_bad_of_eight_fails_alone(server: Server) -> None:
    """At the same time, so that they share a batch; the bad one is none of the others' business."""
    bad = random.Random(0).randrange(8)
    bodies = [well()[:200] if number == bad else well(number) for number in range(8)]
    alone = [server.post("/v1/predict", body, "image/png") for body in bodies]
    answers: list = [None] * 8
    barrier = threading.Barrier(8)

    def ask(number: int) -> None:
        barrier.wait()
        answers[number] = server.post("/v1/predict", bodies[number], "image/png")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [422 if number == bad else 200 for number in range(8)]
    for number in set(range(8)) - {bad}:
        together, before = (json.loads(said[number][1])["predictions"][0]["top"] for said in (answers, alone))
        for one, other in zip(together, before, strict=True):
            assert one["label"] == other["label"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_clients_that_stall_do_not_hold_up_the_others(server: Server) -> None:
    """Two hundred that write half a header and wait, as Slowloris does."""
    stalling = []
    try:
        for _ in range(200):
            connection = socket.create_connection(server.address)
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nX-")
            stalling.append(connection)
        began_at = time.perf_counter()
        assert server.post("/v1/predict", well(), "image/png")[0] == 200
        assert time.perf_counter() - began_at < 1.0
    finally:
        for connection in stalling:
            connection.close()


def test_a_body_may_come_in_many_pieces(server: Server) -> None:
    request = post(well(), "image/png")
    pieces = [request[place : place + 97] for place in range(0, len(request), 97)]
    assert attempt(server.address, iter(pieces)).status == 200
