"""FSDP2: a model whose weights, gradients and optimizer's state lie in pieces on the processes of a run.

What one process holds of a tensor is a `DTensor`, by its first axis. The functions here take plain tensors as
well, and then change nothing, so that whoever calls them need not know which a run has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError


def shard(model: nn.Module, placement: Placement) -> None:
    """Divide a model among the processes, in place: layer by layer, the head, and what is left.

    Every process has the same whole model, on the CPU if it does not fit the device. Gradients are summed,
    not averaged. In bfloat16 the weights travel and are used in it, rounded anew in every pass, and gradients
    are summed in float32: under autocast alone a rounded copy of every weight would stay until the backward
    pass.

    Args:
        model: whose trained parameters are chosen already.
        placement: where it computes, and in which precision.

    Raises:
        VitralError: if it keeps statistics of batches, of which every process would have its own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    _refuse_statistics(model)
    rounded = placement.precision if placement.precision != torch.float32 else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(placement.device.type, (torch.distributed.get_world_size(),)),
        # What enters keeps its type, such as the angles of rotary positions.
        "mp_policy": MixedPrecisionPolicy(rounded, torch.float32, cast_forward_inputs=False),
    }
    if isinstance(model, VisionTransformer):
        for layer in model.layers:
            fully_shard(layer, **options)
        # The backward pass begins where the forward pass ends: it would gather them again at once.
        fully_shard(_last_parts(model), **options, reshard_after_forward=False)
    fully_shard(model, **options)
    for part in model.modules():
        if isinstance(part, FSDPModule):  # neither is recursive
            part.set_gradient_divide_factor(1.0)
            # Gloo has no sum with a factor, and sums where the average is asked (pytorch#162338).
            part.set_force_sum_reduction_for_comms(True)


def _last_parts(model: VisionTransformer) -> list[nn.Module]:
    """What every pass calls after the layers."""
    parts = (
        model.norm,
        model.attention_pool,
        model.pooled_norm,
        model.hidden,
        model.head,
        model.distillation_head,
    )
    return [part for part in parts if part is not None and any(True for _ in part.parameters())]


def _refuse_statistics(model: nn.Module) -> None:
    for name, part in model.named_modules():
        if getattr(part, "track_running_stats", False):
            raise VitralError(
                f"shard=true cannot train {type(part).__name__} ({name}), whose statistics of batches would "
                "differ from process to process; leave it out, or take norms without statistics"
            )


# --- Tensors, divided or not -------------------------------------------------------------------------


def is_divided(tensor: Tensor) -> bool:
    """Whether the processes hold a piece of it each."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """All of a tensor. Every process asks."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """What this process holds of it; a change of it changes the tensor."""
    return tensor.to_local() if is_divided(tensor) else tensor


def laid_out_like(tensor: Any, value: Tensor) -> Tensor:
    """A whole `value` in the device, and divided, as `tensor` is; nothing is said between processes."""
    if not is_divided(tensor) or is_divided(value) or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    there = value.to(tensor.device)
    return distribute_tensor(there, tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def total_norm(tensors: Sequence[Any]) -> Tensor:
    """The norm of all together, (), in their own type. Every process asks.

    The squares are added up in double precision, and the sum is rounded: so it does not follow how many
    processes hold the pieces. In single precision its last bits follow the order of the sum.
    """
    pieces = [local(tensor) for tensor in tensors]
    exact = torch.float32 if pieces[0].device.type == "mps" else torch.float64  # Apple's GPUs know no double
    squares = torch.stack(torch._foreach_norm(pieces, 2, dtype=exact)).square().sum()
    if is_divided(tensors[0]):
        torch.distributed.all_reduce(squares, group=tensors[0].device_mesh.get_group())
    return squares.sqrt().to(pieces[0].dtype)


@torch.no_grad()
def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Do as `load_state_dict`, from whole or divided tensors into either; raises RuntimeError as it does."""
    here = module.state_dict()
    module.load_state_dict({name: laid_out_like(here.get(name), value) for name, value in state.items()})


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, divided as it is. Every process asks."""
    copied = local(tensor).detach().to("cpu", copy=True)
    if not is_divided(tensor):
        return copied
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    divided: Any = tensor
    mesh = init_device_mesh("cpu", divided.device_mesh.shape)
    return DTensor.from_local(
        copied, mesh, divided.placements, run_check=False, shape=divided.shape, stride=divided.stride()
    )


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Nested dictionaries and lists with each tensor replaced."""
    match tree:
        case Tensor():
            return function(tree)
        case dict():
            return {key: mapped(function, value) for key, value in tree.items()}
        case list():
            return [mapped(function, value) for value in tree]
    return tree
