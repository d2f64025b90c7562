"""FSDP2: two processes with a share each end as one process with all, and checkpoints go on with and without it."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.evaluation.evaluate import TEST, accuracies
from spat_train.models.checkpoints import load_model
from spat_train.runtime.signals import Stopped
from spat_train.training.trainer import train
from tests.training import helpers
from tests.training.helpers import events, in_two, new_run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)).relu())


def tokens(num_classes: int) -> nn.Module:
    """The root has parameters of its own; 13 rows do not divide by 2."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 13), nn.Sequential(Block(13), Block(13)), nn.LayerNorm(13), nn.Linear(13, num_classes)
    )


class ConvBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.bn = helpers.FrozenBatchNorm(channels)

    def forward(self, x):
        return x + self.conv2(self.bn(self.conv1(x)).relu())


def convolutions(num_classes: int) -> nn.Module:
    """Its weights are in channels_last without shards, and contiguous with them."""
    stem, head = nn.Conv2d(1, 6, 3, stride=2), nn.Sequential(nn.Flatten(), nn.Linear(54, num_classes))
    return nn.Sequential(stem, nn.Sequential(ConvBlock(6), ConvBlock(6)), head)


def assert_close(folder, expected, tolerance=1e-5):
    """All that updates change, by the distance that it went."""
    ours, theirs = weights(folder), weights(expected)
    for kind in ("model", "ema"):
        for name, w in (theirs[kind] or {}).items():
            assert (ours[kind][name] - w).float().norm() <= tolerance * (1 + w.float().norm()), (kind, name)
    groups = [[g | {"fused": None} for g in state["optimizer"]["param_groups"]] for state in (ours, theirs)]
    assert groups[0] == groups[1]
    for i, state in theirs["optimizer"]["state"].items():
        for name, w in state.items():
            assert ours["optimizer"]["state"][i][name].shape == w.shape
            assert torch.allclose(ours["optimizer"]["state"][i][name], w, rtol=0.01, atol=tolerance), name


OPTIONS = {
    "sgd": {"method": "trades", "inner": "ce", "start": "clean", "ema": 0.9},
    "adam": {"method": "mart", "start": "clean", "optimizer": "adam", "lr": 1e-3, "accumulate": 2, "decay_norm": False},
    "awp": {"method": "madry", "start": "clean", "awp": 0.02, "checkpoint_activations": True, "label_smoothing": 0.1},
    "free": {"method": "free", "steps": None, "replays": 2, "holdout": 22},  # all batches are full: others would use other deltas
}


@pytest.mark.parametrize("name", ["sgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adam", "awp", "free"))])
def test_two_processes_agree_with_one(tmp_path, name):
    config = settings(tmp_path / "one", model="tests.training.test_sharding:tokens", epochs=1, **OPTIONS[name])
    train(config)
    assert in_two(train, replace(config, out=tmp_path / "two", fsdp=True)) == [0, 0]
    assert_close(tmp_path / "two", tmp_path / "one")
    one, two = (events(tmp_path / name, "train")[0]["loss"] for name in ("one", "two"))  # of full batches
    assert two == pytest.approx(one, rel=1e-5)
    one, two = (events(tmp_path / name, "validation")[0] for name in ("one", "two"))
    assert (two["clean"], two["pgd"]) == (one["clean"], one["pgd"])


def stopped(config) -> None:
    with pytest.raises(Stopped):
        train(config, on_step=helpers.after(3, helpers.send))


@pytest.mark.slow
def test_stopped_and_resumed_bit_by_bit(tmp_path):
    """With the averages, dropout, and a batch norm whose statistics are those of both."""
    config = settings(tmp_path / "expected", fsdp=True, method="trades", ema=0.9, epochs=2)
    assert in_two(train, config) == [0, 0]
    other = replace(config, out=tmp_path / "other", resume=True)
    assert in_two(stopped, other) == [0, 0]
    assert weights(tmp_path / "other")["progress"]["step"] == 3
    assert in_two(train, other) == [0, 0]
    helpers.assert_same_run(tmp_path / "other", tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("sharded_first", [False, True])
def test_a_run_goes_on_with_or_without_shards(tmp_path, sharded_first):
    """Begun by one process without, or by two with shards, and ended the other way. Adam has moments and counts to hand over."""
    model = "tests.training.test_sharding:convolutions"
    config = settings(
        tmp_path / "expected", model=model, start="clean", ema=0.9, optimizer="adam", lr=1e-2, schedule="constant", epochs=2
    )
    train(config)
    first, last = replace(config, out=tmp_path / "other", epochs=1), replace(config, out=tmp_path / "other", resume=True)
    if sharded_first:
        assert in_two(train, replace(first, fsdp=True)) == [0, 0]
        train(last)
    else:
        train(first)
        assert in_two(train, replace(last, fsdp=True)) == [0, 0]
    assert_close(tmp_path / "other", tmp_path / "expected", 1e-4)
    assert weights(tmp_path / "other")["progress"]["epoch"] == 2


def whole_model(config) -> None:
    result = train(config)
    assert not any(isinstance(p, DTensor) for p in result.model.parameters())
    assert result.model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_half_precision_test_and_the_checkpoint_of_the_best(tmp_path):
    """best.pt and last.pt are those of any run: `load_model` reads them, and the model that it gives is the result's."""
    model = "tests.training.test_sharding:tokens"
    config = settings(tmp_path / "run", model=model, fsdp=True, precision="bf16", epochs=1, test=True)
    assert in_two(whole_model, config) == [0, 0]
    loaded, _ = load_model(tmp_path / "run", load("digits", limit=150), model)
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert test == accuracies(loaded, load("digits", limit=150).test, TEST, 25.5 / 255, seed=0, batch_size=128, precision="bf16")
    plain = replace(config, out=tmp_path / "plain", fsdp=False)
    assert in_two(train, plain) == [0, 0]
    start, ours = new_run(plain).model.state_dict(), weights(tmp_path / "run")["model"]
    for name, w in weights(tmp_path / "plain")["model"].items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - w).norm() < 0.3 * (w - start[name]).norm(), name  # of their way: signs in bf16 are others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--fsdp: there is one process: leave it out, or start several by torchrun"),
        ({"compile": True}, "--fsdp True: it works without --compile"),
        ({"input_gradient": "plan"}, "--fsdp True: the plan reads whole weights: give --input-gradient auto"),
        ({"precision": "fp16"}, "--fsdp True: .* give --precision bf16"),
        ({"method": "fast", "steps": None, "catastrophic_overfitting": "rollback"}, "--fsdp True: it cannot roll back"),
    ],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=message):
        train(settings(fsdp=True, **options), save=False)
