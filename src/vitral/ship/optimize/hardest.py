"""Which layers rounding to 8 bits changes most: they stay in float32 where all in int8 loses too much."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node


def hardest(program: ExportedProgram, pixels_NHWC: np.ndarray) -> list[tuple[str, float]]:
    """Rank the layers of a program with weights, the most changed first.

    Each layer is given the float32 tokens that it has in the model; its inputs are rounded to 256 levels
    between the least and the largest of a batch and its weights to 255 a channel, as static int8 does. The
    figure is the squared change of what it gives, relative to the squares of that.

    Args:
        program: of `export.pixels.exported`.
        pixels_NHWC: uint8 images of the model's size.

    Returns:
        The name of each layer in the program, and its figure.
    """
    found: dict[str, float] = {}
    with torch.inference_mode():
        _Rounding(program.module(), found).run(torch.from_numpy(pixels_NHWC))
    return sorted(found.items(), key=lambda pair: -pair[1])


class _Rounding(Interpreter):
    """Runs a program as it is, and computes each layer a second time with rounded numbers."""

    def __init__(self, module: Any, found: dict[str, float]) -> None:
        super().__init__(module)
        self._found = found

    def run_node(self, n: Node) -> Any:
        given = super().run_node(n)
        if n.target in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default):
            arguments, options = self.fetch_args_kwargs_from_env(n)
            self._found[n.name] = _change(n.target, arguments, options, given)
        return given


def _change(layer: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], given: Tensor) -> float:
    tokens, weight, *others = arguments
    rounded = layer(_rounded(tokens, None), _rounded(weight, 0), *others, **options)
    return float((rounded - given).square().sum() / given.square().sum().clamp(min=1e-30))


def _rounded(values: Tensor, channels: int | None) -> Tensor:
    """Round to 256 levels between the extremes, or to 255 about 0 for each row."""
    if channels is None:
        low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-12)
        return ((values - low) / step).round() * step + low
    step = (values.abs().flatten(1).amax(1) / 127).clamp(min=1e-12)
    step = step.view(-1, *[1] * (values.ndim - 1))
    return (values / step).round() * step
