"""OpenVINO's intermediate representation: a graph as XML, and its weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.export import ExportedProgram

from vitral.runtime.errors import VitralError
from vitral.ship.export.pixels import INPUTS, OUTPUTS

ABOUT_PATH = ["vitral", "about"]  # in rt_info


def write_openvino(program: ExportedProgram, path: Path, about: str) -> list[Path]:
    """Writes a program of `pixels.exported` in float32, and gives its files.

    The batch stays open; an engine fixes it, for OpenVINO computes a batch of one size twice as fast.

    Args:
        program: what to write; for images of any size only if `refuse_any_size` lets it.
        path: the graph's file, .xml; the weights' lies beside it, .bin.
        about: embedded byte for byte in rt_info, under vitral, about.

    Raises:
        VitralError: if OpenVINO is missing, or has no such operator.
    """
    try:
        import openvino
    except ImportError as error:
        raise VitralError("OpenVINO's form needs the 'export' extra: pip install 'vitral[export]'") from error
    shape = [_size(size) for size in program.example_inputs[0][0].shape]
    try:
        with without_telemetry():
            model = openvino.convert_model(program)
        # It leaves all axes open, those too that the program has fixed.
        model.reshape(dict.fromkeys(model.inputs, openvino.PartialShape(_open_shape(program))))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise VitralError(f"the model cannot be written for OpenVINO: {type(error).__name__} {reason}") from error
    for ports, names in ((model.inputs, INPUTS), (model.outputs, OUTPUTS)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    model.set_rt_info(about, ABOUT_PATH)
    # Its default rounds weights to float16.
    openvino.save_model(model, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]
