"""`vitral info`: a model's stages with shapes, parameters and FLOPs, and what its patch size costs."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from vitral.cli import options
from vitral.cli.console import giga, print_lines, print_table
from vitral.runtime.streams import shown

if TYPE_CHECKING:
    from vitral.checkpoints.folder import Checkpoint
    from vitral.model.config import ViTConfig
    from vitral.model.cost import PatchCost, Stage
    from vitral.runtime.devices import Placement


def info(
    model: Annotated[str, options.text("MODEL", "A variant's name, such as ViT-B/16, or any checkpoint.")],
    settings: options.Settings = None,
    measure: Annotated[bool, typer.Option(help="Time one image for each patch size.")] = True,
    merge: options.Merge = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Print each stage of a model: shape, parameters, FLOPs; and the cost of other patch sizes."""
    from vitral.inference.info import info as describe
    from vitral.runtime.devices import Placement
    from vitral.runtime.settings import nested, parse_overrides

    placement = Placement.choose(device, precision)  # type: ignore[arg-type]
    overrides = nested(parse_overrides(settings or []))
    found = describe(model, placement if measure else None, merge=merge, **overrides)
    print_lines(_about(model, found.checkpoint) if found.checkpoint else model)
    print_stages(found.config, found.stages)
    print_patch_costs(found.config, found.patch_costs, placement)


def _about(model: str, checkpoint: "Checkpoint") -> str:
    """Labels, preprocessing, where the weights come from and under which licence."""
    from vitral.data.split import shortened
    from vitral.evaluation.task import task_of

    metadata, labels = checkpoint.metadata, checkpoint.labels
    lines = [
        shown(f"{model}: {len(labels)} labels ({shortened(labels)})") if labels else f"{model}: no labels"
    ]
    lines.append(f"images: {checkpoint.preprocess}")
    lines += checkpoint.notes
    options = checkpoint.model.config.embedding
    lines.append(f"at another size: positions {options.resize}")
    if labels:
        lines.append(f"probabilities: {task_of(checkpoint).probabilities(checkpoint.temperature)}")
    if "source" in metadata:
        how = f"read as {metadata['layout']}'s layout" if "layout" in metadata else "trained further"
        lines.append(f"weights: from {metadata['source']}, {how}")
        lines.append(f"licence of the weights: {metadata.get('licence') or 'not stated'}")
    return "\n".join(lines)


def print_stages(config: "ViTConfig", stages: "Sequence[Stage]") -> None:
    """Print a row a stage; layers that are alike share one, with the numbers of each."""
    height, width = config.img_size  # pyrefly: ignore[not-iterable] - ViTConfig makes it a pair
    rows: list[Sequence[str]] = []
    for _, alike in groupby(stages, key=lambda stage: (stage.shape, stage.parameters, stage.flops)):
        group = list(alike)
        first, last = group[0], group[-1]
        name = first.name if first is last else f"{first.name} to {last.name}, {len(group)} alike, each"
        shape = " x ".join(map(str, first.shape))
        rows.append((name, shape, f"{first.parameters:,}", giga(first.flops)))
    parameters = sum(stage.parameters for stage in stages)
    rows.append(("total", "", f"{parameters:,}", giga(sum(stage.flops for stage in stages))))
    headings = ("stage", "output shape", "parameters", "GFLOPs")
    title = f"one image of {height}x{width} pixels, stage by stage"
    print_table(title, headings, rows, headings[1:], total=True)


def print_patch_costs(config: "ViTConfig", costs: "Sequence[PatchCost]", placement: "Placement") -> None:
    """Print a row a patch size, the model's own marked."""
    rows = []
    for cost in costs:
        mark = "*" if cost.patch_size == config.patch_size else ""
        parts = cost.attention_flops, cost.linear_flops, cost.attention_flops + cost.linear_flops
        time_taken = "-" if cost.milliseconds is None else f"{cost.milliseconds:.1f}"
        rows.append((f"{mark}{cost.patch_size}", f"{cost.patches:,}", *map(giga, parts), time_taken))
    headings = ("patch size", "patches N", "attention, O(N²·D)", "linear, O(N·D²)", "total", "ms")
    title = f"the cost of each patch size: GFLOPs per image, and ms on {placement}"
    print_table(title, headings, rows, headings)
