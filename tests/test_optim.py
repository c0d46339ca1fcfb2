"""Optimizers do what their papers say, and schedules what their names say."""

import ast
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import vitral
from vitral.model.vit import VisionTransformer
from vitral.recipes.optimizers import OPTIMIZERS
from vitral.recipes.packaged import read
from vitral.recipes.schema import OptimizerName, ScheduleName
from vitral.runtime.devices import Placement
from vitral.training.muon import Muon, orthogonalize
from vitral.training.optimizers import ChainedOptimizer, build_optimizer, parameter_groups
from vitral.training.schedule import _COURSES, Schedule, scaled_rate
from vitral.training.step import Computation, Step


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    return VisionTransformer(
        16, 8, embed_dim=16, num_layers=2, num_heads=2, num_classes=2, dropout=0.0, **options
    )


def built_for(model: Any, name: OptimizerName, **settings: Any) -> ChainedOptimizer:
    groups = parameter_groups(
        model,
        layer_decay=1.0,
        weight_decay=settings.pop("weight_decay", 0.1),
        orthogonal=OPTIMIZERS[name].takes_matrices,
    )
    return build_optimizer(name, groups, **settings)


def test_every_name_of_the_schema_has_its_rows() -> None:
    assert set(get_args(OptimizerName)) == OPTIMIZERS.keys()
    assert set(get_args(ScheduleName)) == _COURSES.keys()


def test_a_row_has_the_rates_that_the_packaged_recipes_do_not_give() -> None:
    # Muon's updates are as large as AdamW's, whose rate `finetune` has.
    for name, row in OPTIMIZERS.items():
        assert ("learning_rate" in row.from_scratch) == (name != read("small")["optimizer"]), name
        assert ("learning_rate" in row.tuning) == (name not in {read("finetune")["optimizer"], "muon"}), name


def test_nothing_but_its_row_asks_for_an_optimizers_name() -> None:
    """A new optimizer is one row: no module compares the name with another."""
    source = Path(vitral.__file__).parent
    compared = [
        f"{path.relative_to(source)}, line {node.lineno}"
        for path in sorted(source.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare | ast.MatchValue)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in OPTIMIZERS
    ]
    assert not compared


def test_an_optimizer_that_keeps_its_average_says_so() -> None:
    # What takes its average is a method of its own, `eval`, which torch's optimizers have not.
    for name, row in OPTIMIZERS.items():
        if package := {"lion": "lion_pytorch", "schedule_free": "schedulefree"}.get(name):
            pytest.importorskip(package)
        built = built_for(tiny(), name)
        assert built.keeps_average == row.keeps_average == any(hasattr(part, "eval") for part in built.parts)


def with_gradients(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# --- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_orthogonalizing_keeps_singular_vectors_and_evens_the_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    in_their_basis = u.mT @ orthogonalize(matrices.float()).double() @ vh.mT
    values = in_their_basis.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(in_their_basis, torch.diag_embed(values), rtol=0, atol=1e-4)


def test_muon_is_torchs_but_for_its_bfloat16() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (8, 8), (24, 8), (8, 24), (4, 16))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    group = {"params": ours, "scale": 1.0, "weight_decay": 0.1, "lr": 0.02}
    muon = Muon([group], momentum=0.9)
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn_like(our)
            their.grad = our.grad.clone()
        muon.step()
        torchs.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-3)


def test_muon_keeps_each_groups_own_rate_and_decay() -> None:
    # Matrices of one shape, or its transpose, are iterated together though layers learn at different rates.
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(shape)) for shape in ((8, 12), (12, 8))]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    settings = [
        {"scale": 1.0, "weight_decay": 0.0, "lr": 0.1},
        {"scale": 0.5, "weight_decay": 0.3, "lr": 0.05},
    ]
    muons = [Muon([{"params": [p], **s}]) for p, s in zip(alone, settings, strict=True)]
    muon = Muon([{"params": [p], **s} for p, s in zip(together, settings, strict=True)])
    for _ in range(2):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in (muon, *muons):
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_muon_updates_are_as_large_as_adams() -> None:
    # Moonlight's eq. 4: a root mean square of 0.2 times the rate, whatever the shape.
    for shape in ((64, 64), (192, 64), (32, 256)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [weight], "scale": 1.0, "weight_decay": 0.0, "lr": 1.0}]).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_filters_are_matrices_to_muon() -> None:
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(filters.detach().flatten(1))
    filters.grad = torch.randn_like(filters)
    matrix.grad = filters.grad.flatten(1)
    for weight in (filters, matrix):
        Muon([{"params": [weight], "scale": 1.0, "weight_decay": 0.0, "lr": 0.1}]).step()
    torch.testing.assert_close(filters.flatten(1), matrix)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = tiny(stem=(4, 8))
    orthogonal = {
        name
        for group in parameter_groups(model, layer_decay=1.0, weight_decay=0.1, orthogonal=True)
        if group["orthogonal"]
        for name in group["names"]
    }
    matrices = ("attention.qkv", "attention.out", "feed_forward.expand", "feed_forward.contract")
    assert orthogonal == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in matrices} | {
        "embedding.stem.stages.1.0.weight"
    }
    plain = parameter_groups(model, layer_decay=1.0, weight_decay=0.1)
    assert not any(group["orthogonal"] for group in plain)


# --- The others ------------------------------------------------------------------------------------


def stepped(optimizer: Any, times: int, **settings: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The head's weight before and after, and its gradients."""
    model = tiny()
    built = built_for(model, optimizer, **settings)
    before, gradients = model.head.weight.detach().clone(), []
    for number in range(times):
        with_gradients(model, number)
        gradients.append(model.head.weight.grad.clone())
        built.set_learning_rate(0.01)
        built.step()
        built.zero_grad()
    return before, model.head.weight.detach(), gradients


def test_lion_moves_by_the_sign_of_its_interpolated_momentum() -> None:
    # Algorithm 2 of arXiv:2302.06675.
    pytest.importorskip("lion_pytorch")
    weight, found, gradients = stepped("lion", 3, betas=(0.9, 0.99))
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        weight = weight - 0.01 * ((0.9 * momentum + 0.1 * gradient).sign() + 0.1 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)


def test_sgd_has_the_first_beta_for_momentum() -> None:
    weight, found, gradients = stepped("sgd", 3, betas=(0.8, 0.999), weight_decay=0.0)
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        velocity = 0.8 * velocity + gradient
        weight = weight - 0.01 * velocity
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)


def test_schedule_free_steps_are_those_of_its_paper() -> None:
    # AdamW variant of arXiv:2405.15682, eq. 3 to 5: z by Adam's direction at y, x the average, y between.
    pytest.importorskip("schedulefree")
    model = tiny()
    built = built_for(model, "schedule_free", weight_decay=0.0)
    z = x = y = model.head.weight.detach().clone()
    second = torch.zeros_like(y)
    for t in range(1, 4):
        with_gradients(model, t)
        gradient = model.head.weight.grad.clone()
        built.set_learning_rate(0.01)
        built.step()
        second = 0.999 * second + 0.001 * gradient**2
        z = z - 0.01 * gradient / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        x = x + (z - x) / t
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(model.head.weight.detach(), y, rtol=0, atol=1e-5)
    built.average(on=True)
    torch.testing.assert_close(model.head.weight.detach(), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "lion", "schedule_free"])
def test_an_optimizer_goes_on_where_its_state_was_saved(optimizer: Any) -> None:
    if package := {"lion": "lion_pytorch", "schedule_free": "schedulefree"}.get(optimizer):
        pytest.importorskip(package)

    def run(model: nn.Module, built: ChainedOptimizer, steps: range) -> None:
        for number in steps:
            with_gradients(model, number)
            built.set_learning_rate(0.01)
            built.step()

    whole = tiny()
    run(whole, built_for(whole, optimizer), range(5))
    model = tiny()
    first = built_for(model, optimizer)
    run(model, first, range(3))
    second = built_for(model, optimizer)
    second.load_state_dict(first.state_dict())
    run(model, second, range(3, 5))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "lion"])
def test_an_optimizer_that_forgets_is_a_new_one(optimizer: Any) -> None:
    if optimizer == "lion":
        pytest.importorskip("lion_pytorch")
    used, new = tiny(), tiny()
    forgetful = built_for(used, optimizer)
    with_gradients(used)
    forgetful.set_learning_rate(0.01)
    forgetful.step()
    used.load_state_dict(new.state_dict())
    forgetful.forget()
    for model, built in ((used, forgetful), (new, built_for(new, optimizer))):
        for number in (2, 3):
            with_gradients(model, number)
            built.set_learning_rate(0.01)
            built.step()
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, used.state_dict()[name]), name


def test_a_rate_in_a_tensor_is_that_of_a_number() -> None:
    # As on a GPU, where a step is recorded once and the rate changes in place.
    models = tiny(), tiny()
    for model, capturable in zip(models, (False, True), strict=True):
        groups = parameter_groups(model, layer_decay=0.5, weight_decay=0.1, orthogonal=True)
        muon = Muon([group for group in groups if group["orthogonal"]])
        chained = ChainedOptimizer([muon], torch.device("cpu"), capturable=capturable)
        for number in range(3):
            with_gradients(model, number)
            rate = 0.01 / (1 + number)
            chained.set_learning_rate(torch.tensor(rate) if capturable else rate)
            chained.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    groups = parameter_groups(model, layer_decay=1.0, weight_decay=0.1)
    assert {name for group in groups for name in group["names"]} == {"head.weight", "head.bias"}


# --- The learning rate -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [
        ("linear", 0.1, 0.5),
        ("linear", 0.2, 1.0),
        ("linear", 0.6, 0.5),
        ("linear", 1.0, 0.0),
        ("constant", 0.1, 0.5),
        ("constant", 0.99, 1.0),
        ("wsd", 0.1, 0.5),
        ("wsd", 0.7, 1.0),
        ("wsd", 0.75, 1.0),
        ("wsd", 0.9, 0.4),
        ("wsd", 1.0, 0.0),
    ],
)
def test_schedules(schedule: Any, progress: float, share: float) -> None:
    course = Schedule(schedule, 0.02, warmup=0.2, decay=0.25)
    assert course.at(progress) == pytest.approx(0.02 * share, abs=1e-12)


def test_the_rate_falls_to_its_final_share() -> None:
    course = Schedule("cosine", 0.02, final_share=0.1)
    assert course.at(1.0) == pytest.approx(0.002)
    assert course.at(0.5) == pytest.approx(0.002 + 0.018 / 2)
    assert course.at(0.0) == pytest.approx(0.02)


def test_a_rate_for_another_batch_is_scaled_linearly() -> None:
    # DeiT: 5e-4 for a batch of 512, so 1e-3 for 1,024.
    assert math.isclose(scaled_rate(5e-4, 1024, 512), 1e-3)
    assert math.isclose(scaled_rate(5e-4, 1024, 0), 5e-4)


# --- The step ------------------------------------------------------------------------------------


def test_a_step_is_recorded_for_whole_batches_of_a_shape_that_was_taken_before() -> None:
    model = tiny()
    step = Step(
        model.train(),
        [],
        lambda heads, targets, _: nn.functional.cross_entropy(heads[0], targets),
        lambda logits, targets: (logits.argmax(1) == targets.argmax(1)).sum(),
        built_for(model, "adamw"),
        Computation(batch_size=4),
        Placement.choose("cpu", "float32"),
    )
    whole, damaged, larger = torch.randn(4, 3, 16, 16), torch.randn(3, 3, 16, 16), torch.randn(4, 3, 24, 24)
    for images in [*[damaged] * 5, *[whole] * 3, *[larger] * 2]:
        assert not step._is_warm(images)
        step(images, torch.eye(2)[torch.zeros(len(images), dtype=torch.int64)], 1e-3, 0.0)
    assert step._is_warm(whole)
    assert not step._is_warm(damaged)
    assert not step._is_warm(larger)
