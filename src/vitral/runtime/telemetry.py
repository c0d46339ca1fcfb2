"""Keeps other libraries from telling their makers what is computed.

OpenVINO and NNCF report each import, conversion and quantization to Google Analytics unless a file in the
user's home says no, and write an identity there. Both go without where their package for it is not installed,
so here it is not found while they are imported. Nothing is set in the environment or written to the home.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

_REPORTER = "openvino_telemetry"


def import_silently(name: str) -> ModuleType:
    """Import a library with no reporter to be found; one that the program itself imported before stays.

    Raises:
        ImportError: if the library is not installed.
    """
    modules: dict[str, Any] = sys.modules
    if _REPORTER in modules:
        return importlib.import_module(name)
    modules[_REPORTER] = None  # what `import` takes for a package that is not there
    try:
        return importlib.import_module(name)
    finally:
        del modules[_REPORTER]
