"""The stages of `scripts/gpu`, most valuable first: which commands they are, and how long each takes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_YET = ("serve",)
# CIFAR-10 on a GPU, as in docs/log.md, 2026-11-26.
CIFAR = [
    "batch_size=512",
    "learning_rate=0.005",
    "eval_epochs=1000",
    "workers=8",
    "architecture.num_layers=6",
]
WIDTH_256 = ["architecture.embed_dim=256", "architecture.num_heads=8"]
WIDTH_384 = ["architecture.embed_dim=384", "architecture.num_heads=6"]
HYBRID = ["model=Conv+ViT-Pico/4", "img_size=32", "flip=true", *CIFAR, *WIDTH_256]
TINY_MODEL = ["img_size=32", "num_layers=1"]


@dataclass(frozen=True)
class Job:
    """A process; `result` is the JSON file that it writes."""

    name: str
    command: list[str]  # arguments of Python
    seconds: float  # estimated, on an H100 with nothing compiled before
    result: Path | None = None
    figures: Callable[[Any], dict[str, Any]] = dict  # the few of the result that a line shows


@dataclass(frozen=True)
class Plan:
    """What the stages are made from."""

    work: Path  # for runs and results
    minutes: float
    cifar: Path
    dry: bool

    def tests(self) -> list[Job]:
        tests = ["tests/test_gpu.py"] if self.dry else ["tests", "--continue-on-collection-errors"]
        command = ["-m", "pytest", *tests, "-m", "gpu", "-v", "-p", "no:cacheprovider"]
        return [Job("pytest", [*command, "-o", "faulthandler_timeout=120"], 150)]

    def step(self) -> list[Job]:
        return [
            self._bench("train", "ViT-B/16", 256, 110),
            self._measure("host", "hybrid", HYBRID, 60),
            self._bench("train", "ViT-S/16", 256, 100),
        ]

    def cifar60(self) -> list[Job]:
        # What the first seed needs to compile is compiled beforehand, so that all have a warm cache.
        first = self._cifar(0, ["minutes=1", *WIDTH_256], 140, "--warm-up")
        others = () if self.dry else (1, 2)
        return [first, *(self._cifar(seed, ["minutes=1", *WIDTH_256], 95) for seed in others)]

    def infer(self) -> list[Job]:
        models = {"ViT-B/16": 65, "ViT-L/16": 95}
        batches = (256,) if self.dry else (256, 1, 32)
        return [self._bench("infer", model, batch, models[model]) for model in models for batch in batches]

    def explain(self) -> list[Job]:
        """Memory and time of looking beside a forward pass, up to 1,370 tokens and 24 layers."""
        return [
            self._looking("memory", "ViT-L/14@518", 1, 60),
            self._looking("time", "ViT-L/14@518", 4, 60),
            self._looking("time", "ViT-B/16@224", 64, 45),
        ]

    def cifar600(self) -> list[Job]:
        minutes = min(10.0, self.minutes - 1)
        return [self._cifar(0, [f"minutes={minutes:g}", *WIDTH_384], 60 * minutes + 55)]

    def large(self) -> list[Job]:
        sizes = {"ViT-L/16": (128, 110), "ViT-H/14": (64, 150)}
        common = ["img_size=224", "checkpoint_layers=true", "optimizer=adamw"]
        return [
            self._measure("memory", model, [f"model={model}", f"batch_size={batch}", *common], seconds)
            for model, (batch, seconds) in sizes.items()
        ]

    def _looking(self, what: str, model: str, batch: int, seconds: float) -> Job:
        result = self.work / f"{what}-{model.replace('/', '-')}.json"
        tiny = ["--model", "ViT-Ti/16@32", "--batch", "2", "--rounds", "1", "--ways", "class rows", "legrad"]
        where = tiny if self.dry else ["--model", model, "--batch", str(batch), "--device", "cuda"]
        command = ["scripts/explain_cost.py", what, *where, "--out", str(result)]
        return Job(f"{what}, {model}", command, seconds, result, looking_figures)

    def _bench(self, what: str, model: str, batch: int, seconds: float) -> Job:
        words = [model, f"batch_size={2 if self.dry else batch}", *(TINY_MODEL if self.dry else [])]
        rounds = ["--rounds", "1", "--no-compile"] if self.dry else ["--rounds", "5"]
        result = self.work / f"{what}-{model.replace('/', '-')}-{batch}.json"
        command = ["-m", "vitral", "bench", what, *words, *rounds, "--peer", "timm", "--out", str(result)]
        return Job(f"{model}, batch {batch}", command, seconds, result, bench_figures)

    def _measure(self, what: str, name: str, settings: list[str], seconds: float) -> Job:
        side = 32 if name == "hybrid" else 112
        tiny = ["batch_size=4", f"img_size={side}", "architecture.num_layers=1", "--steps", "2"]
        settings = [*settings, *tiny] if self.dry else settings
        result = self.work / f"{what}-{name.replace('/', '-')}.json"
        command = ["scripts/gpu_measure.py", what, *settings, "--out", str(result)]
        return Job(f"{what}, {name}", command, seconds, result)

    def _cifar(self, seed: int, settings: list[str], seconds: float, *options: str) -> Job:
        data = noise(self.work / "noise") if self.dry else f"{self.cifar}/{{split}}.parquet"
        out = self.work / f"cifar-{seconds:g}-{seed}"
        command = ["scripts/time_to_accuracy.py", "seeds", data, "--out", str(out), "--seeds", "1"]
        tiny = ["steps=2", "batch_size=8", "architecture.num_layers=1", "workers=0"] if self.dry else []
        command += ["--first-seed", str(seed), *options, *CIFAR, *settings, *tiny]
        return Job(f"seed {seed}", command, seconds, out / "results.json", lambda rows: rows[0])


STAGES: dict[str, Callable[[Plan], list[Job]]] = {
    "tests": Plan.tests,
    "step": Plan.step,
    "cifar60": Plan.cifar60,
    "infer": Plan.infer,
    "explain": Plan.explain,
    "cifar600": Plan.cifar600,
    "large": Plan.large,
}


def bench_figures(report: dict[str, Any]) -> dict[str, Any]:
    """Images a second of each contender, and how many times the fastest of timm's Vitral's fastest is."""
    rows = [row for row in report["rows"] if "images_per_second" in row]
    speeds = {f"{row['contender']} {row['configuration']}": row["images_per_second"] for row in rows}
    best = {
        who: max((speed for name, speed in speeds.items() if name.startswith(who)), default=None)
        for who in ("vitral", "timm")
    }
    ratio = {"ratio": best["vitral"] / best["timm"]} if best["vitral"] and best["timm"] else {}
    shares = [row["peak_share"] for row in rows if row["contender"] == "vitral" and "peak_share" in row]
    return {**speeds, **ratio, "share of the GEMM": max(shares, default=None)}


def looking_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many times a forward pass each way of looking costs, in time or in peak memory."""
    return {row["way"]: row["of forward"] for row in rows}


def noise(folder: Path) -> str:
    """An image folder of two classes, with a test split."""
    for place in (folder / split / name for split in ("train", "test") for name in "ab"):
        place.mkdir(parents=True, exist_ok=True)
        for number in range(20):
            (place / f"{number}.ppm").write_bytes(b"P6 16 16 255\n" + os.urandom(3 * 16 * 16))
    return str(folder)
