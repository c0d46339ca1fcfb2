"""Nothing executes, and no file can do worse than be refused in one line that names it."""

import argparse
import io
import itertools
import json
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.checkpoints.formats import pytorch
from vitral.checkpoints.formats.open import open_weights
from vitral.checkpoints.layouts import google, key_table
from vitral.checkpoints.layouts.timm import keys as timm
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

State = dict[str, Tensor]
HEADS: dict[str, Any] = {"num_heads": 2}  # which no file of 16 channels tells


def tiny(**options: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 16,
        "num_layers": 2,
        "num_classes": 3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(**{**sizes, **HEADS, **options}).eval()


MODEL = tiny()
STATE: State = {name: tensor.detach() for name, tensor in MODEL.state_dict().items()}


def timms(dtype: torch.dtype = torch.float32) -> State:
    """The tiny model under timm's names, which DeiT's, DINO's and MAE's files have too."""
    named = key_table.write(timm.rows(MODEL.config), STATE, len(MODEL.layers))
    return {name: tensor.to(dtype, copy=True) for name, tensor in named.items()}


def googles() -> dict[str, np.ndarray]:
    named = key_table.write(google.rows(MODEL.config), STATE, len(MODEL.layers))
    return {name: tensor.clone().numpy() for name, tensor in named.items()}


def same_as_written(model: VisionTransformer) -> bool:
    state = model.state_dict()
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in state)


# --- One valid checkpoint in every container -----------------------------------------------------


def write_safetensors(folder: Path, state: State) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_pth(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "model.pth", **options)
    return folder / "model.pth"


def write_legacy(folder: Path, content: Any) -> Path:
    return write_pth(folder, content, _use_new_zipfile_serialization=False)


def write_npz(folder: Path, arrays: Mapping[str, Any], **options: Any) -> Path:
    np.savez(folder / "model.npz", allow_pickle=True, **arrays)
    return folder / "model.npz"


def write_compressed(folder: Path, arrays: Mapping[str, Any]) -> Path:
    np.savez_compressed(folder / "model.npz", allow_pickle=True, **arrays)
    return folder / "model.npz"


def write_shards(folder: Path, state: State, *, pickled: bool = False) -> Path:
    """Half of the tensors each; the folder is what is loaded."""
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = {}
    for number, half in enumerate(halves, 1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        (torch.save if pickled else save_file)(half, folder / file)  # type: ignore[operator]
        names |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def write_ours(folder: Path) -> Path:
    save_checkpoint(folder, Checkpoint(MODEL, Preprocess((8, 8)), ("ant", "bee", "cat"), {}))
    return folder


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def with_namespace(folder: Path) -> Path:
    args = argparse.Namespace(lr=0.1, output=None, names=["a"])
    return write_pth(folder, {"model": timms(), "optimizer": {"state": {}}, "args": args, "epoch": 3})


def of_dino(folder: Path) -> Path:
    head = {"head.mlp.0.weight": torch.ones(4, 16), "head.last_layer.weight_g": torch.ones(4, 1)}
    return write_pth(
        folder, {"teacher": prefixed("backbone.", timms()) | head, "student": {"a": torch.ones(1)}}
    )


CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "ours": write_ours,
    "safetensors": lambda folder: write_safetensors(folder, timms()),
    "shards": lambda folder: write_shards(folder, timms()),
    "pickled shards": lambda folder: write_shards(folder, timms(), pickled=True),
    "pth": lambda folder: write_pth(folder, timms()),
    "legacy": lambda folder: write_legacy(folder, timms()),
    "model": lambda folder: write_pth(folder, {"model": timms(), "best_accuracy": torch.tensor(81.2)}),
    "legacy model": lambda folder: write_legacy(folder, {"model": timms(), "epoch": 3}),
    "teacher": of_dino,
    "module": lambda folder: write_pth(folder, {"state_dict": prefixed("module.", timms())}),
    "namespace": with_namespace,
    "npz": lambda folder: write_npz(folder, googles()),
    "compressed npz": lambda folder: write_compressed(folder, googles()),
}
WEIGHTS = (".safetensors", ".pth", ".bin", ".npz")


def weights_of(path: Path) -> Path:
    """The file to damage: what is loaded, or the last file of weights in a folder."""
    return path if path.is_file() else max(file for file in path.iterdir() if file.suffix in WEIGHTS)


def content_of(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_size for file in folder.rglob("*")}


def refused(path: Path, *, named: str | None = None, **overrides: Any) -> str:
    """The message of the VitralError that loading gives, if it is one line and nothing was written."""
    before = content_of(path.parent)
    with pytest.raises(VitralError) as caught:
        load_checkpoint(path, **{**HEADS, **overrides})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert (named or weights_of(path).name) in message
    assert content_of(path.parent) == before
    return message


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_bits(container: str, tmp_path: Path) -> None:
    assert same_as_written(load_checkpoint(CONTAINERS[container](tmp_path), **HEADS).model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("writer", [write_safetensors, write_pth, write_legacy, write_shards])
def test_types_stay_what_they_are(writer: Callable[..., Path], dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = load_checkpoint(writer(tmp_path, timms(dtype)), **HEADS).model
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}


def test_googles_bfloat16_is_read(tmp_path: Path) -> None:
    halves = {name: torch.from_numpy(x).bfloat16() for name, x in googles().items()}
    raw = {name: x.view(torch.int16).numpy().view("V2") for name, x in halves.items()}
    loaded = load_checkpoint(write_npz(tmp_path, raw)).model
    assert torch.equal(loaded.state_dict()["head.bias"], halves["head/bias"])
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_arrays_in_fortran_order_are_read(tmp_path: Path) -> None:
    arrays = {name: np.asfortranarray(array) for name, array in googles().items()}
    assert same_as_written(load_checkpoint(write_compressed(tmp_path, arrays)).model)


@pytest.mark.parametrize("order", [np.ascontiguousarray, np.asfortranarray])
def test_layers_in_one_array_are_read(order: Callable[..., np.ndarray], tmp_path: Path) -> None:
    arrays = googles()
    layers = [name for name in arrays if "encoderblock_0" in name]
    pairs = {name: np.stack([arrays[name], arrays[name.replace("_0", "_1", 1)]]) for name in layers}
    stacked = {name.replace("_0/", "/", 1): order(pair) for name, pair in pairs.items()}
    rest = {name: array for name, array in arrays.items() if "encoderblock" not in name}
    assert same_as_written(load_checkpoint(write_npz(tmp_path, rest | stacked)).model)


def test_views_in_a_pickle_are_the_views_that_were_saved(tmp_path: Path) -> None:
    state = timms()
    packed = torch.stack([state["blocks.0.attn.proj.weight"].T, state["blocks.1.attn.proj.weight"].T])
    for layer in range(2):
        state[f"blocks.{layer}.attn.proj.weight"] = packed[layer].T
    assert same_as_written(load_checkpoint(write_pth(tmp_path, state), **HEADS).model)


@pytest.mark.parametrize("container", ["safetensors", "pth"])
def test_what_is_changed_in_memory_stays_changed_and_the_file_as_it_was(
    container: str, tmp_path: Path
) -> None:
    path = CONTAINERS[container](tmp_path)
    before, weights = path.read_bytes(), open_weights(path)
    first, second = weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"]
    first.zero_()
    view = first[0]
    del first, second
    assert not view.any()
    assert path.read_bytes() == before


@pytest.mark.parametrize("container", ["safetensors", "pth", "legacy", "npz", "shards"])
def test_a_tensor_that_is_soon_copied_is_the_same(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch, "_MAX_PASSED", 0)  # a new map for each
    path = CONTAINERS[container](tmp_path)
    weights = open_weights(path / "model.safetensors.index.json" if path.is_dir() else path)
    assert all(torch.equal(weights.temporary(name), weights[name]) for name in weights)


@pytest.mark.parametrize("padding", range(4))
def test_tensors_that_begin_anywhere_are_read(padding: int, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path, timms())
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header, data = path.read_bytes()[8 : 8 + length], path.read_bytes()[8 + length :]
    path.write_bytes(raw_safetensors(header.rstrip() + b" " * padding, data))
    assert same_as_written(load_checkpoint(path, **HEADS).model)


# --- Cut, renamed, and something else altogether -------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 5, 0.5, -1])
@pytest.mark.parametrize("container", CONTAINERS)
def test_half_a_file_is_refused(container: str, kept: float, tmp_path: Path) -> None:
    path = CONTAINERS[container](tmp_path)
    file = weights_of(path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    message = refused(path)
    assert "is damaged or incomplete" in message
    assert "download or copy it again" in message


ENDINGS = (".safetensors", ".pth", ".npz")
SWAPPED = [
    (container, ending)
    for container in ("safetensors", "pth", "legacy", "npz", "compressed npz")
    for ending in ENDINGS
    if (".pth" if container == "legacy" else f".{container.split()[-1]}") != ending
]


@pytest.mark.parametrize(("container", "ending"), SWAPPED)
def test_a_file_under_another_ending_is_refused(container: str, ending: str, tmp_path: Path) -> None:
    path = CONTAINERS[container](tmp_path)
    message = refused(path.rename(path.with_suffix(ending)))
    assert f"if it is whole, its name should end in {path.suffix}" in message


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is empty"),
        (b"weights\n", "download or copy it again"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "it is a web page; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run git lfs pull"),
        (b"\0" * 4096, "download or copy it again"),
        (b"\x80\x02.", "is damaged or incomplete"),
        (b"PK\5\6" + b"\0" * 18, "is"),  # a zip archive of nothing
    ],
)
def test_what_is_no_weights_is_refused(content: bytes, text: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    assert text in refused(path)


def test_a_folder_named_like_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path / "model.safetensors", named="model.safetensors")


# --- Pickles that would execute ------------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def poisoned(trap: Path) -> dict[str, Any]:
    return {"model": timms(), "args": Touch(trap)}


def zip_of_numpy(folder: Path, trap: Path) -> Path:
    return write_npz(folder, googles() | {"extra": np.array([Touch(trap)], dtype=object)})


POISONED: dict[str, Callable[[Path, Path], Path]] = {
    "pth": lambda folder, trap: write_pth(folder, poisoned(trap)),
    "legacy": lambda folder, trap: write_legacy(folder, poisoned(trap)),
    "in a namespace": lambda folder, trap: write_pth(
        folder, {"model": timms(), "args": argparse.Namespace(a=Touch(trap))}
    ),
    "npz": zip_of_numpy,
    "pth as safetensors": lambda folder, trap: write_pth(folder, poisoned(trap)).rename(
        folder / "model.safetensors"
    ),
    "pth as npz": lambda folder, trap: write_pth(folder, poisoned(trap)).rename(folder / "model.npz"),
    **{
        f"bare {ending}": lambda folder, trap, ending=ending: bare_pickle(folder / f"model{ending}", trap)
        for ending in (".pth", ".bin", ".npz", ".safetensors")
    },
}


def bare_pickle(path: Path, trap: Path) -> Path:
    path.write_bytes(pickle.dumps(Touch(trap)))
    return path


@pytest.mark.parametrize("kind", POISONED)
def test_no_pickle_executes(kind: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    refused(POISONED[kind](tmp_path, trap))
    assert not trap.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


def test_what_would_execute_is_named(tmp_path: Path) -> None:
    path = write_pth(tmp_path, MODEL)
    assert "vitral.model.vit.VisionTransformer, which loading would have to execute" in refused(path)


# --- safetensors ---------------------------------------------------------------------------------


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def raw_safetensors(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = json.dumps({"a": entry(0, 8)})
HEADERS = {
    "2**60 bytes": raw_safetensors(ONE.encode(), bytes(8), 2**60),
    "2**64 - 1 bytes": raw_safetensors(ONE.encode(), bytes(8), 2**64 - 1),
    "longer than the file": raw_safetensors(ONE.encode(), bytes(8), len(ONE) + 9),
    "no header": raw_safetensors(b"", bytes(8)),
    "not JSON": raw_safetensors(b"{'a': 1}", bytes(8)),
    "not UTF-8": raw_safetensors(b'{"\xff": {}}', bytes(8)),
    "a list": raw_safetensors(b"[1, 2]", bytes(8)),
    "deep": raw_safetensors(b"[" * 100_000, bytes(8)),
    "a long number": raw_safetensors(b'{"a": ' + b"9" * 5000 + b"}", bytes(8)),
    "a key twice": raw_safetensors(f'{{"a": {json.dumps(entry(0, 8))}, {ONE[1:]}'.encode(), bytes(8)),
    "a field twice": raw_safetensors(ONE.replace('{"dtype', '{"dtype": "F32", "dtype').encode(), bytes(8)),
    "overlap": raw_safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same bytes": raw_safetensors({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a gap": raw_safetensors({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)),
    "out of the file": raw_safetensors({"a": entry(0, 2**40)}, bytes(8)),
    "backwards": raw_safetensors({"a": entry(8, 0, [2])}, bytes(8)),
    "negative": raw_safetensors({"a": entry(-8, 0, [2])}, bytes(8)),
    "bytes left over": raw_safetensors({"a": entry(0, 8)}, bytes(9)),
    "a shape of terabytes": raw_safetensors({"a": entry(0, 8, [2**40])}, bytes(8)),
    "a shape that overflows": raw_safetensors({"a": entry(0, 8, [2**33, 2**33])}, bytes(8)),
    "a type of no kind": raw_safetensors({"a": entry(0, 8, [2], "X32")}, bytes(8)),
    "another type": raw_safetensors({"a": entry(0, 8, [2], "F16")}, bytes(8)),
    "no offsets": raw_safetensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a line in a key": raw_safetensors({"a\nvitral: all is well": entry(0, 8)}, bytes(8)),
    "a terminal's escape": raw_safetensors({"\x1b[2J": entry(0, 8)}, bytes(8)),
    "a long key": raw_safetensors({"a" * 100_000: entry(0, 8)}, bytes(8)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[case])
    assert "is damaged or incomplete" in refused(path)


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS["a key twice"])
    assert "it holds a twice" in refused(path)


# --- Shards --------------------------------------------------------------------------------------


INDEX = "model.safetensors.index.json"


def repoint(folder: Path, **places: Any) -> None:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    rewrite(folder, {"weight_map": names | places})


def rewrite(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(index))


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"model-0000{number}-of-00002.safetensors"


def both_hold_all(folder: Path) -> None:
    for number in (1, 2):
        save_file(timms(), shard(folder, number))


SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing shard": (lambda f: shard(f).unlink(), "lacks 1 of 2 shards, such as model-00001-of-00002"),
    "an empty shard": (lambda f: shard(f).write_bytes(b""), "00001-of-00002.safetensors is damaged"),
    "a pointer": (lambda f: shard(f).write_text("version https://git-lfs..."), "run git lfs pull"),
    "a key of no shard": (lambda f: repoint(f, more=shard(f).name), "more, which is in"),
    "a key of two shards": (both_hold_all, "00002-of-00002.safetensors hold blocks.0.attn"),
    "the folder above": (lambda f: repoint(f, a="../model.safetensors"), "not beside it"),
    "the root": (lambda f: repoint(f, a="/etc/passwd.safetensors"), "not beside it"),
    "dots": (lambda f: repoint(f, a=".."), "lacks 1 of 3 shards, such as .."),
    "a line": (lambda f: repoint(f, a="b\nc.safetensors"), "lacks 1 of 3 shards"),
    "a null": (lambda f: repoint(f, a="b\0c.safetensors"), "lacks 1 of 3 shards"),
    "a number": (lambda f: repoint(f, a=3), "is no index of shards"),
    "another kind": (lambda f: repoint(f, a="model.safetensors.index.json"), "is not a file of"),
    "a list": (lambda f: rewrite(f, {"weight_map": ["head.bias"]}), "is no index of shards"),
    "no map": (lambda f: rewrite(f, {"metadata": {}}), "is no index of shards"),
    "nothing": (lambda f: rewrite(f, {"weight_map": {}}), "the download is incomplete"),
    "no JSON": (lambda f: (f / INDEX).write_bytes(b"\xff{"), "is no index of shards"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDS)
def test_hostile_shards_are_refused(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(timms(), tmp_path / "model.safetensors")  # which "../" would reach
    damage, text = SHARDS[case]
    damage(write_shards(folder, timms()))
    assert text in refused(folder, named="model")


# --- .npz ----------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


def claiming(shape: tuple[int, ...], numbers: int = 4, dtype: str = "<f4") -> bytes:
    """An .npy that says it has this shape, and has so many numbers."""
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(4 * numbers)


def write_members(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


MEMBERS: dict[str, list[tuple[str, bytes]]] = {
    "terabytes": [("cls.npy", claiming((2**40,)))],
    "more than any machine": [("cls.npy", claiming((2**62, 2**62)))],
    "a negative length": [("cls.npy", claiming((-1,)))],
    "two negative lengths": [("cls.npy", claiming((-2, -2)))],
    "layers of nothing": [("Transformer/encoderblock/b.npy", claiming((10**12, 0), 0))],
    "too short": [("cls.npy", claiming((5,)))],
    "too long": [("cls.npy", claiming((3,)))],
    "no .npy": [("cls.npy", b"cls" * 50)],
    "an unknown version": [("cls.npy", b"\x93NUMPY\x09\x00" + claiming((4,))[8:])],
    "a header of code": [("cls.npy", claiming((4,)).replace(b"False", b"print"))],
    "a header without end": [("cls.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{")],
    "a line in a name": [("cls\nvitral: all is well.npy", claiming((4,)))],
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_hostile_npz_is_refused(case: str, tmp_path: Path) -> None:
    assert "is damaged or incomplete" in refused(write_members(tmp_path / "model.npz", MEMBERS[case]))


@pytest.mark.parametrize("names", [("cls.npy", "cls.npy"), ("cls.npy", "cls")])
def test_an_array_that_stands_twice_is_refused(names: tuple[str, str], tmp_path: Path) -> None:
    members = [(name, npy(np.zeros(4, np.float32))) for name in names]
    if names[0] == names[1]:
        with pytest.warns(UserWarning, match="Duplicate"):
            path = write_members(tmp_path / "model.npz", members)
    else:
        path = write_members(tmp_path / "model.npz", members)
    assert "it holds cls twice" in refused(path)


def test_a_deflate_bomb_is_refused_without_inflating_it(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cls.npy", "w") as file:
        file.write(claiming((24 * 2**20,), 0))
        for _ in range(96):
            file.write(bytes(2**20))
    assert "its arrays claim 100663424 bytes, the file has 9" in refused(path)


def test_a_flipped_bit_in_an_array_fails_its_checksum(tmp_path: Path) -> None:
    path = write_npz(tmp_path, googles())
    content = bytearray(path.read_bytes())
    content[content.index(googles()["head/kernel"].tobytes()) + 3] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32 for file 'head/kernel.npy'" in refused(path)


@pytest.mark.parametrize(("flag", "text"), [(0x1, "encrypted"), (0x20, "patched")])
def test_zip_options_that_cannot_be_read_are_refused(flag: int, text: str, tmp_path: Path) -> None:
    path = write_members(tmp_path / "model.npz", [("cls.npy", npy(np.zeros(4, np.float32)))])
    content = bytearray(path.read_bytes())
    content[6] |= flag  # in the local header
    content[content.index(b"PK\1\2") + 8] |= flag
    path.write_bytes(content)
    assert text in refused(path)


# --- Numbers that are no weights -----------------------------------------------------------------

NO_WEIGHTS = [
    *itertools.product((write_safetensors, write_pth, write_legacy), ("int8", "bool", "complex64")),
    *itertools.product((write_safetensors, write_pth), ("float8_e4m3fn",)),  # newer than the old format
]


@pytest.mark.parametrize(("writer", "kind"), NO_WEIGHTS)
def test_tensors_that_are_no_weights_are_refused(
    kind: str, writer: Callable[..., Path], tmp_path: Path
) -> None:
    state = timms()
    state["head.weight"] = state["head.weight"].to(getattr(torch, kind))
    message = refused(writer(tmp_path, state))
    assert "head.weight is" in message
    assert "weights are floating-point numbers of 16, 32 or 64 bits" in message


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", ">f4", "S4", "M8[s]", "V4", "f4,f4"])
def test_arrays_that_are_no_weights_are_refused(dtype: str, tmp_path: Path) -> None:
    kernel = googles()["head/kernel"]
    other = (
        kernel.astype(dtype) if dtype in (">f4", "int8", "bool", "complex64") else np.zeros((16, 3), dtype)
    )
    assert "head/kernel is" in refused(write_npz(tmp_path, googles() | {"head/kernel": other}))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("writer", [write_safetensors, write_pth, write_legacy, write_shards])
def test_numbers_that_are_not_finite_are_refused(
    writer: Callable[..., Path], dtype: torch.dtype, number: float, tmp_path: Path
) -> None:
    state = timms(dtype)
    state["blocks.1.mlp.fc1.weight"][3, 5] = number
    message = refused(writer(tmp_path, state), named="model")
    assert "blocks.1.mlp.fc1.weight holds NaN or infinity" in message


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_that_are_not_finite_are_refused(dtype: str, number: float, tmp_path: Path) -> None:
    arrays = {name: array.astype(dtype) for name, array in googles().items()}
    arrays["head/kernel"][3, 1] = number
    assert "head/kernel holds NaN or infinity" in refused(write_npz(tmp_path, arrays))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_numbers_are_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    state = timms(dtype)
    state["head.weight"][:] = torch.finfo(dtype).max
    loaded = load_checkpoint(write_safetensors(tmp_path, state), **HEADS).model
    assert torch.equal(loaded.state_dict()["head.weight"], state["head.weight"])


# --- PyTorch's files -----------------------------------------------------------------------------


def itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


CONTENTS: dict[str, Callable[[], Any]] = {
    "a list": lambda: [torch.ones(2)],
    "one tensor": lambda: torch.ones(2),
    "nothing": dict,
    "numbers for names": lambda: {1: torch.ones(2)},
    "no tensors": lambda: {"model": {"a": 1}},
    "itself": itself,
    "terabytes of one number": lambda: {"head.weight": torch.ones(1).expand(10**6, 10**6)},
    "a sparse tensor": lambda: timms() | {"head.weight": timms()["head.weight"].to_sparse()},
    "a meta tensor": lambda: timms() | {"head.weight": torch.ones(3, 16, device="meta")},
    "a line in a name": lambda: timms() | {"a\nvitral: all is well": torch.ones(2)},
}


@pytest.mark.parametrize("writer", [write_pth, write_legacy])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_pickle_that_holds_no_state_dict_is_refused(
    content: str, writer: Callable[..., Path], tmp_path: Path
) -> None:
    refused(writer(tmp_path, CONTENTS[content]()))


def rezip(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    changed = [(name, change(name, content)) for name, content in members]
    return write_members(path, [(name, content) for name, content in changed if content is not None], method)


RECORDS: dict[str, tuple[Callable[[str, bytes], bytes | None], int]] = {
    "compressed": (lambda name, content: content, zipfile.ZIP_DEFLATED),
    "a record too short": (lambda name, content: content[:-4] if name.endswith("data/3") else content, 0),
    "a record too long": (lambda name, content: content + b"1234" if name.endswith("data/3") else content, 0),
    "no record": (lambda name, content: None if name.endswith("data/3") else content, 0),
    "no pickle": (lambda name, content: None if name.endswith("data.pkl") else content, 0),
    "another byte order": (lambda name, content: b"big" if name.endswith("byteorder") else content, 0),
    "no byte order": (lambda name, content: b"odd" if name.endswith("byteorder") else content, 0),
    "code": (lambda name, content: content, -1),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_zip_that_pytorch_does_not_write_is_refused(case: str, tmp_path: Path) -> None:
    change, method = RECORDS[case]
    path = write_pth(tmp_path, timms())
    rezip(path, change, max(method, 0))
    if case == "code":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("model/constants.pkl", b"")
    refused(path)


def test_a_record_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write_pth(tmp_path, timms())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/3", bytes(64))
    assert "it holds model/data/3 twice" in refused(path)


def test_the_oldest_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle", "../escaped"):
            archive.addfile(tarfile.TarInfo(name))
    refused(path)
    assert not (tmp_path.parent / "escaped").exists()


# --- Shapes and names ----------------------------------------------------------------------------


def test_everything_that_does_not_fit_stands_in_one_line(tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    state["head.weight"] = state["head.weight"].T.contiguous()
    state["extra"] = torch.ones(2)
    del state["norm.bias"]
    save_file(state, folder / "model.safetensors")
    message = refused(folder)
    assert message.endswith(
        "extra is not of this model, head.weight is (16, 3), not (3, 16), norm.bias is missing"
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_another_depth_than_the_config_says_is_refused(depth: int, tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    save_file(dict(tiny(num_layers=depth).state_dict()), folder / "model.safetensors")
    message = refused(folder)
    assert ("layers.1.attention.out.bias is missing" in message) == (depth == 1)
    assert ("layers.2.attention.out.bias is not of this model" in message) == (depth == 3)


def edited(change: Callable[[State], Any]) -> State:
    state = timms()
    change(state)
    return state


FOREIGN: dict[str, tuple[Callable[[State], Any], str]] = {
    "a transposed head": (
        lambda s: s.update({"head.weight": s["head.weight"].T.contiguous()}),
        "head.bias is (3,), not (16,), head.weight is (16, 3), not (16, 16)",
    ),
    "extra keys": (lambda s: s.update(b=torch.ones(1), a=torch.ones(1)), "a, b are unknown or incomplete"),
    "a missing key": (lambda s: s.pop("blocks.1.attn.proj.bias"), "layers.1.attention.out.bias is missing"),
    "a missing layer": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.0.")],
        "has no layers",
    ),
    "no numbers": (lambda s: s.update({"cls_token": torch.ones(0)}), "embedding.class_token is (0,)"),
    "one number": (lambda s: s.update({"patch_embed.proj.weight": torch.tensor(1.0)}), "cannot be used"),
    "no axes": (lambda s: s.update({"pos_embed": torch.tensor(1.0)}), "cannot be used"),
    "no grid": (lambda s: s.update({"pos_embed": torch.ones(1, 7, 16)}), "no square grid of patches"),
    "a flat MLP": (lambda s: s.update({"blocks.0.mlp.fc2.weight": torch.ones(16)}), "cannot be used"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("writer", [write_safetensors, write_pth])
def test_foreign_weights_that_do_not_fit_are_refused(
    writer: Callable[..., Path], case: str, tmp_path: Path
) -> None:
    change, text = FOREIGN[case]
    assert text in refused(writer(tmp_path, edited(change)))


@pytest.mark.parametrize("shape", [(), (17,), (16, 2), (1, 1, 16, 2, 8)], ids=str)
@pytest.mark.parametrize("name", ["query/kernel", "query/bias", "out/kernel"])
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_arrays_of_other_shapes_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    key = f"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/{name}"
    arrays = googles() | {key: np.ones(shape, np.float32)}
    refused(write_npz(tmp_path, arrays))


@pytest.mark.parametrize("missing", sorted(googles())[::5])
def test_a_missing_array_is_refused(missing: str, tmp_path: Path) -> None:
    arrays = googles()
    del arrays[missing]
    refused(write_npz(tmp_path, arrays))


# --- Configs -------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, Any] = {
    "layers without end": {"num_layers": 10**9},
    "a width of terabytes": {"embed_dim": 2**50, "num_heads": 1},
    "classes without end": {"num_classes": 2**62},
    "an image of terabytes": {"img_size": 2**40},
    "a fixed table of terabytes": {"img_size": 2**30, "position": "sinusoidal"},
    "a huge MLP": {"mlp_ratio": 1e300},
    "no number": {"mlp_ratio": float("nan")},
    "tokens without end": {"embedding": {"register_tokens": 2**62}},
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_config_that_claims_too_much_is_refused(case: str, tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["architecture"] |= ARCHITECTURES[case]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, named="config.json")


CONFIGS: dict[str, dict[str, Any]] = {
    "a list for a type": {"model_type": ["vit"]},
    "a width in words": {"model_type": "vit", "hidden_size": "wide"},
    "no width": {"model_type": "vit", "hidden_size": 0},
    "layers without end": {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 10**9},
    "an image in words": {"model_type": "vit", "hidden_size": 16, "image_size": "big"},
    "an activation in a list": {"model_type": "vit", "hidden_act": ["gelu"]},
    "labels in a list": {"model_type": "vit", "id2label": ["ant", "bee"]},
    "a tower that is none": {"model_type": "clip", "vision_config": 3},
    "arguments in a list": {"architecture": "vit_base_patch16_224", "model_args": [1]},
    "an image of one number": {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"input_size": [3]}},
    "no heads": {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 0}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_foreign_config_of_the_wrong_kind_is_refused(case: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path, timms())
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[case]))
    before = content_of(tmp_path)
    with pytest.raises(VitralError) as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
    assert tmp_path.name in str(caught.value)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("content", [b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"\0", b"{}{"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_descriptions_that_are_no_json_are_refused(file: str, content: bytes, tmp_path: Path) -> None:
    write_safetensors(tmp_path, timms())
    (tmp_path / file).write_bytes(content)
    assert "is not JSON" in refused(tmp_path, named=file)


# --- Fuzz ----------------------------------------------------------------------------------------


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut, or with a few bytes changed, half of them where headers and tables of contents are."""
    if draw.random() < 0.15:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    edge = min(1500, len(content))
    for _ in range(draw.choice((1, 1, 2, 8))):
        where = draw.choice((draw.randrange(edge), -1 - draw.randrange(edge), draw.randrange(len(content))))
        changed[where] = draw.choice((changed[where] ^ 1 << draw.randrange(8), 0, 255, draw.randrange(256)))
    return bytes(changed)


def complaint(load: Callable[[Path], Any], path: Path) -> str | None:
    """The message of the VitralError, the only thing that may be raised."""
    try:
        load(path)
    except VitralError as error:
        return str(error)
    return None


@pytest.mark.parametrize("container", ["safetensors", "pth", "legacy", "namespace", "npz", "compressed npz"])
def test_random_damage_is_refused_or_harmless(container: str, tmp_path: Path) -> None:
    draw = random.Random(container)
    path = CONTAINERS[container](tmp_path)
    content, refusals = path.read_bytes(), []
    for _ in range(150):
        path.write_bytes(damaged(content, draw))
        refusals.append(complaint(lambda file: load_checkpoint(file, **HEADS), path))
    found = [message for message in refusals if message is not None]
    assert len(found) > 30
    assert all(message.isprintable() and path.name in message for message in found)


def test_random_damage_to_an_index_is_refused_or_harmless(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = write_shards(tmp_path, timms()) / "model.safetensors.index.json"
    content, refusals = path.read_bytes(), []
    for _ in range(150):
        path.write_bytes(damaged(content, draw))
        refusals.append(complaint(open_weights, path))
    assert all(message.isprintable() for message in refusals if message is not None)


# --- Memory --------------------------------------------------------------------------------------

WIDTH, DEPTH = 1024, 6  # about 300 MB in float32, of which one layer is a sixth

MEASURE = """
import json, resource, sys
from pathlib import Path
import torchvision.models  # asked for the names of ImageNet's classes, and 90 MB of code
import vitral.checkpoints.folder

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

before, anonymous = status("VmRSS"), status("RssAnon")
model = vitral.checkpoints.folder.load_checkpoint(sys.argv[1]).model
print(json.dumps({
    "anonymous": status("RssAnon") - anonymous,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    "types": sorted({str(parameter.dtype) for parameter in model.parameters()}),
}))
"""


def wide() -> VisionTransformer:
    return VisionTransformer(embed_dim=WIDTH, num_layers=DEPTH, num_heads=16)


def wide_ours(folder: Path) -> Path:
    save_checkpoint(folder, Checkpoint(wide(), Preprocess((224, 224)), ()))
    return folder


def wide_halves(folder: Path) -> Path:
    model = VisionTransformer(embed_dim=WIDTH, num_layers=2 * DEPTH, num_heads=16).bfloat16()
    save_checkpoint(folder, Checkpoint(model, Preprocess((224, 224)), ()))
    return folder


def wide_transformers(folder: Path) -> Path:
    """Three tensors are one of ours: q, k, v."""
    peer = pytest.importorskip("transformers")
    config = peer.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=16, intermediate_size=4 * WIDTH
    )
    peer.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def wide_bin(folder: Path, *, new: bool = True) -> Path:
    wide_transformers(folder)
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    (folder / "model.safetensors").unlink()
    return folder


def wide_gated(folder: Path) -> Path:
    """The worst case: q, k, v, and gate and up are joined, 11 of 16 numbers."""
    peer = pytest.importorskip("transformers")
    config = peer.DINOv3ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH - 1, num_attention_heads=16, intermediate_size=4 * WIDTH,
        use_gated_mlp=True, num_register_tokens=4,
    )  # fmt: skip
    peer.DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def wide_timm(folder: Path) -> Path:
    arguments = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 16}
    model = pytest.importorskip("timm").create_model("vit_base_patch16_224", **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_base_patch16_224", "num_classes": 1000, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wide_pth(folder: Path) -> Path:
    wide_timm(folder)
    return write_pth(folder, {"model": load_file(folder / "model.safetensors")})


def wide_arrays() -> dict[str, np.ndarray]:
    model = wide()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {name: x.numpy() for name, x in key_table.write(google.rows(model.config), state, DEPTH).items()}


def wide_scan(folder: Path) -> Path:
    """big_vision's scan over layers: one array for all of them."""
    arrays = wide_arrays()
    first = [name for name in arrays if "encoderblock_0/" in name]
    stacked = {
        name.replace("_0/", "/", 1): np.stack(
            [arrays.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(DEPTH)]
        )
        for name in first
    }
    return write_npz(folder, arrays | stacked)


WIDE: dict[str, Callable[[Path], Path]] = {
    "ours": wide_ours,
    "ours in bfloat16": wide_halves,
    "transformers": wide_transformers,
    "transformers .bin": wide_bin,
    "transformers .bin, legacy": lambda folder: wide_bin(folder, new=False),
    "transformers DINOv3, gated": wide_gated,
    "timm": wide_timm,
    ".pth": wide_pth,
    "Google .npz": lambda folder: write_npz(folder, wide_arrays()),
    "Google .npz, compressed": lambda folder: write_compressed(folder, wide_arrays()),
    "big_vision .npz": wide_scan,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with /proc")
@pytest.mark.parametrize("kind", WIDE)
def test_loading_takes_little_more_memory_than_the_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = WIDE[kind](tmp_path)
    size = weights_of(path).stat().st_size
    # ru_maxrss begins at the parent's, which a shell in between keeps small.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, path]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    peak, anonymous = found["peak"] / size, found["anonymous"] / size
    with capsys.disabled():
        said = f"{size / 1e6:.0f} MB; peak {peak:.2f} of it, {anonymous:.2f} stays anonymous"
        print(f"\n{kind}: {said}")  # noqa: T201
    assert found["types"] == ["torch.bfloat16" if "bfloat16" in kind else "torch.float32"]
    assert peak < 1.3
