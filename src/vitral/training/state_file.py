"""Reading ``state.pt``, which may be damaged or another version's."""

import zipfile
from pathlib import Path

import torch

from vitral.runtime.errors import VitralError
from vitral.training.state import TENSORS, RunState, Saved, elsewhere


def read_state(file: Path, device: torch.device) -> Saved | None:
    """Read a checkpoint to resume from; None if it is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                return None
        content = torch.load(file, map_location=device, weights_only=True)
        tensors = {name: content[name] for name in TENSORS if name in content}
        if set(tensors) not in (set(), {"model"}, set(TENSORS)):
            return None
        values = dict(content["state"])
        if "best_top1" in values:  # as runs of before November 2026 call it
            values["best_score"] = values.pop("best_top1")
        strange = values.keys() - vars(RunState()).keys()
        if strange:
            raise VitralError(f"{file} was written {elsewhere(strange)}")
        state = RunState(**values)
        return Saved(state, tensors, content.get("description"), content.get("run"))
    except PermissionError as error:
        raise VitralError(f"{file} cannot be read: {error.strerror}; change its permissions") from error
    except VitralError:
        raise
    except Exception:  # on damaged bytes torch.load and zipfile raise almost anything
        return None
