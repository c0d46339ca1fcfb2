"""Which kernels are chosen, where, and by whom."""

from typing import Any

import pytest
import torch

from vitral.model.kernels import PORTABLE, HasKernels, Kernels, fastest
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        (CPU, torch.float32, PORTABLE),
        (CPU, torch.bfloat16, Kernels("product", "explicit", "index")),
        (CUDA, torch.float32, Kernels("convolution", "fused", "products")),
        (CUDA, torch.bfloat16, Kernels("product", "fused", "products")),
        (MPS, torch.bfloat16, PORTABLE),
    ],
)
def test_the_kernels_that_were_measured_faster(device: Any, precision: Any, expected: Kernels) -> None:
    assert fastest(device, precision) == expected


def test_the_stream_is_kept_in_the_precision_while_training_alone() -> None:
    assert fastest(CPU, torch.bfloat16, training=True).stream == torch.bfloat16
    assert fastest(CPU, torch.bfloat16).stream is None


def chosen(model: VisionTransformer) -> set[Kernels]:
    return {module.kernels for module in model.modules() if isinstance(module, HasKernels)}


def test_placing_a_model_chooses_for_all_its_parts() -> None:
    layer = {"attention": {"relative_bias": "layer"}}
    model = VisionTransformer(8, 4, 3, 12, 2, 3, pooling="map", embedding={"class_token": True}, layer=layer)
    assert chosen(model) == {PORTABLE}
    placed = Placement(CPU, torch.bfloat16).place(model)
    assert chosen(placed) == {fastest(CPU, torch.bfloat16)}
    placed = Placement(CPU, torch.bfloat16).place(model, training=True)
    assert chosen(placed) == {fastest(CPU, torch.bfloat16, training=True)}


def test_a_model_placed_for_use_can_be_trained_without_autocast() -> None:
    model = Placement(CPU, torch.bfloat16).place(VisionTransformer(8, 4, 3, 12, 2, 3, 2, 5)).train()
    assert model(torch.rand(2, 3, 8, 8)).dtype == torch.float32


def test_any_other_module_can_be_placed() -> None:
    assert Placement(CPU, torch.float32).place(torch.nn.Linear(2, 3).double()).weight.dtype == torch.float32
