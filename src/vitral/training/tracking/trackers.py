"""The trackers: what each needs, and how it is given a run's figures.

To add one: a class with the methods of `Tracker`, and a row in `TRACKERS`.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vitral.runtime.extras import need
from vitral.runtime.telemetry import without_reports

_PROJECT = "vitral"
_SECONDS_TO_BEGIN = 30.0


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker is told of it."""

    folder: Path
    id: str  # of the run itself
    settings: Mapping[str, Any]
    known_as: str | None  # what the tracker called it before; None: it is new there
    step: int  # up to which its figures were given; -1: none


class Tracker(Protocol):
    """Takes the figures of one run; each method may raise anything."""

    known_as: str  # by which the tracker finds the run again
    step: int  # up to which it has figures

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of an evaluation."""
        ...

    def end(self, figures: Mapping[str, float], *, finished: bool) -> None:
        """Take what the run ended with, and write everything out."""
        ...


class _TensorBoard:
    """Event files in the run's folder; `tensorboard --logdir` shows all runs below a folder."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.known_as, self.step = "tensorboard", run.step
        # What was given after the last record of ours is given again, and shown once.
        purge = None if run.known_as is None else run.step + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        if run.known_as is None:
            rows = [f"| {name} | {json.dumps(value)} |" for name, value in run.settings.items()]
            self._writer.add_text("recipe", "\n".join(["| setting | value |", "| --- | --- |", *rows]), 0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, figures: Mapping[str, float], *, finished: bool) -> None:  # noqa: ARG002
        self.log(self.step, figures)
        self._writer.close()


class _WandB:
    """Weights & Biases, offline unless there is a key or WANDB_MODE; `wandb sync` sends what is offline."""

    def __init__(self, run: Tracked) -> None:
        with without_reports():
            import wandb

            self.known_as, self.step = run.id, run.step
            mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                id=run.id,
                name=run.folder.name,
                dir=str(run.folder),
                config=dict(run.settings),
                resume="allow",
                mode=mode,
                reinit="create_new",  # the program that trains may have a run of its own
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    save_code=False,
                    init_timeout=_SECONDS_TO_BEGIN,
                ),
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def end(self, figures: Mapping[str, float], *, finished: bool) -> None:
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    """MLflow at MLFLOW_TRACKING_URI, else a database beside the run's folder."""

    def __init__(self, run: Tracked) -> None:
        with without_reports():
            from mlflow import MlflowClient

            for name in ("alembic", "mlflow"):  # which tell how they make a database
                logging.getLogger(name).setLevel(logging.WARNING)
            beside = run.folder.resolve().parent
            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside / 'mlflow.db'}"
            self._client = MlflowClient(tracking_uri=uri)
            self.known_as = run.known_as or self._create(run, (beside / "mlflow-artifacts").as_uri())
        # A record of ours may have been lost with the process; MLflow would keep a step twice.
        there = self._client.get_metric_history(self.known_as, "val_loss") if run.known_as else []
        self.step = max((metric.step for metric in there), default=run.step)
        if run.known_as:
            self._client.update_run(self.known_as, status="RUNNING")

    def _create(self, run: Tracked, artifacts: str) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        there = self._client.get_experiment_by_name(name)
        remote = "MLFLOW_TRACKING_URI" in os.environ
        experiment = (
            there.experiment_id
            if there
            else self._client.create_experiment(name, artifact_location=None if remote else artifacts)
        )
        made = self._client.create_run(experiment, run_name=run.folder.name, tags={"vitral.run": run.id})
        params = [Param(name, json.dumps(value)) for name, value in run.settings.items()]
        self._client.log_batch(made.info.run_id, params=params)
        return made.info.run_id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at = int(time.time() * 1000)
        metrics = [Metric(name, value, at, step) for name, value in figures.items()]
        self._client.log_batch(self.known_as, metrics=metrics)

    def end(self, figures: Mapping[str, float], *, finished: bool) -> None:
        self.log(self.step, figures)
        self._client.set_terminated(self.known_as, "FINISHED" if finished else "KILLED")


# By the name in a recipe: the package that it needs, and what begins it.
TRACKERS: dict[str, tuple[str, Callable[[Tracked], Tracker]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _WandB),
    "mlflow": ("mlflow", _MLflow),
}


def refuse_missing(name: str) -> None:
    """Raise VitralError if a tracker's package is not installed."""
    package, _ = TRACKERS[name]
    need(f"track={name}", package, extra=name)
