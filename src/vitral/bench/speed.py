"""Training steps and forward passes of the same weights in every library that is installed."""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitral.bench.contenders import contenders
from vitral.bench.processes import processes
from vitral.bench.report import Report, Row, describe_machine, with_ratios
from vitral.bench.rounds import Call, Elsewhere, Settings, interleaved, matrix_product, synchronizer
from vitral.bench.steps import FLOPS_FACTOR, Begin, Contender, Task, prepare, reason
from vitral.bench.workload import Workload
from vitral.checkpoints.folder import Checkpoint
from vitral.model.cost import stages

_GEMM = "GEMM"


def infer(workload: Workload, settings: Settings) -> Report:
    """Measure forward passes, a task a batch size; `agreement` is of logits and of the likeliest class.

    In bfloat16 the eager models run under autocast, and the compiled ones, Vitral's too, with their weights
    in bfloat16, as timm and transformers recommend.
    """
    return _report("infer", workload, settings)


def train(workload: Workload, settings: Settings) -> Report:
    """Measure steps of AdamW: forward, cross-entropy, backward, update.

    `agreement` is of the first step's loss, and of its gradient at the patch projection, which all other
    gradients have gone into.
    """
    return _report("train", workload, settings)


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


def _report(benchmark: str, workload: Workload, settings: Settings) -> Report:
    placement, config = settings.placement, workload.checkpoint.model.config
    machine = describe_machine(placement, settings.command)
    flops = sum(stage.flops for stage in stages(config))
    rows: list[Row] = []
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vitral-bench-") as folder:
        found, absent = contenders(workload.checkpoint, Path(folder), settings)
        for batch in workload.batch_sizes:
            task = Task(benchmark, batch, config, placement)
            reference = _reference(workload.checkpoint, task)
            measured, peaks[task.name] = _measure(task, found, reference, settings, flops * batch)
            rows += measured
    facts = {
        "flops_an_image": flops * FLOPS_FACTOR[benchmark],
        "gemm_flops_per_second": peaks,
        "parameters": sum(parameter.numel() for parameter in workload.checkpoint.model.parameters()),
        "processes": "one for each contender" if settings.isolated else "one",
    }
    return Report(benchmark, workload.name, str(placement), (*rows, *absent), machine, facts)


def _reference(checkpoint: Checkpoint, task: Task) -> dict[str, Tensor]:
    """What Vitral gives in float32."""
    work, exact = task.work(), replace(task.placement, precision=torch.float32)
    model = exact.place(copy.deepcopy(checkpoint.model), training=work.training).train(work.training)
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
    if not settings.isolated:
        work = task.work()
        yield lambda contender: prepare(contender, work)
        return
    with processes(task) as begin:
        yield begin
