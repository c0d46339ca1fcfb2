"""A small hub of datasets on this machine, for tests and scripts."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.answering import Answering
from tests.test_hub import point_at
from vitral.data.sources import hub

COMMIT = "b" * 40


class DataHub(Answering):
    """What huggingface_hub asks of the hub for datasets, and how many bytes it was sent of each file."""

    revisions: dict[str, dict[str, bytes]]  # "org/name@revision": its files
    card: dict[str, Any]
    sent: dict[str, int]
    asked: list[str]
    failing: int  # the status of every answer, if any

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.asked.append(f"{self.command} {path}")
        if self.failing:
            return self.answer(self.failing, X_Error_Message="not now")
        found = re.fullmatch(
            r"(/api)?/datasets/(org/\w+)(?:/(revision|tree|resolve)/(refs/convert/parquet|[^/]+)(?:/(.*))?)?",
            path,
        )
        name, what, revision, file = (found[2], found[3], found[4] or "main", found[5]) if found else [""] * 4
        if name == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if f"{name}@main" not in self.revisions:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = self.revisions.get(f"{name}@{'main' if revision == COMMIT else revision}")
        if files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev")
        if what == "resolve":
            return self.send_file(file, files[file])
        if what == "tree":
            listed = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
            return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        siblings = [{"rfilename": f, "size": len(b), "blobId": "0" * 40} for f, b in files.items()]
        sha = COMMIT if revision == "main" else revision if len(revision) == 40 else "c" * 40
        about = {"id": name, "sha": sha, "siblings": siblings, "cardData": self.card}
        return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")

    def send_file(self, file: str, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), int(wanted[2] or len(content) - 1) + 1) if wanted else (0, len(content))
        part = content[start:end]
        if self.command == "GET":
            self.sent[file] = self.sent.get(file, 0) + len(part)
        headers = {"ETag": f'"{len(content)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self.answer(206 if wanted else 200, part, **headers)


@contextmanager
def data_hub(
    files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[DataHub]]:
    """A hub of org/name, whose address and cache the library is told of, ended with the test."""
    DataHub.revisions = {"org/name@main": files}
    DataHub.card, DataHub.sent, DataHub.asked, DataHub.failing = {}, {}, [], 0
    running = ThreadingHTTPServer(("127.0.0.1", 0), DataHub)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    point_at(f"http://127.0.0.1:{running.server_port}", cache, monkeypatch)
    hub._file_system.cache_clear()
    yield DataHub
    running.shutdown()
    running.server_close()
    thread.join()
