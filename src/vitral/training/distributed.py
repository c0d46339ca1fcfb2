"""The gradients of a batch's parts, added up in one fixed tree, whichever processes computed them.

Additions in floating point depend on their order. A batch that is computed in P parts has a binary tree over
them: neighbours are added, then neighbours of those, and what is left over last. One process adds its parts
up that way as they come; several exchange what they have, and then do the same. So every number of processes
gives the same bits, on equal machines (EasyScale, SC'23, shows the idea for workers that come and go).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vitral.model.vit import VisionTransformer
from vitral.runtime.world import World, share_of

T = TypeVar("T")


class Gradients(Protocol):
    """How the gradients of a step come together."""

    @property
    def module(self) -> nn.Module:
        """What is called with images in the model's place."""
        ...

    def passing(self, *, last: bool) -> Any:
        """The context of a forward and backward pass; `last` of those of this process in the step."""
        ...

    def take(self, part: int, *, last: bool) -> None:
        """Takes the gradients of a part, after its passes; after the last the parameters have their sum."""
        ...


@dataclass(frozen=True)
class Node(Generic[T]):
    """The sum of the parts from `place * 2**level` on, 2**level of them."""

    level: int
    place: int
    value: T

    def joins(self, right: "Node[T]") -> bool:
        return self.level == right.level and self.place % 2 == 0 and self.place + 1 == right.place


class Tree(Generic[T]):
    """Adds parts up in the fixed tree, as they come in order: a binary counter."""

    def __init__(self, add: Any) -> None:
        self._add = add  # of two values; may change the first
        self.nodes: list[Node[T]] = []

    def push(self, node: Node[T]) -> None:
        while self.nodes and self.nodes[-1].joins(node):
            left = self.nodes.pop()
            node = Node(left.level + 1, left.place // 2, self._add(left.value, node.value))
        self.nodes.append(node)

    def total(self) -> T:
        """All of it: what has no neighbour is added from the right. Empties the tree."""
        value = self.nodes.pop().value
        while self.nodes:
            value = self._add(self.nodes.pop().value, value)
        return value


def shape_of(parts: range) -> list[tuple[int, int]]:
    """(level, place) of the nodes that these neighbouring parts leave."""
    tree: Tree[None] = Tree(lambda *_: None)
    for part in parts:
        tree.push(Node(0, part, None))
    return [(node.level, node.place) for node in tree.nodes]


def gradients_of(
    model: nn.Module, module: nn.Module, world: World, parts: int, *, sharded: bool = False
) -> Gradients:
    """How the gradients of a model come together.

    Args:
        model: whose parameters they are.
        module: what is called for it, compiled or not.
        world: the processes.
        parts: of each batch.
        sharded: whether the model is divided among the processes, which sums them by itself.
    """
    if sharded:
        return Whole(module)
    if world.alone:
        return OneProcess(model, module) if parts > 1 else Whole(module)
    return Replicas(model, world, parts)


@dataclass(frozen=True)
class Whole:
    """Of a batch in one part, or of a divided model: where they are."""

    module: Any

    def passing(self, *, last: bool) -> Any:  # noqa: ARG002
        return nullcontext()

    def take(self, part: int, *, last: bool) -> None: ...


class OneProcess:
    """Of several parts in one process."""

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.module = module
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._tree: Tree[list[Tensor | None]] = Tree(_added)

    def passing(self, *, last: bool) -> Any:  # noqa: ARG002
        return nullcontext()

    def take(self, part: int, *, last: bool) -> None:
        self._tree.push(Node(0, part, _taken(self._trained)))
        if last:
            for parameter, gradient in zip(self._trained, self._tree.total(), strict=True):
                parameter.grad = gradient


class Replicas:
    """Of several processes that have the whole model each: DistributedDataParallel, with a sum of ours.

    Its own would be an average (and gloo a sum where one asks for that, pytorch#162338), in no fixed order.
    """

    def __init__(self, model: nn.Module, world: World, parts: int) -> None:
        from torch.nn.parallel import DistributedDataParallel

        ours = isinstance(model, VisionTransformer)
        self.module = self._replica = DistributedDataParallel(
            model,
            find_unused_parameters=not ours,
            gradient_as_bucket_view=False,  # earlier parts' gradients are taken away
        )
        if ours:  # whose buffers are tables that no step changes
            self._replica.require_forward_param_sync = False
        self._replica.register_comm_hook(None, self._summed)
        self._world = world
        self._shapes = [shape_of(share_of(rank, world.size, parts)) for rank in range(world.size)]
        self._last_part = world.share(parts)[-1]
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._places = {parameter: place for place, parameter in enumerate(self._trained)}
        self._tree: Tree[list[Tensor | None]] = Tree(_added)
        self._has_passed = False

    def passing(self, *, last: bool) -> Any:
        if not last:
            return self._replica.no_sync()
        if self._has_passed:
            return nullcontext()
        self._has_passed = True
        return _quiet_about_strides()

    def take(self, part: int, *, last: bool) -> None:
        if last:
            self._tree.nodes.clear()
        else:
            self._tree.push(Node(0, part, _taken(self._trained)))

    def _summed(self, _, bucket) -> torch.futures.Future[Tensor]:  # DDP wants its own annotations, or none
        """DDP's hook for a bucket: the gradients of this process's last part, while others are computed."""
        buffer = bucket.buffer()
        tree: Tree[Tensor] = Tree(torch.add)
        for node in self._tree.nodes:
            tree.push(Node(node.level, node.place, self._flat(node.value, bucket, buffer)))
        tree.push(Node(0, self._last_part, buffer))
        future: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
        future.set_result(self._exchanged([node.value for node in tree.nodes], buffer))
        return future

    def _flat(self, gradients: list[Tensor | None], bucket: Any, buffer: Tensor) -> Tensor:
        """The gradients of a bucket's parameters, laid out as it is."""
        flat = torch.zeros_like(buffer)
        for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            gradient = gradients[self._places[parameter]]
            if gradient is not None:
                offset = view.storage_offset() - buffer.storage_offset()
                flat.as_strided(view.shape, view.stride(), offset).copy_(gradient)
        return flat

    def _exchanged(self, values: list[Tensor], buffer: Tensor) -> Tensor:
        """The sum, in the tree's order, of what the processes have: as many nodes each as `_shapes` says."""
        import torch.distributed as dist

        size, most = self._world.size, max(map(len, self._shapes))
        if size == 2 and most == 1:  # a + b is b + a
            dist.all_reduce(values[0])
            return buffer.copy_(values[0])
        # Each process adds up one slice of all: as many bytes travel as in a ring, for one node a process.
        slice_length = -(-len(buffer) // size)
        sent = buffer.new_zeros(size, most, slice_length)
        for place, value in enumerate(values):
            padded = torch.nn.functional.pad(value, (0, size * slice_length - len(value)))
            sent[:, place] = padded.view(size, slice_length)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        tree: Tree[Tensor] = Tree(torch.add)
        for rank, shape in enumerate(self._shapes):
            for place, (level, at) in enumerate(shape):
                tree.push(Node(level, at, received[rank, place]))
        whole = buffer.new_empty(size * slice_length)
        dist.all_gather([*whole.split(slice_length)], tree.total())
        return buffer.copy_(whole[: len(buffer)])


@contextmanager
def _quiet_about_strides() -> Iterator[None]:
    """DDP warns once that the gradients of 1x1 convolutions have other strides, of axes of length 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        yield


def _taken(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _added(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    return [a if b is None else b if a is None else a.add_(b) for a, b in zip(left, right, strict=True)]
