"""FSDP2: two processes with a share each end as one process with all, and checkpoints go on with and without it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.training.trainer import train
from tests.training.helpers import events, in_two, settings, weights

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
    "adam": {
        "method": "mart",
        "start": "clean",
        "optimizer": "adam",
        "lr": 1e-3,
        "accumulate": 2,
        "checkpoint_activations": True,
    },
    "awp": {"method": "madry", "start": "clean", "awp": 0.02},
    "free": {"method": "free", "steps": None, "replays": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_agree_with_one(tmp_path, name):
    config = settings(tmp_path / "one", model="tests.training.test_sharding:tokens", epochs=1, **OPTIONS[name])
    train(config)
    assert in_two(train, replace(config, out=tmp_path / "two", fsdp=True)) == [0, 0]
    assert_close(tmp_path / "two", tmp_path / "one")
    one, two = (events(tmp_path / name, "train")[0]["loss"] for name in ("one", "two"))  # of full batches
    assert two == pytest.approx(one, rel=1e-5)
    one, two = (events(tmp_path / name, "validation")[0] for name in ("one", "two"))
    assert (two["clean"], two["pgd"]) == (one["clean"], one["pgd"])
