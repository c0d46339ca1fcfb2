"""A file or a folder is written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest

from vitral.runtime.files import new_folder, remove_leftovers, write_atomically


def test_writing_replaces_the_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"old and long", b"new"):
        write_atomically(file, content)
        assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_until_the_last_moment_a_reader_sees_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    seen = []
    replace = os.replace

    def watched(*names: Any) -> None:
        seen.append(file.read_bytes())
        replace(*names)

    monkeypatch.setattr(os, "replace", watched)
    write_atomically(file, b"new")
    assert seen == [b"old"]


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".file.a1b2c3d4", ".other.a1b2c3d4", ".file.txt", "file"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path, {"file"})
    assert {path.name for path in tmp_path.iterdir()} == {".other.a1b2c3d4", ".file.txt", "file"}


def test_a_new_folder_appears_at_the_end_or_never(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as staging:
        (staging / "file").write_bytes(b"new")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_bytes() == b"new"


def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as staging:
            (staging / "file").write_bytes(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
