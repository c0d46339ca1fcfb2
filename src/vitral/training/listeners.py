"""Who is told of a run, and what anybody may tell: a message, or how far some work is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Message:
    """Something that a person should read, in a line."""

    text: str


@dataclass(frozen=True)
class Progress:
    """How far some work beside the steps is."""

    what: str
    done: int
    total: int


class Listeners:
    """Several listeners, told one after the other."""

    def __init__(self, *listeners: Callable[[Any], None]) -> None:
        self.all = listeners

    def __call__(self, event: Any) -> None:
        for listener in self.all:
            listener(event)

    def message(self, text: str) -> None:
        self(Message(text))

    def preparing(self, what: str, done: int, total: int) -> None:
        self(Progress(what, done, total))
