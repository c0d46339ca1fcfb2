"""int8 for ONNX Runtime: products of weights in 8 bits, their ranges measured before (QDQ)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitral.artifacts.about import About
from vitral.artifacts.engines.onnx import METADATA_KEY
from vitral.runtime.telemetry import import_silently
from vitral.ship.optimize.candidates import Candidate

_AT_ONCE = 8  # images


def quantize(source: Path, folder: Path, images_NHWC: np.ndarray, _: Candidate, *, int8: bool) -> list[Path]:
    """Write an int8 form of a float32 one, and give its files; as `by_nncf.quantize`, without SmoothQuant."""
    import onnx

    import_silently("onnxruntime")
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, path = source.with_name("prepared.onnx"), folder / "model.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        _reader(images_NHWC),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        reduce_range=not int8,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    about = {prop.key: prop.value for prop in onnx.load(source).metadata_props}
    model = onnx.load(path)
    onnx.helper.set_model_props(model, about)
    onnx.save(model, path)
    return [path]


def with_about(folder: Path, out: Path, about: About) -> list[Path]:
    """Write a form anew with another description, its probabilities those of that one's temperature."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    _without(graph, "probabilities")
    temperature = numpy_helper.from_array(np.array(about.temperature, np.float32), "temperature")
    graph.initializer.append(temperature)
    ends = ["scaled_logits"], ["probabilities"]
    graph.node.extend(
        [
            helper.make_node("Div", ["logits", "temperature"], ["scaled_logits"]),
            helper.make_node("Sigmoid", *ends)
            if about.multi_label
            else helper.make_node("Softmax", *ends, axis=1),
        ]
    )
    helper.set_model_props(model, {METADATA_KEY: about.to_json()})
    path = out / "model.onnx"
    onnx.save(model, path)
    return [path]


def _without(graph: Any, output: str) -> None:
    """Take out of a graph what is computed for one output alone."""
    wanted = {value.name for value in graph.output} - {output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _reader(images_NHWC: np.ndarray) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = (
                np.ascontiguousarray(images_NHWC[first : first + _AT_ONCE])
                for first in range(0, len(images_NHWC), _AT_ONCE)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyrefly: ignore[bad-override]
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": batch}

    return Reader()
