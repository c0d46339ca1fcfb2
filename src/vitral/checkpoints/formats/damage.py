"""One line for whatever a damaged or hostile file leads to: what it is, and what to do."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vitral.runtime.errors import VitralError, one_line, without_control_characters

SAFETENSORS = ".safetensors"
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
NUMPY = ".npz"
ENDINGS = (SAFETENSORS, *PICKLED, NUMPY)
ZIP = b"PK\3\4"
AGAIN = "download or copy it again"

_MAX_MESSAGE = 1200  # characters


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes a VitralError of one line out of whatever a parser raises inside."""
    try:
        yield
    except VitralError:
        raise
    except PermissionError as error:
        raise VitralError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
    # On damaged bytes the parsers of zip, pickle and JSON raise almost anything: struct.error,
    # zlib.error, RecursionError, AttributeError, MemoryError.
    except Exception as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> VitralError:
    """Returns the error that says so, with advice by what the file begins with."""
    return VitralError(f"{path} is damaged or incomplete: {one_line(reason)}; {_advice(path)}")


def printable(message: object) -> str:
    """Returns a message as one line, whatever a file's fields, which it may repeat, contain."""
    line, half = without_control_characters(str(message)), _MAX_MESSAGE // 2
    return line if len(line) <= _MAX_MESSAGE else f"{line[:half]} ... {line[-half:]}"


def refuse_repeated(path: Path, names: Iterable[str]) -> None:
    """Raises VitralError if two tensors have one name, of which a parser would keep either."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise damaged(path, f"it holds {repeated[0]} twice")


def refuse_pointer(path: Path) -> None:
    """Raises VitralError if the file is empty, or stands for one that was not downloaded."""
    if path.stat().st_size == 0:
        raise damaged(path, "it is empty")
    if first_bytes(path).startswith(b"version https://git-lfs"):
        raise VitralError(f"{path} is a pointer of Git LFS, not the weights; run git lfs pull")


def first_bytes(path: Path) -> bytes:
    """Reads enough to tell a file's kind."""
    with path.open("rb") as file:
        return file.read(512)


def _advice(path: Path) -> str:
    begin = first_bytes(path)
    if begin.lstrip().startswith(b"<"):
        return "it is a web page; download the file itself"
    ending = _ending(begin)
    same = path.suffix == ending or (path.suffix in PICKLED and ending in PICKLED)
    return AGAIN if ending is None or same else f"if it is whole, its name should end in {ending}"


def _ending(begin: bytes) -> str | None:
    """Returns that of files which begin so."""
    if begin[8:9] == b"{":
        return SAFETENSORS
    if begin[:4] == ZIP and b".npy" in begin:
        return NUMPY
    return PICKLED[0] if begin[:1] == b"\x80" or (begin[:4] == ZIP and b"data.pkl" in begin) else None
