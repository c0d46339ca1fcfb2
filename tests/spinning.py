"""For `tests/test_bench.py`: what a contender's own process is asked; to import it is quick."""

import os
from typing import Any


def tell_spinning() -> Any:
    raise KeyError(str(os.environ.get("GOMP_SPINCOUNT")))
