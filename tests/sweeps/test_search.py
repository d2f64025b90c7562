"""Trials of a sweep: each run once, pruned, failed, stopped and killed ones, and several workers."""

import importlib
import re
import signal
import sqlite3
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

import optuna
from optuna.trial import TrialState, create_trial

from spat_train.errors import InputError
from spat_train.runtime.run_folder import RunFolder
from spat_train.runtime.signals import Stopped
from spat_train.sweeps import command, report, search
from spat_train.training.run import TrainingError
from spat_train.training.trainer import train
from tests.sweeps.helpers import formula, planned, study_of, work
from tests.training.helpers import TIMEOUT, after, assert_same_run, events, on_one_thread, processes, send, weights

ALPHAS = {"alpha": [0.0, 0.2]}

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "error:The reported value")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(search, "POLL", 0.05)


def states(study) -> dict[str, str]:
    return {name: trial.state.name for name, trial in search.latest(study).items()}


def test_a_grid_of_real_runs(tmp_path, capsys):
    """Each is the ordinary run of its command, and is not trained again by the next worker."""
    sweep = planned(tmp_path, ALPHAS, {"epochs": 2})
    work(sweep)
    config = sweep.cells["alpha0.2-seed0"].config
    expected = train(replace(config, out=tmp_path / "expected"))
    assert_same_run(config.out, tmp_path / "expected")
    (trial,) = [t for name, t in search.latest(study_of(sweep)).items() if name == "alpha0.2-seed0"]
    assert (trial.value, trial.params) == (expected.best["pgd"], {"alpha": 0.2, "seed": 0})
    assert trial.intermediate_values == {e["epoch"]: e["pgd"] for e in events(tmp_path / "expected", "validation")}
    assert trial.user_attrs["best"] == expected.best | {"images": 15}
    before = weights(config.out)["id"]
    command.run(sweep)
    assert len(study_of(sweep).trials) == 2
    assert weights(config.out)["id"] == before
    assert {path.name for path in sweep.out.iterdir()} == {
        "alpha0-seed0", "alpha0.2-seed0", "sweep.db", "sweep.md", "sweep.json", "sweep.png", "sweep.pdf"
    }  # fmt: skip
    assert "all 2 runs are done" in capsys.readouterr().err
    train(config)
    assert "is finished: nothing is done again" in capsys.readouterr().err


def test_halving_prunes_as_the_paper_has_it(tmp_path, monkeypatch, capsys):
    """Li et al.: a run goes on beyond epochs 1, 2 and 4 where it is in the best half of those that came there."""
    alphas = [0.2, 0.7, 0.3, 0.1, 0.5, 0.6]
    sweep = planned(tmp_path, {"alpha": alphas}, {"epochs": 8}, search="halving", min_epochs=1, reduction=2)
    monkeypatch.setattr(search, "train", formula(lambda c, epoch: 100 * c.alpha + epoch))
    study = work(sweep)
    order = [trial.params["alpha"] for trial in study.trials]
    assert sorted(order) == sorted(alphas)
    rungs, expected = {1: [], 2: [], 4: []}, {}
    for alpha in order:
        expected[alpha] = 8
        for epoch, rung in rungs.items():
            rung.append(alpha)
            if alpha not in sorted(rung, reverse=True)[: max(1, len(rung) // 2)]:
                expected[alpha] = epoch
                break
    assert {trial.params["alpha"]: trial.last_step for trial in study.trials} == expected
    for trial in study.trials:
        assert trial.state.name == ("COMPLETE" if trial.last_step == 8 else "PRUNED")
    assert capsys.readouterr().err.count(": pruned after epoch ") == sum(epochs < 8 for epochs in expected.values())
    assert len(set(expected.values())) > 2, "otherwise this tests little"


def test_halving_compares_within_for_each(tmp_path, monkeypatch):
    """At half the eps all have more accuracy, which prunes nobody."""
    grid = {"alpha": [0.1, 0.2], "eps": [4.0, 8.0]}
    monkeypatch.setattr(search, "train", formula(lambda c, epoch: 90 - 5 * c.eps + 100 * c.alpha))
    sweep = planned(tmp_path, grid, search="halving", reduction=2, for_each=["eps"])
    complete = {name for name, state in states(work(sweep)).items() if state == "COMPLETE"}
    assert {"alpha0.2-eps4-seed0", "alpha0.2-eps8-seed0"} <= complete


@pytest.mark.parametrize("once", [True, False])
def test_a_run_that_was_taken_up_again_counts_once(once):
    """One run of three goes on. Counted twice, as Optuna's own pruner does, the worst would make them four, and two go on."""
    pruner = search.Halving((), 1, 2) if once else optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for value, state, history in ((30.0, TrialState.FAIL, []), (30.0, TrialState.PRUNED, [0]), (50.0, TrialState.PRUNED, [])):
        attributes = {"completed_rung_0": value, "retry_history": history}
        study.add_trial(create_trial(state=state, intermediate_values={1: value}, system_attrs=attributes))
    trial = study.ask()
    trial.report(40.0, 1)
    assert trial.should_prune() is once


def test_a_pruned_run_is_whole(tmp_path):
    """Its folder is that of a run which goes on to the end of an uninterrupted one."""
    sweep = planned(tmp_path, {"lr": [0.05, 1e-6]}, search="halving", reduction=4)
    study = work(sweep)
    assert sorted(states(study).values()) == ["COMPLETE", "PRUNED"]
    (name,) = [name for name, state in states(study).items() if state == "PRUNED"]
    config = sweep.cells[name].config
    assert weights(config.out)["progress"]["epoch"] == search.latest(study)[name].last_step < 4
    train(config)
    train(replace(config, out=tmp_path / "expected"))
    assert_same_run(config.out, tmp_path / "expected")


def test_a_failed_run_does_not_end_the_sweep(tmp_path, monkeypatch):
    def accuracy(config, epoch):
        if config.alpha == 0.0 and epoch == 2:
            raise TrainingError("the loss of epoch 2 is not finite")
        return 50.0

    calls = []
    monkeypatch.setattr(search, "train", formula(accuracy, calls))
    sweep = planned(tmp_path, ALPHAS)
    for _ in range(2):
        assert states(work(sweep)) == {"alpha0-seed0": "FAIL", "alpha0.2-seed0": "COMPLETE"}
    assert calls == ["alpha0-seed0", "alpha0.2-seed0"]
    rows = [report.row(name, {"alpha": 0.0, "seed": 0}, trial) for name, trial in search.latest(study_of(sweep)).items()]
    text = report.markdown(sweep.spec, report.numbers(sweep, rows))
    assert "| failed: the loss of epoch 2 is not finite | 1 | 60.00 (" in text
    assert "Runs: 1 failed, 1 complete" in text


def test_an_error_of_an_option_ends_it_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    def refuse(config, on_validation):
        raise InputError("--batch-size 128: out of memory")

    sweep = planned(tmp_path, ALPHAS)
    monkeypatch.setattr(search, "train", refuse)
    said = (
        "run alpha0-seed0: --batch-size 128: out of memory. 2 of 2 runs are not done: when it is mended, the same command goes on"
    )
    with pytest.raises(InputError, match=said):
        work(sweep)
    monkeypatch.setattr(search, "train", formula(lambda c, epoch: 50.0))
    assert set(states(work(sweep)).values()) == {"COMPLETE"}
    said = capsys.readouterr().err
    assert "alpha0-seed0: run 1 of 2, 1 done, taken up again\n" in said
    assert re.search(r"alpha0.2-seed0: run 2 of 2, 0 done\n", said)


@pytest.mark.parametrize(("error", "code"), [(Stopped(15, "stopped by signal 15"), 143), (KeyboardInterrupt(), 130)])
def test_a_stopped_sweep_says_how_it_goes_on(tmp_path, monkeypatch, error, code):
    def stop(config, on_validation):
        raise error

    monkeypatch.setattr(search, "train", stop)
    with pytest.raises(Stopped, match="the same command goes on with the sweep") as stopped:
        command.run(planned(tmp_path, ALPHAS))
    assert stopped.value.exit_code == code


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stop_and_go_on(tmp_path, monkeypatch, number):
    """In epoch 3 of 4. No step is reported twice, which would be a warning, and the run is that of an uninterrupted training."""
    sweep = planned(tmp_path, {"alpha": [0.2]})
    monkeypatch.setattr(search, "train", partial(train, on_step=after(12, partial(send, number))))
    with pytest.raises(Stopped):
        work(sweep)
    (stopped,) = study_of(sweep).trials
    assert (stopped.state, sorted(stopped.intermediate_values)) == (TrialState.FAIL, [1, 2])
    monkeypatch.setattr(search, "train", train)
    study = work(sweep)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert sorted(study.trials[1].intermediate_values) == [1, 2, 3, 4]
    config = sweep.cells["alpha0.2-seed0"].config
    assert [e["epoch"] for e in events(config.out, "start")] == [1, 3]
    train(replace(config, out=tmp_path / "expected"))
    assert_same_run(config.out, tmp_path / "expected")


def test_a_folder_at_which_another_process_works_is_waited_for(tmp_path, monkeypatch):
    sweep, said = planned(tmp_path, {"alpha": [0.2]}, {"epochs": 1}), []
    other = RunFolder(sweep.cells["alpha0.2-seed0"].config.out)
    other.claim()

    def say(text):
        said.append(text)
        if "another run is at work there" in text:
            other.release()

    monkeypatch.setattr(search, "say", say)
    assert states(work(sweep)) == {"alpha0.2-seed0": "COMPLETE"}
    assert len(said) == 3


def test_a_worker_that_counts_as_killed_leaves_its_trial(tmp_path, monkeypatch, capsys):
    sweep, calls = planned(tmp_path, {"alpha": [0.2]}), []

    def accuracy(config, epoch):
        if len(calls) == 1 and epoch == 2:
            study_of(sweep).tell(0, state=TrialState.FAIL)  # as a worker does that hears no heartbeat
        return 50.0

    monkeypatch.setattr(search, "train", formula(accuracy, calls))
    study = work(sweep)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert "another worker goes on with it" in capsys.readouterr().err


def test_doubles_do_not_run(tmp_path, monkeypatch):
    """Workers without a common file system may queue a run twice, or take what is not there."""
    sweep, calls = planned(tmp_path, ALPHAS), []
    study = study_of(sweep)
    study.enqueue_trial({"alpha": 0.2, "seed": 0}, user_attrs={"run": "alpha0.2-seed0"})
    study.add_trial(create_trial(state=TrialState.WAITING))
    monkeypatch.setattr(search, "train", formula(lambda c, epoch: 50.0, calls))
    study = work(sweep)
    for _ in range(2):
        search.Worker(sweep, study).take(lambda: None)
    assert sorted(calls) == ["alpha0-seed0", "alpha0.2-seed0"]
    assert states(study) == dict.fromkeys(sorted(calls), "COMPLETE")
    assert TrialState.WAITING not in {trial.state for trial in study.trials}


def test_of_a_run_that_was_queued_again_twice_at_once_one_goes_on(tmp_path):
    """And where that one is stopped too, it is queued again, not taken for a double of the other."""
    sweep = planned(tmp_path, {"alpha": [0.2]})
    study = study_of(sweep)
    for number, history in enumerate(([], [0], [0], [0, 1])):
        if number:
            attributes = {"failed_trial": 0, "retry_history": history}
            run = {"run": "alpha0.2-seed0"}
            study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=run, system_attrs=attributes))
        expected = {0: 0, 1: 1, 2: 1, 3: 3}[number]
        assert search.latest(study)["alpha0.2-seed0"].number == expected


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_worker_that_was_killed_before_its_first_sign_of_life_is_replaced(tmp_path):
    study = study_of(sweep := planned(tmp_path, {"alpha": [0.2]}))
    study.ask()
    worker = search.Worker(sweep, study)
    assert worker.queue_again() == [TrialState.RUNNING]
    with sqlite3.connect(sweep.out / "sweep.db") as database:  # an hour passes
        changed = database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')").rowcount
    assert changed == 1
    assert worker.queue_again() == [TrialState.WAITING]


def test_a_sweep_is_found_by_another_path_to_its_folder(tmp_path, monkeypatch):
    sweep = planned(tmp_path, ALPHAS)
    names = [trial.number for trial in study_of(sweep).trials]
    monkeypatch.chdir(tmp_path)
    again = search.open_study(planned(tmp_path, ALPHAS, {"out": Path("out")}), None, 30, create=False)
    assert [trial.number for trial in again.trials] == names


def test_a_sweep_may_be_older_than_an_option(tmp_path):
    sweep = planned(tmp_path, ALPHAS)
    study = study_of(sweep)
    before = study.user_attrs["sweep"]
    study.set_user_attr("sweep", {name: value for name, value in before.items() if name != "ema"})
    study_of(sweep)
    with pytest.raises(InputError, match="ema: 0.0 -> 0.9"):
        study_of(planned(tmp_path, ALPHAS, {"ema": 0.9}))


def test_another_spec_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "train", formula(lambda c, epoch: 50.0))
    work(planned(tmp_path, ALPHAS))
    work(planned(tmp_path, ALPHAS, {"eval_batch_size": 3, "test": True}))  # changes no weights
    with pytest.raises(
        InputError, match=r"its sweep was begun otherwise \(epochs: 4 -> 5\): give the same, or choose another --out"
    ):
        study_of(planned(tmp_path, ALPHAS, {"epochs": 5}))
    with pytest.raises(InputError, match=r"data: digits -> mnist"):
        study_of(planned(tmp_path, ALPHAS, {"data": "mnist"}))
    with pytest.raises(InputError, match=r"grid: {'alpha': \[0.0, 0.2\]} -> {'alpha': \[0.0, 0.3\]}"):
        study_of(planned(tmp_path, {"alpha": [0.0, 0.3]}))


def test_a_damaged_storage(tmp_path):
    sweep = planned(tmp_path, ALPHAS)
    study_of(sweep)
    file = sweep.out / "sweep.db"
    whole = file.read_bytes()
    for damaged in (b"no database" * 100, whole[: len(whole) // 2], whole[:4096] + bytes(len(whole) - 4096)):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="--storage .*sweep.db: it cannot be (opened|read) .*: "):
            study_of(sweep)


def test_storages_that_do_not_open(tmp_path, monkeypatch):
    sweep = planned(tmp_path, ALPHAS)
    for driver in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(
        InputError, match=r"--storage postgresql://me:\*\*\*@host/db: psycopg\w* is not installed: pip install .*psycopg"
    ):
        search.open_study(sweep, "postgresql://me:secret@host/db", 30)
    for url in ("sweep.db", "nodb://x", f"sqlite:///{tmp_path}/no/folder/sweep.db"):
        with pytest.raises(InputError, match=f"--storage {re.escape(url)}: it cannot be opened"):
            search.open_study(sweep, url, 30)
    with pytest.raises(InputError, match="--report: --out .* holds no sweep"):
        command.run(sweep, report_only=True)
    assert not sweep.out.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun"):
        command.run(sweep)


def test_without_optuna_the_command_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "optuna"] + ["optuna"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "spat_train.sweeps.search")
    monkeypatch.delattr("spat_train.sweeps.search")
    importlib.reload(command)  # works, as that of the command line has to
    with pytest.raises(InputError, match=r"sweep: optuna.*: pip install '.\[sweep\]'"):
        command.run(planned(tmp_path, ALPHAS))


# ---- several workers


def _work(sweep, heartbeat: int, die: bool = False) -> None:
    """A worker, which may kill itself in epoch 3 of its first run."""
    search.POLL = 0.1
    if die:
        search.train = partial(train, on_step=after(12, partial(send, signal.SIGKILL)))
    command.run(sweep, heartbeat=heartbeat)


def _start(*arguments):
    process = processes().Process(target=on_one_thread, args=(_work, *arguments))
    process.start()
    return process


@pytest.mark.slow
def test_two_workers_do_every_run_once(tmp_path):
    sweep = planned(tmp_path, {"alpha": [0.0, 0.2], "eps": [8.0, 25.5]}, {"epochs": 1})
    workers = [_start(sweep, 30) for _ in range(2)]
    for worker in workers:
        worker.join(TIMEOUT)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [trial.state.name for trial in study_of(sweep).trials] == ["COMPLETE"] * 4
    assert [len(events(cell.config.out, "start")) for cell in sweep.cells.values()] == [1] * 4


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path):
    """By kill -9 in epoch 3: the other worker goes on from the checkpoint, and reports no step twice."""
    sweep = planned(tmp_path, ALPHAS)
    killed = _start(sweep, 1, True)
    while not any(t.state == TrialState.RUNNING for t in study_of(sweep).trials):
        time.sleep(0.05)
    other = _start(sweep, 1)
    for worker in (killed, other):
        worker.join(TIMEOUT)
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    study = study_of(sweep)
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "COMPLETE", "FAIL"]
    (name,) = [trial.user_attrs["run"] for trial in study.trials if trial.state == TrialState.FAIL]
    config = sweep.cells[name].config
    assert [e["epoch"] for e in events(config.out, "start")] == [1, 3]
    assert sorted(search.latest(study)[name].intermediate_values) == [1, 2, 3, 4]
    train(replace(config, out=tmp_path / "expected"))
    assert_same_run(config.out, tmp_path / "expected")
