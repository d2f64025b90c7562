"""A few epochs of every method on 1,500 real MNIST images: it learns, and robustly, where standard training does not."""

import pytest

pytest.importorskip("tyro")

import spat_train
from spat_train.objectives import METHODS

MNIST = "tests/assets/mnist-1500.npz"
EPS = 38.25  # 0.15
COMMON = {
    "data": MNIST, "model": "small-cnn", "eps": EPS, "epochs": 4, "batch_size": 50, "optimizer": "adam", "lr": 2e-3,
    "schedule": "constant", "weight_decay": 0.0, "holdout": 0, "test": False,
}  # fmt: skip
SETTINGS = {  # beside COMMON, by method
    "madry": {"steps": 5},
    "trades": {"steps": 5},
    "mart": {"steps": 5},
    "fast": {"epochs": 2},
    "n-fgsm": {"epochs": 2},
    "free": {"epochs": 1},
    "mmc": {"steps": 3},
    "g-sce": {"steps": 3, "schedule": "one-cycle", "lr": 5e-3},
    "adt": {"steps": 3, "epochs": 3},
}


def pgd_accuracy(**settings) -> float:
    result = spat_train.train(spat_train.Config(**COMMON | settings), save=False)
    return spat_train.evaluate(result.model, spat_train.load_data(MNIST).test, "pgd-20", eps=EPS / 255).accuracy("pgd-20")


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_a_short_training_is_robust(method):
    assert method in METHODS
    assert pgd_accuracy(method=method, **SETTINGS[method]) > 60


@pytest.mark.slow
def test_a_short_standard_training_is_not():
    assert pgd_accuracy(method="standard") < 30
