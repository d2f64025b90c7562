"""The processes of a run: one, or those that torchrun starts (one a GPU; gloo on CPUs)."""

import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    control: "dist.ProcessGroup | None" = None  # gloo, so that agreeing does not wait for GPUs

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def agree(self, *numbers: float) -> list[float]:
        """The largest of each over all processes."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def add(self, *numbers: float) -> list[float]:
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def _reduce(self, numbers, op) -> list[float]:
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, op, group=self.control)
        return values.tolist()

    def gather(self, value: object) -> list:
        """`value` of every process, in each of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def in_turn(self, load: Callable[[], T]) -> T:
        """Call `load` in the main process first, then in the first process of every other machine, then in all others.

        So it may download or write a cache, on a shared disk or on one each. An InputError of one is raised in all.
        """
        mine = 0 if self.main else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            error = None
            if turn == mine:
                try:
                    value = load()
                except InputError as wrong:
                    error = str(wrong)
            for message in self.gather(error):
                if message:
                    raise InputError(message)
        return value

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with gradients averaged over the processes. `average_buffers` keeps its buffers equal."""
        if self.size == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(module, device_ids=devices)
        wrapped.broadcast_buffers = False  # the argument of that name is deprecated from torch 2.13 on
        return wrapped

    def average_buffers(self, buffers: list[Tensor]) -> None:
        """Make the statistics of batch norm the mean over the processes, which each saw a part of the batch."""
        if self.size == 1 or not buffers:
            return
        flat = torch.cat([b.detach().flatten() for b in buffers])
        dist.all_reduce(flat)
        flat /= self.size
        with torch.no_grad():
            for b, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                b.copy_(mean.view_as(b))


def _launched() -> tuple[int, int, int]:
    """WORLD_SIZE, RANK and LOCAL_RANK, where an empty variable counts as unset. Those of other launchers are ignored."""
    remedy = "start several processes by torchrun, which sets these variables, or one without WORLD_SIZE"
    given = {n: os.environ.get(n, "") for n in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    size = given["WORLD_SIZE"] or "1"
    if not re.fullmatch(r"[1-9]\d*", size):
        raise InputError(f"WORLD_SIZE={size}: it is the number of processes: {remedy}")
    if size == "1":
        return 1, 0, 0
    if missing := [name for name, value in given.items() if not value]:
        raise InputError(f"WORLD_SIZE={size} is set, but not {', '.join(missing)}: {remedy}")
    for name, most in (("RANK", int(size) - 1), ("LOCAL_RANK", int(size) - 1), ("MASTER_PORT", 65535)):
        if not re.fullmatch(r"\d+", given[name]) or int(given[name]) > most:
            raise InputError(f"{name}={given[name]}: with WORLD_SIZE={size} it is a number from 0 to {most}: {remedy}")
    return int(size), int(given["RANK"]), int(given["LOCAL_RANK"])


@contextmanager
def world(device: str | None):
    """The processes of this run. `device` None: this process's GPU where there is one, else the CPU."""
    size, rank, local = _launched()
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if size > 1 and name.startswith("cuda:"):
        raise InputError(f"--device {name}: {size} processes cannot share it: leave it out, each takes a GPU of its own")
    if name == "cuda" and size > 1:
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun started process {local} here, but there are {torch.cuda.device_count()} GPUs: one each")
        name = f"cuda:{local}"
    own_device = torch.device("cuda:0" if name == "cuda" else name)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    if size == 1:
        yield World(0, 1, own_device)
        return
    try:
        dist.init_process_group("nccl" if own_device.type == "cuda" else "gloo")
    except dist.DistError as error:
        address, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", first_line(error)
        raise InputError(f"the {size} processes cannot meet at {address} ({reason[:120]}): start them by torchrun") from error
    yield World(rank, size, own_device, local, dist.new_group(backend="gloo"))
    # Not after an error: it would wait for the other processes, which torchrun ends once this one has left.
    dist.destroy_process_group()
