"""What this machine's processor multiplies, and how much of it there is."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from vitral.runtime.devices import multiplies_bfloat16
from vitral.runtime.threads import cpu_quota, engine_threads

# Instructions that multiply 8-bit numbers and add into 32 bits (x86, then ARM), by their Linux names. Without
# them two products are added in 16 bits, where large ones saturate (nncf#1498), and nothing is gained.
_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")


@dataclass(frozen=True)
class Processor:
    """What decides which forms can be right and fast here."""

    int8: str | None  # the best instruction for 8-bit products; None: none
    bfloat16: bool  # whether it multiplies in it
    threads: int  # that compute
    quota: float | None  # cores that a container may use; None: all that it sees

    @classmethod
    def here(cls) -> "Processor":
        """Ask this machine."""
        bfloat16 = multiplies_bfloat16(torch.device("cpu")) or "bf16" in _features()
        return cls(_int8_instruction(), bfloat16, engine_threads(), cpu_quota())

    def notes(self) -> tuple[str, ...]:
        """Say what a user should know before believing the figures, a line each."""
        lines = []
        if self.int8 is None:
            lines.append(
                "this processor has no 8-bit products (VNNI): int8 is judged with 7-bit weights, and is "
                "seldom faster than float32 here; on the machine that will serve, optimize again"
            )
        if self.quota is not None:
            lines.append(f"a quota of {self.quota:g} cores holds here: all forms compute with {self.threads}")
        return tuple(lines)


def _int8_instruction() -> str | None:
    found = _features()
    if not found and platform.machine() == "arm64":  # macOS; each of its processors has them
        return "asimddp"
    if not found and torch.cpu._is_vnni_supported():  # Windows
        return "avx512_vnni"
    return next((name for name in _INT8 if name in found), None)


def _features() -> set[str]:
    """The instructions that Linux lists; empty on other systems."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return set()
    lines = listing.read_text().splitlines()
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
