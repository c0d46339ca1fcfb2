"""A process that builds forms, or holds one and answers with it.

Libraries that compute share no threads or memory in it, a form's memory and time to load are its own, and
whatever it is doing ends with it: after Ctrl-C, at the end of the time, or when a library crashes.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from vitral.runtime.errors import VitralError

_SECONDS_TO_LEAVE = 2.0


class Process:
    """Does one thing at a time, each asked for by the name of a method of `worker.Worker`.

    Args:
        log: a file for what its libraries print.
        threads: that it computes with.
    """

    def __init__(self, log: Path, threads: int) -> None:
        self._log, self._answers = log, queue.SimpleQueue[bytes]()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                # -P: no file of the folder that a user stands in is taken for a library.
                [sys.executable, "-P", "-m", "vitral.ship.optimize.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
        self._reader = threading.Thread(target=self._read, name="vitral-optimize", daemon=True)
        self._reader.start()

    def ask(self, name: str, seconds: float | None = None, **values: Any) -> Any:
        """Have something done, and give its result.

        Args:
            name: a method of `Worker`.
            seconds: after which the process is ended; None: it may take as long as it likes.
            values: the method's arguments, as JSON has them.

        Raises:
            VitralError: with the reason if it failed, took too long, or its process ended.
        """
        if seconds is not None and seconds <= 0:
            raise VitralError("no time was left for it")
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps([name, values]).encode() + b"\n")
            stream.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            raise VitralError(f"it took longer than the {seconds:.0f} s that were left for it") from None
        except (OSError, ValueError):
            line = b""
        if not line:
            raise VitralError(self._ending())
        answer = json.loads(line)
        if "error" in answer:
            raise VitralError(answer["error"])
        return answer["value"]

    def kill(self) -> None:
        """Begin to end the process, whatever it is doing."""
        self._process.kill()

    def end(self) -> None:
        """End the process, and wait until it has."""
        self.kill()
        self._process.wait(_SECONDS_TO_LEAVE)
        self._reader.join(_SECONDS_TO_LEAVE)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what was written and never read
                    continue

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        for line in stream:
            self._answers.put(line)
        self._answers.put(b"")

    def _ending(self) -> str:
        status = self._process.wait()
        said = self._log.read_bytes().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {status}" + (f": {said[-1][:200]}" if said else "")
