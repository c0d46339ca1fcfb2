"""Keeps other libraries from telling their makers what is computed.

Ray, W&B and MLflow are told by variables of the environment, which are set while they begin.

OpenVINO and NNCF report each import, conversion and quantization to Google Analytics unless a file in the
user's home says no, and write an identity there. Both go without where their package for it is not installed,
so here it is not found while they are imported.

ONNX Runtime (1.32, on Linux too) keeps events of each session in a database in the home, for Microsoft,
unless a variable of the environment says no while it is imported. Nothing is written to the home.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_REPORTER = "openvino_telemetry"
_NO_REPORTS = {
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def import_silently(name: str) -> ModuleType:
    """Import a library with no reporter to be found; one that the program itself imported before stays.

    Raises:
        ImportError: if the library is not installed.
    """
    modules: dict[str, Any] = sys.modules
    with without_reports():
        if _REPORTER in modules:
            return importlib.import_module(name)
        modules[_REPORTER] = None  # what `import` takes for a package that is not there
        try:
            return importlib.import_module(name)
        finally:
            del modules[_REPORTER]


@contextmanager
def without_reports(**variables: str) -> Iterator[None]:
    """Begin libraries inside that heed variables of the environment, unless the user has set them.

    Args:
        variables: others that are set inside too.
    """
    ours = {name: value for name, value in (_NO_REPORTS | variables).items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
