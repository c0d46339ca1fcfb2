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
    "artifacts": {"images", "runtime"},
    "data": {"images", "runtime"},
    "checkpoints": {"artifacts", "images", "model", "runtime"},
    "inference": {"artifacts", "checkpoints", "data", "images", "model", "runtime"},
    "evaluation": {"checkpoints", "data", "images", "inference", "model", "runtime"},
    "recipes": {"checkpoints", "data", "evaluation", "images", "model", "runtime"},
    "training": {"checkpoints", "data", "evaluation", "images", "inference", "model", "recipes", "runtime"},
    "explain": {"checkpoints", "data", "evaluation", "images", "inference", "model", "runtime"},
    "bench": {"artifacts", "checkpoints", "data", "images", "inference", "model", "runtime"},
    "reports": {
        "checkpoints", "data", "evaluation", "explain", "images", "inference", "model", "recipes", "runtime",
        "training",
    },
    "checks": {
        "checkpoints", "data", "evaluation", "images", "inference", "model", "reports", "runtime",
    },
    "ship": {
        "artifacts", "bench", "checkpoints", "data", "evaluation", "explain", "images", "inference", "model",
        "runtime",
    },
    "cli": {
        "artifacts", "bench", "checkpoints", "checks", "data", "evaluation", "explain", "images", "inference",
        "model", "recipes", "reports", "runtime", "ship", "training",
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
            others = {module.split(".")[0] for module in imported(tree)} - {room}
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


# --- Decisions taken once (docs/architecture.md) ---------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
# Calls that belong to an owner: the rooms, folders or modules where each may stand, and nowhere else.
OWNERS: dict[str, tuple[str, ...]] = {
    "Image.open": ("images.files",),
    "os.replace": ("runtime.files",),
    "os.rename": (),
    "shutil.move": (),
    "tempfile.mkstemp": ("runtime.files",),
    "tempfile.mkdtemp": ("runtime.files",),
    "write_text": (),
    "write_bytes": (),
    # Others' files are opened by `formats`, a peer's by its own loader; a run's state, cached features and
    # scores by those who wrote them.
    "torch.load": ("checkpoints.formats", "checkpoints.peers", "training"),
    "safe_open": ("checkpoints.formats", "inference.features", "explain.faithfulness"),
    "print": ("cli",),
    "sys.stderr.write": ("__main__",),
    "warnings.warn": ("inference.classifier",),
    "signal.signal": ("runtime.stopping", "data.workers"),  # the latter within a worker process
    "os.cpu_count": ("runtime.threads",),
    "os.sched_getaffinity": ("runtime.threads",),
    "torch.get_num_threads": ("runtime.threads",),
    "torch.set_num_threads": ("runtime.threads",),
    "compute_in_one_thread": ("data.workers",),  # within a worker process
    # The latter three turn it off.
    "torch.autocast": ("runtime.devices", "model.merging", "model.positions", "explain.observe"),
    "DataLoader": ("data.workers", "bench.data"),
    "multiprocessing.get_context": ("bench.processes", "data.workers"),
    "keep_freed_memory": ("cli.commands", "bench.processes"),  # the latter in a contender's process
    "set_how_threads_wait": ("cli.app",),
    "command_streams": ("cli.app",),
    "end_on_signals": ("__main__",),
    "os._exit": ("runtime.stopping",),
    "sys.exit": ("__main__", "cli.app"),
    "torch.use_deterministic_algorithms": ("training",),
}


def test_each_decision_is_taken_by_its_owner_alone() -> None:
    elsewhere = []
    for name, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            for call, owners in OWNERS.items():
                if called != call and not called.endswith(f".{call}"):
                    continue
                if call == "print" and called != "print":  # a console of rich, made within cli
                    continue
                if not any(name == owner or name.startswith(f"{owner}.") for owner in owners):
                    elsewhere.append(f"{name}, line {node.lineno}: {called}")
    assert not elsewhere


def test_no_file_is_renamed_but_by_the_owner_of_files() -> None:
    """`Path.replace` takes one argument, `str.replace` two, and dataclasses' replace goes by keywords."""
    renamed = [
        f"{name}, line {node.lineno}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("replace", "rename")
        and len(node.args) == 1
        and not node.keywords
        and name != "runtime.files"
    ]
    assert not renamed


def named_places() -> Iterator[tuple[str, str]]:
    """The files and folders that the map names, each with a name in it or ""."""
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        path, _, name = span.partition(": ")
        if "/" in path and path.split("/")[0] in ROOMS:
            yield path, name


def test_the_map_names_what_is_there() -> None:
    places = list(named_places())
    assert len(places) > 40
    for path, name in places:
        assert (SOURCE / path).exists(), path
        if name:
            defined = rf"^(class|def) {name}\b|^{name}\b.*="
            assert re.search(defined, (SOURCE / path).read_text(), re.MULTILINE), f"{path}: {name}"


def test_the_map_lists_every_room() -> None:
    for room, others in ROOMS.items():
        row = re.search(rf"^\| `{room}/` \|.*\| (.*) \|$", PAGE.read_text(), re.MULTILINE)
        assert row, room
        exact = {word.strip() for word in row[1].split(",")}
        if exact <= ROOMS.keys():  # other rows are in words
            assert exact == others
