"""Small models and runs for tests of the training, and what compares, stops and kills runs."""

import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from spat_train.config import Config
from spat_train.data.images import Dataset
from spat_train.runtime import logs
from spat_train.runtime.distributed import World
from spat_train.runtime.run_folder import RunFolder
from spat_train.runtime.signals import GracefulStop, Stopped
from spat_train.training.run import OnStep, Run
from spat_train.training.trainer import Result, train

TIMEOUT = 600  # seconds: only a process that hangs takes as long
EVERYTHING = {"method": "mart", "alpha": 0.3, "ema": 0.9, "awp": 0.01, "nesterov": True, "start": "uniform"}

# ---- models, by "tests.training.helpers:NAME"


def network(num_classes: int) -> nn.Module:
    """With batch norm and dropout: statistics and the global random generator must survive an interruption too."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(72, num_classes)
    )


def any_size(num_classes: int) -> nn.Module:
    """For grey images of any size, with dropout."""
    features = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, num_classes))


class FrozenBatchNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True):
        return super().train(False)


def frozen(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), FrozenBatchNorm(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes))


def for_8x8_colour(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))


def for_three_classes(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def giving_a_dict(num_classes: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    model.register_forward_hook(lambda model, args, z: {"logits": z})
    return model


def without_parameters(num_classes: int) -> nn.Module:
    return nn.Flatten()


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))


# ---- runs


def settings(folder=None, **options) -> Config:
    """4 epochs of 5 steps on 135 digits (the last batch has 7), in well under a second."""
    chosen = {
        "data": "digits", "model": "tests.training.helpers:network", "eps": 25.5, "steps": 2, "epochs": 4, "batch_size": 32,
        "limit": 150, "holdout": 15, "lr": 0.05, "schedule": "cosine", "track": "none", "test": False, "val_steps": 2,
        "device": "cpu", "log_every": 3, "pad": 1, "flip": True, "out": folder,
    }  # fmt: skip
    return Config(**chosen | options)


def new_run(config: Config, dataset: Dataset | None = None) -> Run:
    """Not begun, and without a folder."""
    return Run(config, dataset, World(0, 1, torch.device(config.device)), GracefulStop(), RunFolder(None))


def weights(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def events(folder: Path, kind: str) -> list[dict]:
    return logs.read(folder, kind) if (folder / "log.jsonl").exists() else []


def assert_same(a, b) -> None:
    """Nested dicts, lists and tuples are equal, tensors bit by bit."""
    for (place, v), (other, w) in zip(*(tree_flatten_with_path(tree)[0] for tree in (a, b)), strict=True):
        assert place == other
        assert torch.equal(v, w) if isinstance(v, torch.Tensor) else v == w, place


def assert_same_run(folder: Path, expected: Path) -> None:
    """Equal in every tensor of the checkpoint: weights, optimiser, averages, generators; and in the log, but for times."""
    ours, theirs = weights(folder), weights(expected)
    for state in (ours, theirs):
        state.pop("id")
        for option in ("out", "resume", "checkpoint_minutes", "test", "track"):
            state["config"].pop(option)
        for name in ("log_bytes", "log_crc"):  # it has times
            state["progress"].pop(name)
    assert_same(ours, theirs)
    assert_same(weights(folder, "best.pt")["model"], weights(expected, "best.pt")["model"])
    for kind in ("train", "validation"):
        lines = [[e | {"images_per_second": 0} for e in events(f, kind)] for f in (folder, expected)]
        assert lines[0] == lines[1]


# ---- interruptions


def after(steps: int, act: Callable[[], object]) -> OnStep:
    """For `train(on_step=...)`: calls `act` after that many steps."""
    count = itertools.count(1)
    return lambda run: next(count) == steps and act()


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def train_until_stopped(config: Config, on_step: OnStep | None = None) -> int:
    """Train, which a signal must stop. Returns the exit code of the command."""
    with pytest.raises(Stopped, match="last.pt, to go on with by --resume") as stopped:
        train(config, on_step=on_step)
    return stopped.value.exit_code


def expected_and_other(tmp_path: Path, **options) -> Config:
    """Train in tmp_path/expected. Returns the config of the same run in tmp_path/other, to interrupt and to resume."""
    expected = settings(tmp_path / "expected", **options)
    train(expected)
    return replace(expected, out=tmp_path / "other", resume=True)


def assert_ends_alike(config: Config) -> Result:
    """Train, and compare with the run in "expected" beside it."""
    result = train(config)
    assert_same_run(config.out, config.out.with_name("expected"))
    return result


def processes() -> multiprocessing.context.ForkServerContext:
    """Forked, quickly, from a process that has imported everything but run nothing: autograd does not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_distributed", "sklearn.datasets"])
    return context


def on_one_thread(function, *arguments) -> None:
    torch.set_num_threads(1)
    function(*arguments)


# ---- several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank: int, size: int, port: str, function, *arguments) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port
    }  # fmt: skip
    on_one_thread(function, *arguments)


def in_several(size: int, function, *arguments) -> list[int]:
    """Run function(*arguments) in processes that see each other, as torchrun would start them. Returns their exit codes."""
    port = str(free_port())
    children = [processes().Process(target=as_rank, args=(rank, size, port, function, *arguments)) for rank in range(size)]
    for child in children:
        child.start()
    end = time.monotonic() + TIMEOUT
    for child in children:
        child.join(max(0, end - time.monotonic()))
        if child.exitcode is None:
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def in_two(function, *arguments) -> list[int]:
    return in_several(2, function, *arguments)


def torchrun(*arguments, **environment: str) -> subprocess.CompletedProcess:
    """Run a script, or -m and a module, in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return subprocess.run(
        [*launch, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=TIMEOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
