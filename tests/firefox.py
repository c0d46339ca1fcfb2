"""A second browser for tests: Firefox without a window, driven by WebDriver BiDi over a websocket."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browsers import Page


class Tab(Page):
    """One page, by some of the methods of `tests.chromium.Tab`."""

    def __init__(self, connection: Any, timeout: float = 60) -> None:
        super().__init__()
        self._connection, self._timeout, self._numbers = connection, timeout, itertools.count()
        self.browser = self.send("session.new", capabilities={})["capabilities"]["browserVersion"]
        self.send("session.subscribe", events=["network.beforeRequestSent", "log.entryAdded"])
        self._context = self.send("browsingContext.create", type="tab")["context"]

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=self._timeout))
            if answer.get("id") == number:
                if answer["type"] == "error":
                    raise AssertionError(f"{method}: {answer['message']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        if event.get("method") == "network.beforeRequestSent":
            self.requests.append(said["request"]["url"])
        elif event.get("method") == "log.entryAdded" and said["level"] in ("error", "warn"):
            self.complaints.append(said["text"])

    def open(self, url: str) -> None:
        self.send("browsingContext.navigate", context=self._context, url=url, wait="complete")

    def run(self, expression: str) -> Any:
        """The value of JavaScript; a promise's, when it is there."""
        return _plain(self._evaluate(expression))

    def _evaluate(self, expression: str) -> dict[str, Any]:
        answer = self.send(
            "script.evaluate", expression=expression, target={"context": self._context}, awaitPromise=True
        )
        if answer["type"] == "exception":
            raise AssertionError(answer["exceptionDetails"]["text"])
        return answer["result"]

    def give_files(self, selector: str, files: list[Path]) -> None:
        """Chooses files in an input, as a person does."""
        element = self._evaluate(f"document.querySelector({json.dumps(selector)})")
        names = [str(file) for file in files]
        self.send(
            "input.setFiles", context=self._context, element={"sharedId": element["sharedId"]}, files=names
        )


def _plain(said: dict[str, Any]) -> Any:
    """What the protocol says of a value, as Python has it."""
    match said["type"]:
        case "array":
            return [_plain(one) for one in said["value"]]
        case "object":
            return {name: _plain(one) for name, one in said["value"]}
    return said.get("value")


@contextlib.contextmanager
def firefox(timeout: float = 120) -> Iterator[Tab]:
    """A page of a browser of its own. Skips where there is none."""
    program = os.environ.get("VITRAL_FIREFOX") or shutil.which("firefox-esr") or shutil.which("firefox")
    if not program:
        pytest.skip("needs Firefox: on the path, or named by VITRAL_FIREFOX")
    from websockets.sync.client import connect

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port=0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            assert process.stderr is not None
            url = next(
                found[1] for line in process.stderr if (found := re.search(r"listening on (ws://\S+)", line))
            )
            with connect(f"{url}/session", max_size=None, open_timeout=timeout, proxy=None) as connection:
                yield Tab(connection, timeout)
        finally:
            process.terminate()
            process.wait(timeout=30)
            process.stderr.close()
