"""Two processes on the CPU: the gradients and metrics of one, resumed bit by bit. One that is killed is among tests/faults."""

import os
import socket
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.evaluation.evaluate import TEST, accuracies
from spat_train.runtime import logs
from spat_train.runtime.distributed import World, world
from spat_train.runtime.signals import Stopped
from spat_train.training.run import Run
from spat_train.training.step import TrainStep
from spat_train.training.trainer import train
from tests.training import helpers
from tests.training.helpers import (
    assert_same,
    assert_same_run,
    events,
    in_two,
    network,
    new_run,
    settings,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fgsm", "steps": None},
        {"method": "trades", "inner": "ce", "start": "clean", "forwards": "clean-adv-clean"},
        {"method": "mart", "start": "clean", "ema": 0.9},
    ],
)
def test_gradients_are_those_of_one_process_on_the_joined_batch(tmp_path, options):
    """Without momentum a step is the gradient; the last batch, of 7, is shared 4 to 3."""
    config = settings(tmp_path / "one", model="tests.training.helpers:frozen", momentum=0.0, epochs=1, **options)
    train(config)
    assert in_two(train, replace(config, out=tmp_path / "two")) == [0, 0]
    one, two = (weights(tmp_path / name)["model"] for name in ("one", "two"))
    start = new_run(config).model.state_dict()
    for name in one:
        moved = (one[name] - start[name]).float().norm()
        assert (one[name] - two[name]).float().norm() <= 1e-5 * moved, name
    assert sum(float((one[name] - start[name]).float().norm()) for name in one) > 0.01
    assert events(tmp_path / "two", "validation")[0]["clean"] == events(tmp_path / "one", "validation")[0]["clean"]


def stopped(where: str, config) -> None:
    """The second process is asked to stop: after the third step, or in the second validation."""
    between = Run.between_batches

    def interrupted(run):
        if run.world.rank == 1 and run.progress.epoch == 1:
            helpers.send()
        between(run)

    with pytest.MonkeyPatch.context() as patched:
        if where == "validation":
            patched.setattr(Run, "between_batches", interrupted)
        asked = where == "step" and os.environ["RANK"] == "1"
        try:
            train(config, on_step=helpers.after(3, helpers.send) if asked else None)
        except Stopped as stop:
            sys.exit(stop.exit_code)


@pytest.mark.parametrize(("where", "place"), [("step", (0, 3)), ("validation", (1, 5))])
def test_stopped_at_the_same_step_and_resumed_bit_by_bit(tmp_path, where, place):
    """In a validation, the first process has two batches of held-out images, the second one has one."""
    config = settings(tmp_path / "expected", method="mart", alpha=0.3, ema=0.9, epochs=2, eval_batch_size=6)
    assert in_two(train, config) == [0, 0]
    other = replace(config, out=tmp_path / "other", resume=True)
    assert in_two(stopped, where, other) == [143, 143]
    progress = weights(tmp_path / "other")["progress"]
    assert (progress["epoch"], progress["step"]) == place
    assert in_two(train, other) == [0, 0]
    assert_same_run(tmp_path / "other", tmp_path / "expected")
    first, second = (own["random"]["torch"] for own in weights(tmp_path / "expected")["processes"])
    assert not torch.equal(first, second)


def train_with_own_losses(config) -> None:
    with pytest.MonkeyPatch.context() as patched:
        update = TrainStep.update

        def counted(step, *batch, **options):
            loss, terms = update(step, *batch, **options)
            return loss * 0 + 1 + step.world.rank, {"term": loss * 0 + 10 * step.world.rank}

        patched.setattr(TrainStep, "update", counted)
        model = train(config).model
    torch.save(model.state_dict(), config.out.with_name(f"rank{os.environ['RANK']}.pt"))


def test_logged_losses_are_means_and_batch_norm_is_the_same_over_processes(tmp_path):
    """Each saw half of the batches; the attack and the validation of each read the statistics of batch norm."""
    assert in_two(train_with_own_losses, settings(tmp_path / "run", epochs=1)) == [0, 0]
    for event in events(tmp_path / "run", "train"):
        assert (event["loss"], event["term"]) == (1.5, 5)
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert_same(*states)
    assert states[0]["1.running_mean"].any()


def refused(config, path) -> None:
    try:
        train(replace(config, out=config.out / os.environ["RANK"]))
    except InputError as error:
        (path / f"rank{os.environ['RANK']}").write_text(str(error))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, "processes find different checkpoints there"),  # with a disk each, only the main one has any
        ({"data": "nowhere.npz"}, "--data nowhere.npz: there is no such file"),
    ],
)
def test_an_input_error_is_every_process_s(tmp_path, options, message):
    for _ in range(2):
        assert in_two(refused, settings(tmp_path, epochs=1, **options), tmp_path) == [0, 0]
    for rank in range(2):
        assert message in (tmp_path / f"rank{rank}").read_text()


def test_every_process_has_an_image_where_labelled_and_extra_ones_are_few(tmp_path):
    np.savez(tmp_path / "extra.npz", image=np.zeros((20, 8, 8), np.uint8), label=np.zeros(20, np.int64))
    config = settings(tmp_path / "run", method="rst", extra=tmp_path / "extra.npz", batch_size=2, limit=20, holdout=0, epochs=1)
    assert in_two(train, config) == [0, 0]


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29544"}


@pytest.mark.parametrize(("device", "size", "place"), [(None, 1, "cuda:0"), ("cuda:1", 1, "cuda:1"), (None, 2, "cuda:1")])
def test_each_process_has_its_gpu(monkeypatch, device, size, place):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(torch._utils._get_device_index(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: seen.append(backend))
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in (LAUNCHED | {"WORLD_SIZE": size, "RANK": size - 1, "LOCAL_RANK": size - 1}).items():
        monkeypatch.setenv(name, str(value))
    with world(device) as processes:
        assert str(processes.device) == place
    assert seen == [torch.device(place).index] + ["nccl"] * (size > 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "=2 is set, but not RANK, LOCAL_RANK: .*torchrun"),
        (LAUNCHED | {"MASTER_PORT": ""}, "is set, but not MASTER_PORT: "),
        (LAUNCHED | {"RANK": "2"}, "RANK=2: with WORLD_SIZE=2 it is a number from 0 to 1: "),
        (LAUNCHED | {"LOCAL_RANK": "one"}, "LOCAL_RANK=one: "),
        (LAUNCHED | {"MASTER_PORT": "http"}, "MASTER_PORT=http: .*0 to 65535"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: it is the number of processes: "),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, None),
        ({"WORLD_SIZE": "1", "RANK": "1"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, None),
    ],
)  # fmt: skip
def test_variables_of_a_launcher(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message:
        with pytest.raises(InputError, match=message), world("cpu"):
            pass
    else:
        with world("cpu") as processes:
            assert (processes.size, processes.main) == (1, True)


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (LAUNCHED | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="the 2 processes cannot meet at 127.0.0.1:.*start them by torchrun"), world("cpu"):
            pass


def test_buffers_are_not_broadcast_and_torch_does_not_warn():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = World(0, 2, torch.device("cpu")).wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        assert not wrapped.will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()


def test_a_bar_counts_the_images_of_all_processes_once(monkeypatch):
    bars, kind = [], logs.bar
    monkeypatch.setattr(logs, "bar", lambda total, *_, **options: bars.append(kind(total, "shared", **options)) or bars[-1])
    data, model = load("digits", limit=50), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for rank in range(2):
        shared = SimpleNamespace(rank=rank, size=2, add=lambda *numbers: list(numbers))
        for batch_size in (64, 20):
            accuracies(model, data.test, {"clean": TEST["clean"], "FGSM": TEST["FGSM"]}, 0.1, batch_size=batch_size, world=shared)
    assert [(bar.n, bar.total) for bar in bars] == [(100, 100)] * 4


def shared(path) -> None:
    torch.manual_seed(0)
    with world("cpu") as processes:
        test = load("digits", limit=150).test
        percent = accuracies(network(10), test, TEST, 0.1, batch_size=32, seed=3, world=processes)
        buffers = [torch.full((3,), float(processes.rank)), torch.full((2, 2), 10.0 * processes.rank)]
        processes.average_buffers(buffers)
        assert processes.agree(processes.rank, -processes.rank) == [1, 0]
        assert processes.gather(processes.rank) == [0, 1]
    torch.save((percent, buffers), path / f"rank{processes.rank}.pt")


def test_metrics_are_exactly_those_of_one_process_and_statistics_are_averaged(tmp_path):
    assert in_two(shared, tmp_path) == [0, 0]
    torch.manual_seed(0)
    alone = accuracies(network(10), load("digits", limit=150).test, TEST, 0.1, batch_size=32, seed=3)
    assert 0 < alone["clean"] < 100
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"rank{rank}.pt"), (alone, [torch.full((3,), 0.5), torch.full((2, 2), 5.0)]))
