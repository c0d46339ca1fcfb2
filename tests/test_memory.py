"""What a step needs is counted right, and running out of memory ends in advice."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitral.model.variants import create
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.training.memory import MemoryNeed, advice_when_out_of_memory, memory_need, saved_bytes

CPU = Placement.choose("cpu", "float32")


class Counted(nn.Module):
    """Two maps and a ReLU, of which it is easy to say what autograd keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 100), nn.Linear(100, 10)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.second(self.first(images_BCHW.flatten(1)).relu())


def test_bytes_kept_of_an_image_by_hand() -> None:
    # The input of the first map (48 floats), and the ReLU's output (100), which is the second's input too.
    assert saved_bytes(Counted(), (3, 4, 4), CPU) == 4 * (48 + 100)


def test_checkpointed_layers_keep_far_less() -> None:
    model = VisionTransformer(32, 4, embed_dim=32, num_layers=6, num_heads=2, num_classes=2).train()
    everything = saved_bytes(model, (3, 32, 32), CPU)
    model.checkpoint_layers = True
    assert saved_bytes(model, (3, 32, 32), CPU) < everything / 4


def test_counting_draws_nothing_and_leaves_no_gradient() -> None:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2, dropout=0.5)
    before = torch.get_rng_state()
    memory_need(model.train(), (3, 16, 16), 4, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_line_says_what_is_needed_and_what_fits() -> None:
    need = MemoryNeed(fixed=2**30, per_image=2**24, images=64, available=3 * 2**30)
    assert need.total == 2 * 2**30
    assert need.fits
    assert need.most_images == 128
    assert str(need) == "memory: about 2.00 of 3.00 GiB free; 64 images at a time, room for 128"
    assert not MemoryNeed(fixed=2**30, per_image=2**24, images=129, available=3 * 2**30).fits


def test_advice_is_of_use() -> None:
    need = MemoryNeed(fixed=2**30, per_image=2**24, images=64, available=2**30 + 2**24)
    assert "room for 1. That may be too much: set accumulate=2 or more" in str(need)
    need = MemoryNeed(fixed=2**31, per_image=2**24, images=64, available=2**30)
    assert "accumulate" not in str(need)
    assert "take a smaller model" in str(need)


def test_room_without_end_is_not_told() -> None:
    need = MemoryNeed(fixed=2**20, per_image=1000, images=64, available=10 * 2**30)
    assert need.most_images > 10**7
    assert str(need) == "memory: about 0.00 of 10.00 GiB free; 64 images at a time"


def test_a_frozen_model_needs_no_gradients_or_moments() -> None:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert memory_need(model, (3, 16, 16), 1, CPU).fixed == 5 * weights
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    head = sum(p.numel() * 4 for p in model.head.parameters())
    assert memory_need(model, (3, 16, 16), 1, CPU).fixed == 2 * weights + 3 * head


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_running_out_of_memory_ends_in_advice(error: Exception) -> None:
    with (
        pytest.raises(VitralError, match=r"with 32 images at a time.*accumulate=2"),
        advice_when_out_of_memory(32),
    ):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), advice_when_out_of_memory(32):
        raise RuntimeError("shapes do not fit")


def test_what_was_counted_is_given_back() -> None:
    """Else the graph of the count stays alive, and with it the stream that a CUDA graph would be tied to."""
    outputs: list[weakref.ref[Tensor]] = []

    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result = x.exp()  # whose backward pass needs the result
            outputs.append(weakref.ref(result))
            return result

    model = create("ViT-Ti/4", img_size=16, num_classes=3, num_layers=1)
    model.head = nn.Sequential(model.head, Kept())
    memory_need(model.train(), (3, 16, 16), 4, Placement.choose("cpu", "float32"))
    gc.collect()
    assert len(outputs) == 2
    assert all(reference() is None for reference in outputs)


def test_a_batch_norm_keeps_its_statistics_and_an_image_counts_once() -> None:
    norm: Any = nn.BatchNorm1d(10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), norm).train()
    # The images (48 floats) and the map's answers (10), which the norm's backward pass needs.
    assert saved_bytes(model, (3, 4, 4), CPU) == 4 * (48 + 10)
    assert torch.equal(norm.running_mean, torch.zeros(10))
    assert int(norm.num_batches_tracked) == 0
