"""`.pt2`: torch's own exported program, for services that have torch and not Vitral."""

from pathlib import Path

import torch
from torch.export import ExportedProgram

from vitral.artifacts.engines.pt2 import METADATA_FILE


def write_pt2(program: ExportedProgram, path: Path, about: str) -> list[Path]:
    """Writes a program of `pixels.exported`, and gives its files.

    Args:
        program: what to write.
        path: the file, .pt2. Whoever loads it runs `pickle`: only trusted files may be loaded.
        about: embedded byte for byte as the extra file `METADATA_FILE`.
    """
    torch.export.save(program, path, extra_files={METADATA_FILE: about})
    return [path]
