"""Preprocessing as an ONNX graph: any picture's bytes -> the bytes that the model sees, as Pillow gives them.

The graph is `images/preprocess.py: Preprocess.fit` in the operators of ONNX: sizes and offsets to the last
pixel in integers or float64, the resize on bytes. ONNX's `Resize` on uint8, antialiased, with a = -0.5 and
the borders left out, is Pillow's convolution. One pass differs by one level at most, where a sum is close to
a half; on floats it would be five (docs/log.md, 2026-11-27).
"""

import math
from typing import Any

import numpy as np
import onnx
from onnxscript import GraphBuilder, ir

from vitral.images.preprocess import MAX_RESIZED_PIXELS, MAX_TIMES_ENLARGED, Preprocess, resizes_rows_first
from vitral.runtime.errors import VitralError

Value = Any  # a value in the graph that is built
_MODES = {"bilinear": {"mode": "linear"}, "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5}}
# What Pillow's conversion to grey multiplies red, green and blue by, of 65,536 (ITU-R 601-2).
_GREY = (19595, 38470, 7471)


def picture_model(preprocess: Preprocess, opset: int = 20, *, batch: bool = False) -> onnx.ModelProto:
    """Builds the graph: `picture`, uint8 (any height, any width, 3) -> `pixels`, uint8 (H, W, 3).

    With `batch`, `pixels` is (1, H, W, 3), as models take it. The picture is decoded, upright, RGB. One too
    narrow to be resized stops the graph at the node `refuse_a_picture_that_is_too_narrow`, before memory is
    asked for.

    Raises:
        VitralError: if ONNX has no such resize.
    """
    if preprocess.interpolation == "lanczos":
        raise VitralError(
            "the picture cannot be resized inside of the graph, for ONNX has no Lanczos resize; export --to "
            "onnx, and resize before the model"
        )
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="picture")
    builder = GraphBuilder(graph)
    picture = builder.input("picture", dtype=ir.DataType.UINT8, shape=["height", "width", 3])
    pixels = _Picture(builder.op, preprocess).fit(picture)
    shape = [*preprocess.img_size, 3]
    if batch:
        shape = [1, *shape]
        pixels = builder.op.Unsqueeze(pixels, builder.op.Constant(value=ir.tensor(np.array([0]))))
    builder.add_output(pixels, "pixels")
    pixels.type, pixels.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(shape)
    model = ir.to_proto(ir.Model(graph, ir_version=10, producer_name="vitral"))
    onnx.checker.check_model(model, full_check=True)
    return model


class _Picture:
    """The steps of `Preprocess.fit`. Sizes and places are int64 (2,): of rows, of columns."""

    def __init__(self, op: Any, preprocess: Preprocess) -> None:
        self.op, self.preprocess = op, preprocess

    def fit(self, picture_HWC: Value) -> Value:
        op = self.op
        sides = op.Shape(picture_HWC, start=0, end=2)
        seen_1CHW = op.Unsqueeze(op.Transpose(self.seen(picture_HWC), perm=[2, 0, 1]), self.ints(0))
        size = self.refuse_too_narrow(self.resized_size(sides))
        resize = self.nearest if self.preprocess.interpolation == "nearest" else self.convolved
        fitted_1CHW = self.placed(resize(seen_1CHW, sides, size), size)
        pixels_HWC = op.Transpose(op.Squeeze(fitted_1CHW, self.ints(0)), perm=[1, 2, 0])
        return op.Expand(pixels_HWC, self.ints(*self.preprocess.img_size, 3))  # grey is repeated

    def constant(self, values: Any, dtype: type = np.int64) -> Value:
        return self.op.Constant(value=ir.tensor(np.array(values, dtype)))

    def ints(self, *values: int) -> Value:
        return self.constant(values)

    def seen(self, picture_HWC: Value) -> Value:
        """Without colour where the model sees none: one channel of grey."""
        if self.preprocess.channels == 3:
            return picture_HWC
        op = self.op
        weighted = op.Mul(op.Cast(picture_HWC, to=ir.DataType.INT32), self.constant(_GREY, np.int32))
        total = op.Add(op.ReduceSum(weighted, self.ints(2)), self.constant(1 << 15, np.int32))
        return op.Cast(op.Div(total, self.constant(1 << 16, np.int32)), to=ir.DataType.UINT8)

    def resized_size(self, sides: Value) -> Value:
        """As `Preprocess._resized_size`."""
        op, preprocess = self.op, self.preprocess
        target = preprocess.target_size
        if preprocess.resize == "squash":
            return self.ints(*target)
        if preprocess.resize == "shortest" and target[0] == target[1]:
            return op.Div(op.Mul(sides, self.ints(target[0])), op.ReduceMin(sides))
        exact = op.Cast(sides, to=ir.DataType.DOUBLE)
        ratios = op.Div(exact, self.constant(target, np.float64))
        ratio = (op.ReduceMin if preprocess.resize == "shortest" else op.ReduceMax)(ratios)
        # Both languages round a half to the even number.
        return op.Max(op.Cast(op.Round(op.Div(exact, ratio)), to=ir.DataType.INT64), self.ints(1))

    def refuse_too_narrow(self, size: Value) -> Value:
        op = self.op
        most = max(MAX_RESIZED_PIXELS, MAX_TIMES_ENLARGED * math.prod(self.preprocess.img_size))
        too_large = op.Cast(
            op.Greater(op.ReduceProd(size, keepdims=0), self.constant(most)), to=ir.DataType.INT64
        )
        # There is only one row to take: the second is none, and a run ends here.
        row = op.Gather(
            op.Reshape(size, self.ints(1, 2)), too_large, axis=0, _name="refuse_a_picture_that_is_too_narrow"
        )
        return op.Reshape(row, self.ints(2))

    def convolved(self, image_1CHW: Value, sides: Value, size: Value) -> Value:
        """Resized in two passes with bytes between them, in Pillow's order."""
        op = self.op
        rows, columns = self.ints(0), self.ints(1)
        across = op.Concat(op.Gather(sides, rows), op.Gather(size, columns), axis=0)
        if resizes_rows_first():
            down = op.Concat(op.Gather(size, rows), op.Gather(sides, columns), axis=0)
            less = op.Sub(sides, size)
            less_rows, less_columns = op.Gather(less, rows), op.Gather(less, columns)
            down_first = op.And(
                op.Greater(less_rows, self.ints(0)), op.Greater(less_rows, op.Mul(less_columns, self.ints(2)))
            )
            first = op.Where(down_first, down, across)
        else:
            first = across
        return self.resize(self.resize(image_1CHW, first), size)

    def resize(self, image_1CHW: Value, size: Value) -> Value:
        channels = self.preprocess.channels
        return self.op.Resize(
            image_1CHW,
            None,
            None,
            self.op.Concat(self.ints(1, channels), size, axis=0),
            antialias=1,
            exclude_outside=1,
            coordinate_transformation_mode="half_pixel",
            **_MODES[self.preprocess.interpolation],
        )

    def nearest(self, image_1CHW: Value, sides: Value, size: Value) -> Value:
        for axis in range(2):
            image_1CHW = self.op.Gather(image_1CHW, self.nearest_places(sides, size, axis), axis=2 + axis)
        return image_1CHW

    def nearest_places(self, sides: Value, size: Value, axis: int) -> Value:
        """The row or column that each new one shows, found by adding steps in float64, as Pillow does."""
        op = self.op
        side, new = (op.Gather(pair, self.ints(axis)) for pair in (sides, size))
        step = op.Div(op.Cast(side, to=ir.DataType.DOUBLE), op.Cast(new, to=ir.DataType.DOUBLE))
        others = op.Expand(step, op.Sub(new, self.ints(1)))
        steps = op.Concat(op.Mul(step, self.constant([0.5], np.float64)), others, axis=0)
        return op.Cast(op.CumSum(steps, self.constant(0)), to=ir.DataType.INT64)

    def placed(self, image_1CHW: Value, size: Value) -> Value:
        """The centre cut out, or padded with the mean colour."""
        op, preprocess = self.op, self.preprocess
        target = self.ints(*preprocess.img_size)
        excess = op.Sub(size, target)
        begin = self.half(op.Max(excess, self.ints(0)))
        axes = self.ints(2, 3)
        cut_1CHW = op.Slice(image_1CHW, begin, op.Add(begin, op.Min(size, target)), axes)
        if preprocess.resize != "longest":  # the others cover the whole
            return cut_1CHW
        lack = op.Max(op.Neg(excess), self.ints(0))
        before = op.Div(lack, self.ints(2))
        pads = op.Concat(self.ints(0, 0), before, self.ints(0, 0), op.Sub(lack, before), axis=0)
        padded = (
            op.Pad(op.Slice(cut_1CHW, self.ints(c), self.ints(c + 1), self.ints(1)), pads, level)
            for c, level in enumerate(self.fill())
        )
        return op.Concat(*padded, axis=1)

    def fill(self) -> list[Value]:
        """The mean colour of each channel."""
        levels = self.preprocess.fill[: self.preprocess.channels]
        return [self.constant(level, np.uint8) for level in levels]

    def half(self, excess: Value) -> Value:
        """Half of what is too much, as `Preprocess._offset` rounds it: a half to the even number, or down."""
        op = self.op
        half = op.Div(excess, self.ints(2))
        if self.preprocess.crop_rounding == "down":
            return half
        odd, half_odd = (op.Mod(number, self.ints(2)) for number in (excess, half))
        return op.Add(half, op.Mul(odd, half_odd))
