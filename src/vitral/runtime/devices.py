"""Where a computation runs and in which precision; what differs by machine is chosen here."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from vitral.runtime.errors import VitralError

Model = TypeVar("Model", bound=nn.Module)

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Placement:
    """A device and the type its matrix products compute in; weights stay float32."""

    device: torch.device
    precision: torch.dtype

    @classmethod
    def choose(cls, device: Device = "auto", precision: Precision = "auto") -> "Placement":
        """Choose for "auto" a GPU if there is one, and bfloat16 where the hardware multiplies in it.

        Raises:
            VitralError: if the device is not there, or a name unknown.
        """
        for name, value, known in (("device", device, Device), ("precision", precision, Precision)):
            if value not in get_args(known):
                raise VitralError(f"{name}={value}: it must be one of {', '.join(get_args(known))}")
        place = torch.device(_best_device() if device == "auto" else device)
        if place.type not in _available_devices():
            raise VitralError(
                f"device={device}: there is none here; this machine has {', '.join(_available_devices())}"
            )
        if precision == "auto":
            return cls(place, torch.bfloat16 if multiplies_bfloat16(place) else torch.float32)
        return cls(place, getattr(torch, precision))

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16
        )

    def compile_options(self, *, replays: bool = True) -> dict[str, Any]:
        """Give torch.compile's options: each size for itself, on a GPU as CUDA graphs, which spare launches.

        Args:
            replays: False where gradients of several passes are summed, which graphs would overwrite.
        """
        graphs = replays and self.device.type == "cuda"
        return {"dynamic": False, "mode": "reduce-overhead" if graphs else None}

    def put(self, tensor: Tensor) -> Tensor:
        return put(tensor, self.device)

    def place(self, model: Model, *, training: bool = False, on: torch.device | None = None) -> Model:
        """Put a model on the device, its weights in float32, in whatever type a file has them.

        A file's type is how weights are stored; they are trained and averaged in float32, and products
        compute in `precision` (arXiv:1710.03740, §3.1: smaller updates round to nothing in 16 bits).

        Args:
            model: any; one of ours chooses its kernels for the device and precision.
            training: whether it is to be trained, always under `autocast`: the tokens between layers are
                then kept in `precision`.
            on: where it waits, if it comes to the device later.
        """
        placed = model.to(on or self.device, torch.float32)
        if choose := getattr(placed, "choose_kernels", None):  # of equal computations the faster one here
            choose(self.device, self.precision, training=training)
        return placed

    def __str__(self) -> str:
        return f"{self.device.type}, {str(self.precision).removeprefix('torch.')}"


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Move the tensor to a device; to a GPU without waiting. Apple's may read memory that is gone."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def compiles(device: Device, *, wanted: bool | None) -> bool:
    """Say whether a run on this device goes through torch.compile: as wanted, else where it is faster.

    On CPUs the compiled step was slower than the eager one, and compiling takes a minute; on a GPU it was
    1.4 times as fast (docs/log.md, 2026-11-25 and 26).
    """
    if wanted is not None:
        return wanted
    return device == "cuda" or (device == "auto" and _best_device() == "cuda")


def _available_devices() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _best_device() -> str:
    return _available_devices()[-1]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether the device has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without them bfloat16 is emulated, and slower than float32.
        return torch.cpu._is_avx512_bf16_supported()
    return False
