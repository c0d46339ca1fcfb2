"""`scripts/gpu` runs what fits, goes on after a failure and keeps each stage's results; here on a CPU."""

import importlib.util
import json
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu"


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The script as a module; its table of stages stands beside it."""
    before = sys.path.copy(), sys.dont_write_bytecode
    sys.path.insert(0, str(SCRIPT.parent))
    sys.dont_write_bytecode = True
    loader = SourceFileLoader("gpu_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.path[:], sys.dont_write_bytecode = before
    return module


def plan(gpu: Any, folder: Path, *, dry: bool = False) -> Any:
    return gpu.Plan(folder, 9.0, folder / "cifar10", dry)


def job(gpu: Any, name: str, code: str, seconds: float = 1.0, **options: Any) -> Any:
    return gpu.Job(name, ["-c", code], seconds, **options)


def run(gpu: Any, folder: Path, jobs: list[Any], seconds: float = 60.0) -> tuple[bool, list[dict[str, Any]]]:
    """Whether a stage of these jobs passed, and its records."""
    passed = gpu.run_stage("a", jobs, time.monotonic() + seconds, {"gpu": "none"}, plan(gpu, folder), folder)
    written = json.loads((folder / "a.json").read_text())
    assert (written["gpu"], written["stage"]) == ("none", "a")
    return passed, written["jobs"]


def test_a_failure_is_recorded_and_does_not_stop_the_others(
    gpu: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    jobs = [
        job(gpu, "fails", "import sys; print('why'); sys.exit(3)"),
        job(gpu, "writes", f"open({str(result)!r}, 'w').write('{{\"speed\": 12.3456}}')", result=result),
        job(gpu, "forgets", "print('done')", result=tmp_path / "absent.json"),
    ]
    passed, records = run(gpu, tmp_path, jobs)
    assert not passed
    assert [record["status"].split(":")[0] for record in records] == [
        "failed with status 3", "passed", "no result",
    ]  # fmt: skip
    assert records[0]["output"] == "why\n"
    assert records[1]["result"] == {"speed": 12.3456}
    out = capfd.readouterr().out
    assert "why" in out
    assert "speed 12.35" in out


def test_a_job_is_stopped_at_its_limit_with_its_children(gpu: Any, tmp_path: Path) -> None:
    child = "import time; time.sleep(2); open('touched', 'w')"
    code = f"import os, subprocess, sys, time; os.chdir({str(tmp_path)!r}); print('begun', flush=True)\n"
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    record = gpu.run_job(job(gpu, "hangs", code), 0.7, tmp_path, gpu.child_environment(plan(gpu, tmp_path)))
    assert record["status"] == "stopped after 1 s"
    assert record["output"] == "begun\n"
    time.sleep(1.6)
    assert not (tmp_path / "touched").exists()


def test_the_rest_of_a_stage_is_left_out_where_a_job_does_not_fit(gpu: Any, tmp_path: Path) -> None:
    jobs = [job(gpu, "fits", ""), job(gpu, "large", "", seconds=100.0), job(gpu, "needs it", "")]
    passed, records = run(gpu, tmp_path, jobs, seconds=30.0)
    assert passed
    assert [record["status"] for record in records] == ["passed", "left out", "left out"]


def test_a_stage_without_its_data_is_skipped_with_the_reason(gpu: Any, tmp_path: Path) -> None:
    assert gpu.absent("cifar60", plan(gpu, tmp_path)).endswith("name CIFAR-10's folder with --cifar")
    assert gpu.absent("step", plan(gpu, tmp_path)) is None


@pytest.mark.parametrize(
    ("stage", "reason"), [("serve", "is not there yet; there are tests, step"), ("tset", "is not known")]
)
def test_an_unknown_stage_is_refused(stage: str, reason: str) -> None:
    ended = subprocess.run([sys.executable, SCRIPT, stage], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert reason in ended.stderr


def test_stages_stand_in_the_order_of_their_value(gpu: Any, tmp_path: Path) -> None:
    assert list(gpu.STAGES) == ["tests", "step", "cifar60", "infer", "explain", "cifar600", "large"]
    for dry in (False, True):
        for jobs in gpu.STAGES.values():
            assert all(job.seconds > 0 for job in jobs(plan(gpu, tmp_path, dry=dry)))


def test_figures_of_a_benchmark_compare_the_fastest_of_each(gpu: Any) -> None:
    def row(contender: str, configuration: str, speed: float, share: float) -> dict[str, Any]:
        named = {"contender": contender, "configuration": configuration}
        return {**named, "images_per_second": speed, "peak_share": share}

    rows = [
        row("vitral", "eager", 20.0, 0.2),
        row("vitral", "compiled", 60.0, 0.6),
        row("timm", "default", 40.0, 0.4),
    ]
    found = sys.modules[gpu.Job.__module__].bench_figures(  # pyrefly: ignore[missing-attribute]
        {"rows": [*rows, {"contender": "torchvision", "reason": "absent"}]}
    )
    assert found["ratio"] == 1.5
    assert found["share of the GEMM"] == 0.6


@pytest.mark.slow
def test_every_command_runs_tiny_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--dry-run", "--minutes", "9", "--out", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert ended.returncode == 0, ended.stdout
    assert len(list(tmp_path.glob("*.json"))) == 6
