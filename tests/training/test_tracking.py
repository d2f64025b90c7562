"""Trackers: what they get is what log.jsonl has, nothing of the run changes, and one that fails does not end it."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.models.run_config import run_config
from spat_train.runtime import trackers
from spat_train.runtime.atomic_write import SaveError, write_torch
from spat_train.runtime.run_folder import RunFolder
from spat_train.runtime.seeding import random_state
from spat_train.training.trainer import train
from tests.training.helpers import (
    assert_ends_alike,
    assert_same,
    assert_same_run,
    events,
    expected_and_other,
    free_port,
    in_two,
    settings,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def logged(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and numbers of each line of log.jsonl but the first, by the names that trackers get."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    texts = "kind", "epoch", "step"
    return [(e["step"], {f"{e['kind']}/{k}": v for k, v in e.items() if k not in texts}) for e in lines if e["kind"] != "start"]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same by name. Without the speed, which is no run's twice."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, values in logged(folder):
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    del found["train/images_per_second"]
    return found


# ---- a run that is killed, and resumed, with each of them

RUN = """
import os, sys, torch
from dataclasses import replace
from spat_train.training.trainer import train
from tests.training.helpers import after, settings
torch.set_num_threads(1)
folder, track, steps = sys.argv[1:]
config = settings(folder, track=track, resume=True, test=True)
train(config, on_step=after(int(steps), lambda: os._exit(9)))
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Path:
    """The folder of a run with all trackers there are, killed in the third of four epochs after a line of the log that it writes
    again when it is resumed. It is compared with one that is not tracked.
    """
    base = tmp_path_factory.mktemp("tracked")
    folder, names = base / "run", [name for name in trackers.TRACKERS if trackers._installed(name)]
    variables = {"WANDB_MODE": "offline", "MLFLOW_EXPERIMENT_NAME": "ours", **store(base)}
    for steps, code in ((15, 9), (10**6, 0)):
        words = [sys.executable, "-c", RUN, str(folder), ",".join(names) or "none", str(steps)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | variables)
        assert done.returncode == code, done.stderr
        assert [step for step, _ in logged(folder)][:7] == [3, 5, 5, 8, 10, 10, 13]
        assert not done.stdout
        lines = [line for line in done.stderr.split("\n") if line.strip()]
        assert all(line.startswith(("madry", "spat-train: on 1 x ")) for line in lines), done.stderr  # its bar
    torch.set_num_threads(1)
    train(settings(base / "expected", test=True))
    assert_same_run(folder, base / "expected")
    assert points(folder) == points(base / "expected")
    return folder


def store(base: Path) -> dict[str, str]:
    """Of files, which mlflow-skinny has too. mlflow wants to be asked for it twice."""
    return {"MLFLOW_TRACKING_URI": f"file:{base / 'store'}", "MLFLOW_ALLOW_FILE_STORE": "true"}


def test_tensorboard_shows_each_step_once(tracked):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tracked / "tensorboard"))
    shown.Reload()
    for name, expected in points(tracked).items():
        assert [(e.step, e.value) for e in shown.Scalars(name)] == [(step, pytest.approx(v, rel=1e-6)) for step, v in expected]


def test_mlflow_goes_on_in_the_same_run(tracked, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    for name, value in store(tracked.parent).items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert json.loads((tracked / "tracking.json").read_bytes())["mlflow"] == run.info.run_id
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params.items() >= {"method": "madry", "eps": "25.5", "epochs": "4"}.items()
    expected = {name.replace("&", ""): values for name, values in points(tracked).items()}
    assert run.data.metrics.keys() == expected.keys() | {"train/images_per_second"}
    for name, values in expected.items():
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == values


def wandb_records(path: Path) -> list:
    """The records of an offline run. Its file is LevelDB's log after 7 bytes: blocks of 32 KiB, which hold parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def test_nothing_about_the_machine_leaves_it(tracked):
    """That of wandb is in its file and in files/, that of mlflow in params and tags."""
    sent = [*tracked.glob("wandb/offline-run-*/*.wandb"), *tracked.glob("wandb/offline-run-*/files/*")]
    sent += [path for kind in ("params", "tags") for path in tracked.parent.glob(f"store/*/*/{kind}/*")]
    assert len(sent) > 4
    for path in sent:
        for private in (str(tracked.parent), sys.executable):
            assert private.encode() not in path.read_bytes(), path
    for path in tracked.glob("wandb/offline-run-*/*.wandb"):
        assert not any(record.run.host for record in wandb_records(path))


def test_wandb_goes_on_in_the_same_run(tracked):
    """Offline, the process that goes on writes a file with all rows: the one that is killed may leave none."""
    pytest.importorskip("wandb")
    name = json.loads((tracked / "tracking.json").read_bytes())["wandb"]
    _, path = sorted(
        (tracked / "wandb").glob(f"offline-run-*-{name}*/run-{name}.wandb"), key=lambda path: path.stat().st_mtime_ns
    )

    def read(items) -> dict:
        found = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        return {key: v for key, v in found.items() if not key.startswith("_") and key != "train/images_per_second"}

    rows, summary, codes = {}, {}, []
    for record in wandb_records(path):
        if record.HasField("run"):
            assert (record.run.run_id, record.run.project, record.run.display_name) == (name, "spat_train", "run")
            assert read(record.run.config.update).items() >= {"method": "madry", "eps": 25.5, "holdout": 15}.items()
        elif record.HasField("history"):
            rows[record.history.step.num] = read(record.history.item)
        elif record.HasField("summary"):
            summary |= read(record.summary.update)
        elif record.HasField("exit"):
            codes.append(record.exit.exit_code)
    expected: dict[int, dict] = {}  # a row of wandb is all of a step
    for key, values in points(tracked).items():
        for step, value in values:
            expected.setdefault(step, {})[key] = value
    assert rows == expected
    assert summary == {key: values[-1][1] for key, values in points(tracked).items()}
    assert codes == [0]


# ---- one that fails


class Fake:
    """Draws, prints, hooks, and works until `works` values have come."""

    id, works = "its id", 10**6

    def __init__(self, run: trackers.Tracked):
        self.run, self.rows, self.closed = run, [], None
        made.append(self)
        self.disturb()

    def disturb(self):
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        torch.manual_seed(7)
        sys.excepthook = print
        print("noise")

    def scalars(self, values, step):
        self.disturb()
        if len(self.rows) == self.works:
            raise ConnectionError("the server\nis gone")
        self.rows.append((step, values))

    def close(self, complete):
        self.disturb()
        self.closed = complete


class Failing(Fake):
    works = 1


made: list[Fake] = []


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    made.clear()
    for name, kind in {"wandb": Fake, "mlflow": Failing}.items():
        monkeypatch.setitem(trackers.TRACKERS, name, kind)
    installed = trackers._installed
    monkeypatch.setattr(trackers, "_installed", lambda name: name != "tensorboard" or installed(name))


def test_one_that_fails_is_left_out_and_changes_nothing(tmp_path, capsys):
    other = expected_and_other(tmp_path)
    hooks = sys.exit, sys.excepthook
    assert_ends_alike(settings(other.out, track="wandb,mlflow"))
    assert (sys.exit, sys.excepthook) == hooks
    out, err = capsys.readouterr()
    assert out == ""
    line = "spat-train: mlflow does not work (ConnectionError: the server): the run goes on without it, and log.jsonl has what"
    assert err.count(line) == err.count("ConnectionError") == 1
    fake, failing = made
    assert fake.rows == logged(other.out)
    assert (fake.closed, failing.closed) == (True, None)
    assert (fake.run.folder, fake.run.id, fake.run.config["eps"]) == (other.out, "", 25.5)


def test_one_that_exits_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Failing, "scalars", lambda self, values, step: sys.exit(3))
    before = random_state()
    opened = trackers.Trackers("mlflow", RunFolder(tmp_path), {}, 0)
    opened.scalars({"loss": 1.0}, 1)
    assert "mlflow does not work (SystemExit: 3): the run goes on without it" in capsys.readouterr().err
    assert not opened.open
    assert_same(random_state(), before)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda run: sys.exit(3))
    with pytest.raises(InputError, match="--track mlflow: it does not work .SystemExit: 3.: pip install -U mlflow"):
        trackers.Trackers("mlflow", RunFolder(tmp_path), {}, 0)


def test_paths_are_not_handed_over(tmp_path):
    data = load("digits", limit=60)
    arrays = {"x_train": data.train.pixels, "y_train": data.train.labels, "x_test": data.test.pixels, "y_test": data.test.labels}
    np.savez(tmp_path / "mine.npz", **arrays)
    train(settings(tmp_path / "run", track="wandb", data=str(tmp_path / "mine.npz"), limit=None, holdout=5, epochs=1))
    config = made[0].run.config
    assert config["data"] == "mine.npz"
    assert str(tmp_path) not in json.dumps(config)


def test_a_server_that_is_down_does_not_hold_up_the_run(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "")  # to be restored
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    start = time.monotonic()
    with pytest.raises(Exception, match="Max retries exceeded"):
        trackers.MLflow(trackers.Tracked(Path("run"), {}, ""))
    assert time.monotonic() - start < 60
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def test_they_are_closed_where_the_log_does_not_open(tmp_path):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(SaveError, match="log.jsonl .Is a directory."):
        train(settings(tmp_path / "run", track="wandb"))
    assert made[0].closed is False


def test_a_copy_of_a_run_has_runs_of_its_own(tmp_path):
    train(settings(tmp_path / "run", track="wandb", epochs=1, schedule="constant"))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name, epochs in (("copy", 2), ("copy", 3), ("run", 2)):
        train(settings(tmp_path / name, track="wandb", epochs=epochs, schedule="constant", resume=True))
    assert [fake.run.id for fake in made] == ["", "", "its id", "its id"]


@pytest.mark.parametrize("line", ['{"kind": "note", "text": "mine"}', "[]", "null", '{"step": 3}'])
def test_lines_of_others_in_the_log(tmp_path, line):
    config = settings(tmp_path / "run", epochs=1, schedule="constant")
    train(config)
    text = (config.out / "log.jsonl").read_text()
    (config.out / "log.jsonl").write_text(f"{line}\n" + text)
    saved = weights(config.out)
    saved["progress"] |= {"log_bytes": saved["progress"]["log_bytes"] + len(line) + 1, "log_crc": None}
    write_torch(config.out / "last.pt", saved)
    train(settings(config.out, epochs=2, schedule="constant", resume=True, track="wandb"))
    assert len(events(config.out, "validation")) == 2
    assert len(made[0].rows) == 6


def test_the_run_is_told_when_it_ends_early(tmp_path):
    def stop(run):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(settings(tmp_path / "run", track="wandb"), on_step=stop)
    assert made[0].closed is False


def test_ids_are_those_of_the_checkpoint_s_run(tmp_path):
    """One that was killed before its first checkpoint begins again, there too."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tracking.json").write_text('{"wandb": "old", "tensorboard": ""}')
    train(settings(folder, track="wandb", resume=True, epochs=1, schedule="constant"))
    train(settings(folder, track="mlflow", resume=True, epochs=2, schedule="constant"))
    train(settings(folder, track="wandb,mlflow", resume=True, epochs=3, schedule="constant"))
    assert [fake.run.id for fake in made] == ["", "", "its id", "its id"]
    assert [len(fake.rows) for fake in made] == [3, 1, 9, 1]  # all lines so far, unless it fails
    (folder / "tracking.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="--track: .*tracking.json cannot be read .TypeError.: remove it"):
        train(settings(folder, track="wandb", resume=True, epochs=4, schedule="constant"))


def raising(run: trackers.Tracked):
    raise TypeError("Descriptors cannot be created directly.\nIf this call came from")


def test_one_that_does_not_open_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", raising)
    line = "--track mlflow: it does not work .TypeError: Descriptors cannot be created directly..: pip install -U mlflow.* out$"
    with pytest.raises(InputError, match=line):
        train(settings(tmp_path / "run", track="wandb,mlflow"))
    assert made[0].closed is False
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("track", "save", "message"),
    [
        (
            "wandb,wandbb",
            True,
            "--track wandbb: there is none: did you mean wandb. give auto, none, or some of tensorboard,wandb",
        ),
        ("", True, "--track : there is none"),
        ("wandb,mlflow", True, "--track mlflow: it is not installed: pip install -U mlflow"),
        ("wandb", False, "track='wandb': what is not saved is not tracked"),
    ],
)
def test_what_cannot_be_tracked_is_refused(tmp_path, monkeypatch, track, save, message):
    monkeypatch.setattr(trackers, "_installed", lambda name: name == "wandb")
    with pytest.raises(InputError, match=message):
        train(settings(tmp_path / "run", track=track), save=save)
    assert not made


def test_a_folder_of_that_name_is_no_tracker(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mlflow_logs").mkdir()
    assert not trackers._installed("mlflow_logs")
    assert trackers._installed("json")


def refused_on(path: Path) -> None:
    """In each process of two: the main one alone opens the tracker, and both say what is wrong."""

    def opened(run: trackers.Tracked):
        (path / f"opened-{os.environ['RANK']}").touch()
        raising(run)

    trackers.TRACKERS["wandb"] = opened
    trackers._installed = bool
    with pytest.raises(InputError, match="--track wandb: it does not work .TypeError"):
        train(settings(path / "run", track="wandb", epochs=1))


def test_the_main_process_alone_tracks(tmp_path):
    assert in_two(refused_on, tmp_path) == [0, 0]
    assert [path.name for path in tmp_path.glob("opened-*")] == ["opened-0"]


# ---- runs from before there was a choice


def test_older_runs_resume(tmp_path):
    config = settings(tmp_path / "run", epochs=1, schedule="constant")
    train(config)
    saved = weights(config.out)
    saved["config"] = {name: v for name, v in saved["config"].items() if name != "track"} | {"tensorboard": True}
    write_torch(config.out / "last.pt", saved)
    (config.out / "config.json").write_text(json.dumps(saved["config"]))
    assert run_config(config.out).track == "auto"
    train(settings(tmp_path / "run", epochs=2, schedule="constant", resume=True))
    assert len(events(config.out, "validation")) == 2
    assert torch.load(config.out / "last.pt", weights_only=True)["config"]["track"] == "none"
