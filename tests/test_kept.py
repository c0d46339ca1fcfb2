"""Tables of a grid are computed once, and again when what they are made of changes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitral.model.config import Grid, RotaryOptions
from vitral.model.positions import rotary, tables
from vitral.model.positions.kept import KeepsLearned, computed_once
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.rotary import RotaryPositions
from vitral.model.positions.tables import LearnedPositions
from vitral.model.vit import VisionTransformer

CPU, GRID, OTHER = torch.device("cpu"), (3, 5), (4, 2)


def bias() -> RelativeBias:
    made = RelativeBias(GRID, 3, "bilinear")
    nn.init.normal_(made.table)
    return made


def found(module: RelativeBias, grid: Grid) -> Tensor:
    bias_ATT = module(grid, CPU).bias_ATT
    assert bias_ATT is not None
    return bias_ATT


def test_a_table_is_built_once_for_its_arguments() -> None:
    built: list[Any] = []

    @computed_once
    def table(grid: Grid, device: torch.device) -> Tensor:
        built.append(grid)
        return torch.zeros(grid, device=device)

    assert table(GRID, CPU) is table(GRID, CPU)
    table(OTHER, CPU)
    assert built == [GRID, OTHER]
    for side in range(1, 20):
        table((side, 1), CPU)
    table(GRID, CPU)
    assert built.count(GRID) == 2  # the last sixteen are kept


@pytest.mark.parametrize("grid", [GRID, OTHER])
def test_a_learned_table_is_made_again_when_its_weights_change(grid: Grid) -> None:
    module = bias()
    with torch.no_grad():
        before = found(module, grid)
        assert found(module, grid) is before
        module.table.mul_(2)
        torch.testing.assert_close(found(module, grid), 2 * before)
        module.load_state_dict(bias().state_dict())
        assert not torch.equal(found(module, grid), 2 * before)
        module.table = nn.Parameter(torch.zeros_like(module.table))
        assert not found(module, grid).any()


def test_weights_written_behind_autograds_back_count_from_the_next_evaluation() -> None:
    module = bias().eval()
    with torch.no_grad():
        before = found(module, OTHER)
        module.table.data.mul_(2)
        module.eval()
        torch.testing.assert_close(found(module, OTHER), 2 * before)


def test_a_copy_is_of_its_own() -> None:
    module = bias()
    with torch.no_grad():
        before = found(module, GRID)
        twin = copy.deepcopy(module)
        twin.table.zero_()
        assert not found(twin, GRID).any()
        assert torch.equal(found(module, GRID), before)


OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal_2d": {"position": "sinusoidal_2d"},
    "rotary": {"layer": {"attention": {"rotary": {}}}},
    "mixed": {"layer": {"attention": {"rotary": {"kind": "mixed"}}}},
    "relative": {"layer": {"attention": {"relative_bias": "layer"}}},
    "shared": {"layer": {"attention": {"relative_bias": "shared"}}},
}


def model(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer((12, 20), 4, 3, 24, 2, 3, 2, 5, 0.0, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


@pytest.mark.parametrize("shape", [(12, 20), (16, 8)], ids=["native", "other"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_inference_kept_serves_training(options: dict[str, Any], shape: tuple[int, int]) -> None:
    """In inference mode first, then with gradients, which are those of a model that kept nothing."""
    used, fresh = model(**options), model(**options)
    images = torch.randn(2, 3, *shape)
    with torch.inference_mode():
        once, twice = used.eval()(images), used(images)
    assert torch.equal(once, twice)
    for each in (used, fresh):
        each.train()(images).square().sum().backward()
    for ours, theirs in zip(used.parameters(), fresh.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_model_keeps_no_tables_of_its_graph(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    eager, twin, images = model(**options).eval(), model(**options).eval(), torch.randn(2, 3, 16, 8)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(images), eager(images), rtol=1e-5, atol=1e-5)
    assert all(m._kept is None for m in twin.modules() if isinstance(m, KeepsLearned))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    calls: list[str] = []

    def counting(make: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        return lambda *arguments: calls.append(name) or make(*arguments)

    monkeypatch.setattr(RelativeBias, "resized", counting(RelativeBias.resized, "relative"))
    monkeypatch.setattr(LearnedPositions, "resized", counting(LearnedPositions.resized, "learned"))
    monkeypatch.setattr(rotary, "_cosines_and_sines", counting(rotary._cosines_and_sines, "rotary"))
    monkeypatch.setattr(tables, "sinusoidal_table", counting(tables.sinusoidal_table, "sinusoidal"))
    yield calls


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_second_pass_over_a_grid_computes_no_table(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, images = model(**options).eval(), torch.randn(2, 3, 16, 24)  # a grid of no other test
    with counted(monkeypatch) as calls, torch.inference_mode():
        made(images)
        assert calls
        calls.clear()
        made(images)
        assert not calls


def test_learned_frequencies_keep_their_gradient() -> None:
    module = RotaryPositions(8, 3, 1, RotaryOptions(kind="mixed"))
    with torch.no_grad():
        module(GRID, CPU)
    rotation = module(GRID, CPU).rotation
    assert rotation is not None
    assert rotation.cos.requires_grad
