"""Interruptions: stopped or killed at any moment, a run goes on to the same bits, and its folder stays whole."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.runtime import atomic_write, logs, rounding, signals
from spat_train.runtime.atomic_write import SaveError
from spat_train.runtime.run_folder import RunFolder
from spat_train.runtime.signals import Stopped
from spat_train.training import setup
from spat_train.training.run import Run, TrainingError
from spat_train.training.trainer import train
from tests.training import helpers
from tests.training.helpers import EVERYTHING, TIMEOUT, assert_same, events, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- signals; kills are among tests/faults


ADAM = {"method": "trades", "optimizer": "adam", "lr": 1e-3, "schedule": "one-cycle"}


@pytest.mark.parametrize(("number", "options"), [(signal.SIGTERM, EVERYTHING), (signal.SIGINT, ADAM)])
@pytest.mark.parametrize("steps", [1, 5, 8, 12])
def test_signals_save_first(tmp_path, monkeypatch, number, options, steps):
    config, before, save = helpers.expected_and_other(tmp_path, **options), signal.getsignal(number), Run.save
    with monkeypatch.context() as patched:
        if steps == 8:  # a second one does not stop the save
            patched.setattr(Run, "save", lambda run: (run.wish.number and helpers.send()) or save(run))
        stop = helpers.after(steps, partial(helpers.send, number))
        assert helpers.train_until_stopped(config, stop) == 128 + number
    assert signal.getsignal(number) is before
    progress = weights(config.out)["progress"]
    assert 5 * progress["epoch"] + progress["step"] == steps
    (config.out / "best.pt").unlink(missing_ok=True)  # it is written after last.pt: killed in between, there may be none
    helpers.assert_ends_alike(config)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"ema": 0.9, "optimizer": "adam", "lr": 1e-3}])
def test_a_stopped_run_goes_on_on_the_gpu(tmp_path, options):
    """Generators, scaler and fused optimisers too; cuDNN's sums are not repeatable to the last bit."""
    config = helpers.expected_and_other(tmp_path, method="mart", alpha=0.3, device="cuda", **options)
    helpers.train_until_stopped(config, helpers.after(8, helpers.send))
    train(config)
    ours, theirs = (weights(tmp_path / name) for name in ("other", "expected"))
    assert ours["progress"]["epoch"] == 4
    assert_same(ours["processes"][0]["random"], theirs["processes"][0]["random"])
    for name, t in theirs["model"].items():
        assert (ours["model"][name] - t).float().norm() <= 0.05 * t.float().norm(), name


@pytest.fixture
def hangups():
    """SIGHUP has its default, though these tests are run by nohup."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, kept)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("name", ["load_images", "make_model"])
def test_signals_before_the_first_step_end_the_run_at_once(tmp_path, monkeypatch, number, name):
    original = getattr(setup, name)

    def interrupted(*args, **options):
        try:
            helpers.send(number)
        except Exception:  # of a reader that takes everything for a broken file
            pytest.fail("the signal was swallowed")
        return original(*args, **options)

    monkeypatch.setattr(setup, name, interrupted)
    with pytest.raises(Stopped, match="before the first step: there is nothing to save") as stop:
        train(settings(tmp_path / "runs" / "run"))
    assert stop.value.exit_code == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("copy", "codes"), [(0.0, [143]), (600.0, [])])
def test_a_second_sigterm_ends_what_never_comes_to_an_end(monkeypatch, copy, codes):
    """Though the main thread is busy outside of Python; not one that may be the first, sent twice."""
    seen, busy = [], [True]
    monkeypatch.setattr(signals, "COPY", copy)
    monkeypatch.setattr(os, "_exit", lambda code: seen.append((code, *busy)))
    twice = "import os, sys, time; [(time.sleep(0.1), os.kill(int(sys.argv[1]), 15)) for _ in range(2)]"
    with signals.GracefulStop().heard() as wish:
        sender = subprocess.Popen([sys.executable, "-S", "-c", twice, str(os.getpid())])
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds outside of Python
        busy.clear()
        sender.wait()
    assert seen == [(code, True) for code in codes]
    assert wish.number == signal.SIGTERM


def test_signals_of_forked_processes_are_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(signals, "COPY", 0.0)
    monkeypatch.setattr(os, "_exit", seen.append)
    with signals.GracefulStop().heard() as wish:
        for _ in range(2):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(TIMEOUT,))
            child.start()
            time.sleep(0.1)
            child.terminate()
            time.sleep(0.1)
            child.kill()
            child.join()
    assert not seen
    assert not wish.number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_reader_that_dies_ends_the_run(tmp_path, number):
    config = helpers.expected_and_other(tmp_path, stream=True, epochs=3, limit=400, log_every=1)
    name = {signal.SIGKILL: "Killed", signal.SIGBUS: "Bus error"}[number]
    with pytest.raises(TrainingError, match=f"reader process .*({name}|exited).*--workers 0.*last.pt; with --resume"):
        train(config, on_step=helpers.after(15, lambda: [os.kill(p.pid, number) for p in multiprocessing.active_children()[:1]]))
    for reader in multiprocessing.active_children():  # killed, but perhaps not gone yet
        reader.join(TIMEOUT)
        assert not reader.is_alive()
    helpers.assert_ends_alike(config)


def exit_code(config: Config) -> None:
    os.setsid()
    try:
        train(config)
    except Stopped as stopped:
        os._exit(stopped.exit_code)


def test_a_signal_to_the_group_does_not_kill_the_readers_before_the_save(tmp_path):
    config = settings(tmp_path / "run", stream=True, workers=2, limit=None, holdout=0, batch_size=16, epochs=1000)
    child = helpers.processes().Process(target=exit_code, args=(config,))
    child.start()
    while not events(tmp_path / "run", "train"):
        assert child.is_alive()
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGTERM)
    child.join(TIMEOUT)
    assert child.exitcode == 143
    assert weights(tmp_path / "run")["progress"]["count"] >= 0


@pytest.mark.parametrize("during_test", [False, True])
def test_a_signal_during_an_evaluation(tmp_path, monkeypatch, during_test):
    """In the test, the model has its best weights, which are not the last ones."""
    config, signals_left = helpers.expected_and_other(tmp_path, epochs=3, test=True), iter([helpers.send])

    def interrupted(run):
        if run.finished == during_test:
            next(signals_left)()
        between_batches(run)

    with monkeypatch.context() as patched:
        between_batches = Run.between_batches
        patched.setattr(Run, "between_batches", interrupted)
        helpers.train_until_stopped(config)
    assert weights(config.out)["progress"]["step"] == (0 if during_test else 5)
    if during_test:
        helpers.assert_same_run(config.out, tmp_path / "expected")
    assert helpers.assert_ends_alike(config).test is not None


# ---- what a resumed run compares


@pytest.mark.parametrize("options", [{"test": True}, {"test": False}, {"test": True, "patience": 1, "lr": 1e-9}])
def test_a_finished_run_resumes_to_its_result(tmp_path, monkeypatch, capsys, options):
    config = settings(tmp_path / "run", epochs=3, **options)
    first = train(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.delattr(Run, "epoch")
    monkeypatch.delattr(Run, "test")
    again = train(replace(config, resume=True))
    assert "run is finished: nothing is done again" in capsys.readouterr().err
    assert (again.test, again.best, again.summary) == (first.test, first.best, first.summary)
    assert_same(dict(again.model.state_dict()), dict(first.model.state_dict()))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    if first.test:
        assert json.loads(before["result.json"])["test"] == first.test


@pytest.mark.parametrize(
    ("schedule", "before", "milestones"), [("constant", None, None), ("piecewise", (2,), (2, 4)), ("piecewise", None, (2, 3))]
)
def test_more_epochs_extend_a_finished_run(tmp_path, schedule, before, milestones):
    expected = settings(tmp_path / "expected", epochs=4, test=True, schedule=schedule, milestones=milestones)
    result = train(expected)
    longer = replace(expected, out=tmp_path / "longer", resume=True)
    train(replace(longer, epochs=2, milestones=before))
    assert train(longer).test == result.test
    helpers.assert_same_run(tmp_path / "longer", tmp_path / "expected")
    with pytest.raises(InputError, match=r"other options \(epochs: 4 -> 3(; .*)?\): give the same"):
        train(replace(longer, epochs=3, milestones=milestones and (2, 3)))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"epochs": 4}, "epochs: 2 -> 4, which --schedule cosine cannot change"),
        ({"schedule": "one-cycle"}, {"epochs": 4}, "epochs: 2 -> 4, which --schedule one-cycle cannot change"),
        ({"schedule": "piecewise"}, {"epochs": 4}, "epochs: 2 -> 4, where lr dropped at 2: let --milestones begin with these"),
        ({}, {"alpha": 0.5}, r"alpha: 0.0 -> 0.5.*give the same"),
        ({}, {}, "--model tests.training.helpers:network: its weights differ from those in"),
    ],
)
def test_changed_options_and_models_are_refused(tmp_path, monkeypatch, options, changes, message):
    config = settings(tmp_path / "run", epochs=2, **options)
    train(config)
    other = helpers.for_three_classes(3).append(nn.Linear(3, 10))
    monkeypatch.setattr("tests.training.helpers.network", lambda num_classes: other)
    with pytest.raises(InputError, match=message):
        train(replace(config, resume=True, **changes))


def test_options_that_do_nothing_may_be_left_out_on_resume():
    """Older versions took the options of attacks for --method standard, and their checkpoints know no newer options."""
    older = Config(method="standard", steps=40, bn_mode="train", epochs=3).to_dict()
    newer = ("replays", "inner_lr", "entropy", "inner_samples", "classifier", "catastrophic_overfitting")
    older = {name: value for name, value in older.items() if name not in newer}
    assert Config(method="standard", epochs=3).differences(older) == []
    assert Config(epochs=3).differences(older) == ["method: standard -> madry", "steps: 40 -> None", "bn_mode: train -> eval"]


@pytest.mark.parametrize("changed", [("train",), ("test",), ("extra",), ("train", "test", "extra")])
def test_changed_images_are_refused(tmp_path, changed):
    data, extra = load("digits", limit=150), tmp_path / "extra.npz"
    np.savez(extra, image=data.train.pixels, label=data.train.labels)
    config = settings(tmp_path / "run", epochs=1, extra=extra)
    train(config, data)
    for name in changed:
        if name == "extra":
            np.savez(extra, image=data.train.pixels, label=9 - data.train.labels)
        else:
            getattr(data, name).pixels[3, 2, 2, 0] ^= 1
    message = rf"{' and '.join(changed)} images or labels differ .*\(--data digits, --extra {extra}\)"
    with pytest.raises(InputError, match=message):
        train(replace(config, resume=True), data)
    if changed == ("extra",):
        with pytest.raises(InputError, match="extra images or labels differ"):
            train(replace(config, extra=None, resume=True), data)


def test_moved_images_are_the_same_and_another_arithmetic_is_noted_in_a_line(tmp_path, monkeypatch, capsys):
    data, first, second = load("digits", limit=150), tmp_path / "first", tmp_path / "second"
    first.mkdir()
    arrays = {"x_train": data.train.pixels, "y_train": data.train.labels, "x_test": data.test.pixels, "y_test": data.test.labels}
    np.savez(first / "data.npz", **arrays)
    np.savez_compressed(first / "extra.npz", image=data.train.pixels, label=data.train.labels)
    config = settings(tmp_path / "run", epochs=1, schedule="constant", data=str(first / "data.npz"), extra=first / "extra.npz")
    train(config)
    first.rename(second)
    moved = replace(config, resume=True, data=str(second / "data.npz"), extra=second / "extra.npz", log_every=7)
    train(replace(moved, epochs=2))
    assert "begun with" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(second / "data.npz")
    torch_here = re.escape(str(torch.__version__))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "__version__", "2.99")
    monkeypatch.setattr(rounding, "hardware", lambda device: "another CPU")
    train(replace(moved, epochs=3))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "begun with" in line)
    changes = f"torch {torch_here}, now 2.99; device .+, now another CPU; threads 1, now 7"
    assert re.fullmatch(f"spat-train: begun with {changes}: rounding differs from here on, .*, not equal", line)


def test_a_run_goes_on_when_a_broken_picture_is_repaired(tmp_path, pictures, capsys):
    path = pictures / "train" / "dog" / "2.png"
    config = settings(
        tmp_path / "run", data=str(pictures), image_size=8, model="tests.training.helpers:for_8x8_colour", batch_size=2,
        holdout=0, epochs=2, limit=None, workers=0, checkpoint_minutes=1e-9, resume=True,
    )  # fmt: skip
    train(replace(config, out=tmp_path / "expected"))
    good = path.read_bytes()
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match="dog/2.png cannot be decoded .*: repair or remove it"):
        train(config)
    path.write_bytes(good)
    train(config)
    assert "1 of 6 train pictures, dog/2.png the first, have another size than before" in capsys.readouterr().err
    assert_same(weights(tmp_path / "run")["model"], weights(tmp_path / "expected")["model"])


# ---- the folder


def test_two_runs_do_not_share_a_folder(tmp_path):
    config = settings(tmp_path / "run", epochs=1)
    other = RunFolder(tmp_path / "run")
    other.claim()
    with pytest.raises(InputError, match="another run is at work there"):
        train(config)
    other.release()
    train(config)
    (tmp_path / "run" / "best.pt").unlink()
    assert not train(replace(config, resume=True)).model.training
    assert (tmp_path / "run" / "best.pt").exists()  # written again, though the run was over


def test_readers_that_outlive_a_run_hold_no_lock(tmp_path):
    folder, again = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    folder.claim()
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    reader = context.Process(target=lambda: begun.set() or time.sleep(TIMEOUT), daemon=True)
    reader.start()
    assert begun.wait(TIMEOUT)
    with pytest.raises(InputError, match="another run is at work there"):
        again.claim()
    folder._unlock()  # as when the run is killed
    again.claim()
    assert reader.is_alive()
    reader.kill()
    reader.join()
    again.release()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    train(settings(tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_loser_leaves_the_winner_s_folder(tmp_path, monkeypatch):
    """When two start at once, the one that made the folder may be the one that is refused."""
    winner, loser = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    flock = fcntl.flock

    def late(*args):
        with monkeypatch.context() as patched:
            patched.setattr(fcntl, "flock", flock)
            winner.claim()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another run is at work there"):
        loser.claim()
    loser.release()
    assert (tmp_path / "run").is_dir()
    winner.release()


def test_a_refused_run_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("run", "mine", "runs/of/mine", "mine/run"):
        with pytest.raises(InputError, match="there is no such file"):
            train(settings(tmp_path / name, data="nowhere.npz"))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """It is refused before any work. Where the file system turns read-only later, what was there stays."""
    (tmp_path / "kept").write_bytes(b"1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # to root, a file system alone is read-only
        with pytest.raises(InputError, match="--out .*: nothing can be written there: make it writable, or choose another"):
            train(settings(tmp_path))

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refused)
        with pytest.raises(SaveError, match=r"cannot write .*kept \(Read-only file system\); .*kept is as it was"):
            atomic_write.write(tmp_path / "kept", b"2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"1"]


def test_a_run_is_not_overwritten(tmp_path):
    config = settings(tmp_path / "run", epochs=1)
    train(config)
    with pytest.raises(InputError, match="holds a run: add --resume"):
        train(config)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    for resume, message in ((False, "holds a run"), (True, "holds best.pt but no last.pt")):
        with pytest.raises(InputError, match=message):
            train(replace(config, resume=resume))


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_checkpoint(tmp_path, size):
    config = helpers.expected_and_other(tmp_path)
    train(config)
    last = config.out / "last.pt"
    os.truncate(last, size if size >= 0 else last.stat().st_size - 50)
    with pytest.raises(InputError, match="last.pt is damaged .*previous.pt"):
        train(config)
    last.unlink()
    helpers.assert_ends_alike(config)


def _edited(value, places: tuple, new):
    """A copy of nested dicts and lists with `new` at the place that these keys lead to; ... removes it."""
    first, *rest = places
    value = [*value] if isinstance(value, list) else dict(value)
    value[first] = _edited(value[first], tuple(rest), new) if rest else new
    if new is ... and not rest:
        del value[first]
    return value


def test_checkpoints_of_others(tmp_path):
    """A file may hold anything: it is refused before a step, and nothing is written."""
    config = settings(tmp_path / "run", epochs=1, ema=0.9, test=False, schedule="constant")
    train(config)
    config, last = replace(config, epochs=2, resume=True), config.out / "last.pt"
    saved, cycle = weights(config.out), {}
    cycle["itself"] = cycle
    name = next(iter(saved["model"]))
    weight, moments = saved["model"][name], ("optimizer", "state", 0, "momentum_buffer")
    for places, new in {
        ("id",): [], ("config",): 5, ("config", "eps"): "8", ("config", "awp"): torch.zeros(2), ("config", "epochs"): 10**30,
        ("config", "lr"): float("nan"), ("progress",): ..., ("progress", "epoch"): "1", ("progress", "step"): -1,
        ("progress", "best"): {"epoch": 1}, ("progress", "best", "pgd"): None, ("progress", "sums"): {"loss": "x"},
        ("progress", "collapses"): 5, ("progress", "more"): 1, ("best",): None, ("best", name): weight[:1], ("ema",): None,
        ("ema", name): ..., ("model",): [], ("model", name): weight.to_sparse(), ("averaged",): "1", ("scaler",): None,
        moments: weight[:1], (*moments[:-1],): {}, ("optimizer", "state", 0): 5, ("optimizer", "param_groups"): [],
        ("optimizer", "param_groups", 0, "momentum"): "x", ("processes",): [], ("processes", 0, "random"): {},
        ("processes", 0, "random", "torch"): torch.zeros(3), ("processes", 0, "sums"): None, ("data",): [1],
        ("data", "train"): torch.zeros(2), ("snapshot",): {}, ("arithmetic",): cycle,
    }.items():  # fmt: skip
        torch.save(_edited(saved, places, new), last)
        before = {path: path.read_bytes() for path in config.out.iterdir()}
        with pytest.raises(InputError, match=r"^--resume: |^--model ") as refused:
            train(config)
        assert str(config.out) in str(refused.value), places
        assert {path: path.read_bytes() for path in config.out.iterdir()} == before, places


@pytest.mark.parametrize(
    ("place", "error", "expected"),
    [
        ((RunFolder, "write_best"), SaveError("full"), "full"),
        ((Run, "_load"), torch.OutOfMemoryError(), "--batch-size 32: out of memory"),
    ],
)
def test_a_checkpoint_is_not_blamed_for_the_computer(tmp_path, monkeypatch, place, error, expected):
    def failing(*_):
        raise error

    config = settings(tmp_path / "run", epochs=1, test=False, schedule="constant")
    train(config)
    monkeypatch.setattr(*place, failing)
    with pytest.raises((SaveError, InputError), match=f"^{expected}"):
        train(replace(config, epochs=2, resume=True))


def test_an_altered_config_is_noticed(tmp_path, capsys):
    """The checkpoint has the options, so nothing is lost."""
    config = settings(tmp_path / "run", epochs=1, test=False, schedule="constant")
    train(config)
    file = config.out / "config.json"
    good, options = file.read_bytes(), {k: v for k, v in json.loads(file.read_bytes()).items() if k != "digest"}
    edits = json.dumps(options | {"lr": 0.5}).encode(), good.replace(b'"lr": 0.', b'"lr": 1.'), good[:100], b"5", b"[" * 100_000
    for epochs, content in enumerate((*edits, good), 2):
        file.write_bytes(content)
        capsys.readouterr()
        train(replace(config, epochs=epochs, resume=True))
        assert ("config.json was altered or damaged: the run keeps" in capsys.readouterr().err) == (content != good), content[
            :200
        ]
        kept = json.loads(file.read_bytes())
        assert kept["lr"] == options["lr"]
        assert kept["epochs"] == epochs


def test_a_damaged_log_is_noticed(tmp_path):
    config = settings(tmp_path / "run", epochs=1, test=False, schedule="constant")
    train(config)
    log, config = config.out / "log.jsonl", replace(config, epochs=2, resume=True)
    content = log.read_bytes()
    for damaged in (content[:-5], content.replace(b"train", b"trbin", 1), bytes(5) + content[5:]):
        log.write_bytes(damaged)
        with pytest.raises(InputError, match=r"log.jsonl is damaged: .*: restore it, or remove it, and a new log begins there"):
            train(config)
        assert log.read_bytes() == damaged
    log.unlink()
    train(config)
    assert [event["epoch"] for event in events(config.out, "validation")] == [2]


def test_events_that_no_run_writes(tmp_path):
    """What is no event is left out, half a line of a killed run among it."""
    train_line = b'{"kind": "train", "epoch": 1, "step": 3, "loss": -0.5, "lr": 0.1}\n'
    log = tmp_path / "log.jsonl"
    log.write_bytes(train_line + b'{"kind": "tra\n\xff\n[]\n' + b"[" * 60_000 + b'\n{"kind": "note"}\n' + train_line)
    assert [event["loss"] for event in logs.read(tmp_path, "train")] == [-0.5, -0.5]
    for line in (
        train_line.replace(b"0.1", b'"x"'), train_line.replace(b"0.1", b"NaN"), train_line.replace(b"0.1", b"true"),
        train_line.replace(b"3", b"-3"), train_line.replace(b'"lr"', b'"rl"'), train_line.replace(b'"train"', b"[]"),
        b'{"kind": "start", "step": 1, "steps_per_epoch": 0}\n', b'{"kind": "validation", "step": 1, "epoch": 1, "pgd": 5}\n',
    ):  # fmt: skip
        log.write_bytes(train_line + line)
        with pytest.raises(InputError, match="log.jsonl: line 2 is of no run"):
            logs.read(tmp_path, "train")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_full_disk_of_the_log(tmp_path, monkeypatch):
    def full(path):
        path.touch()
        return open("/dev/full", "ab")

    monkeypatch.setattr(atomic_write, "open_to_append", full)
    with pytest.raises(SaveError, match="cannot write .*log.jsonl .*No space left"):
        train(settings(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_finalizer_is_not_lost():
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with signals.interrupts_kept() as look:
            look()
            Finalized()
            with pytest.raises(KeyboardInterrupt):
                look()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
