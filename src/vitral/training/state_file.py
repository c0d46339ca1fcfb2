"""How far a run is, on disk: one file ``state.pt``, or of a large sharded run a folder with a file a process.

Either appears whole or not at all, and only then is the one before removed.
"""

import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitral.runtime.errors import VitralError
from vitral.runtime.files import new_file, put_in_place, remove_leftovers
from vitral.training.state import TENSORS, RunState, Saved, elsewhere

_STEP = re.compile(r"step-(\d+)")
_PARTIAL = ".partial"
_HEAD = "state.pt"  # of a folder: all but the tensors that processes share
_KEPT = 2  # folders


class StateFiles:
    """The states in a folder, of which the newest counts.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "state.pt"

    def exist(self) -> bool:
        return self.file.exists() or bool(self._steps())

    def read(self, device: torch.device) -> Saved | None:
        """Read the newest state that is whole; None if none is.

        Raises:
            VitralError: if it cannot be read, or was written by another version.
        """
        found = [read_state(self.file, device)] if self.file.exists() else []
        found += [_read_head(folder) for folder in self._steps()]
        return max((saved for saved in found if saved), key=lambda saved: saved.state.step, default=None)

    def write(self, saved: Saved) -> None:
        """Replace whatever is there by one file."""
        self.folder.mkdir(exist_ok=True)
        _write(self.file, saved)
        for older in self._steps():
            shutil.rmtree(older)

    def write_pieces(self, saved: Saved, group: Any, *, is_first: bool) -> None:
        """Write each process's pieces of the tensors into a folder. Every process asks, in the same order.

        Args:
            saved: with tensors in the CPU's memory, divided or the same in all processes.
            group: of processes, for this alone.
            is_first: whether this process makes the folder whole in the end.

        Raises:
            OSError: in all, if one cannot write.
        """
        import torch.distributed.checkpoint as dcp

        pieces, rest = _flat(saved.tensors)
        folder = self.folder / f"step-{saved.state.step}"
        partial = folder.with_name(f"{folder.name}{_PARTIAL}")
        try:
            dcp.save(pieces, storage_writer=dcp.FileSystemWriter(partial), process_group=group)
        except dcp.CheckpointException as error:
            raise _cause(error) from None
        if not is_first:
            return
        _write(partial / _HEAD, replace(saved, tensors=rest))
        put_in_place(partial, folder)
        self.file.unlink(missing_ok=True)
        for older in self._steps()[_KEPT:]:
            shutil.rmtree(older)

    def remove_leftovers(self) -> None:
        """Remove what killed processes left half-written."""
        remove_leftovers(self.folder, {self.file.name})
        for folder in self.folder.glob(f"step-*{_PARTIAL}"):
            shutil.rmtree(folder)

    def _steps(self) -> list[Path]:
        """The folders that are whole, the newest first."""
        found = [folder for folder in self.folder.glob("step-*") if _STEP.fullmatch(folder.name)]
        return sorted(found, key=lambda folder: -int(folder.name.removeprefix("step-")))


def read_state(file: Path, device: torch.device) -> Saved | None:
    """Read a checkpoint to resume from; None if it is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                return None
        content = torch.load(file, map_location=device, weights_only=True)
        tensors = {name: content[name] for name in TENSORS if name in content}
        if set(tensors) not in (set(), {"model"}, {"optimizer"}, set(TENSORS)):
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


def read_pieces(folder: Path, like: Callable[[str, torch.Size], Tensor | None]) -> dict[str, Any]:
    """Read the tensors of a folder, however many processes wrote it.

    Args:
        folder: of a `Saved`.
        like: of the name of a parameter or buffer and the size of a tensor that belongs to it, a tensor that
            is laid out as the answer is to be; None: whole, on the CPU.

    Raises:
        KeyError: from `like`, if there is no such name.
        VitralError: if a file is damaged.
    """
    import torch.distributed.checkpoint as dcp

    try:
        kept: dict[str, Any] = dict(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
        pieces: dict[str, Any] = {}
        for key, of in kept.items():  # all are tensors
            pattern = like(_parameter(key), of.size)
            dtype = of.properties.dtype
            pieces[key] = (
                torch.empty(of.size, dtype=dtype)
                if pattern is None
                else torch.empty_like(pattern, dtype=dtype, requires_grad=False)
            )
        with warnings.catch_warnings():  # that this process reads alone, which is meant
            warnings.simplefilter("ignore")
            dcp.load(pieces, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except KeyError:
        raise
    except (Exception, dcp.CheckpointException) as error:
        raise VitralError(
            f"{folder} is damaged and cannot be resumed; remove it, and the state before it is taken"
        ) from error
    return _nested(pieces)


def _read_head(folder: Path) -> Saved | None:
    """What a folder's state is; None if it is damaged."""
    saved = read_state(folder / _HEAD, torch.device("cpu"))
    whole = saved is not None and (folder / ".metadata").exists()
    return replace(saved, folder=folder) if whole else None


def _write(file: Path, saved: Saved) -> None:
    values = {"run": saved.run, "description": saved.description, "state": asdict(saved.state)}
    with new_file(file) as temporary, temporary.open("r+b") as content:
        torch.save({**values, **saved.tensors}, content)
        content.flush()
        os.fsync(content.fileno())


def _cause(error: Any) -> Exception:
    """What went wrong in one of the processes."""
    failures = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in failures if isinstance(failure, OSError)), RuntimeError(str(error)))


# --- Tensors by one name each ------------------------------------------------------------------------

# Names of parameters have dots.
_APART = "/"


def _flat(tensors: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by their names, and the rest, which is small: what an optimizer says of its groups."""
    optimizer = tensors["optimizer"]
    flat: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name, kept in optimizer["parameters"].items():
        for key, value in kept.items():
            if isinstance(value, Tensor):
                flat[_APART.join(("optimizer", name, key))] = value
            else:
                rest.setdefault(name, {})[key] = value
    for part in ("model", "average"):
        flat.update({f"{part}{_APART}{name}": value for name, value in tensors[part].items()})
    return flat, {"optimizer": {"groups": optimizer["groups"], "parameters": rest}}


def _parameter(key: str) -> str:
    return key.split(_APART)[1]


def _nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    tensors: dict[str, Any] = {part: {} for part in TENSORS}
    for key, value in flat.items():
        part, name, *rest = key.split(_APART)
        if rest:
            tensors[part].setdefault(name, {})[rest[0]] = value
        else:
            tensors[part][name] = value
    return tensors
