"""int8 for OpenVINO, by NNCF: products in 8 bits, everything else in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitral.artifacts.about import About
from vitral.artifacts.engines.openvino import METADATA_PATH
from vitral.runtime.telemetry import import_silently
from vitral.ship.optimize.candidates import Candidate


def quantize(
    source: Path,
    folder: Path,
    images_NHWC: Sequence[np.ndarray] | np.ndarray,
    candidate: Candidate,
    *,
    int8: bool,
) -> list[Path]:
    """Write an int8 form of a float32 one, and give its files.

    The preset for transformers leaves norms, sums and softmax in float32 and moves outliers of activations
    into the weights (SmoothQuant, arXiv:2211.10438).

    Args:
        source: the float32 model, .xml.
        folder: where to write ``model.xml``.
        images_NHWC: pixels that ranges are measured on.
        candidate: with the strength of SmoothQuant and the layers that stay in float32.
        int8: whether the processor adds 8-bit products without overflow. Without, sums of two products
            saturate in 16 bits: weights then have half the range (nncf#1498).
    """
    openvino, nncf = _libraries()
    model = openvino.Core().read_model(source)
    about = model.get_rt_info(METADATA_PATH).astype(str)
    _, height, width, channels = model.inputs[0].partial_shape
    model.reshape([1, height, width, channels])
    fix = nncf.OverflowFix.DISABLE if int8 else nncf.OverflowFix.ENABLE
    strength = nncf.AdvancedSmoothQuantParameters(matmul=candidate.strength)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([images_NHWC[place : place + 1] for place in range(len(images_NHWC))]),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(images_NHWC),
        fast_bias_correction=True,
        ignored_scope=nncf.IgnoredScope(names=_operations(model, candidate.in_float)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=fix, smooth_quant_alphas=strength
        ),
    )
    quantized.reshape([-1, height, width, channels])
    quantized.set_rt_info(about, METADATA_PATH)
    return _written(openvino, quantized, folder)


def with_about(folder: Path, out: Path, about: About) -> list[Path]:
    """Write a form anew with another description, its probabilities those of that one's temperature."""
    openvino, _ = _libraries(nncf=False)
    import openvino.opset13 as ops

    model = openvino.Core().read_model(folder / "model.xml")
    logits = model.output("logits").node.input_value(0)
    scaled = ops.divide(logits, np.float32(about.temperature))
    said = ops.sigmoid(scaled) if about.multi_label else ops.softmax(scaled, 1)
    named = openvino.Model([logits, said.output(0)], model.get_parameters(), "vitral")
    for port, name in zip(named.outputs, ("logits", "probabilities"), strict=True):
        port.get_tensor().set_names({name})
    named.set_rt_info(about.to_json(), METADATA_PATH)
    return _written(openvino, named, out)


def _operations(model: Any, layers: Sequence[str]) -> list[str]:
    """The operations with the weights of layers, which are called as in torch's program."""
    return [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in ("MatMul", "Convolution")
        and operation.get_friendly_name().partition("/")[0] in layers
    ]


def _written(openvino: Any, model: Any, folder: Path) -> list[Path]:
    path = folder / "model.xml"
    # Its default rounds what is float32 to float16.
    openvino.save_model(model, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def _libraries(*, nncf: bool = True) -> tuple[Any, Any]:
    openvino = import_silently("openvino")
    return openvino, import_silently("nncf") if nncf else None
