#!/usr/bin/env python
"""How accurate a model gets from scratch in a given time, over several seeds, and what each ingredient buys.

    scripts/time_to_accuracy.py seeds DATA --out OUT minutes=12
    scripts/time_to_accuracy.py ingredients DATA --out OUT epochs=1

DATA is what `vitral train` takes, for example 'cifar10/{split}.parquet'. "seeds" trains as often as --seeds
says and looks at the test images once a run, plain and with --tta flip; a finished run is not trained again.
With --warm-up a few steps are trained first, so that each run finds the compiler's cache warm.
"ingredients" trains the recipe and then the recipe without each of its parts, and looks at validation images
only: give it data without a test split, for example 'cifar10/train.parquet' and val_fraction=0.2, and a
budget in epochs, in which every part sees as many images. Settings are those of `vitral train`. Everything
else on the machine must be at rest. Results: OUT/results.json.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 20
# The recipe without one of its parts, or with one that it goes without.
INGREDIENTS = {
    "the recipe": [],
    "AdamW rather than Muon": ["optimizer=adamw"],
    "batches of 32": ["batch_size=32"],
    "batches of 256": ["batch_size=256"],
    "heads that start anywhere": ["architecture.layer.attention.relative_start=zero"],
    "no relative positions": ["architecture.layer.attention.relative_bias=none"],
    "six layers": ["architecture.num_layers=6"],
    "no hybrid: no convolutions, local heads, mean": ["model=ViT-Pico/4"],
    "no whitening": ["whiten=false"],
    "no smaller images at first": ["small_images=0"],
    "class token, not mean": ["pooling=class"],
    "no averaged weights": ["ema_decay=0"],
    "label smoothing": ["label_smoothing=0.1"],
    "no CutMix": ["cutmix=0"],
    "no mirroring": ["flip=false"],
    "no shifting": ["crop=none"],
}


def run(*words: str) -> str:
    """`vitral` in a process of its own, as a user has it; what it prints on standard output."""
    command = [sys.executable, "-m", "vitral", *words]
    print("$", shlex.join(["vitral", *words]), flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(data: str, folder: Path, settings: list[str]) -> dict[str, Any]:
    """The summary of a run, which is trained unless it was before."""
    if not (folder / "summary.json").exists():
        resume = ["--resume"] if folder.exists() else settings
        run("train", data, "--out", str(folder), *resume)
    return json.loads((folder / "summary.json").read_text())


def seeds(data: str, out: Path, settings: list[str], numbers: Iterable[int]) -> list[dict[str, Any]]:
    found = []
    for seed in numbers:
        folder = out / f"seed-{seed}"
        summary = train(data, folder, [*settings, f"seed={seed}"])
        mirrored = json.loads(run("eval", str(folder), data, "--split", "test", "--tta", "flip", "--json"))
        found.append(
            {
                "seed": seed,
                "minutes": summary["seconds"] / 60,
                "epochs": summary["epochs"],
                "validation": summary["val_top1"],
                "test": summary["test"]["top1"],
                "calibration error": summary["test"]["ece"],
                "test, flip": mirrored["top1"],
                "calibration error, flip": mirrored["ece"],
            }
        )
    return found


def ingredients(data: str, out: Path, settings: list[str]) -> list[dict[str, Any]]:
    found = []
    for name, change in INGREDIENTS.items():
        folder = out / name.replace(" ", "-").replace(",", "")
        summary = train(data, folder, [*settings, *change])
        row = {"ingredient": name, "settings": shlex.join(change), "validation": summary["val_top1"]}
        found.append({**row, "minutes": summary["seconds"] / 60})
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """As a Markdown table, with mean and spread of the numbers if the rows are seeds."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    if "seed" in rows[0] and len(rows) > 1:
        columns = [[row[name] for row in rows] for name in rows[0] if name != "seed"]
        lines.append(["mean", *(f"{statistics.mean(column):.4f}" for column in columns)])
        lines.append(["deviation", *(f"{statistics.stdev(column):.4f}" for column in columns)])
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["seeds", "ingredients"])
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--warm-up", action="store_true", help="compile before the first run")
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "getloadavg"):
        print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    data, out, settings = arguments.data, arguments.out, arguments.settings
    if arguments.warm_up:
        train(arguments.data, arguments.out / "warm-up", [*arguments.settings, f"steps={WARM_UP_STEPS}"])
    if arguments.what == "seeds":
        numbers = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        rows = seeds(data, out, settings, numbers)
    else:
        rows = ingredients(data, out, settings)
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
