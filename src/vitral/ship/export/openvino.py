"""OpenVINO's intermediate representation: a graph as XML, and its weights beside it."""

from pathlib import Path

from torch.export import ExportedProgram

from vitral.artifacts.engines.openvino import METADATA_PATH
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.telemetry import import_silently
from vitral.ship.export.pixels import INPUTS, OUTPUTS, first_line


def write_openvino(program: ExportedProgram, path: Path, about: str) -> list[Path]:
    """Writes a program of `pixels.exported` in float32, and gives its files.

    The batch stays open: an engine fixes it, for OpenVINO computes batches of a fixed size twice as fast.

    Args:
        program: what to write.
        path: the graph's file, .xml; the weights' lies beside it, .bin.
        about: embedded byte for byte in rt_info, under vitral, about.

    Raises:
        VitralError: if OpenVINO has no such operator.
    """
    openvino = import_silently("openvino")
    try:
        model = openvino.convert_model(program)
    except Exception as error:
        raise VitralError(f"OpenVINO cannot compute the model: {first_line(error)}") from error
    for ports, names in ((model.inputs, INPUTS), (model.outputs, OUTPUTS)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    # It leaves open all axes of the input, those too that the program has fixed.
    model.reshape(openvino.PartialShape([-1, *_image(program)]))
    model.set_rt_info(about, METADATA_PATH)
    # Its default rounds the weights to float16.
    openvino.save_model(model, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def refuse_any_size(model: VisionTransformer) -> None:
    """Raises VitralError if OpenVINO cannot compute the model at every size."""
    config = model.config
    resized = {config.embedding.resize} if config.position == "learned" else set()
    if config.layer.attention.relative_bias != "none":
        resized.add(config.layer.attention.relative_resize)
    rotary = config.layer.attention.rotary
    why = None
    if blurred := sorted(rule for rule in resized if rule.endswith("_antialias")):
        why = f"it resizes positions without antialiasing, and the model's rule is {blurred[0]!r}"
    elif rotary is not None and rotary.reference_grid is not None:
        why = "it cannot scale places to a reference grid"
    elif rotary is not None and any(model.merge):
        why = "it cannot turn tokens that merge by their places"
    if why:
        raise VitralError(
            f"OpenVINO has no form of this model for images of any size: {why}; export it for one size"
        )


def _image(program: ExportedProgram) -> list[int]:
    """Height, width and channels of the input; -1 where any will do."""
    pixels = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == INPUTS[0])
    return [size if isinstance(size, int) else -1 for size in pixels.meta["val"].shape[1:]]
