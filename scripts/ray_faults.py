"""Scores images on Ray while actors and the driver are killed, and holds the rows against `vitral predict`'s.

Prints whether all rows are equal, and the time that a part takes here and on a Ray that nobody kills. It is
read off the parts' files, from the first to the last, so that no start is in it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq


def command(model: str, source: str, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "vitral", "predict", model, source, "--out", str(out), *options]


def actors() -> list[psutil.Process]:
    """Ray's processes that hold a model."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "ray::" in words and "Scorer" in words:
            found.append(process)
    return found


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"), key=lambda file: file.stat().st_mtime_ns)


def seconds_a_part(out: Path, at_a_time: int = 1) -> float:
    """From the end of the first parts, which are made at a time, to that of the last."""
    times = [file.stat().st_mtime for file in parts(out)]
    return (times[-1] - times[at_a_time - 1]) / (len(times) - at_a_time)


def wait_for(count: int, out: Path, driver: subprocess.Popen) -> None:
    while len(parts(out)) < count and driver.poll() is None:
        time.sleep(0.02)


def under_fire(run: list[str], out: Path, kills: int) -> None:
    """Kills an actor after every second part, then the driver; the same command ends the work."""
    driver = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    killed = 0
    for number in range(kills):
        wait_for(1 + 2 * number, out, driver)
        if there := actors():
            there[0].kill()
            killed += 1
    wait_for(len(parts(out)) + 1, out, driver)
    ended = driver.poll() is not None
    driver.kill()
    driver.wait()
    when = "too late" if ended else "in time"
    print(f"killed {killed} actors and the driver ({when}) at {len(parts(out))} parts")
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    print(done.stdout.strip())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3)
    asked = parser.parse_args()
    on_ray = ("--engine", "ray", "--actors", str(asked.actors))
    with tempfile.TemporaryDirectory() as place:
        here, calm, fire = (Path(place) / name for name in ("here", "calm", "fire"))
        seconds = {}
        for out, options, at_a_time in ((here, (), 1), (calm, on_ray, asked.actors)):
            begun = time.monotonic()
            subprocess.run(command(asked.model, asked.source, out, *options), check=True)
            seconds[out] = seconds_a_part(out, at_a_time)
            print(f"{out.name}: {time.monotonic() - begun:.1f} s in all, {seconds[out]:.2f} s a part")
        under_fire(command(asked.model, asked.source, fire, *on_ray), fire, asked.kills)
        ours = pq.read_table(here)
        for out in (calm, fire):
            theirs = pq.read_table(out)
            values = [np.array(table["probability"].to_pylist(), float) for table in (ours, theirs)]
            away = np.nanmax(np.abs(values[0] - values[1]))
            same = all(ours[name].equals(theirs[name]) for name in ("row", "image", "label", "error"))
            print(f"{out.name}: {len(theirs):,} rows; the same: {same}; probabilities within {away:.1e}")
        print(f"calm Ray takes {seconds[calm] / seconds[here]:.2f} times as long a part")


if __name__ == "__main__":
    main()
