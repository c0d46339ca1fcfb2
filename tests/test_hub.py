"""The hub, as a small server on this machine: what is asked for, what is kept, and how refusals read."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import vitral
from vitral.checkpoints import Checkpoint, hub, load_checkpoint, save_checkpoint
from vitral.errors import VitralError
from vitral.preprocess import Preprocess

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Just what huggingface_hub asks of the hub for public, gated and missing models, and for commits."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[str]
    commits: list[dict[str, Any]]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def as_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        name = "/".join(re.sub(r"^/api/models", "", path).split("/")[1:3])
        if name == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if name not in self.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = self.repositories[name]
        revision = re.search(r"/(?:tree|revision|resolve)/([^/]+)", path)
        if revision and revision[1] not in ("main", "v1", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev")
        if "/tree/" in path:
            return self.as_json(
                [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
            )
        if path.startswith("/api/"):
            return self.as_json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
        content = files.get(path.split(f"/resolve/{revision[1]}/")[1]) if revision else None
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, content, ETag=f'"{len(content)}"', X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"POST {self.path.split('?')[0]}")
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.as_json({"files": modes})
        if "/commit/" in self.path:
            self.commits += [json.loads(line) for line in body.splitlines()]
            return self.as_json(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/new/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "pullRequestUrl": None,
                }
            )
        if self.path.endswith("/repos/create"):
            return self.as_json({"url": f"http://{self.headers['Host']}/me/new", "name": "me/new"})
        return self.as_json({})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    built = vitral.create("ViT-Pico/8", img_size=16, num_classes=2, embed_dim=8, num_heads=2, num_layers=1)
    metadata = {"source": "hf://org/teacher", "licence": "cc-by-nc-4.0"}
    save_checkpoint(folder, Checkpoint(built, Preprocess((16, 16)), ("ant", "bee"), metadata))
    return folder


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of one model, whose address and cache the library is told of, ended with the test."""
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    Hub.repositories = {"org/name": {**files, "pytorch_model.bin": b"not wanted", "a.onnx": b"nor this"}}
    Hub.asked, Hub.commits = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    point_at(f"http://127.0.0.1:{running.server_port}", tmp_path / "cache", monkeypatch)
    yield Hub
    running.shutdown()
    running.server_close()
    thread.join()


def point_at(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", with_endpoint(address))
    # Elsewhere the library asks for its token and warns that there is none.
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")


def with_endpoint(address: str) -> Any:
    from huggingface_hub import HfApi

    original = HfApi.__init__

    def build(self: Any, *words: Any, **options: Any) -> None:
        options |= {"endpoint": address, "token": "hf_nobody"}
        original(self, *words, **options)

    return build


def test_a_model_is_loaded_from_the_hub(server: type[Hub], model: Path, tmp_path: Path) -> None:
    found = load_checkpoint("hf://org/name")
    assert found.labels == ("ant", "bee")
    ours = load_checkpoint(model).model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in found.model.state_dict().items())
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not kept & {"pytorch_model.bin", "a.onnx"}
    assert not any("pytorch_model.bin" in line for line in server.asked)


def test_a_revision_is_asked_for_by_name(server: type[Hub]) -> None:
    load_checkpoint("hf://org/name@v1")
    assert any("/v1" in line for line in server.asked)
    with pytest.raises(VitralError, match=r"hf://org/name@v9 is not there in that revision"):
        load_checkpoint("hf://org/name@v9")


def test_what_was_downloaded_once_needs_no_connection(
    server: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    load_checkpoint("hf://org/name")
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint("hf://org/name").labels == ("ant", "bee")
    assert not server.asked


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("hf://org/gated", r"is gated: accept its terms on the model's page, then run hf auth login"),
        ("hf://org/missing", "is not on the hub, or private: check the name, or run hf auth login"),
        ("hf://name", "is no model on the hub; write hf://org/name or hf://org/name@revision"),
        ("hf://a/b/c", "is no model on the hub; write hf://org/name"),
        ("hf:///b", "is no model on the hub"),
    ],
)
def test_refusals_are_one_line_that_helps(reference: str, text: str, server: type[Hub]) -> None:
    with pytest.raises(VitralError, match=text) as caught:
        load_checkpoint(reference)
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights_says_what_it_holds(server: type[Hub]) -> None:
    server.repositories = {"org/data": {"README.md": b"#", "data.csv": b"1"}}
    with pytest.raises(
        VitralError, match=r"holds no weights that Vitral reads; its files are README\.md, data\.csv"
    ):
        load_checkpoint("hf://org/data")


def test_no_connection_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(
        VitralError,
        match="hf://org/name is not in the cache, and the hub is out of reach: check the connection",
    ) as caught:
        load_checkpoint("hf://org/name")
    assert "\n" not in str(caught.value)


# --- Uploading -------------------------------------------------------------------------------------


def committed(server: type[Hub]) -> dict[str, bytes]:
    import base64

    files = [line["value"] for line in server.commits if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


def test_a_model_is_pushed_with_a_card(server: type[Hub], model: Path) -> None:
    hub.push(model, "hf://me/new")
    assert any(line == "POST /api/repos/create" for line in server.asked)
    files = committed(server)
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert front is not None
    for line in (
        "library_name: vitral",
        "pipeline_tag: image-classification",
        "license: cc-by-nc-4.0",
        "base_model: org/teacher",
    ):
        assert line in front[1].splitlines()
    for text in ("# new", "16x16 pixels in patches of 8", "2: ant, bee", 'vitral.load("hf://me/new")'):
        assert text in card
    assert not (model / "README.md").exists()


def test_a_card_that_is_there_is_kept(server: type[Hub], model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("# mine\n")
    hub.push(tmp_path, "hf://me/new")
    assert committed(server)["README.md"] == b"# mine\n"


def test_only_a_model_folder_of_ours_is_pushed(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=r"is no model folder of Vitral's; write one with: vitral convert"):
        hub.push(tmp_path, "hf://me/new")


def test_the_command_line_without_a_connection(model: Path, tmp_path: Path) -> None:
    """A real process: its own import of the library, no token, nobody at the other end."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_nobody",
    }
    command = [sys.executable, "-m", "vitral", "push", str(model), "hf://me/new"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 1
    assert ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("vitral: hf://me/new cannot be reached:")
