"""`World`: the processes that work together, and what they decide together; alone, all of it changes nothing.

torchrun starts the processes, and its environment names them. What they say to each other goes through a
gloo group of its own, so that it never mixes with the gradients. Who is alone imports no torch.distributed.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitral.runtime.errors import ToldElsewhere, VitralError
from vitral.runtime.stopping import Interrupted, Stopped

T = TypeVar("T")

# What every process must have taken part in by then; one that died is known at once.
_TIMEOUT = timedelta(minutes=30)
# For what the first process does alone while the others wait, such as trials of ways to train.
_PATIENCE = timedelta(days=2)
# What torchrun sets, and what `torch.distributed` needs.
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


class World:
    """Which of how many processes this is. Every method is called by all of them, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group, self._store = group, store
        self._told = ""  # the key under which the first to fail says so
        self._first_alone = False  # within `from_first` nobody else listens

    @property
    def alone(self) -> bool:
        return self.size == 1 or self._first_alone

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and has the clock."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` parts this process computes: neighbours, as many as any other or one fewer."""
        return share_of(self.rank, self.size, count)

    # --- What they say to each other -----------------------------------------------------------------

    def sum(self, *numbers: float) -> list[float]:
        """Add numbers up over the processes; where all but one give 0, that one's is told to all."""
        if self.alone:
            return list(numbers)
        return self.sum_tensor(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the processes; in any order, if all but one have 0 in each place."""
        if self.alone:
            return tensor
        import torch.distributed as dist

        here = tensor.detach().cpu()
        here = here.clone() if here is tensor else here
        dist.all_reduce(here, group=self._group)
        return here.to(tensor.device)

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - a reduction of it
        """Say whether a flag is set in one process at least."""
        return flag if self.alone else self.sum(float(flag))[0] > 0

    def first(self, number: float) -> float:
        """Tell all the first process's number."""
        return number if self.alone else self.sum(number if self.is_first else 0.0)[0]

    def from_first(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """Let the first process do something alone, and give all what came of it, or its error.

        Args:
            work: gives what can be pickled; other processes never call it.
            patient: whether it may take hours.
        """
        if self.alone:
            return work()
        import torch.distributed as dist

        group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if patient else self._group
        outcome: list[Any] = [None, None]
        if self.is_first:
            self._first_alone = True
            try:
                outcome = list(_attempted(work))
            finally:
                self._first_alone = False
        dist.broadcast_object_list(outcome, group=group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def exchanged(self, thing: T) -> list[T]:
        """Give all what each has, by rank; for what is small and can be pickled."""
        if self.alone:
            return [thing]
        import torch.distributed as dist

        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self._group)
        return things

    def gathered(self, work: Callable[[], T]) -> list[T]:
        """Let each do its share, and give the first process all that came of it, by rank; others get nothing.

        An error of one, or its wish to stop, is raised in all.
        """
        if self.alone:
            return [work()]
        import torch.distributed as dist

        result, error = _attempted(work)
        for one in self.exchanged(error):
            if one is not None:
                raise one
        results: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(result, results, dst=0, group=self._group)
        return results or []

    def new_group(self) -> Any:
        """Make another group of the same processes, through which a thread may speak."""
        if self.alone:
            return None
        import torch.distributed as dist

        return dist.new_group(backend="gloo", timeout=_PATIENCE)

    def align(self, module: nn.Module) -> None:
        """Make a module's weights and buffers those of the first process."""
        if self.alone:
            return
        import torch.distributed as dist

        for tensor in module.state_dict(keep_vars=True).values():
            here = tensor.detach().cpu()
            dist.broadcast(here, 0, group=self._group)
            if not self.is_first:
                tensor.detach().copy_(here)

    def refuse_unlike(self, what: str, value: object) -> None:
        """Raise VitralError in all if they do not have the same value."""
        values = self.exchanged(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise VitralError(
                    f"{what} of process {rank} are not those of process 0; every process needs the same data "
                    "under the same name"
                )

    # --- How it ends ---------------------------------------------------------------------------------

    def told(self, error: Exception) -> Exception:
        """Give the error to end with: itself in the first process to fail, so that one line is said."""
        if self.size == 1 or self._store is None:
            return error
        try:
            if self._store.add(self._told, 1) > 1:
                return ToldElsewhere("another process of this run has said why it ended")
        except Exception:  # the store was another process's, which is gone
            return error
        if _is_lost_connection(error):
            return VitralError(
                "another process of this run ended without a word (killed, or out of memory); "
                "go on with --resume, or let torchrun do so: --max-restarts"
            )
        return error


ALONE = World()
_here: World | None = None


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started; give the world that this process is already in, if it is.

    Raises:
        VitralError: if the environment names several processes, and not where they meet.
    """
    global _here
    if _here is not None:
        yield _here
        return
    world, ours = _met()
    if world.size == 1:
        yield world
        return
    _here = world
    try:
        yield world
    except Exception as error:
        told = world.told(error)
        if told is error:
            raise
        raise told from error
    finally:
        _here = None
        if ours:
            _part()


def _met() -> tuple[World, bool]:
    """The world of this process, and whether its group was made here."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, False
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise VitralError(
            f"WORLD_SIZE={size} is set, and {missing[0]} is not; start with torchrun, or unset it"
        )
    import torch.distributed as dist

    ours, store = not dist.is_initialized(), None
    if ours:
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        shared, rank, size = next(iter(dist.rendezvous("env://")))
        store = dist.PrefixStore(_meeting(shared, rank, size), shared)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    world = World(
        dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_TIMEOUT), store
    )
    world._told = world.from_first(lambda: f"told/{uuid.uuid4().hex}")
    return world, ours


def _meeting(store: Any, rank: int, size: int) -> str:
    """A name that the processes of this start agree on, and those of no start before.

    torchrun's store outlives the processes that it starts again, and what they wrote into it: to read where a
    dead process listened is to wait for it in vain. So each says hello under a number of its own, the first
    answers every hello that it finds, and goes on once all have thanked it for this very answer.
    """
    if rank:
        own = uuid.uuid4().hex
        store.set(f"vitral/hello/{rank}", own)
        store.wait([f"vitral/answer/{own}"], _TIMEOUT)
        name = store.get(f"vitral/answer/{own}").decode()
        store.set(f"{name}/{rank}", "thanks")
        return name
    name, until = f"vitral/{uuid.uuid4().hex}", time.monotonic() + _TIMEOUT.total_seconds()
    missing = set(range(1, size))
    while missing:
        for other in missing:
            if store.check([f"vitral/hello/{other}"]):
                store.set(f"vitral/answer/{store.get(f'vitral/hello/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        if time.monotonic() > until:
            raise VitralError(f"{len(missing)} of {size} processes did not come, the first {min(missing)}")
        time.sleep(0.02)
    return name


def _part() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def elastic_run() -> str | None:
    """The name of torchrun's job that started this process, by which a start is known for the same one's."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def share_of(rank: int, size: int, count: int) -> range:
    """The parts of `count` that one of `size` processes computes."""
    return range(rank * count // size, (rank + 1) * count // size)


def in_order(shares: Sequence[Sequence[T]]) -> list[T]:
    """What was dealt one by one, put together again: the first of each share, then the second of each."""
    longest = max(map(len, shares), default=0)
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


def _attempted(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except (Exception, Interrupted, Stopped) as error:
        return None, error.with_traceback(None)


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error is that another process is gone, and not one of our own."""
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, torch.OutOfMemoryError)
        and any(
            word in str(error) for word in ("onnection", "gloo", "NCCL", "Broken pipe", "ncclRemoteError")
        )
    )
