"""`Builder`: writes the forms of one model, each into a folder of its own."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from torch.export import ExportedProgram

from vitral.artifacts.about import about_from
from vitral.inference.classifier import Classifier, load
from vitral.ship.export.export import about_of
from vitral.ship.export.pixels import PixelsModel, exported
from vitral.ship.optimize import by_nncf, by_onnxruntime
from vitral.ship.optimize.candidates import Candidate
from vitral.ship.optimize.hardest import hardest

_DRAFT_IMAGES = 8  # of a form that is only timed
_RANKING_IMAGES = 16


class Builder:
    """Writes forms; what several of them begin with is made once.

    Args:
        checkpoint: a folder with the model.
        calibration: pixels of training images, (n, H, W, 3) uint8, as a .npy file.
        calibrating: of them, how many ranges are measured on.
    """

    def __init__(self, checkpoint: Path, calibration: Path, calibrating: int) -> None:
        self.checkpoint = checkpoint
        self.pixels_NHWC = np.load(calibration, mmap_mode="r")[:calibrating]
        self.classifier = cache(self._classifier)
        self.program = cache(self._program)

    def _classifier(self, merge: int) -> Classifier:
        return load(self.checkpoint, device="cpu", precision="float32", merge=merge or None)

    def _program(self, merge: int) -> ExportedProgram:
        classifier = self.classifier(merge)
        return exported(PixelsModel(classifier), classifier.preprocess.img_size)

    def build(self, candidate: Candidate, folder: Path, *, int8: bool) -> list[str]:
        """Write a candidate's files, and give their names, the model's first.

        Args:
            candidate: of OpenVINO or ONNX Runtime.
            folder: a new one.
            int8: whether the processor multiplies 8-bit numbers without overflow; else weights have 7 bits.
        """
        folder.mkdir()
        if candidate.precision != "int8":
            return self._float(candidate, folder)
        source = folder / "float"
        source.mkdir()
        # As OpenVINO's float form is bfloat16's too, the hint alone differs.
        path = source / self._float(candidate, source)[0]
        images_NHWC = self.pixels_NHWC[:: max(len(self.pixels_NHWC) // _DRAFT_IMAGES, 1)]
        images_NHWC = images_NHWC if candidate.draft else self.pixels_NHWC
        by = by_nncf if candidate.library == "openvino" else by_onnxruntime
        files = by.quantize(path, folder, images_NHWC, candidate, int8=int8)
        for file in source.iterdir():
            file.unlink()
        source.rmdir()
        return [file.name for file in files]

    def _float(self, candidate: Candidate, folder: Path) -> list[str]:
        classifier, program = self.classifier(candidate.merge), self.program(candidate.merge)
        about = about_of(classifier, "model").to_json()
        if candidate.library == "openvino":
            from vitral.ship.export.openvino import write_openvino

            files = write_openvino(program, folder / "model.xml", about)
        else:
            from vitral.ship.export.onnx import write_onnx  # its libraries take seconds to import

            files = write_onnx(program, folder / "model.onnx", about)
        return [file.name for file in files]

    def finish(self, candidate: Candidate, folder: Path, out: Path, about: str) -> list[str]:
        """Write a form as an artifact has it: with the probabilities of its own temperature.

        Args:
            candidate: as it was built.
            folder: where it was built.
            out: where its files are written.
            about: embedded in the file; its temperature is set in the graph.
        """
        described = about_from(json.loads(about), "the artifact")
        by = by_nncf if candidate.library == "openvino" else by_onnxruntime
        files = by.with_about(folder, out, described)
        return [file.name for file in files]

    def hardest(self, candidate: Candidate) -> list[tuple[str, float]]:
        """Name the layers by how much rounding to 8 bits changes what they give, the most first."""
        images_NHWC = np.array(self.pixels_NHWC[:_RANKING_IMAGES])
        return hardest(self.program(candidate.merge), images_NHWC)
