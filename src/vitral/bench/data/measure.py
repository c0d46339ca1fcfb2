"""`data`: images a second from file to batch, beside the other libraries; how far apart the images are."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitral.bench.data.loaders import LoaderContender, Pass, loaders
from vitral.bench.data.workload import Photographs, photographs
from vitral.bench.report import Report, Row, describe_machine
from vitral.bench.rounds import Call, Elsewhere, Settings, interleaved
from vitral.bench.steps import reason
from vitral.checkpoints import peers
from vitral.data.batches import ImageKey, ImageLoading, collate
from vitral.data.split import Split
from vitral.data.workers import Loading
from vitral.runtime.threads import computing_threads

# Of the loader alone; a batch is what a GPU takes at a time.
_ALONE_SIDE, _ALONE_BATCH, _ALONE_BATCHES = 224, 128, 48


def data(words: Sequence[str], settings: Settings) -> Report:
    """Measure loaders in one thread each, in turns; Vitral's alone too, with nothing to decode.

    A reading is a pass over all images. Where one thread does all, processor seconds are counted, so that
    figures are of a core whatever else the machine does; with worker processes it is seconds of the clock.

    Args:
        words: a folder or pattern of images, or none to have photographs made; then settings of
            `bench.data.workload.Settings`.
        settings: how to run it; of them rounds, peers and what is told.

    Raises:
        VitralError: if there are no images, or a setting cannot be used.
    """
    with photographs(words) as photos, computing_threads(1):
        machine = describe_machine(settings.placement, settings.command)
        workers = photos.settings.workers
        clock = time.perf_counter if workers else time.process_time
        found, absent = _contenders(photos, settings)
        rows = [
            *_measured("training crops", found, photos, settings, clock),
            *_measured("evaluation", found, photos, settings, clock),
            *_alone(settings),
        ]
    facts = {
        "legend": "ratio: speed over that of torchvision's default; levels: mean difference from Vitral's "
        "full decoding, of 255; " + ("seconds by the clock" if workers else "processor seconds of one thread")
    }
    return Report("data", photos.title, f"cpu, {workers} workers", (*rows, *absent), machine, facts)


def _contenders(photos: Photographs, settings: Settings) -> tuple[list[LoaderContender], list[Row]]:
    found: list[LoaderContender] = []
    absent: list[Row] = []
    for library, make in loaders(photos, settings.peers or peers.LIBRARIES):
        if library != "vitral" and not peers.is_installed(library):
            absent.append(Row("", library, reason="not installed"))
            continue
        settings.say(f"reading the images with {library}")
        try:
            made = make()
            for contender in made:
                next(contender.evaluation())
        except Exception as error:  # of a library's own, or of images that it does not read
            absent.append(Row("", library, reason=reason(error)))
            continue
        found += made
    return found, absent


def _measured(
    task: str,
    found: Sequence[LoaderContender],
    photos: Photographs,
    settings: Settings,
    clock: Callable[[], float],
) -> list[Row]:
    """A row a contender."""
    trains = task == "training crops"
    passes = {(one.library, one.configuration): one.training if trains else one.evaluation for one in found}
    settings.say(f"{task}: {settings.rounds} rounds of {len(passes)} contenders")
    counts = {key: sum(map(len, run())) for key, run in passes.items()}  # a remainder may be left out
    calls: dict[Any, Call] = {key: _through(run) for key, run in passes.items()}
    seconds: dict[Any, Any] = interleaved(calls, settings.rounds, warm_up=False, clock=clock)
    levels = {} if trains else _levels(passes, photos)
    rows = [
        Row(
            task,
            one.library,
            one.configuration,
            one.detail,
            seconds[one.library, one.configuration],
            counts[one.library, one.configuration],
            levels=levels.get((one.library, one.configuration)),
        )
        for one in found
    ]
    return _with_ratios(rows)


def _with_ratios(rows: list[Row]) -> list[Row]:
    """Of images a second, over those of torchvision's default; without it there are none."""
    base = next(
        (row for row in rows if (row.contender, row.configuration) == ("torchvision", "default")), None
    )
    if base is None or base.images_per_second is None:
        return rows
    return [replace(row, folder_ratio=(row.images_per_second or 0) / base.images_per_second) for row in rows]


def _through(run: Pass) -> Call:
    def call() -> None:
        for _ in run():
            pass

    return call


def _levels(passes: Mapping[tuple[str, str], Pass], photos: Photographs) -> dict[tuple[str, str], float]:
    """How far each one's images are from ours of full decoding, in grey levels on average."""
    spread = 255 * torch.tensor(photos.settings.preprocess.std).view(1, 3, 1, 1)
    wanted = torch.cat(list(passes["vitral", "full"]()))
    found = {}
    for key, run in passes.items():
        images = torch.cat(list(run()))
        if images.shape == wanted.shape:
            found[key] = float(((images - wanted).abs() * spread).mean())
    return found


# --- The loader alone ------------------------------------------------------------------------------


class _Stub(torch.utils.data.Dataset):
    """An image that is decoded already, as a dataset of torch."""

    def __init__(self) -> None:
        self.pixels = torch.zeros(_ALONE_SIDE, _ALONE_SIDE, 3, dtype=torch.uint8)

    def __len__(self) -> int:
        return _ALONE_BATCH * _ALONE_BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels, index


class _AfterTheFirst(Elsewhere):
    """A pass, timed from its first batch on: what it takes to start processes is left out."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self.begin = begin

    def read(self, calls: int) -> float:  # noqa: ARG002 - a pass is long enough
        batches = self.begin()
        next(batches)
        begun = time.perf_counter()
        for _ in batches:
            pass
        return time.perf_counter() - begun


def _alone(settings: Settings) -> list[Row]:
    """Loaders with nothing to decode: bytes of 224 pixels a side, copied into batches, by the clock."""
    task = f"loader alone, {_ALONE_SIDE} pixels, nothing to decode"
    settings.say(task)
    count = _ALONE_BATCH * _ALONE_BATCHES
    pixels_HWC = np.zeros((_ALONE_SIDE, _ALONE_SIDE, 3), np.uint8)
    split = Split([b""] * count, np.zeros(count, dtype=np.int64), [""] * count)
    loaded = ImageLoading(split, lambda _: pixels_HWC, None)
    starts = range(0, count, _ALONE_BATCH)
    keys = [[ImageKey(0, row) for row in range(first, first + _ALONE_BATCH)] for first in starts]
    readings: dict[tuple[str, int], Elsewhere] = {}
    for workers in (0, 1, 2):
        ours, theirs = Loading(workers), DataLoader(_Stub(), _ALONE_BATCH, num_workers=workers)
        readings["vitral", workers] = _AfterTheFirst(partial(ours.batches, loaded, keys, collate))
        readings["torch", workers] = _AfterTheFirst(partial(iter, theirs))  # pyrefly: ignore
    found = interleaved(readings, settings.rounds, warm_up=False)  # type: ignore[arg-type]
    return [
        Row(task, library, f"workers={workers}", "", seconds, count - _ALONE_BATCH)
        for (library, workers), seconds in found.items()
    ]
