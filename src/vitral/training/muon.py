"""Muon: momentum, made orthogonal (Jordan et al., https://kellerjordan.github.io/posts/muon).

To orthogonalize the matrices of one step costs as much as training some images, so several processes share
them: `Together` where each has all weights, `Owners` where each has a piece.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vitral.recipes.optimizers import Group
from vitral.runtime.devices import multiplies_bfloat16
from vitral.runtime.world import ALONE, World, share_of
from vitral.training.sharding import local


class Sharing(Protocol):
    """Who orthogonalizes which matrices."""

    def updates(
        self, directions: list[Tensor], shapes: list[torch.Size], rates_G: Tensor
    ) -> Sequence[Tensor]:
        """The updates of matrices of one shape or its transpose.

        Args:
            directions: what this process has of each.
            shapes: of the whole matrices; filters (out, in, h, w) are matrices (out, in * h * w).
            rates_G: what each is multiplied by.
        """
        ...


class Muon(torch.optim.Optimizer):
    """The update of a matrix is the nearest semi-orthogonal one, scaled to the size of AdamW's updates.

    So one learning rate and weight decay serve both (Moonlight, arXiv:2502.16982, eq. 4). Matrices of
    one shape go through the iteration together, in bfloat16 where the device multiplies in it, for the
    iteration forgives rounding: torch's own `torch.optim.Muon` takes them one by one and always in
    bfloat16, which some CPUs emulate (docs/log.md, 2026-11-25). Filters (out, in, h, w) are matrices
    (out, in * h * w).

    Args:
        groups: with "scale" and "weight_decay"; the schedule sets "lr".
        momentum: Nesterov's.
        sharing: which process does what; None: this one everything.
    """

    def __init__(self, groups: list[Group], momentum: float = 0.95, sharing: Sharing | None = None) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})
        self._sharing = sharing or Together()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            if trained := [local(weight) for weight in group["params"] if weight.grad is not None]:
                torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
        for alike in _by_shape(self.param_groups):
            self._update(*alike)

    def _update(self, weights: list[Tensor], groups: list[Group]) -> None:
        """Weights of one shape or its transpose, each with its group."""
        gradients = [local(weight.grad) for weight in weights if weight.grad is not None]
        buffers = [local(self._buffer(weight)) for weight in weights]
        momentum = self.defaults["momentum"]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        directions = torch._foreach_add(gradients, buffers, alpha=momentum)
        shapes = [weight.shape for weight in weights]
        size = 0.2 * math.sqrt(max(_matrix_of(shapes[0])))
        rates_G = _stacked_rates(groups).mul(-size).to(directions[0])
        updates = self._sharing.updates([*directions], shapes, rates_G)
        torch._foreach_add_([local(weight) for weight in weights], [*updates])

    def _buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


# --- Which process does what -------------------------------------------------------------------------


class Together:
    """Every process has every matrix: each orthogonalizes those of its parts, and gets the others'.

    A product of a stack rounds by how many are in it. So the matrices are divided by the batch's parts, and
    not by the processes: any number of those gives the same bits.

    Args:
        world: the processes.
        parts: of each batch.
    """

    def __init__(self, world: World = ALONE, parts: int = 1) -> None:
        self._world, self._parts = world, parts

    def updates(
        self, directions: list[Tensor], shapes: list[torch.Size], rates_G: Tensor
    ) -> Sequence[Tensor]:
        stacked_GMN = torch.stack([_wide(direction) for direction in directions])
        scaled_GMN = self._orthogonal(stacked_GMN) * rates_G[:, None, None]
        return [_shaped(update, shape) for update, shape in zip(scaled_GMN, shapes, strict=True)]

    def _orthogonal(self, stacked_GMN: Tensor) -> Tensor:
        dtype, count, size = _type_on(stacked_GMN.device), len(stacked_GMN), self._world.size
        stacks = [share_of(part, self._parts, count) for part in self._world.share(self._parts)]
        done = [orthogonalize(stacked_GMN[stack.start : stack.stop], dtype) for stack in stacks if stack]
        if len(done) == 1 and self._world.alone:
            return done[0]
        here_GMN = torch.cat(done) if done else stacked_GMN[:0]
        if self._world.alone:
            return here_GMN
        import torch.distributed as dist

        counts = [self._count_of(rank, count) for rank in range(size)]
        # They are numbers of this type: half as much to send as they are, where it is bfloat16.
        sent = torch.zeros(max(counts), *stacked_GMN.shape[1:], dtype=dtype, device=stacked_GMN.device)
        sent[: len(here_GMN)] = here_GMN
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent)
        return torch.cat([came[:have] for came, have in zip(received, counts, strict=True)]).to(stacked_GMN)

    def _count_of(self, rank: int, count: int) -> int:
        parts = share_of(rank, self._world.size, self._parts)
        return sum(len(share_of(part, self._parts, count)) for part in parts)


class Owners:
    """Every process has some rows of every matrix: whole ones come to one process each, and go back.

    Four bytes a weight over the number of processes travel each way; all of every matrix to everybody would
    be `full_tensor()`. On pieces alone the iteration would be of other matrices (Moonlight's issue 27).

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def updates(
        self, directions: list[Tensor], shapes: list[torch.Size], rates_G: Tensor
    ) -> Sequence[Tensor]:
        rank, size, count = self._world.rank, self._world.size, len(shapes)
        mine = share_of(rank, size, count)
        owned = [share_of(owner, size, count) for owner in range(size)]
        # Numbers that go from one process to another: of the matrices of the one who owns them.
        out = [sum(directions[place].numel() for place in places) for places in owned]
        back = [sum(_numel(shapes[place], source, size) for place in mine) for source in range(size)]
        came = _exchanged(torch.cat([direction.flatten() for direction in directions]), out, back)
        pieces = [
            list(have.split([_numel(shapes[place], source, size) for place in mine]))
            for source, have in enumerate(came)
        ]
        wholes = [
            torch.cat([have[place] for have in pieces]).view(shapes[at]) for place, at in enumerate(mine)
        ]
        done = self._orthogonal(wholes) if wholes else []
        sent = [
            _rows(matrix, source, size).flatten() * rates_G[at]
            for source in range(size)
            for at, matrix in zip(mine, done, strict=True)
        ]
        like = directions[0]
        returned = _exchanged(torch.cat(sent) if sent else like.new_empty(0), back, out)
        flat = torch.cat(returned).split([direction.numel() for direction in directions])
        return [update.view(direction.shape) for update, direction in zip(flat, directions, strict=True)]

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        stacked_GMN = torch.stack([_wide(matrix) for matrix in matrices])
        done_GMN = orthogonalize(stacked_GMN, _type_on(stacked_GMN.device))
        return [_shaped(update, matrix.shape) for update, matrix in zip(done_GMN, matrices, strict=True)]


def _exchanged(sent: Tensor, sizes: list[int], their_sizes: list[int]) -> list[Tensor]:
    """What each process has for this one, of what this one has for each, one after the other."""
    import torch.distributed as dist

    received = sent.new_empty(sum(their_sizes))
    dist.all_to_all_single(received, sent, their_sizes, sizes)
    return list(received.split(their_sizes))


def _rows_of(rows: int, rank: int, size: int) -> slice:
    """The rows that a process has of a matrix, as `torch.chunk` and so FSDP2 divide it."""
    each = -(-rows // size)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


def _rows(matrix: Tensor, rank: int, size: int) -> Tensor:
    return matrix[_rows_of(len(matrix), rank, size)]


def _numel(shape: torch.Size, rank: int, size: int) -> int:
    have = _rows_of(shape[0], rank, size)
    return (have.stop - have.start) * shape[1:].numel()


# --- Matrices ----------------------------------------------------------------------------------------


def _type_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def _matrix_of(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _wide(weight: Tensor) -> Tensor:
    """As a matrix with at least as many columns as rows."""
    matrix = weight.flatten(1)
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _shaped(wide: Tensor, shape: torch.Size) -> Tensor:
    """A wide matrix as the weight of this shape that it is of."""
    return (wide if wide.shape == _matrix_of(shape) else wide.mT).reshape(shape)


def _stacked_rates(groups: list[Group]) -> Tensor:
    """Numbers of the host in all their digits, tensors of the device as they are."""
    rates: list[Any] = [group["lr"] for group in groups]
    if isinstance(rates[0], Tensor):
        return torch.stack(rates)
    return torch.tensor(rates, dtype=torch.float64)


def _by_shape(groups: list[Group]) -> Iterator[tuple[list[Tensor], list[Group]]]:
    """Weights of each shape or its transpose, whatever their groups, which differ from layer to layer."""
    shapes: dict[tuple[int, ...], tuple[list[Tensor], list[Group]]] = {}
    for group in groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weights, theirs = shapes.setdefault(tuple(sorted(_matrix_of(weight.shape))), ([], []))
                weights.append(weight)
                theirs.append(group)
    yield from shapes.values()


# Quintic whose slope at 0 is large: singular values from 1e-3 to 1 end between 0.7 and 1.2 after five
# rounds (Jordan's post, "Newton-Schulz").
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonalize(matrices_GMN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T for each matrix U S V^T of a stack (G, M, N), by Newton-Schulz iteration in `dtype`.

    Tall matrices take longer than their transposes, whose Gram matrices are smaller.
    """
    a, b, c = _QUINTIC
    x = matrices_GMN / (matrices_GMN.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    x = x.to(dtype)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices_GMN.dtype)
