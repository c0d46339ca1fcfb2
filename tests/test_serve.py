"""The server says what `predict` says, to each its own, and refuses in time what it cannot do."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from openapi_spec_validator import validate
from typer.testing import CliRunner

from tests.serving import (
    HOST,
    JPEG,
    JSON,
    LABELS,
    Colours,
    Server,
    asked,
    behind_a_port,
    encoded,
    in_process,
    picture,
    plain,
    served,
    status,
)
from vitral.cli.app import app
from vitral.runtime.errors import VitralError
from vitral.ship.serve.admission import Admission
from vitral.ship.serve.app import App
from vitral.ship.serve.options import ServeOptions
from vitral.ship.serve.refusal import Refusal
from vitral.ship.serve.routes import ROUTES, openapi
from vitral.ship.serve.server import _listener, serve

FILES = [encoded(picture(seed), kind) for seed in range(6) for kind in ("PNG", "JPEG", "WEBP")]


def listed(files: list[bytes]) -> dict[str, Any]:
    return {"images": [base64.b64encode(file).decode() for file in files]}


async def predicted(client: httpx.AsyncClient, file: bytes, top: int = 3) -> httpx.Response:
    return await client.post(f"/v1/predict?top={top}", content=file, headers=JPEG)


# --- Answers -----------------------------------------------------------------------------------------


def test_pictures_asked_for_at_once_are_computed_together_and_get_their_own_answers() -> None:
    engine = Colours(lambda: time.sleep(0.01))
    model = served(engine)

    async def ask(_: Server, client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(predicted(client, file) for file in FILES))

    expected = [prediction.top for prediction in model.predictor.predict(FILES, top=3)]
    engine.batches.clear()
    replies = asked(ask, model)
    for reply, top in zip(replies, expected, strict=True):
        (found,) = reply.json()["predictions"]
        assert [pair["label"] for pair in found["top"]] == [label for label, _ in top]
        assert [pair["probability"] for pair in found["top"]] == pytest.approx([p for _, p in top], abs=1e-6)
        assert found["label"] == top[0][0]
        assert found["error"] is None
    assert max(engine.batches[-10:]) > 1  # after the warm-up
    assert max(engine.batches) <= 8


def test_a_damaged_picture_among_eight_fails_alone() -> None:
    files = [*FILES[:3], FILES[3][:40], *FILES[4:8]]

    async def ask(_: Server, client: httpx.AsyncClient) -> tuple[httpx.Response, list[httpx.Response]]:
        together = await client.post("/v1/predict", json=listed(files))
        return together, await asyncio.gather(*(predicted(client, file) for file in files))

    together, alone = asked(ask)
    assert together.status_code == 200
    errors = [one["error"] is not None for one in together.json()["predictions"]]
    assert errors == [index == 3 for index in range(8)]
    assert [reply.status_code for reply in alone] == [422 if index == 3 else 200 for index in range(8)]
    assert [one["label"] for one in together.json()["predictions"]][4] == alone[4].json()["predictions"][0][
        "label"
    ]


def test_a_picture_that_breaks_the_engine_breaks_no_other_answer() -> None:
    engine = Colours(lambda: time.sleep(0.01), fails_at=77)
    files = [plain(value) for value in (10, 20, 77, 40, 50, 60, 70, 80)]

    async def ask(_: Server, client: httpx.AsyncClient) -> list[int]:
        return [r.status_code for r in await asyncio.gather(*(predicted(client, file) for file in files))]

    assert asked(ask, served(engine)) == [200, 200, 500, 200, 200, 200, 200, 200]


def test_what_is_not_sure_gets_no_label() -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> tuple[Any, str]:
        reply = await predicted(client, plain(100))
        return reply.json()["predictions"][0], (await client.get("/metrics")).text

    found, metrics = asked(ask, served(abstain_below=0.5))  # grey: a third each
    assert found["label"] is None
    assert found["abstained"]
    assert found["top"][0]["probability"] == pytest.approx(1 / 3)
    assert "vitral_abstained_total 1.0" in metrics
    assert "vitral_predictions_total{" not in metrics
    sure, _ = asked(ask, served(abstain_below=0.3))
    assert not sure["abstained"]


def test_metrics_count_what_was_done() -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> str:
        for file in (FILES[0], FILES[1], b"no picture"):
            await predicted(client, file)
        await client.get("/nowhere")
        return (await client.get("/metrics")).text

    metrics = asked(ask)
    for line in (
        'vitral_requests_total{code="200",route="/v1/predict"} 2.0',
        'vitral_requests_total{code="422",route="/v1/predict"} 1.0',
        'vitral_requests_total{code="404",route="(none)"} 1.0',
        'vitral_rejected_total{reason="unreadable"} 1.0',
        "vitral_decode_seconds_count 3.0",
        "vitral_batch_size_sum 2.0",
        "vitral_queue_seconds_count 2.0",
        "vitral_request_seconds_count 4.0",
        "vitral_queue_depth 0.0",
        'vitral_info{engine="colours 1.0",model="colours",version=',
    ):
        assert line in metrics, line


# --- The line of those who wait ----------------------------------------------------------------------


def test_beyond_what_can_be_done_in_time_requests_are_refused_at_once_and_the_others_are_in_time() -> None:
    engine = Colours(lambda: time.sleep(0.04))
    times: list[tuple[int, float, bool]] = []

    async def one(client: httpx.AsyncClient, after: float) -> None:
        await asyncio.sleep(after)
        began_at = time.monotonic()
        reply = await predicted(client, FILES[0])
        times.append((reply.status_code, time.monotonic() - began_at, "retry-after" in reply.headers))

    async def ask(_: Server, client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(one(client, number / 75) for number in range(150)))

    asked(ask, served(engine), deadline=0.5, max_batch=1)  # 25 a second can be done, thrice as many come
    accepted = [seconds for code, seconds, _ in times if code == 200]
    refused = [(seconds, again) for code, seconds, again in times if code == 503]
    assert len(accepted) + len(refused) == 150
    assert 10 <= len(accepted) <= 65
    assert max(accepted) <= 0.75  # with what this process, the client too, takes of the machine
    assert all(again for _, again in refused)
    assert np.median([seconds for seconds, _ in refused]) < np.median(accepted) / 2


def test_a_client_that_fills_the_line_leaves_room_for_others() -> None:
    admission = Admission(lambda count: count * 0.01, deadline=1.0)  # 60 pictures are 0.6 s
    alone = [admission.place("a") for _ in range(60)]
    for place in alone:
        place.__enter__()
    with pytest.raises(Refusal) as full:
        admission.check("a")
    assert full.value.status == 503
    assert full.value.retry_after == 1
    for place in alone[:20]:
        place.__exit__(None, None, None)
    admission.check("b")  # it is known from now on
    with pytest.raises(Refusal) as share:
        admission.check("a")
    assert (share.value.status, share.value.reason) == (429, "client_share")
    for place in alone[20:]:
        place.__exit__(None, None, None)
    assert admission.waiting == 0
    admission.check("a", 32)


def test_nothing_is_computed_for_a_client_that_has_gone() -> None:
    may, engine = threading.Event(), Colours()
    with behind_a_port(served(engine), deadline=10.0) as server:
        engine.wait = lambda: may.wait(10)
        engine.batches.clear()
        with socket.create_connection(("127.0.0.1", server.port)) as first:
            first.sendall(request(FILES[0]))
            while not engine.batches:
                time.sleep(0.005)
            with socket.create_connection(("127.0.0.1", server.port)) as second:
                second.sendall(request(FILES[1]))
                time.sleep(0.3)
            time.sleep(0.2)  # the second has gone, waiting for the first's batch
            may.set()
            assert b"200 OK" in first.recv(20)
        time.sleep(0.1)
        assert engine.batches == [1]


def request(file: bytes, extra: str = "") -> bytes:
    head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{extra}"
    return f"{head}Content-Length: {len(file)}\r\n\r\n".encode() + file


def test_a_server_that_is_asked_to_stop_finishes_what_is_under_way() -> None:
    may, engine, found = threading.Event(), Colours(), []
    with behind_a_port(served(engine), deadline=20.0) as server:
        engine.wait = lambda: may.wait(10)
        engine.batches.clear()
        ask = lambda: found.append(status(server.port, "POST", "/v1/predict", FILES[0]))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.url, timeout=20) as other:
            until = time.monotonic() + 20
            while sum(engine.batches) + depth(other) < 24 and time.monotonic() < until:
                time.sleep(0.02)
            server.stop.request()
            time.sleep(0.3)
            draining = other.get("/readyz")
            refused = other.post("/v1/predict", content=FILES[0], headers=JPEG)
            may.set()
        for thread in threads:
            thread.join(20)
    assert (draining.status_code, refused.status_code) == (503, 503)
    assert "retry-after" in refused.headers
    assert found == [200] * 24
    assert server.unfinished == 0


def depth(client: httpx.Client) -> int:
    found = re.search(r"^vitral_queue_depth (\d+)", client.get("/metrics").text, re.MULTILINE)
    assert found
    return int(found[1])


# --- Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "headers", "code", "word"),
    [
        (b"x" * 3000, JPEG, 413, "too large"),
        (b"", JPEG, 400, "empty"),
        (b"<svg/>", {"content-type": "image/svg+xml"}, 415, "image/jpeg"),
        (b"a=b", {"content-type": "application/x-www-form-urlencoded"}, 415, "image/jpeg"),
        (b"<svg/>", JPEG, 422, "not an image"),
        (encoded(picture(0), "TIFF", compression="tiff_lzw")[:2000], JPEG, 422, "TIFF"),
        (encoded(picture(0, (101, 101)), "JPEG", quality=5), JPEG, 422, "too large: 101x101"),
        (b"{", JSON, 400, "not JSON"),
        (b"[" * 2000, JSON, 400, "not JSON"),
        (b'{"images": []}', JSON, 400, "images"),
        (b'{"images": "http://example.com/a.png"}', JSON, 400, "images"),
        (b'{"images": ["http://example.com/a.png"]}', JSON, 422, "never opened"),
        (b'{"images": ["/etc/passwd"]}', JSON, 422, "picture"),
        (json.dumps({"images": ["aaaa"] * 33}).encode(), JSON, 413, "33 pictures"),
        (FILES[0], {**JPEG, "content-encoding": "gzip"}, 415, "compressed"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(
    content: bytes, headers: dict[str, str], code: int, word: str
) -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/predict", content=content, headers=headers)

    reply = asked(ask, max_body=2500, max_pixels=10_000)
    assert reply.status_code == code, reply.text
    assert list(reply.json()) == ["error"]
    assert word in reply.json()["error"]
    assert "\n" not in reply.json()["error"]
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_a_body_without_a_length_is_counted_while_it_comes() -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b"x" * 1000

    async def ask(server: Server, client: httpx.AsyncClient) -> int:
        reply = await client.post("/v1/predict", content=endless(), headers=JPEG)
        assert server.app.guard._bodies.taken == 0
        return reply.status_code

    assert asked(ask, max_body=5000) == 413


def test_headers_and_bodies_that_come_too_slowly_end_their_connection() -> None:
    with behind_a_port(header_timeout=0.3, body_timeout=0.4) as server:
        for sent in (b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nX-A: ", request(b"x" * 100)[:-50]):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
                slow.sendall(sent)
                began_at = time.monotonic()
                assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
                assert 0.2 < time.monotonic() - began_at < 3
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as long:
            long.sendall(b"GET /readyz HTTP/1.1\r\nX: " + b"a" * 70_000)
            assert long.recv(100).startswith(b"HTTP/1.1 431 ")
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as other:
            other.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert other.recv(100).startswith(b"HTTP/1.1 400 ")
        assert status(server.port, "GET", "/readyz") == 200


# --- Who may ask -------------------------------------------------------------------------------------


def test_without_its_token_a_request_learns_nothing() -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> dict[str, int]:
        codes = {}
        for route in ROUTES:
            path = route.path.replace("{model}", "colours").replace("{version}", "1")
            codes[path] = (await client.request(route.method, path)).status_code
        for given in ("Bearer " + "b" * 20, "Bearer", "Basic " + "a" * 20, "Bearer é"):
            reply = await client.get("/v1/model", headers={b"authorization": given.encode("latin-1")})
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"].startswith("Bearer")
        for token in ("a" * 20, "c" * 20):
            reply = await client.get("/v1/model", headers={"authorization": f"Bearer {token}"})
            assert reply.status_code == 200
        return codes

    codes = asked(ask, tokens=("a" * 20, "c" * 20))
    assert {path for path, code in codes.items() if code != 401} == {"/healthz", "/readyz", "/"}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "localhost:99"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": HOST}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(headers: dict[str, str], code: int) -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/predict", content=FILES[0], headers={**JPEG, **headers})

    reply = asked(ask)
    assert reply.status_code == code
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_server_for_other_machines_has_its_own_name() -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> int:
        return (await client.get("/readyz", headers={"host": "models.example"})).status_code

    assert asked(ask, host="0.0.0.0") == 200


def test_an_error_of_ours_shows_nothing_of_the_machine() -> None:
    told: list[str] = []

    async def run() -> httpx.Response:
        async with in_process() as server, server.client() as client:
            server.app.guard._tell = told.append
            server.app.served.predictor.engine.wait = lambda: open("/secret/path")  # type: ignore[attr-defined] # noqa: SIM115
            return await predicted(client, FILES[0])

    reply = asyncio.run(run())
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert "/secret/path" in told[0]
    assert reply.json()["error"].split()[-1] in told[0]


def test_logs_carry_hashes_and_no_pictures() -> None:
    with behind_a_port() as server:
        status(server.port, "POST", "/v1/predict", FILES[0])
    line = next(json.loads(line) for line in server.lines if "/v1/predict" in line)
    assert hashlib.sha256(FILES[0]).hexdigest().startswith(line.pop("body_sha256"))
    assert set(line) == {"time", "route", "code", "seconds"}


# --- Readiness ---------------------------------------------------------------------------------------


def test_it_is_ready_once_the_model_has_passed_its_check() -> None:
    may = threading.Event()

    async def run() -> list[int]:
        server = Server(App(served(Colours(lambda: may.wait(10))), ServeOptions()))
        async with server.app.running(), server.client() as client:
            paths = ("/healthz", "/readyz", "/v2/health/ready", "/v2/models/colours/ready")
            before = [(await client.get(path)).status_code for path in paths]
            before.append((await predicted(client, FILES[0])).status_code)
            may.set()
            await server.ready()
            after = [(await client.get(path)).status_code for path in paths]
            return [*before, *after]

    assert asyncio.run(run()) == [200, 503, 400, 400, 503, 200, 200, 200, 200]


def test_a_model_whose_answers_depend_on_the_batch_is_never_ready() -> None:
    class Mixing(Colours):
        def __call__(self, pixels_BHWC: np.ndarray) -> Any:
            return super().__call__(np.sort(pixels_BHWC, axis=0))

    async def ask(server: Server, client: httpx.AsyncClient) -> int:
        return (await client.get("/readyz")).status_code

    assert asked(ask, served(Mixing())) == 503


# --- The Open Inference Protocol ---------------------------------------------------------------------


def test_the_open_inference_protocol_answers_for_files_and_for_pixels() -> None:
    model = served()
    pixels = np.stack([model.predictor.pixels(file) for file in FILES[:2]])
    texts = listed(FILES[:2])["images"]
    inputs = [
        {"name": "image", "datatype": "BYTES", "shape": [2], "data": texts},
        {"name": "pixels", "datatype": "UINT8", "shape": [2, 13, 17, 3], "data": pixels.flatten().tolist()},
        {"name": "pixels", "datatype": "UINT8", "shape": [2, 13, 17, 3], "data": pixels.tolist()},
    ]

    async def ask(_: Server, client: httpx.AsyncClient) -> tuple[list[Any], Any]:
        replies = [
            await client.post(f"/v2/models/colours{version}/infer", json={"id": "7", "inputs": [one]})
            for one, version in zip(inputs, ("", "/versions/1", ""), strict=True)
        ]
        return [reply.json() for reply in replies], (await client.get("/v2/models/colours")).json()

    replies, metadata = asked(ask, model)
    expected = model.predictor.answers(pixels)
    declared = {one["name"]: (one["datatype"], len(one["shape"])) for one in metadata["outputs"]}
    for reply in replies:
        assert (reply["model_name"], reply["model_version"], reply["id"]) == ("colours", "1", "7")
        found = {one["name"]: one for one in reply["outputs"]}
        for name, one in found.items():
            assert declared[name] == (one["datatype"], len(one["shape"]))
            assert len(one["data"]) == np.prod(one["shape"])
        assert found["probabilities"]["shape"] == [2, 3]
        assert found["probabilities"]["data"] == pytest.approx(expected.probabilities.flatten(), abs=1e-6)
        assert found["label"]["data"] == [LABELS[row.argmax()] for row in expected.probabilities]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"inputs": []}, 400),
        ({"inputs": [{}]}, 400),
        ({"outputs": [{"name": "nothing"}]}, 400),
        ({"outputs": [{"name": "logits"}]}, 200),
        ({"outputs": 5}, 400),
        ({"id": 5}, 400),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["a"]}]}, 400),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aaaa"]}]}, 422),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [10**9], "data": ["aaaa"]}]}, 413),
        ({"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12}]}, 400),
        (
            {
                "inputs": [
                    {"name": "pixels", "datatype": "UINT8", "shape": [1, 13, 17, 3], "data": [256] * 663}
                ]
            },
            400,
        ),
        (
            {
                "inputs": [
                    {"name": "pixels", "datatype": "UINT8", "shape": [1, 13, 17, 3], "data": [0.5] * 663}
                ]
            },
            400,
        ),
        (
            {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 13, 17, 3], "data": [[1], 2]}]},
            400,
        ),
    ],
)
def test_the_protocol_refuses_what_it_cannot_mean(change: dict[str, Any], code: int) -> None:
    sound = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": listed(FILES[:1])["images"]}]
    }

    async def ask(_: Server, client: httpx.AsyncClient) -> tuple[int, int, int]:
        return (
            (await client.post("/v2/models/colours/infer", json={**sound, **change})).status_code,
            (await client.post("/v2/models/other/infer", json=sound)).status_code,
            (await client.get("/v2/models/colours/versions/2")).status_code,
        )

    assert asked(ask) == (code, 404, 404)


# --- The description ---------------------------------------------------------------------------------


def test_the_description_is_valid_and_names_the_routes_that_there_are() -> None:
    async def ask(server: Server, client: httpx.AsyncClient) -> tuple[Any, set[tuple[str, str]]]:
        routes = {(route.path, method) for route in server._asgi.routes for method in route.methods}  # type: ignore[attr-defined]
        return (await client.get("/openapi.json")).json(), routes

    description, routes = asked(ask)
    validate(description)
    validate(openapi(served(), with_token=True))
    named = {(path, method.upper()) for path, methods in description["paths"].items() for method in methods}
    assert named == {(path, method) for path, method in routes if method != "HEAD"}


def test_answers_are_as_described() -> None:
    from jsonschema import Draft202012Validator

    async def ask(_: Server, client: httpx.AsyncClient) -> None:
        description = (await client.get("/openapi.json")).json()

        def check(path: str, method: str, reply: httpx.Response) -> None:
            operation = description["paths"][path][method]
            content = operation["responses"][str(reply.status_code)]["content"]["application/json"]
            Draft202012Validator({**content["schema"], "components": description["components"]}).validate(
                reply.json()
            )

        check("/v1/predict", "post", await predicted(client, FILES[0]))
        check("/v1/predict", "post", await client.post("/v1/predict", json=listed([FILES[0], b"x"])))
        check("/v1/predict", "post", await predicted(client, b"x"))
        check("/v1/explain", "post", await client.post("/v1/explain", content=FILES[0], headers=JPEG))
        for path in ("/v1/model", "/readyz", "/v2", "/v2/health/live"):
            check(path, "get", await client.get(path))
        check("/v2/models/{model}", "get", await client.get("/v2/models/colours"))

    asked(ask)


def test_an_unknown_route_and_another_method_are_told_so_in_json() -> None:
    async def ask(_: Server, client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/v1/predict"), await client.get("/nowhere"), await client.put("/readyz")]

    replies = asked(ask)
    assert [reply.status_code for reply in replies] == [405, 404, 405]
    assert replies[0].headers["allow"] == "POST"
    assert all(list(reply.json()) == ["error"] for reply in replies)


# --- At rest -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_at_rest_takes_next_to_no_time() -> None:
    with behind_a_port() as server:
        status(server.port, "POST", "/v1/predict", FILES[0])
        time.sleep(1)
        process = psutil.Process()
        before = sum(process.cpu_times()[:2])
        time.sleep(10)
        assert (sum(process.cpu_times()[:2]) - before) / 10 <= 0.01


# --- The command -------------------------------------------------------------------------------------


def test_answers_wait_for_no_acknowledgement() -> None:
    """Nagle's algorithm is off on every connection, as asyncio does where it knows that it is TCP."""

    async def run() -> int:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[int] = loop.create_future()

        async def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = _listener(ServeOptions(port=0))
        async with await asyncio.start_server(look, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await found

    assert asyncio.run(run()) != 0


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    short = tmp_path / "tokens"
    short.write_text("secret\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(VitralError, match="choose another --port"):
            serve(served(), ServeOptions(port=int(port)))
    for words, said in (
        (["x", "--host", "0.0.0.0"], "--token-file FILE, or --insecure"),
        (["x", "--token-file", str(short)], "16 letters or more"),
        (["x", "--max-error", "0.1"], "go together"),
        (["x"], "x does not exist"),
    ):
        done = CliRunner().invoke(app, ["serve", *words])
        assert isinstance(done.exception, VitralError)
        assert said in str(done.exception)
        assert "\n" not in str(done.exception)
    assert CliRunner().invoke(app, ["serve", "x", "--deadline", "soon"]).exit_code == 2
