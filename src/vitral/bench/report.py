"""What a benchmark measured, on which machine."""

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from vitral.checkpoints import peers
from vitral.runtime import machine
from vitral.runtime.devices import Placement


@dataclass(frozen=True)
class Row:
    """One contender at one task; without `seconds` there is a `reason`."""

    task: str
    contender: str
    configuration: str = ""
    detail: str = ""  # what the configuration is
    seconds: tuple[float, ...] = ()  # of one call, a number a round
    images: int | None = None  # in one call
    speed_ratio: float | None = None  # to the fastest of the other libraries' defaults
    peak_share: float | None = None  # of the GEMM's FLOP/s; counts the whole model for all contenders
    agreement: Mapping[str, float | bool] = field(default_factory=dict)  # with the reference; see `speed`
    parts: Mapping[str, float] = field(default_factory=dict)  # median seconds of a call's parts
    peak_bytes: int | None = None  # resident memory at most
    reason: str | None = None  # why it could not be measured
    folder_ratio: float | None = None  # of a loader: to torchvision's ImageFolder as it comes
    levels: float | None = None  # mean difference from our images, of 255 grey levels

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Give (slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.median if self.images else None

    def to_dict(self) -> dict[str, Any]:
        """Give the fields that are known, and what follows from them."""
        known = {name: value for name, value in vars(self).items() if value not in (None, "", (), {})}
        if self.seconds:
            known |= {"median_seconds": self.median, "spread": self.spread}
        if self.seconds and self.images:
            known["images_per_second"] = self.images_per_second
        return known


@dataclass(frozen=True)
class Report:
    """What a benchmark measured, on which machine."""

    benchmark: str
    title: str  # the model, and what was done with it
    placement: str
    rows: tuple[Row, ...]
    machine: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)  # FLOPs, the GEMM's peak and the like

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


def with_ratios(rows: list[Row]) -> list[Row]:
    """Add speeds as multiples of the fastest of the other libraries in their default configurations."""
    defaults = [row.median for row in rows if row.configuration == "default" and row.seconds]
    if not defaults:
        return rows
    return [replace(row, speed_ratio=min(defaults) / row.median) if row.seconds else row for row in rows]


def describe_machine(placement: Placement, command: str) -> dict[str, Any]:
    """Give what a figure depends on: versions, processor, threads, load."""
    installed = [name for name in ("vitral", "torch", *peers.LIBRARIES) if peers.is_installed(name)]
    return {
        "command": command,
        **machine.describe_machine(placement),
        # Work of others; figures from a machine that is busy are worth little.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in installed},
    }
