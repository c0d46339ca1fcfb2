"""A server under overload: who may wait is decided by what is known now; see also `scripts/serve_soak.py`."""

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from scripts import hostile
from scripts.servers import serving, vitral_server
from vitral.artifacts.engine import Answers
from vitral.bench.serving.load import rates_of
from vitral.bench.serving.measure import Load, measure
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.ship.serve.batching import Batcher, Item

for _name in ("starlette", "uvicorn", "httptools", "prometheus_client"):
    pytest.importorskip(_name)


def batcher() -> Batcher:
    def answers(pixels_BHWC: np.ndarray) -> Answers:
        rows = np.zeros((len(pixels_BHWC), 2), np.float32)
        return Answers(rows, rows)

    return Batcher(answers, (1, 2, 4, 8), 8, 1.0, lambda outcomes: None)


def test_what_was_known_of_a_busy_minute_is_forgotten_with_the_first_quick_answer() -> None:
    """Else all who would come into a batch of that size are refused, and nothing new is learnt of it."""
    known = batcher()
    known._seconds = {1: 0.5, 2: 0.9, 4: 1.7, 8: 3.2}
    assert known.seconds_for(1) == 0.5
    assert known.seconds_for(2) == 0.9
    assert known.seconds_for(9) == 3.7
    known._seconds[1] = 0.1
    assert [known.seconds_for(count) for count in (1, 2, 4, 8)] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    known._seconds[8] = 0.05  # a larger batch takes no less time than a smaller one
    assert known.seconds_for(1) == 0.05


def test_one_picture_is_tried_though_the_last_took_longer_than_the_deadline() -> None:
    """Else a server that began in a busy minute refuses for ever."""
    known = batcher()
    known._seconds = {1: 5.0}
    item, other = Item("a", time.monotonic() + 1.0), Item("b", time.monotonic() + 1.0)
    known._items.extend([item, other])
    assert known._live() == [item]


def test_before_the_first_batch_nobody_is_refused() -> None:
    assert batcher().seconds_for(100) == 0.0


@pytest.mark.slow
def test_of_three_times_what_it_can_do_a_server_answers_in_time_and_refuses_at_once(tmp_path: Path) -> None:
    model = VisionTransformer(96, 8, embed_dim=96, num_layers=4, num_heads=3, num_classes=3, dropout=0.0)
    save_checkpoint(tmp_path / "model", Checkpoint(model, Preprocess((96, 96)), ("ant", "bee", "cat")))
    files = []
    for number in range(8):
        files.append(tmp_path / f"{number}.jpg")
        hostile.picture(256, number).save(files[-1])
    command, port = vitral_server(tmp_path / "model", "--deadline", "2s")
    with serving(command, port, stdout=subprocess.DEVNULL) as server:
        load = Load(seconds=6, rates=rates_of("3x"), pid=server.process.pid, idle=0)
        *_, overload = measure(server.url, files, load).phases
        metrics = server.get("/metrics")[1].decode()
        assert server.get("/readyz")[0] == 200
    tally = overload.tally
    found = json.dumps(overload.to_dict())
    assert not tally.lost, found
    assert tally.unfinished == 0
    assert tally.count(200, 429, 503) == tally.begun, found
    assert tally.count(503) > 0, found
    assert not tally.without_retry_after
    assert not tally.otherwise
    # On a machine that others use the generator is late too, in reading what was answered in time.
    assert np.percentile(tally.times[200].from_sent, 99) <= 2.0 + max(tally.lags), found
    assert overload.machine["server_bytes_after"] - overload.machine["server_bytes_before"] <= 100 * 2**20
    assert "vitral_rejected_total" in metrics
