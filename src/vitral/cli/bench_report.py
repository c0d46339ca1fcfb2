"""What the benchmarks do alike with a report."""

import shlex
import sys
from pathlib import Path
from typing import Any

from vitral.runtime.plainjson import to_json


def command_line() -> str:
    """The command as it was typed, for a report."""
    return shlex.join(["vitral", *sys.argv[1:]])


def give(report: dict[str, Any], out: Path | None, *, as_json: bool) -> bool:
    """Write a report to a file and print its JSON, where either is wanted; gives whether it was printed."""
    from vitral.runtime.files import write_atomically

    content = to_json(report, indent=1)
    if out is not None:
        write_atomically(out, f"{content}\n".encode())
    if as_json:
        print(content)
    return as_json
