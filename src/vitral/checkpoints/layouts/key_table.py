"""Key tables: which tensors of a foreign layout are which of ours, read in both directions.

A layout is a list of `Row`. Names hold ``{i}`` for the layer and ``{p}`` for weight and bias. A row
applies where its keys are there; what no row accounts for, on either side, is an error.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitral.checkpoints.formats.weights import Weights
from vitral.runtime.errors import VitralError

Tensors = list[Tensor]
_NAMED_IN_ERRORS = 6


@dataclass(frozen=True)
class Transform:
    """Tensors of the other layout to ours and back; each undoes the other to the bit."""

    read: Callable[[Tensors], Tensors]
    write: Callable[[Tensors], Tensors]


def each(read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Transform:
    """Returns the transform of one tensor to one tensor."""
    return Transform(lambda found: [read(x) for x in found], lambda found: [write(x) for x in found])


def joined(*shares: int, then: Transform | None = None) -> Transform:
    """Returns the transform of several tensors to one, joined along the first axis in these proportions."""

    def join(found: Tensors) -> Tensors:
        return [torch.cat(then.read(found) if then else found)]

    def split(found: Tensors) -> Tensors:
        unit = len(found[0]) // sum(shares)
        parts = list(found[0].split([unit * share for share in shares]))
        return then.write(parts) if then else parts

    return Transform(join, split)


def cut(sizes: Sequence[int]) -> Transform:
    """Returns the transform of one tensor that is several of ours, cut along the first axis."""
    return Transform(lambda found: list(found[0].split(list(sizes))), lambda found: [torch.cat(found)])


def stacked(axis: int = 0) -> Transform:
    """Returns the transform of one tensor with an axis over layers to one of ours for each layer."""
    return Transform(lambda found: list(found[0].unbind(axis)), lambda found: [torch.stack(found, axis)])


SAME = each(lambda x: x, lambda x: x)
UNBATCHED = each(lambda x: x[0], lambda x: x[None])  # theirs has a leading axis of one
VECTOR = each(lambda x: x.reshape(1, 1, -1), lambda x: x.reshape(-1))  # a token (1, 1, D) of ours
TRANSPOSED = each(lambda x: x.T, lambda x: x.T)
QKV = joined(1, 1, 1)
QV = joined(1, 1)


@dataclass(frozen=True)
class Row:
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform = SAME


def row(ours: str | Sequence[str], theirs: str | Sequence[str], transform: Transform = SAME) -> Row:
    def as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
        return (names,) if isinstance(names, str) else tuple(names)

    return Row(as_tuple(ours), as_tuple(theirs), transform)


def modules(names: Mapping[str, str], ours: str = "", theirs: str = "") -> list[Row]:
    """Returns a row for each module whose weight and bias are the same in both, by name, within others."""
    return [row(f"{ours}{mine}.{{p}}", f"{theirs}{their}.{{p}}") for mine, their in names.items()]


# What every layer has: a norm, attention's last map, another norm, the MLP's two maps.
_OF_A_LAYER = (
    "attention_norm", "attention.out", "feed_forward_norm", "feed_forward.expand", "feed_forward.contract",
)  # fmt: skip


def layer_modules(layer: str, *names: str) -> list[Row]:
    """Returns rows for the five modules that every layer has, by their names within the layer."""
    return modules(dict(zip(_OF_A_LAYER, names, strict=True)), "layers.{i}.", layer)


def layer_scales(attention: str, feed_forward: str) -> list[Row]:
    scales = {"attention_scale": attention, "feed_forward_scale": feed_forward}
    return [row(f"layers.{{i}}.{ours}.gamma", theirs) for ours, theirs in scales.items()]


def separate_qkv(q: str, k: str, v: str) -> list[Row]:
    """Returns rows for q, k and v as modules of their own, with all biases or (BEiT) without k's."""
    return [
        row("layers.{i}.attention.qkv.{p}", [f"{name}.{{p}}" for name in (q, k, v)], QKV),
        row("layers.{i}.attention.qv_bias", [f"{q}.bias", f"{v}.bias"], QV),
    ]


def expand(rows: Iterable[Row], num_layers: int) -> list[Row]:
    """Writes out each row for each layer, weight and bias that its names speak of."""
    found = []
    for pattern in rows:
        names = " ".join(pattern.ours + pattern.theirs)
        for i in range(num_layers) if "{i}" in names else (0,):
            for p in ("weight", "bias") if "{p}" in names else ("",):
                ours, theirs = (
                    tuple(name.replace("{i}", str(i)).replace("{p}", p) for name in side)
                    for side in (pattern.ours, pattern.theirs)
                )
                found.append(Row(ours, theirs, pattern.transform))
    return found


def read(
    rows: Iterable[Row],
    weights: Weights,
    num_layers: int,
    ignored: str = "(?!)",
    optional: Collection[str] = (),
) -> dict[str, Tensor]:
    """Makes our tensors of theirs.

    Args:
        rows: the layout.
        weights: their tensors; each is taken once, when its row is reached.
        num_layers: of the model.
        ignored: a pattern of keys that are left behind, such as those of a text tower.
        optional: keys that no row need account for.

    Raises:
        VitralError: naming the keys that no row accounts for.
    """
    state: dict[str, Tensor] = {}
    wanted = {name for name in weights if not re.search(ignored, name)}
    used: set[str] = set()
    for pattern in expand(rows, num_layers):
        available = all(name in wanted and name not in used for name in pattern.theirs)
        if not available or any(name in state for name in pattern.ours):
            continue
        take = weights.__getitem__ if len(pattern.theirs) == 1 else weights.temporary
        tensors = pattern.transform.read([take(name) for name in pattern.theirs])
        state.update(zip(pattern.ours, tensors, strict=True))
        used.update(pattern.theirs)
    left = sorted(wanted - used - set(optional))
    if left:
        raise VitralError(f"{listing(left)} {'is' if len(left) == 1 else 'are'} unknown or incomplete")
    return state


def write(rows: Iterable[Row], state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Makes their tensors of ours. Raises VitralError naming every tensor that no row takes."""
    found: dict[str, Tensor] = {}
    done: set[str] = set()
    for pattern in expand(rows, num_layers):
        if all(name in state and name not in done for name in pattern.ours):
            tensors = pattern.transform.write([state[name] for name in pattern.ours])
            found.update(zip(pattern.theirs, (x.contiguous() for x in tensors), strict=True))
            done.update(pattern.ours)
    left = [name for name in state if name not in done]
    if left:
        kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in left}
        raise VitralError(f"it has no place for {listing(list(kinds))}")
    return found


def without(rows: Iterable[Row], pattern: str) -> list[Row]:
    """Leaves out the rows whose names in the other layout, written in one line, match."""
    return [r for r in rows if not re.search(pattern, " ".join(r.theirs))]


def listing(names: Sequence[str]) -> str:
    """Names the first few, for a message."""
    some = ", ".join(sorted(names)[:_NAMED_IN_ERRORS])
    return some if len(names) <= _NAMED_IN_ERRORS else f"{some} and {len(names) - _NAMED_IN_ERRORS} more"
