"""Pillow's resize in the operators of ONNX, to the last bit.

ONNX's own `Resize` computes the same convolution from weights in float32. It is off by a level in some pixels
of ten thousand, and a probability in its fourth digit (docs/log.md, 2026-11-27); nor has it Lanczos'.
Here weights are in float64 and then whole numbers of 22 bits, as Pillow has them, and sums are of integers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnxscript import ir

from vitral.images.preprocess import Interpolation, resizes_rows_first

Value = Any  # a value in the graph that is built
_BITS = 22  # of a weight after the point
_REACH = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}  # of a filter, in pixels of the smaller picture
_DOUBLE, _INT32, _INT64 = ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64


class Resize:
    """Builds the nodes that resize a picture.

    Args:
        op: of the graph.
        interpolation: Pillow's filter.
    """

    def __init__(self, op: Any, interpolation: Interpolation) -> None:
        self.op, self.interpolation = op, interpolation
        self.parts = 0  # graphs within the graph

    def __call__(self, image_HWC: Value, sides: Value, size: Value) -> Value:
        """Gives the picture, uint8, at another size.

        Args:
            image_HWC: uint8.
            sides: its rows and columns, int64 (2,).
            size: those that are wanted.
        """
        op = self.op
        (rows, columns), (new_rows, new_columns) = self.pair(sides), self.pair(size)
        if self.interpolation == "nearest":
            rows_HWC = op.Gather(image_HWC, self.nearest_places(rows, new_rows), axis=0)
            return op.Gather(rows_HWC, self.nearest_places(columns, new_columns), axis=1)
        down_first = self.down_first(op.Sub(sides, size))
        # The axis that comes first is moved to the front, and whole lines of pixels are added up.
        first_XYC = self.turned(image_HWC, op.Not(down_first))
        old, new = op.Where(down_first, rows, columns), op.Where(down_first, new_rows, new_columns)
        half_XYC = self.convolved(first_XYC, old, new)
        old, new = op.Where(down_first, columns, rows), op.Where(down_first, new_columns, new_rows)
        whole_YXC = self.convolved(op.Transpose(half_XYC, perm=[1, 0, 2]), old, new)
        return self.turned(whole_YXC, down_first)

    def constant(self, values: Any, dtype: type) -> Value:
        return self.op.Constant(value=ir.tensor(np.array(values, dtype)))

    def number(self, value: float) -> Value:
        return self.constant(value, np.float64)

    def pair(self, sides: Value) -> tuple[Value, Value]:
        """Rows and columns as scalars."""
        rows, columns = (self.op.Gather(sides, self.constant(axis, np.int64)) for axis in (0, 1))
        return rows, columns

    def down_first(self, less: Value) -> Value:
        """Whether rows are resized before columns, of how many go of each (`resizes_rows_first`)."""
        op = self.op
        if not resizes_rows_first():
            return self.constant(False, np.bool_)
        rows, columns = self.pair(less)
        return op.And(
            op.Greater(rows, self.constant(0, np.int64)),
            op.Greater(rows, op.Mul(columns, self.constant(2, np.int64))),
        )

    def turned(self, image_XYC: Value, condition: Value) -> Value:
        """Its first two axes exchanged, if the condition holds."""
        exchanged = self.subgraph(lambda op: op.Transpose(image_XYC, perm=[1, 0, 2]), {})
        as_is = self.subgraph(lambda op: op.Identity(image_XYC), {})
        return self.op.If(condition, then_branch=exchanged, else_branch=as_is)

    def subgraph(self, make: Callable[..., Value], inputs: dict[str, ir.DataType]) -> ir.Graph:
        """A graph within the graph, its names apart from others'; `make` may use values around it."""
        builder = self.op.builder
        self.parts += 1
        builder.push_module(f"{self.interpolation}_{self.parts}")
        values = [ir.Value(name=name, type=ir.TensorType(kind)) for name, kind in inputs.items()]
        found = builder.subgraph(make, values, [ir.Value(name=f"result_{self.parts}")])
        builder.pop_module()
        return found

    def convolved(self, image_XYC: Value, old: Value, new: Value) -> Value:
        """Each new line a weighted sum of old ones, along the first axis: uint8."""
        op = self.op
        places_KX, weights_KX = self.windows(old, new)
        weights_KX11 = op.Unsqueeze(weights_KX, self.constant([2, 3], np.int64))
        rounding = self.constant(1 << (_BITS - 1), np.int32)
        shape = op.Concat(op.Reshape(new, self.constant([1], np.int64)), op.Shape(image_XYC, start=1), axis=0)
        begin_XYC = op.Expand(rounding, shape)

        def add(op: Any, sum_XYC: Value, places_X: Value, weights_X11: Value) -> Value:
            lines_XYC = op.Cast(op.Gather(image_XYC, places_X, axis=0), to=_INT32)
            return op.Add(sum_XYC, op.Mul(lines_XYC, weights_X11))

        body = self.subgraph(add, {"sum": _INT32, "places": _INT64, "weights": _INT32})
        total_XYC = op.Scan(begin_XYC, places_KX, weights_KX11, body=body, num_scan_inputs=2)
        # What is below 0 goes to 0 in either case, so that the division rounds down.
        positive_XYC = op.Max(total_XYC, self.constant(0, np.int32))
        levels_XYC = op.Div(positive_XYC, self.constant(1 << _BITS, np.int32))
        return op.Cast(op.Min(levels_XYC, self.constant(255, np.int32)), to=ir.DataType.UINT8)

    def windows(self, old: Value, new: Value) -> tuple[Value, Value]:
        """The old lines of each new one, (K, X) int64, and their weights, (K, X) int32."""
        op = self.op
        zero, one, half = self.number(0), self.number(1), self.number(0.5)
        count, lines = op.Cast(old, to=_DOUBLE), op.Cast(new, to=_DOUBLE)
        scale = op.Div(count, lines)
        stretch = op.Max(scale, one)
        reach = op.Mul(self.number(_REACH[self.interpolation]), stretch)
        centre_X = op.Mul(op.Add(op.Range(zero, lines, one), half), scale)
        first_X = op.Floor(op.Max(op.Add(op.Sub(centre_X, reach), half), zero))
        end_X = op.Min(op.Floor(op.Add(op.Add(centre_X, reach), half)), count)
        taps = op.Add(op.Mul(op.Ceil(reach), self.number(2)), one)
        step_K1 = op.Unsqueeze(op.Range(zero, taps, one), self.constant([1], np.int64))
        places_KX = op.Add(step_K1, first_X)
        distance_KX = op.Mul(op.Add(op.Sub(places_KX, centre_X), half), op.Div(one, stretch))
        inside_KX = op.Cast(op.Less(places_KX, end_X), to=_DOUBLE)
        weights_KX = op.Mul(self.filter(distance_KX), inside_KX)
        total_1X = op.ReduceSum(weights_KX, self.constant([0], np.int64), keepdims=1)
        exact_KX = op.Mul(op.Div(weights_KX, total_1X), self.number(1 << _BITS))
        rounded_KX = op.Cast(op.Add(exact_KX, op.Mul(op.Sign(exact_KX), half)), to=_INT32)  # to zero
        last = op.Sub(count, one)
        return op.Cast(op.Min(places_KX, last), to=_INT64), rounded_KX

    def filter(self, x: Value) -> Value:
        """The filter's value at a distance."""
        op, number = self.op, self.number
        x = op.Abs(x)
        if self.interpolation == "bilinear":
            return op.Max(op.Sub(number(1), x), number(0))
        if self.interpolation == "bicubic":  # a = -0.5
            near = op.Mul(op.Mul(op.Sub(op.Mul(number(1.5), x), number(2.5)), x), x)
            far = op.Add(op.Mul(op.Sub(x, number(5)), x), number(8))
            far = op.Mul(op.Sub(op.Mul(far, x), number(4)), number(-0.5))
            beyond = op.Where(op.Less(x, number(2)), far, number(0))
            return op.Where(op.Less(x, number(1)), op.Add(near, number(1)), beyond)
        window = op.Mul(self.sinc(x), self.sinc(op.Div(x, number(3))))
        return op.Where(op.Less(x, number(3)), window, number(0))

    def sinc(self, x: Value) -> Value:
        op, angle = self.op, self.op.Mul(x, self.number(np.pi))
        none = op.Equal(x, self.number(0))
        one = self.number(1)
        return op.Where(none, one, op.Div(op.Sin(angle), op.Where(none, one, angle)))

    def nearest_places(self, side: Value, new: Value) -> Value:
        """The line that each new one shows, found by adding steps in float64, as Pillow does."""
        op = self.op
        line = self.constant([1], np.int64)
        step = op.Div(op.Cast(side, to=_DOUBLE), op.Cast(new, to=_DOUBLE))
        first = op.Reshape(op.Mul(step, self.number(0.5)), line)
        others = op.Expand(step, op.Sub(op.Reshape(new, line), line))
        return op.Cast(op.CumSum(op.Concat(first, others, axis=0), self.constant(0, np.int64)), to=_INT64)
