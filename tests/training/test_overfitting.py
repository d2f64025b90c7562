"""The alarm for catastrophic overfitting: when it is raised, and that stop and rollback do what they say, also after a resume."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.config import Config
from spat_train.training.overfitting import collapse, on_host, one_step_alone, remedies, validations
from spat_train.training.run import Run
from spat_train.training.trainer import train
from tests.training import helpers
from tests.training.helpers import assert_same, events, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")

BEST = {"epoch": 3, "clean": 80.0, "pgd": 50.0, "fgsm": 55.0}


@pytest.mark.parametrize(
    ("pgd", "fgsm", "images", "raised"),
    [
        (0.0, 80.0, 1000, True),
        (38.0, 56.0, 1000, True),
        (0.0, 55.0, 1000, False),  # FGSM accuracy has not risen: the model is worse, or this is noise
        (27.0, 34.0, 1000, False),
        (45.0, 60.0, 1000, False),  # within chance, as when a robust model slowly overfits
        (38.0, 56.0, 100, False),  # the same fall on fewer images
        (0.0, 80.0, 10, False),
    ],
)
def test_the_alarm_is_for_a_fall_beyond_chance_under_pgd_alone(pgd, fgsm, images, raised):
    p = collapse({"epoch": 9, "pgd": pgd, "fgsm": fgsm}, BEST, images, validations=100)
    assert (p is not None) == raised
    assert p is None or p < 1e-4


def test_its_probability_is_that_of_drawing_as_few():
    """All of 10 images robust, then none: that 10 drawn from 20 are all of the same 10 has the probability 1 / C(20, 10)."""
    now, best = {"epoch": 2, "pgd": 0.0, "fgsm": 60.0}, BEST | {"pgd": 100.0}
    p = 1 / math.comb(20, 10)
    assert collapse(now, best, 10, validations=61) == pytest.approx(p)  # of 61 validations there are 1,830 pairs
    assert p < 0.01 / (61 * 60 / 2)
    assert collapse(now, best, 10, validations=62) is None
    assert p > 0.01 / (62 * 61 / 2)
    assert validations(Config(epochs=10, val_every=3)) == 4


@pytest.mark.parametrize(
    ("pgd", "fgsm", "images", "classes", "raised"),
    [
        (0.0, 24.0, 1000, 10, True),
        (0.0, 77.0, 1000, 10, True),
        (10.0, 80.0, 1000, 10, True),  # as many as guesses get right
        (1.0, 28.0, 200, 10, True),
        (0.0, 5.0, 1000, 100, True),
        (13.0, 80.0, 1000, 10, False),  # beyond chance: not from the first validation on, so it is a fall or none
        (11.0, 18.0, 1000, 10, False),  # not twice as many
        (0.0, 11.0, 1000, 10, False),  # FGSM is at chance itself
        (0.5, 2.5, 1000, 100, False),  # within chance of each other
        (0.0, 40.0, 10, 10, False),
        (45.0, 95.0, 1000, 2, True),
        (40.0, 79.0, 1000, 2, False),
        # First validations of sound trainings on 1,300 images of MNIST at eps 0.3: N-FGSM, Fast AT, Madry.
        (10.0, 13.5, 200, 10, False),
        (16.0, 29.0, 200, 10, False),
        (23.5, 28.5, 200, 10, False),
    ],
)
def test_the_alarm_is_for_one_step_withstood_but_not_pgd(pgd, fgsm, images, classes, raised):
    p = one_step_alone({"epoch": 1, "pgd": pgd, "fgsm": fgsm}, images, classes, validations=100)
    assert (p is not None) == raised
    assert p is None or p < 0.01 / (100 * 99 / 2)


def test_its_probability_is_fishers():
    """None of 10 images under PGD, all under FGSM."""
    p = 1 / math.comb(20, 10)
    now = {"epoch": 1, "pgd": 0.0, "fgsm": 100.0}
    assert one_step_alone(now, 10, 10, validations=61) == pytest.approx(p)
    assert one_step_alone(now, 10, 10, validations=62) is None


def test_where_it_is_on():
    found = {m: Config(method=m).overfitting_alarm for m in ("fast", "n-fgsm", "free", "fgsm", "madry", "standard", "trades")}
    assert [name for name, action in found.items() if action == "warn"] == ["fast", "n-fgsm", "free", "fgsm"]
    assert set(found.values()) == {"warn", "off"}
    assert Config(method="fast", holdout=0).overfitting_alarm == "off"
    assert Config(method="madry", catastrophic_overfitting="stop").overfitting_alarm == "stop"


SCORES = {1: (60, 70), 2: (80, 75), 3: (0, 95), 4: (7, 99), 5: (75, 74)}  # by epoch, under PGD and FGSM
BLIND = dict(zip(range(1, 6), [(0, 60), (7, 80), (0, 95), (0, 99), (7, 99)], strict=True))  # withstands one step alone


@pytest.fixture
def scores():
    return SCORES


@pytest.fixture
def collapsing(monkeypatch, scores):
    """Validations as in `scores`, and what an epoch begins with, by epoch: weights, average and optimiser."""
    begun, epoch = {}, Run.epoch

    def accuracies(run, name, images, attacks, rows=None):
        found = dict(zip(("clean", "pgd", "fgsm"), (80.0, *map(float, scores[run.progress.epoch + 1])), strict=True))
        return {name: found[name] for name in attacks}

    def begin(run):
        begun[run.progress.epoch + 1] = on_host(run.step.state_dict())
        epoch(run)

    monkeypatch.setattr(Run, "accuracies", accuracies)
    monkeypatch.setattr(Run, "epoch", begin)
    return begun


def config(folder, action: str, **options) -> Config:
    chosen = {"method": "fast", "steps": None, "epochs": 5, "ema": 0.9, "catastrophic_overfitting": action}
    return settings(folder, **chosen | options)


def test_warn_says_so_once(tmp_path, collapsing, capsys):
    result = train(config(tmp_path / "run", "warn"))
    err = capsys.readouterr().err
    line = "catastrophic overfitting in epoch 3: accuracy under PGD from 80.0 % to 0.0 %, under FGSM from 75.0 % to 95.0 %: "
    assert err.count("catastrophic overfitting in") == err.count(line) == 1
    found = events(tmp_path / "run", "overfitting")
    assert [(e["epoch"], e["pgd"], e["best_epoch"], e["best_pgd"], e["action"]) for e in found] == [
        (3, 0, 2, 80, "warn"), (4, 7, 2, 80, "warn")
    ]  # fmt: skip
    assert [e["fgsm"] for e in events(tmp_path / "run", "validation")] == [70, 75, 95, 99, 74]
    assert result.best["epoch"] == 2
    assert result.summary.endswith(". Catastrophic overfitting from epoch 3 on: see --catastrophic-overfitting")


def test_stop_ends_the_training_for_good(tmp_path, collapsing, capsys):
    options = config(tmp_path / "run", "stop")
    result = train(options)
    assert list(collapsing) == [1, 2, 3]
    assert "FGSM from 75.0 % to 95.0 %: training ends here" in capsys.readouterr().err
    assert result.best["epoch"] == 2
    assert "best.pt, of epoch 2 of 3" in result.summary
    assert "Catastrophic overfitting in epoch 3 ended the training" in result.summary
    assert_same(dict(result.model.state_dict()), weights(options.out, "best.pt")["model"])
    again = train(replace(options, resume=True))
    assert "is finished: nothing is done again" in capsys.readouterr().err
    assert (again.summary, list(collapsing)) == (result.summary, [1, 2, 3])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_rollback_goes_back_each_time(tmp_path, collapsing, optimizer):
    """Epoch 3 began with the best weights. So do epochs 4 and 5, whose batches differ."""
    result = train(config(tmp_path / "run", "rollback", optimizer=optimizer, lr=0.01))
    assert list(collapsing) == [1, 2, 3, 4, 5]
    assert_same(collapsing[4], collapsing[3])
    assert_same(collapsing[5], collapsing[3])
    saved = weights(tmp_path / "run")
    assert_same(saved["snapshot"], collapsing[3])
    assert saved["progress"]["collapses"] == [3, 4]
    assert [e["count"] for e in events(tmp_path / "run", "overfitting")] == [1, 2]
    assert result.summary.endswith(". Catastrophic overfitting was undone after epochs 3, 4")


HELPS = "--method n-fgsm, a smaller --step-size or a lower --lr may help"


def test_a_second_rollback_to_the_same_weights_says_what_helps(tmp_path, collapsing, capsys):
    train(config(tmp_path / "run", "rollback"))
    third, fourth = (line for line in capsys.readouterr().err.splitlines() if "catastrophic overfitting in" in line)
    assert third.endswith("training goes on from the weights of epoch 2")
    assert fourth.endswith(f"training goes on from the weights of epoch 2 again: {HELPS}")
    assert remedies(Config(method="n-fgsm")) == "a smaller --step-size or a lower --lr"
    assert remedies(Config(method="adt", steps=1)) == "--method n-fgsm or a lower --lr"


@pytest.mark.parametrize("scores", [BLIND])
@pytest.mark.parametrize(
    ("action", "epochs", "then", "summary"),
    [
        ("warn", 5, f"training goes on, but {HELPS}", "from epoch 1 on: see --catastrophic-overfitting"),
        ("stop", 1, "training ends here", "in epoch 1 ended the training: no epoch before it is better"),
        ("rollback", 5, f"there are no weights to go back to: training goes on, but {HELPS}",
         "in epochs 1, 2, 3, 4, 5 could not be undone: no epoch withstood PGD"),
    ],
)  # fmt: skip
def test_without_weights_to_go_back_to(tmp_path, collapsing, capsys, action, epochs, then, summary):
    result = train(config(tmp_path / "run", action))
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "catastrophic overfitting in" in line)
    assert "in epoch 1: accuracy under PGD 0.0 %, not beyond chance, under FGSM 60.0 %: " in said
    assert said.endswith(then)
    assert list(collapsing) == list(range(1, epochs + 1))
    assert [(e["epoch"], e["undone"]) for e in events(tmp_path / "run", "overfitting")] == [(n, False) for n in collapsing]
    assert result.summary.endswith(f". Catastrophic overfitting {summary}")
    for before, after in zip(collapsing.values(), list(collapsing.values())[1:], strict=False):
        with pytest.raises(AssertionError):  # trained on, not gone back
            assert_same(before["model"], after["model"])


@pytest.mark.parametrize("scores", [{1: (0, 60), 2: (60, 70), 3: (0, 90), 4: (0, 95), 5: (0, 95)}])
def test_an_early_warning_does_not_silence_a_later_one(tmp_path, collapsing, capsys, scores):
    train(config(tmp_path / "run", "warn"))
    said = [line for line in capsys.readouterr().err.splitlines() if "catastrophic overfitting in" in line]
    assert ["in epoch 1: accuracy under PGD 0.0 %" in said[0], "in epoch 3: accuracy under PGD from 60.0 %" in said[1]] == [
        True
    ] * 2
    assert len(said) == 2


@pytest.mark.parametrize("scores", [{1: (0, 90), 2: (60, 65), 3: (0, 60), 4: (70, 75), 5: (70, 75)}])
def test_it_goes_back_as_soon_as_there_are_better_weights(tmp_path, collapsing, capsys, scores):
    """Epoch 1 withstands one step alone; epoch 3 as well, beside good weights, though its FGSM accuracy did not rise."""
    result = train(config(tmp_path / "run", "rollback"))
    assert_same(collapsing[4], collapsing[3])
    said = [line for line in capsys.readouterr().err.splitlines() if "catastrophic overfitting in" in line]
    assert [line.endswith("training goes on from the weights of epoch 2") for line in said] == [False, True]
    assert [e["undone"] for e in events(tmp_path / "run", "overfitting")] == [False, True]
    summary = ". Catastrophic overfitting was undone after epoch 3, and in epoch 1 could not be undone: no epoch withstood PGD"
    assert result.summary.endswith(summary)


@pytest.mark.parametrize("steps", [12, 17])
@pytest.mark.parametrize("method", ["fast", "free"])
def test_a_run_that_rolled_back_resumes_to_the_same_bits(tmp_path, collapsing, steps, method):
    """Stopped between the best validation and the collapse, and after the first rollback."""
    expected = config(tmp_path / "expected", "rollback", method=method)
    train(expected)
    other = replace(expected, out=tmp_path / "other", resume=True)
    helpers.train_until_stopped(other, helpers.after(steps, helpers.send))
    helpers.assert_ends_alike(other)
    assert events(other.out, "overfitting") == events(expected.out, "overfitting")


@pytest.mark.slow
def test_a_real_fall_is_noticed(tmp_path):
    """FGSM training on real MNIST images at eps 0.15: within an epoch it withstands FGSM alone."""
    options = {
        "method": "fgsm", "data": "tests/assets/mnist-1500.npz", "model": "small-cnn", "eps": 38.25, "epochs": 7,
        "batch_size": 50, "optimizer": "adam", "lr": 2e-3, "schedule": "constant", "weight_decay": 0.0, "holdout": 200,
        "test": False,
    }  # fmt: skip
    result = train(Config(**options, out=tmp_path / "run", catastrophic_overfitting="stop", track="none"))
    *before, last = events(tmp_path / "run", "validation")
    (event,) = events(tmp_path / "run", "overfitting")
    assert len(before) < 6
    assert event["epoch"] == last["epoch"] == result.best["epoch"] + 1
    assert last["pgd"] < result.best["pgd"] - 15
    assert last["fgsm"] > result.best["fgsm"]


def test_it_is_noticed_at_the_first_validation(tmp_path, capsys):
    """FGSM training on real MNIST images at eps 0.3 withstands FGSM from the first epoch on, and PGD never."""
    options = {
        "method": "fgsm", "data": "tests/assets/mnist-1500.npz", "model": "small-cnn", "eps": 76.5, "epochs": 2, "batch_size": 50,
        "optimizer": "adam", "lr": 2e-3, "schedule": "constant", "weight_decay": 0.0, "holdout": 200, "test": False,
        "device": "cpu",
    }  # fmt: skip
    result = train(Config(**options, out=tmp_path / "run", catastrophic_overfitting="stop", track="none"))
    (event,) = events(tmp_path / "run", "overfitting")
    assert (event["epoch"], event["best_epoch"], event["undone"]) == (1, 1, False)
    assert event["pgd"] < 5 < 20 < event["fgsm"]
    assert event["p"] < 1e-6
    assert "not beyond chance, under FGSM" in capsys.readouterr().err
    assert result.summary.endswith("ended the training: no epoch before it is better")
