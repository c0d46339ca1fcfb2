"""How many cores a process may use: a container's quota counts, by both versions of control groups."""

from pathlib import Path

import pytest

from vitral.runtime import threads
from vitral.runtime.threads import cpu_count, cpu_quota, engine_threads


def groups(tmp_path: Path, own: str, **files: str) -> tuple[Path, Path]:
    root = tmp_path / "cgroup"
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(own)
    return root, tmp_path / "own"


def test_the_quota_of_version_2_is_the_least_of_the_groups_above(tmp_path: Path) -> None:
    found = groups(tmp_path, "0::/a/b\n", a__cpu_max="150000 100000\n", a__b__cpu_max="max 100000\n")
    assert cpu_quota(*found) == 1.5


def test_the_quota_of_version_1(tmp_path: Path) -> None:
    own = "3:cpuset:/\n2:cpu,cpuacct:/docker/x\n"
    place = "cpu__docker__x__cpu_cfs_"
    found = groups(tmp_path, own, **{f"{place}quota_us": "200000\n", f"{place}period_us": "100000\n"})
    assert cpu_quota(*found) == 2.0
    unlimited = groups(tmp_path, own, **{f"{place}quota_us": "-1\n", f"{place}period_us": "100000\n"})
    assert cpu_quota(*unlimited) is None


def test_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "none") is None
    assert cpu_quota(*groups(tmp_path, "0::/\nodd\n", cpu_max="odd\n")) is None


def test_threads_are_bounded_by_the_quota_and_the_users_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    cores = cpu_count()
    assert engine_threads() == cores
    monkeypatch.setattr(threads, "cpu_quota", lambda: 0.5)
    assert cpu_count() == engine_threads() == 1
    monkeypatch.setattr(threads, "cpu_quota", lambda: cores + 3.0)
    assert engine_threads() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert engine_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "no")
    assert engine_threads() == cores
