"""What was computed for a block of images, kept on disk, so that a killed run is taken up where it was.

A file is known by what its numbers are a function of: the model, the method, the images of the block and how
they were perturbed. A block is computed as a whole or read as a whole, so that a resumed run multiplies the
same matrices as one that was never stopped, and gives the same numbers to the last bit.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitral.inference.classifier import Classifier
from vitral.inference.features import update_with_weights
from vitral.runtime.files import write_atomically
from vitral.runtime.version import vitral_version

_FORMAT = 1  # raised whenever the same key would stand for other numbers


class Store:
    """Tensors of one model's images by what they are, in the files of a folder.

    Args:
        folder: of all models; made if need be, and safe to delete.
        classifier: the model, its preprocessing and its precision.
        warn: told of a damaged file, which is computed again.
    """

    def __init__(self, folder: Path, classifier: Classifier, warn: Callable[[str], None]) -> None:
        self.folder = folder / _model_key(classifier)
        self.warn = warn
        self.read = 0  # how many were found

    def get(self, about: list[Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Reads what is there under `about`, whose items JSON can write; else computes and keeps it."""
        file = self.folder / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors"
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            self.read += 1
            return found
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError) as error:
            self.warn(f"{file} is damaged ({error}); it is computed again")
        computed = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            file, safetensors.torch.save({name: of.contiguous() for name, of in computed.items()})
        )
        return computed


def _model_key(classifier: Classifier) -> str:
    about = [_FORMAT, vitral_version(), asdict(classifier.model.config), classifier.preprocess.record()]
    digest = hashlib.sha256(json.dumps([*about, str(classifier.placement)]).encode())
    update_with_weights(digest, classifier.model.state_dict())
    return digest.hexdigest()[:32]
