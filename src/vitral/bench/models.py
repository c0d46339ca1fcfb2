"""Training steps and forward passes of the same weights in every library that is installed."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitral.bench.apart import processes
from vitral.bench.measure import (
    Call,
    Elsewhere,
    Report,
    Row,
    Settings,
    describe_machine,
    interleaved,
    matrix_product,
    synchronizer,
)
from vitral.bench.subject import Subject
from vitral.bench.work import FLOPS_FACTOR, Begin, Contender, Task, prepare, reason
from vitral.checkpoints import peers
from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.model.config import ViTConfig, height_and_width
from vitral.model.cost import stages
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.process import keep_freed_memory

_GEMM = "GEMM"


def infer(subject: Subject, settings: Settings) -> Report:
    """Forward passes, a task a batch size; `agreement` is of logits and of the likeliest class.

    In bfloat16 the eager models run under autocast, and the compiled ones, Vitral's too, with their weights
    in bfloat16, as timm and transformers recommend.
    """
    return _report("infer", subject, settings)


def train(subject: Subject, settings: Settings) -> Report:
    """Steps of AdamW: forward, cross-entropy, backward, update.

    `agreement` is of the first step's loss, and of its gradient at the patch projection, which all other
    gradients have gone into.
    """
    if not settings.apart:
        keep_freed_memory()  # as in a run; here for all alike
    return _report("train", subject, settings)


def _agreement(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each result, relative to its largest value; of logits also "top1"."""
    shares = {}
    for name, expected in wanted.items():
        difference = (found[name].float().cpu() - expected).abs().max() / expected.abs().max()
        shares[name] = float(difference)
    if "logits" in wanted:
        same = found["logits"].argmax(1).cpu() == wanted["logits"].argmax(1)
        shares["top1"] = float(same.float().mean())
    return shares


# --- Who competes ----------------------------------------------------------------------------------


def contenders(checkpoint: Checkpoint, folder: Path, settings: Settings) -> tuple[list[Contender], list[Row]]:
    """Vitral and every library that can hold the model, twice each; and why others cannot.

    Args:
        checkpoint: the model with its weights.
        folder: where it is written in each library's layout.
        settings: whether to compile.
    """
    ours = partial(_ours, folder / "vitral")
    found = [
        Contender("vitral", "eager", "", ours),
        Contender("vitral", "compiled", _how_compiled(settings.placement), ours, compiled=True),
    ]
    absent = []
    save_checkpoint(folder / "vitral", checkpoint)
    for library in settings.peers or peers.LIBRARIES:
        settings.say(f"writing the model for {library}")
        try:
            make = _maker(library, checkpoint, folder)
        except VitralError as error:
            absent.append(Row("", library, reason=str(error)))
            continue
        same = library != "vit-pytorch"
        best = peers.BEST_DOCUMENTED[library]
        found += [
            Contender(library, "default", "", make(False), same_weights=same),
            Contender(library, "best documented", best, make(True), compiled=True, same_weights=same),
        ]
    if not settings.compiled:
        left_out = [contender for contender in found if contender.compiled]
        found = [contender for contender in found if not contender.compiled]
        absent += [_without_numbers(c, "left out with --no-compile") for c in left_out]
    return found, absent


def _how_compiled(placement: Placement) -> str:
    mode = placement.compile_options()["mode"]
    return f'torch.compile, mode "{mode}"' if mode else "torch.compile"


def _without_numbers(contender: Contender, reason: str) -> Row:
    return Row("", contender.library, contender.configuration, contender.detail, reason=reason)


def _ours(folder: Path) -> nn.Module:
    return load_checkpoint(folder).model


def _maker(library: str, checkpoint: Checkpoint, folder: Path) -> Callable[[bool], Callable[[], nn.Module]]:
    """Makes what builds the model in `library`: in its best documented configuration, or as it comes.

    Raises:
        VitralError: if the library is not installed or cannot hold the model.
    """
    if not peers.is_installed(library):
        raise VitralError("not installed")
    if library == "vit-pytorch":
        arguments = _vit_pytorch_arguments(checkpoint.model.config)
        return lambda _: partial(peers.vit_pytorch, **arguments)
    place = folder / library
    convert(str(folder / "vitral"), place, library)
    return lambda best: partial(peers.classifier, library, place, best_documented=best)


def _vit_pytorch_arguments(config: ViTConfig) -> dict[str, Any]:
    """The paper's numbers under vit-pytorch's names. Raises VitralError for a model that it has not."""
    paper = ViTConfig(num_classes=1)
    plain = all(
        getattr(config, part) == getattr(paper, part) for part in ("layer", "head", "stem", "position")
    )
    if not plain or config.pooling not in ("class", "mean") or config.embedding != paper.embedding:
        raise VitralError("its ViT is the paper's model only")
    return {
        "image_size": height_and_width(config.img_size),
        "patch_size": config.patch_size,
        "channels": config.in_channels,
        "dim": config.embed_dim,
        "depth": config.num_layers,
        "heads": config.num_heads,
        "dim_head": config.embed_dim // config.num_heads,
        "mlp_dim": config.hidden_dim,
        "num_classes": config.num_classes,
        "pool": "cls" if config.pooling == "class" else "mean",
    }


# --- The rounds ------------------------------------------------------------------------------------


def _report(benchmark: str, subject: Subject, settings: Settings) -> Report:
    placement, config = settings.placement, subject.checkpoint.model.config
    machine = describe_machine(placement, settings.command)
    flops = sum(stage.flops for stage in stages(config))
    rows: list[Row] = []
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vitral-bench-") as folder:
        found, absent = contenders(subject.checkpoint, Path(folder), settings)
        for batch in subject.batch_sizes:
            task = Task(benchmark, batch, config, placement)
            reference = _reference(subject.checkpoint, task)
            measured, peaks[task.name] = _measure(task, found, reference, settings, flops * batch)
            rows += measured
    facts = {
        "flops_an_image": flops * FLOPS_FACTOR[benchmark],
        "gemm_flops_per_second": peaks,
        "parameters": sum(parameter.numel() for parameter in subject.checkpoint.model.parameters()),
        "processes": "one for each contender" if settings.apart else "one",
    }
    return Report(benchmark, subject.name, str(placement), (*rows, *absent), machine, facts)


def _reference(checkpoint: Checkpoint, task: Task) -> dict[str, Tensor]:
    """What Vitral gives in float32."""
    work, exact = task.work(), replace(task.placement, precision=torch.float32)
    model = copy.deepcopy(checkpoint.model).to(task.placement.device).train(work.training)
    return {name: tensor.cpu() for name, tensor in work.outcome(model, exact).items()}


def _measure(
    task: Task,
    found: Iterable[Contender],
    reference: Mapping[str, Tensor],
    settings: Settings,
    forward_flops: int,
) -> tuple[list[Row], float]:
    """A row a contender, and the FLOP/s of the GEMM that ran in the same rounds, at its best."""
    rows: dict[str, Row] = {}
    calls: dict[str, Call | Elsewhere] = {}
    with _begun(task, settings) as begin:
        for contender in found:
            key = f"{contender.library}, {contender.configuration}"
            settings.say(f"{task.name}: {key}{' (compiling)' if contender.compiled else ''}")
            rows[key], call = _ready(contender, task, begin, reference)
            if call is not None:
                calls[key] = call
        product, product_flops = matrix_product(task.placement)
        settings.say(f"{task.name}: {settings.rounds} rounds of {len(calls)} contenders")
        synchronize = synchronizer(task.placement)
        seconds = interleaved({**calls, _GEMM: product}, settings.rounds, synchronize=synchronize)
    peak = product_flops / min(seconds.pop(_GEMM))
    for key, readings in seconds.items():
        row = replace(rows[key], seconds=readings)
        rows[key] = replace(row, peak_share=forward_flops * FLOPS_FACTOR[task.benchmark] / row.median / peak)
    return with_ratios(list(rows.values())), peak


def _ready(
    contender: Contender, task: Task, begin: Begin, reference: Mapping[str, Tensor]
) -> tuple[Row, Call | Elsewhere | None]:
    """A row with the agreement and what is to be timed, or one with the reason why nothing is."""
    library, configuration, detail = contender.library, contender.configuration, contender.detail
    row = Row(task.name, library, configuration, detail, images=task.batch_size)
    try:
        call, outcome = begin(contender)
        agreement = _agreement(outcome, reference) if contender.same_weights else {}
    except Exception as error:  # a compiler or a kernel that this machine lacks, too little memory
        return replace(row, reason=reason(error)), None
    return replace(row, agreement=agreement), call


@contextmanager
def _begun(task: Task, settings: Settings) -> Iterator[Begin]:
    """What makes a contender ready, here or in a process of its own, which ends with the context."""
    if not settings.apart:
        work = task.work()
        yield lambda contender: prepare(contender, work)
        return
    with processes(task) as begin:
        yield begin


def with_ratios(rows: list[Row]) -> list[Row]:
    """Speeds as multiples of the fastest of the other libraries in their default configurations."""
    defaults = [row.median for row in rows if row.configuration == "default" and row.seconds]
    if not defaults:
        return rows
    return [replace(row, speed_ratio=min(defaults) / row.median) if row.seconds else row for row in rows]
