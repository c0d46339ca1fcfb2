"""The house keeps its shape: which module may import which, what is public, how large a function may grow."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitral

SOURCE = Path(vitral.__file__).parent

# What each room may import of the others.
ROOMS: dict[str, set[str]] = {
    "runtime": set(),
    "images": {"runtime"},
    "model": {"runtime"},
    "data": {"images", "runtime"},
    "checkpoints": {"images", "model", "runtime"},
    "inference": {"checkpoints", "data", "images", "model", "runtime"},
    "evaluation": {"checkpoints", "data", "images", "inference", "model", "runtime"},
    "recipes": {"checkpoints", "data", "evaluation", "images", "model", "runtime"},
    "training": {"checkpoints", "data", "evaluation", "images", "inference", "model", "recipes", "runtime"},
    "bench": {"checkpoints", "images", "inference", "model", "runtime"},
    "cli": {
        "bench", "checkpoints", "data", "evaluation", "images", "inference", "model", "recipes", "runtime",
        "training",
    },
}  # fmt: skip


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of ours that a module imports, by a statement or by a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitral":
            inner = node.module.removeprefix("vitral").removeprefix(".")
            yield from (f"{inner}.{alias.name}".removeprefix(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("vitral.") for a in node.names if a.name.startswith("vitral."))
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from re.findall(r"vitral\.([\w.]+)", ast.unparse(node))


def test_every_module_is_in_a_room() -> None:
    rooms = {name.split(".")[0] for name, _ in modules() if "." in name}
    assert rooms == set(ROOMS)
    assert {name for name, _ in modules() if "." not in name} - rooms == {"__init__", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_it_may(room: str) -> None:
    for name, tree in modules():
        if name.split(".")[0] == room:
            others = {module.split(".")[0] for module in imported(tree)} - {room, "__version__"}
            assert others <= ROOMS[room], f"{name} imports {others - ROOMS[room]}"


def test_no_module_imports_itself_through_others() -> None:
    names = {name for name, _ in modules()}
    graph = {}
    for name, tree in modules():
        # What is imported is a module, or a name of the module before its last dot.
        targets = {m if m in names else m.rpartition(".")[0] for m in imported(tree)}
        graph[name] = (targets & names) - {name}
    graphlib.TopologicalSorter(graph).prepare()


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
            importlib.import_module(f"vitral.{name}")


def test_prediction_does_without_libraries_that_are_slow_to_import() -> None:
    """Each of them takes a second or more, before the first answer."""
    code = "import sys, vitral; vitral.load; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    slow = {"huggingface_hub", "pandas", "pyarrow", "scipy", "sklearn", "timm", "torchvision", "transformers"}
    assert not slow & set(loaded.split())
