"""Trainings on a folder of real pictures and on shards: killed and resumed to the same bits, and shared by two processes."""

import os
import random
import signal
from dataclasses import replace
from multiprocessing import connection

import pytest
from torch import nn

pytest.importorskip("tyro")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")
pytest.importorskip("torchvision", exc_type=Exception)

from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.evaluation.evaluate import evaluate
from spat_train.training.trainer import train
from tests.data.helpers import write_folder, write_shards
from tests.training import helpers
from tests.training.helpers import events, in_two, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 31 pictures of three classes to train on, and shards of the same."""
    folder = write_folder(tmp_path_factory.mktemp("folder"))
    return {"folder": folder, "shards": write_shards(folder, tmp_path_factory.mktemp("made") / "shards")}


def network(num_classes: int) -> nn.Module:
    """Without statistics of a batch: two processes update it as one does."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, num_classes)
    )


def settings(data, folder, **options) -> Config:
    """2 epochs of 4 steps on 28 images of 24x24."""
    chosen = {
        "data": str(data), "image_size": 24, "model": "tests.training.test_pictures:network", "batch_size": 8, "limit": None,
        "holdout": 3, "epochs": 2, "eps": 4.0, "crop": "resized", "rand_augment": (2, 9), "pad": None, "workers": 2,
        "log_every": 1,
    }  # fmt: skip
    return helpers.settings(folder, **chosen | options)


def tell(pipe, steps: int, config: Config) -> None:
    train(config, on_step=helpers.after(steps, lambda: pipe.send(steps)))


def in_child(config: Config, step: int = 10**6) -> int:
    """Train in a process of its own, killed by SIGKILL after that step. Returns its exit code."""
    ours, its = helpers.processes().Pipe(duplex=False)
    child = helpers.processes().Process(target=helpers.on_one_thread, args=(tell, its, step, config))
    child.start()
    if ours in connection.wait([child.sentinel, ours]):
        child.kill()
    child.join()
    return child.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_killed_and_resumed_in_the_middle_of_an_epoch(tmp_path, data, kind):
    expected = settings(data[kind], tmp_path / "expected")
    assert in_child(expected) == 0
    killed = replace(expected, out=tmp_path / "killed", resume=True, checkpoint_minutes=1e-9, workers=1)  # saved after every step
    chance, places, code = random.Random(1), [], None
    while code != 0:
        code = in_child(killed, chance.randrange(3, 6))
        assert code in (0, -signal.SIGKILL)
        if (killed.out / "last.pt").exists():  # the first may die before its first save is done
            progress = weights(killed.out)["progress"]
            places.append(4 * progress["epoch"] + progress["step"])
    assert any(place % 4 for place in places)
    states = [weights(tmp_path / name) for name in ("killed", "expected")]
    helpers.assert_same(*[{name: state[name] for name in ("model", "optimizer", "best")} for state in states])
    lines = [[e["loss"] for e in events(tmp_path / name, "train")] for name in ("killed", "expected")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 8


def test_stopped_in_the_middle_of_an_epoch_and_resumed(tmp_path, data):
    for kind in ("folder", "shards"):
        expected = settings(data[kind], tmp_path / kind / "expected", workers=0)
        train(expected)
        other = replace(expected, out=tmp_path / kind / "other", resume=True)
        helpers.train_until_stopped(other, helpers.after(6, helpers.send))
        assert weights(other.out)["progress"]["step"] == 2
        helpers.assert_ends_alike(other)


@pytest.mark.parametrize("kind", ["folder", pytest.param("shards", marks=pytest.mark.slow)])
def test_two_processes_agree_with_one(tmp_path, data, kind):
    config = settings(data[kind], tmp_path / "one", start="clean", workers=0)
    train(config)
    assert in_two(train, replace(config, out=tmp_path / "two", workers=1)) == [0, 0]
    one, two = (weights(tmp_path / name)["model"] for name in ("one", "two"))
    start = helpers.new_run(config).model.state_dict()
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert moved > 0
        assert (one[name] - two[name]).norm() <= 1e-4 * moved, name
    logs = [[e["loss"] for e in events(tmp_path / name, "train")] for name in ("one", "two")]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_evaluations_of_both_are_alike(data):
    """Picture by picture, whatever their order."""
    model, found = helpers.new_run(settings(data["folder"], None, workers=0)).model.eval(), []
    for where in data.values():
        test = load(str(where), image_size=24, test_only=True).test
        predicted = evaluate(model, test, "clean,fgsm", eps=4 / 255, batch_size=4).predicted
        names = [name.rpartition(".tar/")[2].replace("-", "/") for name in test.files]
        found.append(sorted(zip(names, *(predicted[attack].tolist() for attack in ("clean", "fgsm")), strict=True)))
    assert found[0] == found[1]
    assert len(found[0]) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": 2}, "--pad 2: --crop resized has no padding: leave out either"),
        ({"rand_augment": (2, 31)}, r"--rand-augment \(2, 31\): give 1 or more, and 0 to 30: 2 9"),
        ({"rand_augment": (0, 9)}, r"--rand-augment \(0, 9\): give 1 or more"),
        ({"crop": "centre"}, "--crop centre: choose one of padded, resized"),
    ],
)
def test_options_that_do_not_fit(data, options, message):
    with pytest.raises(InputError, match=message):
        train(settings(data["folder"], None, **options), save=False)


def test_a_shard_that_is_cut_short(tmp_path, data, capsys):
    made = write_shards(data["folder"], tmp_path / "shards")
    os.truncate(made / "train-000002.tar", 3000)
    config = settings(made, None, epochs=1, workers=0)
    with pytest.raises(InputError, match="train-000002.tar is damaged from .*add --skip-broken to leave out the rest of it$"):
        train(config, save=False)
    train(replace(config, skip_broken=True), save=False)
    assert "train-000002.tar is damaged from" in capsys.readouterr().err
