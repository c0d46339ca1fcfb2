"""Every benchmark by its name, as `vitral bench` knows it."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from vitral.artifacts.manifest import is_artifact
from vitral.bench.data.measure import data
from vitral.bench.forms import infer_forms
from vitral.bench.kernels import kernels
from vitral.bench.report import Report
from vitral.bench.rounds import Settings
from vitral.bench.speed import infer, train
from vitral.bench.start import start
from vitral.bench.workload import Workload, batch_sizes_of, choose_workload
from vitral.checkpoints import peers as libraries
from vitral.runtime.devices import Device, Placement, Precision
from vitral.runtime.errors import VitralError
from vitral.runtime.limits import BENCHMARKS, ROUNDS
from vitral.runtime.ranges import refuse_beyond

_OF_MODELS: dict[str, Callable[[Workload, Settings], Report]] = {
    "train": train,
    "infer": infer,
    "start": start,
}


def benchmark(
    what: Literal["train", "infer", "start", "data", "kernels"],
    model: str | None = None,
    *,
    rounds: int = 7,
    peers: Sequence[str] = (),
    device: Device = "auto",
    precision: Precision = "auto",
    **settings: Any,
) -> Report:
    """Measure speed beside timm, transformers, torchvision and vit-pytorch, whichever are installed.

    Args:
        what: "train" steps, "infer" forward passes, "start" a fresh process to its first prediction, "data"
            from files to batches, or "kernels", our two routes of patches and of attention.
        model: a variant's name or a checkpoint; "data" takes a folder of images, "kernels" nothing. "infer"
            takes an artifact too, and measures its forms beside each other.
        rounds: interleaved readings of each contender.
        peers: compete with these libraries only.
        device: where to compute.
        precision: of matrix products.
        settings: batch_size, also a list; fields of `ViTConfig`, such as ``img_size=32``; ``compiled`` and
            ``isolated``, as the command line's options.

    Raises:
        VitralError: if a setting or the model cannot be used.
    """
    chosen = {name: settings.pop(name) for name in ("compiled", "isolated") if name in settings}
    words = [*([model] if model else []), *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    how = Settings(Placement.choose(device, precision), rounds, peers=tuple(peers), **chosen)
    return run(what, words, how)


def run(benchmark: str, words: Sequence[str], settings: Settings) -> Report:
    """Run one of the benchmarks.

    Args:
        benchmark: "train", "infer", "start", "data" or "kernels".
        words: the model and settings, such as ``["ViT-Ti/4", "img_size=32", "batch_size=64"]``; of "data" a
            folder of images and settings; "kernels" takes none.
        settings: how to run it.

    Raises:
        VitralError: if there is no such benchmark, or a word cannot be used.
    """
    refuse_beyond("rounds", settings.rounds, ROUNDS)
    unknown = [name for name in settings.peers if name not in libraries.LIBRARIES]
    if unknown:
        raise VitralError(f"peer={unknown[0]}: it must be one of {', '.join(libraries.LIBRARIES)}")
    if benchmark not in BENCHMARKS:
        raise VitralError(f"there is no benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
    if benchmark == "kernels" and words:
        raise VitralError(f"bench kernels takes no model and no setting; you gave {words[0]!r}")
    with torch.random.fork_rng(devices=[]):  # images and products are drawn
        if benchmark == "kernels":
            return kernels(settings)
        if benchmark == "data":
            return data(words, settings)
        if benchmark == "infer" and words and is_artifact(words[0]):
            return infer_forms(words[0], batch_sizes_of(words[1:]), settings)
        return _OF_MODELS[benchmark](choose_workload(benchmark, words, settings.placement), settings)
