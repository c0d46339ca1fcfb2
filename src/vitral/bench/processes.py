"""Contenders in processes of their own, each set up as its users have it.

How threads wait and who keeps freed memory are settings of a process: `vitral train` chooses them, and a
script with another library has what torch brings. In one process all share one choice.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from vitral.bench.rounds import Call, Elsewhere, read_clock, synchronizer
from vitral.bench.steps import Begin, Contender, Task, prepare, reason
from vitral.runtime.errors import VitralError
from vitral.runtime.process import keep_freed_memory
from vitral.runtime.threads import threads_wait_as_they_come

_SECONDS_TO_END = 10


@contextmanager
def processes(task: Task) -> Iterator[Begin]:
    """Give what begins a contender's process and gives its first outcome; leaving the context ends them all.

    It raises VitralError with the reason where a contender has no outcome.
    """
    with ExitStack() as begun:

        def begin(contender: Contender) -> tuple[Elsewhere, dict[str, Tensor]]:
            process = _Process(contender, task)
            begun.callback(process.end)
            return process, {name: torch.from_numpy(array) for name, array in process.answer().items()}

        yield begin


class _Process(Elsewhere):
    """A contender's process; it waits, at rest, between its turns."""

    def __init__(self, contender: Contender, task: Task) -> None:
        # Not forked: threads of torch do not survive that.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, contender, task), daemon=True)
        with nullcontext() if _is_ours(contender) else threads_wait_as_they_come():
            self.process.start()
        theirs.close()

    def read(self, calls: int) -> float:
        self.pipe.send(calls)
        return self.answer()

    def answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join(_SECONDS_TO_END)
            raise VitralError(f"its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, VitralError):
            raise answer
        return answer

    def end(self) -> None:
        self.pipe.close()
        self.process.join(_SECONDS_TO_END)
        self.process.terminate()


def _is_ours(contender: Contender) -> bool:
    return contender.library == "vitral"


def _serve(pipe: Connection, contender: Contender, task: Task) -> None:
    """In the contender's process: its first outcome, then a reading whenever asked."""
    if _is_ours(contender) and task.benchmark == "train":
        keep_freed_memory()
    try:
        call, outcome = prepare(contender, task.work())
        # On the CPU and by value: the tensors of a process end with it.
        pipe.send({name: tensor.float().cpu().numpy() for name, tensor in outcome.items()})
        read = partial(_read_on_gpu if task.placement.device.type == "cuda" else read_clock, call)
        while True:
            pipe.send(read(pipe.recv(), synchronizer(task.placement)))
    except (EOFError, ConnectionError):
        return  # the other side has left
    except Exception as error:  # a compiler or a kernel that this machine lacks, too little memory
        pipe.send(VitralError(reason(error)))


def _read_on_gpu(call: Call, calls: int, synchronize: Callable[[], object]) -> float:
    """A reading that takes the memory first, and leaves it to the next contender."""
    call()
    seconds = read_clock(call, calls, synchronize)
    torch.cuda.empty_cache()
    return seconds
