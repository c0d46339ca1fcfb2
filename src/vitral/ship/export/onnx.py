"""ONNX: what ONNX Runtime, browsers and most other tools compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import ir
from torch.export import ExportedProgram

from vitral.artifacts.engines.onnx import METADATA_KEY
from vitral.runtime.errors import VitralError
from vitral.ship.export.pixels import INPUTS, OUTPUTS, first_line

# A file of protobuf holds 2 GiB; what is beyond the weights takes little.
MAX_IN_ONE_FILE = 2**31 - 2**24


def write_onnx(
    program: ExportedProgram, path: Path, about: str, opset: int = 20, outputs: Sequence[str] = OUTPUTS
) -> list[Path]:
    """Writes a program of `pixels.exported`, and gives its files.

    That is one file, with the weights inside; of 2 GiB and more of them a second, `path` with .data appended,
    which must stay beside the first.

    Args:
        program: what to write.
        path: the file, .onnx.
        about: embedded byte for byte as the metadata `vitral`.
        opset: of ONNX's operators.
        outputs: what the program gives.

    Raises:
        VitralError: if ONNX has no such operator.
    """
    try:
        translated = torch.onnx.export(
            program, dynamo=True, external_data=False, opset_version=opset,
            input_names=INPUTS, output_names=outputs, verbose=False,
        )  # fmt: skip
    except Exception as error:
        raise VitralError(f"the model cannot be written as ONNX: {first_line(error)}") from error
    assert translated is not None
    model = translated.model
    _bare(model)
    model.metadata_props[METADATA_KEY] = about
    in_two = sum(tensor.nbytes for tensor in _weights(model)) > MAX_IN_ONE_FILE
    translated.save(path, external_data=in_two)
    return [path, path.with_name(f"{path.name}.data")] if in_two else [path]


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    return [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]


def _bare(model: ir.Model) -> None:
    """Leaves the graph itself: no traces of where it was made, and axes called what they are."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    open_sizes = [str(size) for size in _sizes(model.graph.inputs[0]) if not isinstance(size, int)]
    names = dict(zip(open_sizes, ("batch", "height", "width"), strict=False))
    for value in (*model.graph.inputs, *model.graph.outputs):
        sizes = [size if isinstance(size, int) else names.get(str(size), str(size)) for size in _sizes(value)]
        value.shape = ir.Shape(sizes)


def _sizes(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return list(value.shape)


def merged(picture: onnx.ModelProto, model: Path, about: str) -> onnx.ModelProto:
    """Joins two graphs: `picture`, uint8 (H, W, 3) of any height and width -> the answers for it, (1, L).

    Args:
        picture: the graph of `picture.picture_model`, as a batch of one.
        model: a file of `write_onnx`, for one size of images.
        about: embedded as the metadata `vitral`.
    """
    # Before its names, for nodes of both graphs may have the same.
    first = onnx.compose.add_prefix(picture, "picture/", rename_inputs=False, rename_outputs=False)
    second = onnx.load(model)
    first.ir_version = second.ir_version
    del second.metadata_props[:]
    joined = onnx.compose.merge_models(first, second, [("pixels", "pixels")], producer_name="vitral")
    for output in joined.graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.helper.set_model_props(joined, {METADATA_KEY: about})
    return joined
