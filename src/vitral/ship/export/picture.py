"""Preprocessing as an ONNX graph: any picture's bytes -> the bytes that the model sees, as Pillow gives them.

The graph is `images/preprocess.py: Preprocess.fit` in the operators of ONNX: sizes and places to the last
pixel, in integers or float64, and `pillow_resize`, which gives Pillow's pixels to the last bit.
"""

import math
from typing import Any

import numpy as np
import onnx
from onnxscript import GraphBuilder, ir

from vitral.images.preprocess import MAX_RESIZED_PIXELS, MAX_TIMES_ENLARGED, Preprocess
from vitral.ship.export.pillow_resize import Resize

Value = Any  # a value in the graph that is built
# What Pillow's conversion to grey multiplies red, green and blue by, of 65,536 (ITU-R 601-2).
_GREY = (19595, 38470, 7471)


def picture_model(preprocess: Preprocess, opset: int = 20, *, batch: bool = False) -> onnx.ModelProto:
    """Builds the graph: `picture`, uint8 (any height, any width, 3) -> `pixels`, uint8 (H, W, 3).

    With `batch`, `pixels` is (1, H, W, 3), as models take it. The picture is decoded, upright, RGB. One too
    narrow to be resized stops the graph at the node `refuse_a_picture_that_is_too_narrow`, before memory is
    asked for.
    """
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
        size = self.refuse_too_narrow(self.resized_size(sides))
        resize = Resize(op, self.preprocess.interpolation)
        pixels_HWC = self.placed(resize(self.seen(picture_HWC), sides, size), size)
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

    def placed(self, image_HWC: Value, size: Value) -> Value:
        """The centre cut out, or padded with the mean colour."""
        op, preprocess = self.op, self.preprocess
        target = self.ints(*preprocess.img_size)
        excess = op.Sub(size, target)
        begin = self.half(op.Max(excess, self.ints(0)))
        axes = self.ints(0, 1)
        cut_HWC = op.Slice(image_HWC, begin, op.Add(begin, op.Min(size, target)), axes)
        if preprocess.resize != "longest":  # the others cover the whole
            return cut_HWC
        lack = op.Max(op.Neg(excess), self.ints(0))
        before = op.Div(lack, self.ints(2))
        none = self.ints(0)
        pads = op.Concat(before, none, op.Sub(lack, before), none, axis=0)
        padded = (
            op.Pad(op.Slice(cut_HWC, self.ints(c), self.ints(c + 1), self.ints(2)), pads, level)
            for c, level in enumerate(self.fill())
        )
        return op.Concat(*padded, axis=2)

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
