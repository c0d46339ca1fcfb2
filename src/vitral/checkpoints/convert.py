"""From any layout to any other, with a certificate of how far apart the two models' answers are."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from vitral.checkpoints import sidecar
from vitral.checkpoints.certificate import CERTIFICATE_FILE, Certificate, certify
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.dtypes import store_as
from vitral.checkpoints.express import check_expressed, fold_temperature, in_terms_of, refuse_inexpressible
from vitral.checkpoints.folder import load_checkpoint, save_checkpoint
from vitral.checkpoints.layouts import key_table
from vitral.checkpoints.layouts.layout import Writing
from vitral.checkpoints.layouts.registry import WRITERS
from vitral.runtime.errors import VitralError
from vitral.runtime.files import new_folder, refuse_filled, write_atomically

LAYOUTS = ("vitral", *WRITERS)


def convert(
    source: str | PathLike, out: str | PathLike, to: str, dtype: str | None = None, **overrides: Any
) -> Certificate:
    """Write the model `source` into the new folder `out` as the layout `to`.

    The folder appears whole or not at all, with ``parity.json`` beside the weights.

    Args:
        source: as in `load_checkpoint`, and so are `overrides`.
        out: a folder that is not there yet, or empty.
        to: one of `LAYOUTS`.
        dtype: to store weights in, one of `dtypes.STORABLE`; None: as the source has them.
        overrides: what to change.

    Raises:
        VitralError: if the layout cannot hold the model, `out` exists, or the answers differ.
    """
    source, out = str(source), Path(out)
    if to not in LAYOUTS:
        raise VitralError(f"there is no layout {to!r}; there are {', '.join(LAYOUTS)}")
    refuse_filled(out)
    checkpoint = load_checkpoint(source, **overrides)
    if dtype is not None:
        store_as(checkpoint.model, dtype)
    refuse_inexpressible(checkpoint.model.config, source, to)
    staging = out
    try:
        with new_folder(out) as staging:
            certificate = _as_origin_or_nearest(staging, checkpoint, source, to)
            content = json.dumps(asdict(certificate), indent=1, allow_nan=False) + "\n"
            write_atomically(staging / CERTIFICATE_FILE, content.encode())
    except (VitralError, OSError) as error:
        # The folder's other name is no one's business.
        raise VitralError(str(error).replace(staging.name, out.name)) from error
    return certificate


def _as_origin_or_nearest(folder: Path, checkpoint: Checkpoint, source: str, to: str) -> Certificate:
    """Converts to the family that the model came from, if that still can; else to the nearest."""
    origin = checkpoint.metadata.get("origin")
    if to == "vitral":
        return _convert_into(folder, checkpoint, source, to)
    if not isinstance(origin, Mapping) or origin.get("layout") != to:
        return _convert_into(folder, _without_origin(checkpoint), source, to)
    try:
        return _convert_into(folder, checkpoint, source, to)
    # Whatever another program's config, which was kept as it was, leads to.
    except Exception:
        for file in folder.iterdir():
            file.unlink()
        return _convert_into(folder, _without_origin(checkpoint), source, to)


def _without_origin(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, metadata={k: v for k, v in checkpoint.metadata.items() if k != "origin"})


def _convert_into(folder: Path, checkpoint: Checkpoint, source: str, to: str) -> Certificate:
    if to == "vitral":
        save_checkpoint(folder, checkpoint)
        return certify(folder, checkpoint, source, to, ())
    cooled = fold_temperature(checkpoint)
    adapted = in_terms_of(to, cooled)
    writing = WRITERS[to](adapted)
    _write(folder, adapted, writing, to)
    rounded = check_expressed(folder, adapted, to)
    certificate = certify(folder, cooled, source, to, rounded)
    # Last, for what was read back was to be what the library's own files say.
    kept = sidecar.content(checkpoint, to, writing.weights_file)
    write_atomically(folder / sidecar.FILE, (json.dumps(kept, indent=1, allow_nan=False) + "\n").encode())
    return replace(certificate, temperature=checkpoint.temperature)


def _write(folder: Path, checkpoint: Checkpoint, writing: Writing, to: str) -> None:
    model = checkpoint.model
    try:
        state = key_table.write(writing.rows, model.state_dict(), len(model.layers))
    except VitralError as error:
        raise VitralError(f"{to} cannot hold this model: {error}") from error
    state = {
        (name if re.search(writing.beside, name) else writing.prefix + name): tensor.detach()
        for name, tensor in {**writing.constants, **state}.items()
    }
    write_atomically(folder / writing.weights_file, _serialized(state, writing.weights_file))
    for name, content in writing.descriptions.items():
        write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def _serialized(state: Mapping[str, Tensor], file: str) -> bytes:
    if file.endswith(".safetensors"):
        return safetensors.torch.save(dict(state), {"format": "pt"})
    buffer = io.BytesIO()
    if file.endswith(".npz"):
        np.savez(buffer, allow_pickle=False, **{name: x.float().numpy() for name, x in state.items()})
    else:
        torch.save(dict(state), buffer)
    return buffer.getvalue()
