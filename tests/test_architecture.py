"""The house keeps its shape: which module may import which, what is public, how large a function may grow."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitral

SOURCE = Path(vitral.__file__).parent

# Lower floors first. A module imports only from floors below its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "libtiff", "limits", "peers", "plainjson", "process", "spelling", "stopping"),
    ("devices", "image_files", "streams"),
    ("sources", "workers"),
    ("positions", "preprocess", "data", "config", "ranges", "pictures", "lock"),
    ("blocks", "contents"),
    ("model", "augment"),
    ("variants", "checkpoints", "info"),
    ("mistakes",),
    ("classifier", "imagenet", "recipe", "multilabel", "held"),
    ("evaluate", "optim", "adapt", "objective", "loss_watch", "memory", "recipes", "bench"),
    ("calibrate", "features", "run_folder"),
    ("doctor", "probe"),
    ("train",),
    ("choose",),
    ("console", "demo", "options", "usage"),
    ("cli",),
    ("__main__",),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        yield name, ast.parse(path.read_text())


def room(module: str) -> str:
    """``checkpoints.positions`` is part of the room ``checkpoints``."""
    return module.split(".")[0]


def imported_rooms(tree: ast.Module) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitral":
            inner = node.module.split(".")[1:]
            rooms |= {inner[0]} if inner else {alias.name for alias in node.names}
    return rooms - {"__version__"}


def test_every_module_has_a_floor() -> None:
    assert {room(name) for name, _ in modules()} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_imports_point_downwards(module: str) -> None:
    for name, tree in modules():
        if room(name) == module:
            upward = {r for r in imported_rooms(tree) - {module} if FLOOR[r] >= FLOOR[module]}
            assert not upward, f"{name} imports {upward}"


def test_only_the_module_peers_knows_other_libraries() -> None:
    for name, tree in modules():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # peers.py itself imports them by name, inside the function that needs one.
            assert not {n.split(".")[0] for n in names} & {"timm", "transformers", "vit_pytorch"}, name


def test_all_is_sorted_and_importable() -> None:
    assert vitral.__all__ == sorted(vitral.__all__)
    for name in vitral.__all__:
        assert getattr(vitral, name).__name__ == name


def test_version_is_the_newest_in_the_changelog() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert f"## {vitral.__version__}" in changelog


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def test_functions_fit_on_a_screen() -> None:
    long = {
        name: node.end_lineno - node.lineno + 1
        for name, node in functions()
        if node.end_lineno and node.end_lineno - node.lineno >= 60
    }
    assert not long


def test_modules_import_with_the_base_dependencies_alone() -> None:
    for name, _ in modules():
        if name != "__main__":
            importlib.import_module(f"vitral.{name}".removesuffix(".__init__"))


def test_prediction_does_without_libraries_that_are_slow_to_import() -> None:
    """Each of them takes a second or more, before the first answer."""
    code = "import sys, vitral; vitral.load; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    slow = {"huggingface_hub", "pandas", "pyarrow", "scipy", "sklearn", "timm", "torchvision", "transformers"}
    assert not slow & set(loaded.split())
