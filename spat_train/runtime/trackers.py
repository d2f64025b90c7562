"""Programs that draw runs side by side: TensorBoard, Weights & Biases, MLflow. They get the scalars of log.jsonl and the config.

What was asked for must open before the first step, else the run ends there. A tracker that fails later is left out with a
warning: the record of a run is its log.jsonl. A resumed run goes on in the same run of each tracker, whose id is in
tracking.json, and hands over log.jsonl from the start; in a folder that was copied or moved it begins new ones. TensorBoard shows
these values alone. The others take what they lack, and keep the first values of steps that are done again.
"""

import hashlib
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import InputError, first_line, lookup
from . import json_files
from .run_folder import RunFolder
from .seeding import random_state, set_random_state

IDS = "tracking.json"
PROJECT = "spat_train"  # wandb's project and mlflow's experiment, unless their environment variables name another
MINUTE = 60.0
FAILURES = (Exception, SystemExit)  # of a tracker


class Tracked(NamedTuple):
    """The run that is tracked."""

    folder: Path  # absolute; its name is the run's
    config: dict[str, Any]
    id: str  # the tracker's own, from before an interruption; "" for a new run


class Tracker(Protocol):
    """Its class makes it from a `Tracked`, and raises anything where it does not work."""

    id: str  # to go on with; "" where there is none

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def close(self, complete: bool) -> None: ...


class TensorBoard:
    id = ""

    def __init__(self, run: Tracked):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(run.folder / "tensorboard", purge_step=0)  # hides what is there

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self, complete: bool) -> None:
        self.board.close()


class Wandb:
    def __init__(self, run: Tracked):
        import wandb

        given = os.environ.get  # arguments would go before the variables
        self.id = given("WANDB_RUN_ID") or run.id or uuid.uuid4().hex[:12]
        self.run = wandb.init(
            project=given("WANDB_PROJECT") or PROJECT, name=given("WANDB_NAME") or run.folder.name, id=self.id, resume="allow",
            dir=given("WANDB_DIR") or run.folder, config=run.config, allow_val_change=True, reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", finish_timeout=5 * MINUTE, finish_timeout_raises=True,
                x_disable_meta=True, x_disable_machine_info=True, disable_git=True, host="",  # paths, names and arguments
            ),
        )  # fmt: skip
        if not self.run.offline and self.run.url:
            print(f"spat-train: {self.run.url}")

    def scalars(self, values: dict[str, float], step: int) -> None:
        if step >= self.run.starting_step:  # wandb refuses to go back, and warns each time
            self.run.log(values, step=step)
        self.run.summary.update(values)

    def close(self, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class MLflow:
    def __init__(self, run: Tracked):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # whose thread draws from Python's generator
        # Other processes wait meanwhile: without these, some minutes for a server that is down, and 20 for one that hangs.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
        from mlflow import MlflowClient, entities

        self.entities, self.client = entities, MlflowClient()  # mlflow's functions would act on a run of the caller's
        if run.id:
            self.client.update_run(run.id, status="RUNNING")
        self.id = run.id or self.client.create_run(self._experiment(), run_name=run.folder.name).info.run_id
        data = self.client.get_run(self.id).data
        new = {name: str(value) for name, value in run.config.items() if name not in data.params}  # they cannot be changed
        self.client.log_batch(self.id, params=[entities.Param(*item) for item in new.items()], synchronous=True)
        self.last = {name: max(m.step for m in self.client.get_metric_history(self.id, name)) for name in data.metrics}

    def _experiment(self) -> str:
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)

    def scalars(self, values: dict[str, float], step: int) -> None:
        named = {re.sub(r"[^\w\-. /]", "", name): value for name, value in values.items()}  # it takes no C&W
        now = int(1000 * time.time())
        new = [self.entities.Metric(name, v, now, step) for name, v in named.items() if step > self.last.get(name, -1)]
        if new:
            self.client.log_batch(self.id, metrics=new, synchronous=True)

    def close(self, complete: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if complete else "FAILED")


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
REMEDIES = {
    "tensorboard": "pip install -U tensorboard",
    "wandb": "pip install -U wandb, then wandb login, or set WANDB_MODE=offline",
    "mlflow": "pip install -U mlflow, or set MLFLOW_TRACKING_URI to a server that answers",
}


def chosen(track: str) -> list[str]:
    """The trackers that `Config.track` names.

    Raises:
        InputError: there is none of a name, or it is not installed.
    """
    if track in ("auto", "none"):
        return ["tensorboard"] if track == "auto" and _installed("tensorboard") else []
    names = [name.strip() for name in track.split(",")]
    for name in names:
        lookup("--track", name, TRACKERS, remedy=f"give auto, none, or some of {','.join(TRACKERS)}")
        if not _installed(name):
            raise InputError(f"--track {name}: it is not installed: {REMEDIES[name]}, or leave it out")
    return list(dict.fromkeys(names))


def _installed(name: str) -> bool:
    found = find_spec(name)
    return found is not None and found.origin is not None  # else it is a folder, such as wandb makes


class Trackers:
    """The trackers of a run, opened.

    Raises:
        InputError: one does not work. With `track` "auto" that is a warning.
        SaveError: tracking.json cannot be written.
    """

    def __init__(self, track: str, folder: RunFolder, config: dict[str, Any], step: int):
        self.open: dict[str, Tracker] = {}
        if folder.path is None:
            return
        path = folder.path / IDS
        here = hashlib.sha256(os.fsencode(folder.path.resolve())).hexdigest()[:16]
        saved = _read(path) if step else {}
        if saved.get("folder", here) != here:  # it was copied: the runs are the original's
            saved = {}
        for name in chosen(track):
            try:
                with _apart():
                    self.open[name] = TRACKERS[name](Tracked(folder.path.absolute(), config, saved.get(name, "")))
            except FAILURES as error:  # such as TypeError of a tensorboard that does not fit protobuf
                if track == "auto":
                    _warn(f"{name} {_failed(error)}: the run goes on without; --track none ends this message")
                    continue
                self.close(complete=False)
                remedy = f"{REMEDIES[name]}, or leave it out"
                remedy += f", or remove {path} for a new run there" if name in saved else ""
                raise InputError(f"--track {name}: it {_failed(error)}: {remedy}") from error
        ids = {name: tracker.id for name, tracker in self.open.items() if tracker.id}
        if ids and saved != (ids := saved | ids | {"folder": here}):
            folder.write(IDS, ids)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Values by name, after `step` updates."""
        self._each(lambda tracker: tracker.scalars(values, step))

    def close(self, complete: bool) -> None:
        """`complete`: the run did not stop early."""
        self._each(lambda tracker: tracker.close(complete))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self.open.items()]:
            try:
                with _apart():
                    act(tracker)
            except FAILURES as error:
                del self.open[name]
                _warn(f"{name} {_failed(error)}: the run goes on without it, and log.jsonl has what it lacks")


@contextmanager
def _apart() -> Iterator[None]:
    """Within, prints go to stderr. Generators and hooks are restored: mlflow draws names, wandb watches for exits."""
    generators, hooks = random_state(), (sys.exit, sys.excepthook)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        set_random_state(generators)
        sys.exit, sys.excepthook = hooks


def _warn(text: str) -> None:
    print(f"spat-train: {text}", file=sys.stderr)


def _failed(error: BaseException) -> str:
    return f"does not work ({type(error).__name__}: {first_line(error)[:500]})"


def _read(path: Path) -> dict[str, str]:
    """The ids of the trackers' runs by name, and "folder", a hash of where that was, from tracking.json."""
    try:
        found = dict(json_files.read(path)) if path.is_file() else {}
        if not all(isinstance(value, str) for value in found.values()):
            raise TypeError("ids are texts")
        return found
    except (TypeError, ValueError) as error:
        remedy = "remove it, and the trackers begin new runs"
        raise InputError(f"--track: {path} cannot be read ({type(error).__name__}): {remedy}") from error
