"""The runs of a sweep as trials of an Optuna study, which any number of workers share through its storage.

Every run is queued once, and Optuna gives a queued trial to one worker. (Its GridSampler gives a cell to two where workers start
or end together, as its documentation says.) A trial whose worker was stopped, or killed (its heartbeat ends), becomes FAIL and is
queued again by Optuna's RetryHeartbeatStaleTrialCallback, under a new number with its reports. The run itself goes on from its
checkpoint.
"""

import copy
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from ..config import Config
from ..errors import InputError, InUseError, first_line
from ..runtime.run_folder import RunFolder
from ..training.checkpoint import say
from ..training.run import Result, Run, TrainingError
from ..training.trainer import train
from .spec import Sweep

POLL = 2.0  # seconds between two looks at what other workers do
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}  # package by module


@contextmanager
def quiet() -> Iterator[None]:
    """Within, Optuna says nothing that `say` says too."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


@contextmanager
def alone(sweep: Sweep) -> Iterator[None]:
    """Within, no other worker on this file system is: two may not make the tables of a storage, or take a trial, at once."""
    lock = RunFolder(sweep.out)
    while True:
        try:
            lock.claim()
            break
        except InUseError:
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


# ---- the study


def open_study(sweep: Sweep, url: str | None, heartbeat: int, create: bool = True) -> Study:
    """The study of the sweep, with all its runs in the queue.

    Args:
        url: of the storage. None: SQLite, in the folder of the sweep.
        heartbeat: seconds between signs of life of a worker. One that gives none for three times as long counts as killed.
        create: make it where there is none.

    Raises:
        InputError: the storage cannot be opened, there is no study, or it was begun with another spec or other options.
    """
    file = sweep.out / "sweep.db"
    if not create and not (sweep.out.is_dir() and (url or file.is_file())):
        raise InputError(f"--report: --out {sweep.out} holds no sweep: give its folder, or run it first")
    with alone(sweep), _readable(url or str(file)):
        storage = _open_storage(url or f"sqlite:///{file}", heartbeat)
        names = optuna.get_all_study_names(storage)
        name = names[0] if names and not url else str(sweep.out)  # a folder has one sweep, by whatever path it was begun
        if not create and name not in names:
            raise InputError(f"--report: the storage holds no sweep {name}: give its --out, or run it first")
        pruner: BasePruner = NopPruner()
        if sweep.spec.search == "halving":
            pruner = Halving(sweep.spec.for_each, sweep.spec.min_epochs or 1, sweep.spec.reduction or 3)
        study = optuna.create_study(storage=storage, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True)
        _compare(sweep, study)
        _queue(sweep, study)
    return study


@contextmanager
def _readable(storage: str) -> Iterator[None]:
    """Within, what a damaged database makes Optuna raise becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except (OptunaError, SQLAlchemyError, ValueError, KeyError, TypeError) as error:
        shown, why = _shown(storage), f"{type(error).__name__}: {first_line(error)[:200]}"
        raise InputError(f"--storage {shown}: it cannot be read ({why}): restore it, or choose another --out") from error


def _shown(url: str) -> str:
    """`url` without its password."""
    return re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", url)


def _open_storage(url: str, heartbeat: int) -> RDBStorage:
    shown = _shown(url)
    patience: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, patience, heartbeat_interval=heartbeat, grace_period=3 * heartbeat)
    except ImportError as error:
        module = getattr(error.__cause__, "name", None) or "its driver"
        package = DRIVERS.get(module, module)
        raise InputError(f"--storage {shown}: {module} is not installed: pip install {package}") from error
    except (SQLAlchemyError, RuntimeError, ValueError) as error:
        remedy = "give sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME of a database that is there"
        raise InputError(f"--storage {shown}: it cannot be opened ({first_line(error)}): {remedy}") from error


def _compare(sweep: Sweep, study: Study) -> None:
    now, before = sweep.record(), study.user_attrs.get("sweep")
    if before is None:
        study.set_user_attr("sweep", now)
        return
    before = Config().to_dict() | before  # it may be older than an option
    if changed := [f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]:
        listed = "; ".join(changed)
        raise InputError(f"--out {sweep.out}: its sweep was begun otherwise ({listed}): give the same, or choose another --out")


def _queue(sweep: Sweep, study: Study) -> None:
    """Queue the runs that are not there yet, for halving in random order: it compares a run with those before it alone."""
    names = list(sweep.cells)
    if sweep.spec.search == "halving":
        random.Random(0).shuffle(names)
    there = latest(study)
    for name in names:
        if name not in there:
            study.enqueue_trial(sweep.cells[name].params, user_attrs={"run": name})


# ---- what the trials are


def _before(trial: FrozenTrial) -> list[int]:
    """The numbers under which the same run was begun before."""
    return RetryHeartbeatStaleTrialCallback.retry_history(trial)


def latest(study: Study, until: int | None = None) -> dict[str, FrozenTrial]:
    """By run, its trial, the last one where it was taken up again; of those before the number `until`.

    Others are doubles: workers without a file system in common may queue a run, or take none, at once.
    """
    found: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False)[:until]:
        run = trial.user_attrs.get("run")
        if run and (run not in found or found[run].number in _before(trial)):
            found[run] = trial
    return found


class Halving(SuccessiveHalvingPruner):
    """Asynchronous successive halving (Li et al., 2020) among the trials that have the same `for_each`; each run counts once."""

    def __init__(self, for_each: tuple[str, ...], min_epochs: int, reduction: int):
        super().__init__(min_resource=min_epochs, reduction_factor=reduction)
        self.for_each = for_each

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        def field(**options: Any) -> list[FrozenTrial]:
            trials = study.get_trials(**options)
            again = {number for each in trials for number in _before(each)}
            return [t for t in trials if t.number not in again and self._among(t) == self._among(trial)]

        view = copy.copy(study)
        view.get_trials = field  # type: ignore[method-assign,assignment]
        return super().prune(view, trial)

    def _among(self, trial: FrozenTrial) -> list[Any]:
        return [trial.params.get(factor) for factor in self.for_each]


# ---- a worker


def give_first_signs(study: Study) -> None:
    """Give a sign of life for trials that have none: a worker killed before its first would otherwise never count as killed."""
    storage: RDBStorage = study._storage._backend  # type: ignore[attr-defined]  # Optuna puts a cache before it
    with storage.engine.connect() as connection:
        known = set(connection.execute(text("SELECT trial_id FROM trial_heartbeats")).scalars())
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial._trial_id not in known:
            storage.record_heartbeat(trial._trial_id)


class Worker:
    """Runs trials until all of the sweep are finished, also those of workers that are killed meanwhile."""

    def __init__(self, sweep: Sweep, study: Study):
        self.sweep, self.study = sweep, study
        self.number: int | None = None  # of the trial at work
        self.replaced = False  # it counted as killed, and another worker goes on with it

    def work(self, look: Callable[[], None]) -> None:
        """Run what is queued, and wait for what others run.

        Args:
            look: called before each run; what it raises ends the work.

        Raises:
            InputError, SaveError, Stopped: as `train` does. The trial is queued again when a worker looks next.
        """
        waited = False
        while True:
            look()
            with ExitStack() as turn:
                turn.enter_context(alone(self.sweep))
                states = self.queue_again()
                if TrialState.WAITING in states:
                    self.take(turn.close)
                    continue
            running = states.count(TrialState.RUNNING)
            if not running:
                failed = states.count(TrialState.FAIL)
                say(f"all {len(states)} runs are done" + f", but {failed} failed" * bool(failed))
                return
            if not waited:
                say(f"waiting for {running} runs of other workers, to go on with those that are killed; Ctrl-C loses nothing")
            waited = True
            time.sleep(POLL)

    def queue_again(self) -> list[TrialState]:
        """Queue the runs whose worker was stopped or killed. Returns the states of all."""
        give_first_signs(self.study)
        fail_stale_trials(self.study)
        for trial in latest(self.study).values():
            if trial.state == TrialState.FAIL and "error" not in trial.user_attrs:
                RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(self.study, trial)
        return [trial.state for trial in latest(self.study).values()]

    def done(self) -> int:
        """How many runs are complete, pruned, or failed for good."""
        trials = latest(self.study).values()
        return sum(t.state.is_finished() and (t.state != TrialState.FAIL or "error" in t.user_attrs) for t in trials)

    def take(self, begun: Callable[[], None]) -> None:
        """Run one trial. `begun` is called when it is taken."""
        self.number, self.replaced = None, False

        def objective(trial: Trial) -> float:
            self.number = trial.number
            begun()
            try:
                return self.run(trial)
            except UpdateFinishedTrialError:
                self.replaced = True
                raise

        try:
            self.study.optimize(objective, n_trials=1, catch=(TrainingError,), gc_after_trial=True)
        except BaseException as error:
            if self.number is not None:
                self.study.tell(self.number, state=TrialState.FAIL, skip_if_finished=True)
            if not (self.replaced and isinstance(error, Exception)):
                raise
            say(f"trial {self.number} gave no sign of life for long, and another worker goes on with it")

    def run(self, trial: Trial) -> float:
        """The best held-out accuracy of the trial's run, in percent."""
        runs = latest(self.study, trial.number + 1)
        name, own = next(((n, t) for n, t in runs.items() if t.number == trial.number), (None, None))
        if name is None or own is None:
            raise optuna.TrialPruned("a double")
        for factor, levels in self.sweep.spec.factors.items():
            trial.suggest_categorical(factor, list(levels))
        trial.suggest_categorical("seed", sorted({cell.params["seed"] for cell in self.sweep.cells.values()}))

        def on_validation(run: Run, record: dict) -> None:
            assert run.progress.best
            trial.set_user_attr("best", run.progress.best | {"images": len(run.held_out)})
            if record["epoch"] not in own.intermediate_values:  # of an earlier trial of this run
                trial.report(record[self.sweep.maximise], record["epoch"])
            if not run.finished and trial.should_prune():
                say(f"{name}: pruned after epoch {record['epoch']}, as others were better then")
                raise optuna.TrialPruned

        cells, again = list(self.sweep.cells), ", taken up again" * bool(_before(own))
        say(f"{name}: run {cells.index(name) + 1} of {len(cells)}, {self.done()} done{again}")
        try:
            result = self.train(name, on_validation)
            if result.best is None:
                raise InputError("no image is held out, by which runs are compared: give --holdout, or more images")
        except InputError as error:
            left = f"{len(cells) - self.done()} of {len(cells)} runs are not done"
            raise InputError(f"run {name}: {error}. {left}: when it is mended, the same command goes on with them") from error
        except TrainingError as error:
            trial.set_user_attr("error", str(error))
            say(f"{name} failed, and the sweep goes on: {error}")
            raise
        trial.set_user_attr("best", result.best | {"images": result.held_out})
        trial.set_user_attr("test", result.test)
        print(result.summary, file=sys.stderr)
        return result.best[self.sweep.maximise]

    def train(self, name: str, on_validation: Callable[[Run, dict], None]) -> Result:
        """Train, or go on, when no other process is at work in the run's folder."""
        waited = False
        while True:
            try:
                return train(self.sweep.cells[name].config, on_validation=on_validation)
            except InUseError as error:
                if not waited:
                    say(f"{error}; this worker waits")
                waited = True
                time.sleep(POLL)
