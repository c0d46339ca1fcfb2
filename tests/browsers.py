"""What the tests' browsers have in common, whatever protocol drives them."""

import contextlib
import time
from typing import Any


class Page:
    """One page: what it asks of a network and complains of is kept."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def run(self, expression: str) -> Any:
        """The value of JavaScript; a promise's, when it is there."""
        raise NotImplementedError

    def wait_for(self, condition: str, seconds: float = 60) -> Any:
        """The first value of JavaScript that is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):  # the page is not there yet
                if value := self.run(condition):
                    return value
            time.sleep(0.05)
        raise AssertionError(f"{condition} is not true after {seconds} s; complaints: {self.complaints}")
