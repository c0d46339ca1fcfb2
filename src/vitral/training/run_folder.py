"""A run on disk: whether there is one, what it is, how far it is, whether it is finished, who works on it.

The files of a run's folder, each of which is replaced as a whole:

- ``recipe.toml``: its settings. Those in `CHANGEABLE` may be changed when it is resumed.
- ``checkpoints/run.json``: what the run is from its beginning on, a `Record`.
- ``checkpoints/state.pt``: how far it is, `Saved`; once finished, the weights alone, unless `keep_state`.
  Of a large sharded run folders ``checkpoints/step-N``, two at most.
- ``metrics.jsonl``: a line for each evaluation.
- ``config.json``, ``model.safetensors``: the model with the best weights.
- ``last/``: the model with the averaged weights of the last checkpoint.
- ``summary.json``: how it ended. A run is finished exactly if this says so.
- ``.lock``: while a process works on it.
"""

import contextlib
import copy
import errno
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from pydantic import TypeAdapter
from torch import nn

from vitral.checkpoints.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    described_checkpoint,
    is_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from vitral.data.contents import Contents
from vitral.data.image_data import ImageData
from vitral.data.randomness import seeded
from vitral.recipes.packaged import RUN_FILE
from vitral.recipes.recipe import Recipe
from vitral.recipes.schema import BUDGET, Resolved, missing
from vitral.runtime import settings as config
from vitral.runtime.background import Background
from vitral.runtime.errors import VitralError
from vitral.runtime.files import remove_leftovers, write_atomically
from vitral.runtime.world import ALONE, World
from vitral.training.changes import CHANGEABLE
from vitral.training.claim import claim_folder
from vitral.training.history import History, read_history, whole_lines
from vitral.training.state import Record, Saved, Summary
from vitral.training.state_file import StateFiles

_NEW_RUN = "begin a new run with another --out"

P = ParamSpec("P")
T = TypeVar("T")


def _by_first(
    method: "Callable[Concatenate[RunFolder, P], T]",
) -> "Callable[Concatenate[RunFolder, P], T]":
    """Lets the first process do it; all get what it found, or its error."""

    @wraps(method)
    def done(self: "RunFolder", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.world.from_first(lambda: method(self, *args, **kwargs))

    return done


class RunFolder:
    """The folder of a run, whether there is one yet or not.

    Of several processes the first reads and writes it, at the call of all.

    Args:
        path: the folder.
        tell: told, in one line each, of what was mended.
        module: the model, if it is the user's own.
        world: the processes of the run.
    """

    def __init__(
        self,
        path: Path,
        tell: Callable[[str], None] = lambda _: None,
        module: nn.Module | None = None,
        world: World = ALONE,
    ) -> None:
        self.path, self.tell, self.module, self.world = path, tell, module, world
        self._recipe_file, self._metrics_file = path / RUN_FILE, path / "metrics.jsonl"
        self._summary_file, self._last = path / "summary.json", path / "last"
        self._checkpoints = path / "checkpoints"
        self._states, self._record_file = StateFiles(self._checkpoints), self._checkpoints / "run.json"
        # What is written while steps go on: weights and states. All else is small.
        self._writing, self._writers = Background(), None
        self._written = SimpleQueue[int]()  # steps of states that came to be on disk

    # --- What there is -------------------------------------------------------------------------------

    @property
    @_by_first
    def holds_run(self) -> bool:
        return any(there.exists() for there in (self._recipe_file, self._record_file)) or self._states.exist()

    @property
    @_by_first
    def finished(self) -> bool:
        try:
            summary = json.loads(self._summary_file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(summary, dict) and summary.get("finished") is True

    @property
    @_by_first
    def has_best(self) -> bool:
        """Whether the model of the best weights can be read."""
        self._writing.finish()
        try:
            self.best()
        except VitralError:
            return False
        return True

    @property
    @_by_first
    def record(self) -> Record | None:
        """What the run is; None if nobody wrote it down, as in older runs."""
        return self._record

    @cached_property
    def _record(self) -> Record | None:
        try:
            return TypeAdapter(Record).validate_json(self._record_file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            self.tell(f"{self._record_file} is damaged: whether settings and data changed is not checked")
            return None

    @property
    @_by_first
    def has_state(self) -> bool:
        return self._states.exist()

    @_by_first
    def summary(self) -> Summary:
        """How the run ended, if it is finished."""
        return Summary(**json.loads(self._summary_file.read_bytes()))

    @property
    def history(self) -> History:
        """What it wrote down of its course so far."""
        return read_history(self._metrics_file, self._summary_file)

    @_by_first
    def recipe(self) -> Resolved:
        """The recipe that the run began with, and what was changed of it since.

        Raises:
            VitralError: if there is no run, or what it computes was changed by hand.
        """
        if not self.holds_run:
            raise VitralError(f"{self.path} holds no run to resume; leave out --resume to begin one")
        file, record = self._recipe_file, self._record
        try:
            values = config.read_toml(file)
            if record is not None:
                values = self._completed(values, record)
            settings = Recipe(**values).given
        except VitralError as error:
            if record is None:
                raise VitralError(f"{file} cannot be used: {error}; put it back as it was") from error
            self.tell(f"{file} cannot be used ({error}); the run goes on with the settings it began with")
            return record.began()
        return self._as_begun(settings, record.began() if record else None)

    def _completed(self, values: dict[str, Any], record: Record) -> dict[str, Any]:
        lacking = [name for name in record.recipe if name not in values]
        if any(name in values for name in BUDGET):  # one was taken out for another
            lacking = [name for name in lacking if name not in BUDGET]
        if lacking:
            listed = ", ".join(lacking)
            self.tell(f"{self._recipe_file} has no {listed} any more; the run goes on as it began")
        return values | {name: record.recipe[name] for name in lacking}

    def _as_begun(self, settings: dict[str, Any], began: Resolved | None) -> Resolved:
        """The recipe of these settings, unless they would compute something else than the run began with."""
        file = self._recipe_file
        then = began.settings() if began else settings
        for name in settings.keys() - CHANGEABLE:
            has, had = settings[name], then.get(name)
            if has != had:
                raise VitralError(
                    f"{file} has {name}={has}, and the run began with {name}={had}; put that back, or take "
                    "the file to a new run with --recipe"
                )
        if not any(name in settings for name in BUDGET):
            raise VitralError(f"{file} has no budget; put back epochs, steps or minutes")
        if lost := missing(settings):
            raise VitralError(f"{file} has no {lost[0]}; put back what stood there when the run began")
        return Resolved.of(settings)

    @_by_first
    def saved(self, first_checkpoint: int, device: torch.device) -> Saved | None:
        """The checkpoint to resume from; None if the run was stopped before its first.

        Args:
            first_checkpoint: the step after which it is written.
            device: to load the tensors to.

        Raises:
            VitralError: if it is gone, damaged, or another run's.
        """
        file, record = self._states.file, self._record
        if not self._states.exist():
            if self._last.exists() or self._last_metric > first_checkpoint:
                raise VitralError(f"{file} is gone, without which the run cannot go on{self._what_is_left}")
            return None
        found = self._states.read(device)
        if found is None:
            raise VitralError(f"{file} is damaged and cannot be resumed{self._what_is_left}")
        if record and found.run not in (None, record.id):
            raise VitralError(
                f"{file} is another run's; put back the one that belongs to {self.path}{self._what_is_left}"
            )
        return found

    @property
    def _what_is_left(self) -> str:
        """The end of a message about a lost state."""
        for folder, which in ((self._last, "last"), (self.path, "best")):
            if RunFolder(folder, module=self.module).has_best:
                return f"; {_NEW_RUN} from its {which} weights, model={shlex.quote(str(folder))}"
        return f"; {_NEW_RUN}"

    def checkpoint_of(self, saved: Saved) -> Checkpoint | None:
        """The model of a checkpoint, with any weights; None if nobody wrote down what it is."""
        if saved.description is not None:
            with seeded(0):
                config = json.loads(saved.description)
                return described_checkpoint(config, str(self._states.file), module=self.module)
        try:
            return load_checkpoint(self._last)
        except VitralError:
            return None

    # --- Who may write -------------------------------------------------------------------------------

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """No other process works on the folder inside; it is made, and unmade if nothing was written.

        What a killed process left half-written is removed.

        Raises:
            VitralError: if another process does, or the folder cannot be written.
        """
        with contextlib.ExitStack() as claim:
            self.world.from_first(lambda: self._claim(claim))
            try:
                try:
                    yield
                finally:
                    self._writing.close()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                line = f"{self.path}: {error.strerror}; make room, and go on with --resume"
                raise VitralError(line) from error

    def _claim(self, claim: contextlib.ExitStack) -> None:
        claim_folder(self.path, claim)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        files = (self._recipe_file, self._metrics_file, self._summary_file)
        names = {CONFIG_FILE, WEIGHTS_FILE, self._record_file.name, *(file.name for file in files)}
        for folder in (self.path, self._last, self._checkpoints):
            remove_leftovers(folder, names)
        self._states.remove_leftovers()

    @_by_first
    def refuse_to_begin(self, data: ImageData, recipe: Recipe) -> None:
        """Raises VitralError if a new run here would overwrite something."""
        if self.holds_run:
            raise VitralError(
                f"{self.path} already holds a run; go on with --resume, or choose another --out"
            )
        for folder in (self.path, self._last):
            if is_checkpoint(folder):
                raise VitralError(
                    f"{folder} holds a model, which a run would overwrite; choose another --out"
                )
        here, images = self.path.resolve(), Path(data.source)
        if images.is_dir() and _one_within_other(here, images.resolve()):
            raise VitralError(
                f"--out {self.path} and the images of {images} lie one within the other; choose an --out "
                "beside them"
            )
        for name in ("model", "teacher"):
            source = recipe.get(name)
            if source and Path(source).exists() and Path(source).resolve().is_relative_to(here):
                raise VitralError(
                    f"--out {self.path} holds {name}={source}, which the run would overwrite; choose another "
                    "--out"
                )

    # --- What is written -----------------------------------------------------------------------------

    @_by_first
    def begin(self, recipe: Resolved, data: ImageData, threads: int) -> None:
        """Makes a run of the folder."""
        self.go_on(Record.of(recipe, threads, Contents.of(data)), recipe, data.source, step=-1)

    def withdraw(self) -> None:
        """Undoes `begin`, where nothing was learnt yet."""
        if not self.world.is_first:  # and says nothing to the others, who may know of no error
            return
        model = self.path / CONFIG_FILE, self.path / WEIGHTS_FILE  # of a start that was judged
        for file in (self._recipe_file, self._record_file, self._metrics_file, *model):
            file.unlink(missing_ok=True)
        self._record = None
        with contextlib.suppress(OSError):
            self._checkpoints.rmdir()

    @_by_first
    def go_on(self, record: Record, recipe: Resolved, source: str, step: int) -> None:
        """Takes the run up after `step`; a larger budget holds for the next resume too."""
        self._summary_file.unlink(missing_ok=True)
        self._checkpoints.mkdir(exist_ok=True)
        self._write_record(record)
        self._truncate_metrics(step)
        self._write_recipe(recipe, source)

    @_by_first
    def save(self, saved: Saved, last: Callable[[], Checkpoint]) -> None:
        """Writes all that a resume needs, in the background; in one file, so that it is never of two steps.

        Args:
            saved: whose tensors nobody changes any more.
            last: gives the model then, which nobody changes any more either; asked of the first process.
        """
        self._writing.begin(partial(self._write_state, self._states.write, saved))
        self.save_last(last)

    def save_pieces(self, saved: Saved, last: Callable[[], Checkpoint]) -> None:
        """As `save`, each process its pieces of the tensors, into one folder."""
        if self._writers is None:  # what they say to each other must not mix with what steps say
            self._writers = self.world.new_group()
        pieces = partial(self._states.write_pieces, group=self._writers, is_first=self.world.is_first)
        write = partial(self._write_state, pieces, saved)
        self.world.gathered(lambda: self._writing.begin(write))
        self.save_last(last)

    def _write_state(self, write: Callable[[Saved], object], saved: Saved) -> None:
        write(saved)
        self._written.put(saved.state.step)

    def newly_written(self) -> Iterator[int]:
        """Gives the steps of states that came to be on disk since this was asked last."""
        with contextlib.suppress(Empty):
            while True:
                yield self._written.get_nowait()

    def finish_writing(self) -> None:
        """Waits for what this process has to write in the background."""
        self._writing.finish()

    @_by_first
    def save_last(self, last: Callable[[], Checkpoint]) -> None:
        self._writing.begin(partial(save_checkpoint, self._last, last()))

    @_by_first
    def save_best(self, best: Callable[[], Checkpoint]) -> None:
        self._writing.begin(partial(save_checkpoint, self.path, best()))

    def settle(self) -> None:
        """Waits until all is written that was to be written in the background."""
        self.world.gathered(self._writing.finish)

    def best(self) -> Checkpoint:
        self._writing.finish()
        # Not into the module itself, which is trained.
        module = None if self.module is None else copy.deepcopy(self.module)
        return load_checkpoint(self.path, model=module)

    @_by_first
    def add_metrics(self, metrics: dict[str, Any]) -> None:
        with self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def note_damaged(self, names: Iterable[str]) -> None:
        """Remembers images that could not be read: to mend or to remove them is no change of the data."""
        if not self.world.is_first:
            return
        record = self._record
        new = set(names) - set(record.damaged) if record else set()
        if record and new:
            self._write_record(replace(record, damaged=tuple(sorted({*record.damaged, *new}))))

    @_by_first
    def conclude(self, summary: Summary) -> None:
        """Makes the run a finished one."""
        self._writing.finish()
        write_atomically(self._summary_file, (json.dumps(asdict(summary), indent=1) + "\n").encode())

    @_by_first
    def drop_optimizer(self, saved: Saved) -> None:
        """Keeps of the last checkpoint what a finished run needs, which is not the optimizer's state."""
        self._states.write(replace(saved, tensors={"model": saved.tensors["model"]}))

    def _write_record(self, record: Record) -> None:
        write_atomically(self._record_file, (json.dumps(asdict(record), indent=1) + "\n").encode())
        self._record = record

    def _write_recipe(self, recipe: Resolved, source: str) -> None:
        command = shlex.join(
            ["vitral", "train", source, "--out", "NEW_DIR", "--recipe", str(self._recipe_file)]
        )
        write_atomically(
            self._recipe_file, config.to_toml(recipe.settings(), f"Run again with: {command}").encode()
        )

    @property
    def _metrics(self) -> list[tuple[int, str]]:
        """The step and the text of each whole line."""
        return [(evaluation["step"], line) for evaluation, line in whole_lines(self._metrics_file)]

    @property
    def _last_metric(self) -> int:
        return max((step for step, _ in self._metrics), default=0)

    def _truncate_metrics(self, step: int) -> None:
        """Drops what a killed run wrote after the checkpoint that it resumes from."""
        if self._metrics_file.exists():
            kept = [line for at, line in self._metrics if at <= step]
            write_atomically(self._metrics_file, "".join(f"{line}\n" for line in kept).encode())


def _one_within_other(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)
