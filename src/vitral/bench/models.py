"""Training steps and forward passes of the same weights in every library that is installed."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral import peers
from vitral.bench import (
    Call,
    Report,
    Row,
    Settings,
    describe_machine,
    interleaved,
    matrix_product,
    synchronizer,
)
from vitral.bench.subject import Subject
from vitral.blocks import height_and_width
from vitral.checkpoints import Checkpoint, save_checkpoint
from vitral.checkpoints.convert import convert
from vitral.devices import Placement, keep_freed_memory
from vitral.errors import VitralError
from vitral.info import stages
from vitral.model import ViTConfig

_GEMM = "GEMM"


@dataclass(frozen=True)
class Contender:
    """A library's model in one configuration."""

    library: str
    configuration: str
    detail: str
    make: Callable[[], nn.Module]  # images (B, C, H, W) -> logits (B, L); float32, on the CPU
    compiled: bool = False
    same_weights: bool = True


def infer(subject: Subject, settings: Settings) -> Report:
    """Forward passes, a task a batch size; `agreement` is of logits and of the likeliest class.

    In bfloat16 the eager models run under autocast, and the compiled ones, Vitral's too, with their weights
    in bfloat16, as timm and transformers recommend.
    """
    return _report("infer", subject, settings, lambda images: _Forward(images, settings.placement))


def train(subject: Subject, settings: Settings) -> Report:
    """Steps of AdamW: forward, cross-entropy, backward, update.

    `agreement` is of the first step's loss, and of its gradient at the patch projection, which all other
    gradients have gone into.
    """
    classes = subject.checkpoint.model.config.num_classes
    keep_freed_memory()  # as in a run; here for all alike

    def step(images: Tensor) -> _TrainingStep:
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(classes, (len(images),), generator=generator)
        return _TrainingStep(images, settings.placement.put(labels), settings.placement)

    return _report("train", subject, settings, step)


# --- What is timed and compared --------------------------------------------------------------------


@dataclass(frozen=True)
class _Forward:
    images: Tensor
    placement: Placement
    training = False
    flops_factor = 1

    def call(self, model: nn.Module) -> Call:
        return lambda: self._logits(model, self.placement)

    def outcome(self, model: nn.Module, placement: Placement) -> dict[str, Tensor]:
        return {"logits": self._logits(model, placement)}

    @torch.inference_mode()
    def _logits(self, model: nn.Module, placement: Placement) -> Tensor:
        stored = next(model.parameters()).dtype
        if stored != torch.float32:
            return model(self.images.to(stored))
        with placement.autocast():
            return model(self.images)


@dataclass(frozen=True)
class _TrainingStep:
    images: Tensor
    labels: Tensor
    placement: Placement
    training = True
    flops_factor = 3  # backward is twice the forward's products

    def call(self, model: nn.Module) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

        def step() -> None:
            self._loss(model, self.placement).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def outcome(self, model: nn.Module, placement: Placement) -> dict[str, Tensor]:
        loss = self._loss(model, placement)
        loss.backward()
        # All libraries that share weights keep the patch projection as a convolution, (D, C, p, p).
        patches = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        found = {"loss": loss.detach()}
        if patches is not None and patches.weight.grad is not None:
            found["gradient"] = patches.weight.grad.clone()
        model.zero_grad()
        return found

    def _loss(self, model: nn.Module, placement: Placement) -> Tensor:
        with placement.autocast():
            return F.cross_entropy(model(self.images), self.labels)


_Work = _Forward | _TrainingStep


def _agreement(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each result, relative to its largest value; of logits also "top1"."""
    shares = {}
    for name, expected in wanted.items():
        difference = (found[name].float() - expected).abs().max() / expected.abs().max()
        shares[name] = float(difference)
    if "logits" in wanted:
        same = found["logits"].argmax(1) == wanted["logits"].argmax(1)
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
    model = checkpoint.model
    found = [
        Contender("vitral", "eager", "", lambda: copy.deepcopy(model)),
        Contender("vitral", "compiled", "torch.compile", lambda: copy.deepcopy(model), compiled=True),
    ]
    absent = []
    save_checkpoint(folder / "vitral", checkpoint)
    for library in peers.LIBRARIES:
        settings.say(f"writing the model for {library}")
        try:
            make = _maker(library, checkpoint, folder)
        except VitralError as error:
            absent.append(Row("", library, reason=str(error)))
            continue
        same = library != "vit-pytorch"
        best = peers.BEST_DOCUMENTED[library]
        found += [
            Contender(library, "default", "", lambda make=make: make(False), same_weights=same),
            Contender(
                library,
                "best documented",
                best,
                lambda make=make: make(True),
                compiled=True,
                same_weights=same,
            ),
        ]
    if not settings.compiled:
        left_out = [contender for contender in found if contender.compiled]
        found = [contender for contender in found if not contender.compiled]
        absent += [_without_numbers(c, "left out with --no-compile") for c in left_out]
    return found, absent


def _without_numbers(contender: Contender, reason: str) -> Row:
    return Row("", contender.library, contender.configuration, contender.detail, reason=reason)


def _maker(library: str, checkpoint: Checkpoint, folder: Path) -> Callable[[bool], nn.Module]:
    """Builds the model in `library`; the argument is whether in its best documented configuration.

    Raises:
        VitralError: if the library is not installed or cannot hold the model.
    """
    if not peers.is_installed(library):
        raise VitralError("not installed")
    if library == "vit-pytorch":
        arguments = _vit_pytorch_arguments(checkpoint.model.config)
        return lambda _: peers.vit_pytorch(**arguments)
    place = folder / library
    convert(str(folder / "vitral"), place, library)
    return lambda best: peers.classifier(library, place, best_documented=best)


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


def _report(benchmark: str, subject: Subject, settings: Settings, work: Callable[[Tensor], _Work]) -> Report:
    placement, config = settings.placement, subject.checkpoint.model.config
    machine = describe_machine(placement, settings.command)
    flops = sum(stage.flops for stage in stages(config))
    rows: list[Row] = []
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vitral-bench-") as folder:
        found, absent = contenders(subject.checkpoint, Path(folder), settings)
        for batch in subject.batch_sizes:
            generator = torch.Generator().manual_seed(0)
            shape = batch, config.in_channels, *height_and_width(config.img_size)
            images = placement.put(torch.randn(shape, generator=generator))
            task = f"{benchmark}, batch {batch}"
            measured, peaks[task] = _measure(task, work(images), found, settings, flops * batch)
            rows += measured
    facts = {
        "flops_an_image": flops * (3 if benchmark == "train" else 1),
        "gemm_flops_per_second": peaks,
        "parameters": sum(parameter.numel() for parameter in subject.checkpoint.model.parameters()),
    }
    return Report(benchmark, subject.name, str(placement), (*rows, *absent), machine, facts)


def _measure(
    task: str, work: _Work, found: Iterable[Contender], settings: Settings, forward_flops: int
) -> tuple[list[Row], float]:
    """A row a contender, and the FLOP/s of the GEMM that ran in the same rounds, at its best."""
    placement = settings.placement
    exact = replace(placement, precision=torch.float32)
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    reference: dict[str, Tensor] | None = None
    for contender in found:
        key = f"{contender.library}, {contender.configuration}"
        settings.say(f"{task}: {key}{' (compiling)' if contender.compiled else ''}")
        row = Row(task, contender.library, contender.configuration, contender.detail, images=len(work.images))
        try:
            model = contender.make().to(placement.device).train(work.training)
            if reference is None:  # Vitral's own, which is first
                reference = work.outcome(model, exact)
            if contender.compiled:
                if not work.training:
                    model.to(placement.precision)
                # In place, so that it stays a module; each batch size is compiled for itself.
                model.compile(dynamic=False)
            outcome = work.outcome(model, placement)  # the first call compiles
            agreement = _agreement(outcome, reference) if contender.same_weights else {}
            calls[key], row = work.call(model), replace(row, agreement=agreement)
        except Exception as error:  # a compiler or a kernel that this machine lacks, too little memory
            row = replace(row, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        rows[key] = row
    product, product_flops = matrix_product(placement)
    settings.say(f"{task}: {settings.rounds} rounds of {len(calls)} contenders")
    seconds = interleaved({**calls, _GEMM: product}, settings.rounds, synchronize=synchronizer(placement))
    peak = product_flops / min(seconds.pop(_GEMM))
    for key, readings in seconds.items():
        row = replace(rows[key], seconds=readings)
        flops = forward_flops * work.flops_factor
        rows[key] = replace(row, peak_share=flops / row.median / peak)
    return with_ratios(list(rows.values())), peak


def with_ratios(rows: list[Row]) -> list[Row]:
    """Speeds as multiples of the fastest of the other libraries in their default configurations."""
    defaults = [row.median for row in rows if row.configuration == "default" and row.seconds]
    if not defaults:
        return rows
    return [replace(row, speed_ratio=min(defaults) / row.median) if row.seconds else row for row in rows]
