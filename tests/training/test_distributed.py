"""Two processes on the CPU: the gradients and metrics of one, resumed bit by bit, and no hang when one of them dies."""

import os
import socket
import subprocess
import sys
import time
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
from tests.training.helpers import (
    TIMEOUT,
    after,
    assert_same,
    assert_same_run,
    events,
    network,
    new_run,
    on_one_thread,
    processes,
    send,
    settings,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank: int, port: str, function, *arguments) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port
    }  # fmt: skip
    on_one_thread(function, *arguments)


def in_two(function, *arguments) -> list[int]:
    """Run function(*arguments) in two processes that see each other, as torchrun would start them. Returns their exit codes."""
    port = str(free_port())
    children = [processes().Process(target=as_rank, args=(rank, port, function, *arguments)) for rank in range(2)]
    for child in children:
        child.start()
    end = time.monotonic() + TIMEOUT
    for child in children:
        child.join(max(0, end - time.monotonic()))
        if child.exitcode is None:
            child.kill()
            child.join()
    return [child.exitcode for child in children]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fgsm"},
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


def evaluate_shared(path) -> None:
    data = load("digits", limit=150)
    torch.manual_seed(0)
    with world("cpu") as processes:
        percent = accuracies(network(10), data.test, TEST, 0.1, batch_size=32, seed=3, world=processes)
    torch.save(percent, path / f"rank{processes.rank}.pt")


def test_metrics_are_exactly_those_of_one_process(tmp_path):
    assert in_two(evaluate_shared, tmp_path) == [0, 0]
    data = load("digits", limit=150)
    torch.manual_seed(0)
    alone = accuracies(network(10), data.test, TEST, 0.1, batch_size=32, seed=3)
    assert [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)] == [alone, alone]
    assert 0 < alone["clean"] < 100


def exit_code_of(config, on_step=None) -> None:
    try:
        train(config, on_step=on_step)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


def stop_after(config, steps) -> None:
    """One process is asked to stop; both must save at the same step."""
    exit_code_of(config, after(steps, send) if os.environ["RANK"] == "1" else None)


def test_stopped_and_resumed_bit_by_bit(tmp_path):
    config = settings(tmp_path / "expected", method="mart", alpha=0.3, ema=0.9, epochs=2)
    assert in_two(train, config) == [0, 0]
    stopped = replace(config, out=tmp_path / "stopped", resume=True)
    assert in_two(stop_after, stopped, 3) == [143, 143]
    assert weights(tmp_path / "stopped")["progress"]["step"] == 3
    assert in_two(train, stopped) == [0, 0]
    assert_same_run(tmp_path / "stopped", tmp_path / "expected")
    own = weights(tmp_path / "expected")["processes"]
    assert len(own) == 2
    assert not torch.equal(*(each["random"]["torch"] for each in own))


def validate_interrupted(config) -> None:
    with pytest.MonkeyPatch.context() as patched:
        between = Run.between_batches

        def interrupted(run):
            if run.world.rank == 1 and run.progress.epoch == 1:
                send()
            between(run)

        patched.setattr(Run, "between_batches", interrupted)
        exit_code_of(config)


def test_a_signal_during_validation_stops_all_processes(tmp_path):
    """The first one has two batches of held-out images, the second one has one."""
    config = settings(tmp_path / "expected", epochs=2, eval_batch_size=6)
    assert in_two(train, config) == [0, 0]
    stopped = replace(config, out=tmp_path / "stopped", resume=True)
    assert in_two(validate_interrupted, stopped) == [143, 143]
    progress = weights(tmp_path / "stopped")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 5)
    assert in_two(train, stopped) == [0, 0]
    assert_same_run(tmp_path / "stopped", tmp_path / "expected")


def train_with_own_losses(config) -> None:
    with pytest.MonkeyPatch.context() as patched:
        update = TrainStep.update

        def counted(step, *batch, **options):
            loss, terms = update(step, *batch, **options)
            return loss * 0 + 1 + step.world.rank, {"term": loss * 0 + 10 * step.world.rank}

        patched.setattr(TrainStep, "update", counted)
        train(config)


def test_logged_losses_are_means_over_processes(tmp_path):
    assert in_two(train_with_own_losses, settings(tmp_path / "run", epochs=1)) == [0, 0]
    for event in events(tmp_path / "run", "train"):
        assert (event["loss"], event["term"]) == (1.5, 5)


def refused(config, path) -> None:
    try:
        train(replace(config, out=config.out / os.environ["RANK"]))
    except InputError as error:
        (path / f"rank{os.environ['RANK']}").write_text(str(error))


def test_processes_must_see_the_same_checkpoint(tmp_path):
    """With a disk of its own each, the main process has checkpoints and the others have none."""
    config = settings(tmp_path, resume=True, epochs=1)
    assert in_two(refused, config, tmp_path) == [0, 0]
    assert in_two(refused, config, tmp_path) == [0, 0]
    for rank in range(2):
        assert "processes find different checkpoints there" in (tmp_path / f"rank{rank}").read_text()


def test_an_input_error_is_every_process_s(tmp_path):
    assert in_two(refused, settings(tmp_path, data="nowhere.npz"), tmp_path) == [0, 0]
    for rank in range(2):
        assert "--data nowhere.npz: there is no such file" in (tmp_path / f"rank{rank}").read_text()


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
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: None)
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
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: "),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "1"}, None),
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


def statistics_of_both(path) -> None:
    with world("cpu") as processes:
        buffers = [torch.full((3,), float(processes.rank)), torch.full((2, 2), 10.0 * processes.rank)]
        processes.average_buffers(buffers)
        assert processes.agree(processes.rank, -processes.rank) == [1, 0]
        assert processes.gather(processes.rank) == [0, 1]
    torch.save(buffers, path / f"rank{processes.rank}.pt")


def test_statistics_are_averaged(tmp_path):
    assert in_two(statistics_of_both, tmp_path) == [0, 0]
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"rank{rank}.pt"), [torch.full((3,), 0.5), torch.full((2, 2), 5.0)])


def test_batch_norm_is_the_same_in_both_processes(tmp_path):
    """Each saw half of the batches, the attack and the validation of each read these statistics."""
    assert in_two(train_and_keep, settings(tmp_path / "run", epochs=1, method="madry"), tmp_path) == [0, 0]
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert_same(*states)
    assert states[0]["1.running_mean"].any()


def train_and_keep(config, path) -> None:
    torch.save(train(config).model.state_dict(), path / f"rank{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_one_process_dying_ends_the_job(tmp_path):
    """By torchrun, as users start it: the second process is killed in the middle; the first one must not wait for ever."""
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, signal, sys, torch\n"
        "from spat_train import cli\n"
        "from spat_train.training.run import Run\n"
        "torch.set_num_threads(1)\n"
        "train_on = Run.train_on\n"
        "def dying(self, *batch):\n"
        "    train_on(self, *batch)\n"
        "    if self.global_step == 6 and self.world.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.train_on = dying\n"
        "cli.main()\n"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), str(script),
        "train", "--data", "digits", "--model", "small-cnn", "--eps", "51", "--limit", "150", "--batch-size", "32",
        "--epochs", "3", "--device", "cpu", "--no-tensorboard", "--no-test", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert weights(tmp_path / "run")["progress"]["epoch"] == 1  # what was saved before is whole
    command = [part for part in command if part != str(script)]
    command[command.index("train") : command.index("train")] = ["-m", "spat_train"]
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "run")["progress"]["epoch"] == 3
