"""The hub, as a small server on this machine: what is asked for, what is kept, and how refusals read."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import safetensors.torch
import torch

import vitral
from tests.answering import Answering
from vitral.checkpoints import hub, push
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.checkpoints.layouts import key_table
from vitral.checkpoints.layouts.timm import keys as timm
from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import VitralError

COMMIT = "a" * 40


class Hub(Answering):
    """Just what huggingface_hub asks of the hub for public, gated and missing models, and for commits."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[str]
    commits: list[dict[str, Any]]
    cuts: int  # how many answers with weights break off half way
    failing: dict[str, int]  # parts of paths, and the status that they are answered with

    def as_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.asked.append(f"{self.command} {path}")
        if self.fails(path):
            return None
        if path.startswith("/cdn/"):
            return self.send_weights(*path.removeprefix("/cdn/").rsplit("/", 1))
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
        if path.endswith((".safetensors", ".bin")):  # as from Git LFS: from another host
            port, file = self.headers["Host"].split(":")[1], path.rsplit("/", 1)[1]
            return self.answer(
                302,
                Location=f"http://localhost:{port}/cdn/{name}/{file}",
                X_Linked_Size=str(len(content)),
                X_Linked_ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                X_Repo_Commit=COMMIT,
            )
        return self.answer(200, content, ETag=f'"{len(content)}"', X_Repo_Commit=COMMIT)

    def fails(self, path: str) -> bool:
        status = next((status for part, status in self.failing.items() if part in path), None)
        if status is not None:
            # 403 for a file is how the hub refuses one of a gated model, whose description is public.
            code = "GatedRepo" if "/resolve/" in path else "None"
            self.answer(status, X_Error_Message="not now", X_Error_Code=code)
        return status is not None

    def send_weights(self, name: str, file: str) -> None:
        """From where it broke off, if asked to."""
        content = self.repositories[name][file]
        start = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0])[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if type(self).cuts:
            type(self).cuts -= 1
            self.wfile.write(content[start : (start + len(content)) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"POST {self.path.split('?')[0]}")
        if self.fails(self.path):
            return None
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
    Hub.asked, Hub.commits, Hub.cuts, Hub.failing = [], [], 0, {}
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
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
        ("hf://org/gated", r"is gated: accept its terms on its page, then run hf auth login"),
        ("hf://org/missing", "is not on the hub, or private: check the name, or run hf auth login"),
        ("hf://name", "does not name a model on the hub; write hf://org/name or hf://org/name@revision"),
        ("hf://a/b/c", "does not name a model on the hub; write hf://org/name"),
        ("hf:///b", "does not name a model on the hub"),
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


def shards(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    files = {name: safetensors.torch.save(half) for name, half in zip(names, halves, strict=True)}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


def of_timm(model: Path) -> dict[str, torch.Tensor]:
    found = load_checkpoint(model).model
    state = {name: tensor.detach() for name, tensor in found.state_dict().items()}
    return key_table.write(timm.rows(found.config), state, len(found.layers))


def test_shards_of_safetensors_go_before_a_pickle(server: type[Hub], model: Path, tmp_path: Path) -> None:
    files = shards(of_timm(model))
    pickles = {"pytorch_model.bin": b"not wanted", "pytorch_model-00001-of-00001.bin": b"nor this"}
    server.repositories["org/name"] = {**files, **pickles, "onnx/model.safetensors": b"nor this"}
    found = load_checkpoint("hf://org/name", num_heads=2).model
    assert len(found.state_dict()) == len(load_checkpoint(model).model.state_dict())
    kept = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/**/*")}
    assert kept == set(files)


@pytest.mark.parametrize("name", ["anything.safetensors", "a[1].npz", "vit.pth"])
def test_the_only_file_of_weights_is_taken_whatever_its_name(
    name: str, server: type[Hub], tmp_path: Path
) -> None:
    server.repositories["org/name"] = {name: b"no weights", "README.md": b"#"}
    with pytest.raises(VitralError, match=r"is damaged or incomplete"):
        load_checkpoint("hf://org/name")
    server.repositories["org/two"] = {name: b"no weights", f"2{name}": b"no weights"}
    with pytest.raises(VitralError, match=r"holds 2 files of weights, such as 2.*; download one and give"):
        load_checkpoint("hf://org/two")


def test_a_download_that_breaks_off_goes_on(server: type[Hub], model: Path) -> None:
    server.cuts = 1
    assert load_checkpoint("hf://org/name").labels == ("ant", "bee")
    assert sum("GET /cdn/" in line for line in server.asked) == 2


def test_a_download_that_keeps_breaking_off_is_refused_and_then_begun_again(
    server: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, file_download

    def no_more(*words: Any, **options: Any) -> None:
        raise httpx_error("peer closed connection without sending complete message body")

    httpx_error = type("RemoteProtocolError", (Exception,), {})
    with monkeypatch.context() as broken:
        broken.setattr(file_download, "http_get", no_more)
        with pytest.raises(VitralError, match=r"hf://org/name cannot be reached: peer closed connection"):
            load_checkpoint("hf://org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(VitralError, match=r"hf://org/name is not in the cache, and the hub is out of reach"):
        load_checkpoint("hf://org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load_checkpoint("hf://org/name").labels == ("ant", "bee")


def test_a_cache_without_all_shards_is_not_taken_for_the_model(
    server: type[Hub], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    server.repositories["org/name"] = shards(of_timm(model))
    folder = hub.download("hf://org/name")
    (folder / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(VitralError, match=r"hf://org/name is not in the cache"):
        load_checkpoint("hf://org/name")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_down_leaves_the_cache(status: int, server: type[Hub], model: Path) -> None:
    server.failing = {"/api/models/": status}
    with pytest.raises(VitralError, match="is not in the cache, and the hub is out of reach") as caught:
        load_checkpoint("hf://org/name")
    assert str(caught.value).isprintable()
    server.failing = {}
    load_checkpoint("hf://org/name")
    server.failing = {"/": status}
    assert load_checkpoint("hf://org/name").labels == ("ant", "bee")


def test_a_gated_model_whose_description_is_public_is_named(server: type[Hub]) -> None:
    server.failing = {"/resolve/": 403}
    with pytest.raises(VitralError, match=r"hf://org/name is gated: accept its terms") as caught:
        load_checkpoint("hf://org/name")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["org/na me", "org/..", "-/name", "org/" + "a" * 100])
def test_names_that_the_hub_does_not_allow_are_refused(name: str, server: type[Hub]) -> None:
    with pytest.raises(VitralError, match=r"cannot be used: ") as caught:
        load_checkpoint(f"hf://{name}")
    assert str(caught.value).isprintable()
    assert not server.asked


def test_another_process_needs_no_hub_for_what_was_downloaded(server: type[Hub], tmp_path: Path) -> None:
    """A real one, told by the environment alone, with nobody at the other end."""
    hub.download("hf://org/name")
    code = "import vitral; print(vitral.load('hf://org/name', device='cpu').labels)"
    told = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **told}, timeout=120
    )
    assert ended.stdout == "('ant', 'bee')\n", ended.stderr


# --- Uploading -------------------------------------------------------------------------------------


def committed(server: type[Hub]) -> dict[str, bytes]:
    import base64

    files = [line["value"] for line in server.commits if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


def test_a_model_is_pushed_with_a_card(server: type[Hub], model: Path) -> None:
    push.push(model, "hf://me/new")
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
    push.push(tmp_path, "hf://me/new")
    assert committed(server)["README.md"] == b"# mine\n"


def test_a_card_that_the_hub_has_is_kept(server: type[Hub], model: Path) -> None:
    server.repositories["me/new"] = {"README.md": b"# edited there\n"}
    push.push(model, "hf://me/new")
    assert set(committed(server)) == {"config.json", "model.safetensors"}


def test_a_model_is_pushed_to_a_branch_that_is_made(server: type[Hub], model: Path) -> None:
    address = push.push(model, "hf://me/new@v1", private=True)
    assert address.endswith("/me/new")
    assert "POST /api/models/me/new/branch/v1" in server.asked
    assert "POST /api/models/me/new/commit/v1" in server.asked


def test_states_for_a_resume_stay_here(server: type[Hub], model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "run")
    for name in ("recipe.toml", "last.pt", "log.jsonl", ".secret"):
        (tmp_path / "run" / name).write_bytes(b"a = 1")
    push.push(tmp_path / "run", "hf://me/new")
    assert set(committed(server)) == {"README.md", "config.json", "model.safetensors", "recipe.toml"}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_not_pushed(file: str, server: type[Hub], model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(VitralError, match=re.escape(file)):
        push.push(tmp_path / "run", "hf://me/new")
    assert not server.asked


@pytest.mark.parametrize(
    ("failing", "text"),
    [
        ({"repos/create": 401}, "is not open to you: run hf auth login with a token that may write there"),
        ({"repos/create": 403}, "is not open to you: run hf auth login with a token that may write there"),
        ({"/commit/": 403}, "is not open to you: run hf auth login"),
        ({"/commit/": 413}, "is refused by the hub: "),
    ],
)
def test_a_push_that_is_refused_is_one_line(
    failing: dict[str, int], text: str, server: type[Hub], model: Path
) -> None:
    server.failing = failing
    with pytest.raises(VitralError, match=f"hf://me/new {text}") as caught:
        push.push(model, "hf://me/new")
    assert str(caught.value).isprintable()


def card(**changes: Any) -> tuple[dict[str, Any], str]:
    """The front matter, read by the hub's own library, and the text of a card."""
    from huggingface_hub import ModelCard

    model = vitral.create("ViT-Pico/8", img_size=16, num_classes=2, embed_dim=8, num_heads=2)
    config = {
        "architecture": asdict(model.config),
        "preprocess": asdict(Preprocess((16, 16))),
        "labels": ["ant", "bee"],
        "metadata": {},
    }
    found = ModelCard(push.model_card({**config, **changes}, "me/new"))
    return found.data.to_dict(), found.text


def test_a_card_says_what_is_known() -> None:
    front, text = card(metadata={"data": "/data/me/private/ants", "source": "/tmp/vit.npz"})
    assert front["library_name"] == "vitral"
    assert "license" not in front
    assert "base_model" not in front
    for line in (
        "| trained on | ants |",
        "| weights from | vit.npz |",
        "| licence of the weights | not stated |",
    ):
        assert line in text
    assert "/data/me" not in text


def test_a_card_without_labels_is_for_features() -> None:
    front, text = card(labels=[])
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert 'model.features(["photo.jpg"])' in text
    assert "| classes |" not in text


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("dinov3-license", {"license": "other", "license_name": "dinov3-license"}),
        ("mine\nbase_model: theirs", {"license": "other", "license_name": "mine\nbase_model: theirs"}),
        ("a: 'b' # c", {"license": "other", "license_name": "a: 'b' # c"}),
    ],
)
def test_licences_are_called_what_the_hub_allows(licence: str, expected: dict[str, str]) -> None:
    front, _ = card(metadata={"licence": licence})
    assert {name: front[name] for name in ("license", "license_name") if name in front} == expected
    assert "base_model" not in front


def test_labels_cannot_break_the_table() -> None:
    _, text = card(labels=["a|b", "c\n## d"])
    assert r"2: a\|b, c ## d |" in text


def test_only_a_model_folder_of_ours_is_pushed(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=r"is not a model folder of Vitral; write one with: vitral convert"):
        push.push(tmp_path, "hf://me/new")


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
