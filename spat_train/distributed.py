"""The processes of a run: one, or those that torchrun starts (one a GPU; gloo on CPUs)."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .images import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    control: "dist.ProcessGroup | None" = None  # gloo: what processes agree on does not wait for their GPUs

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
        """What `load` returns: called by the main process first, then by the first process of every other machine, then by all
        others, since it may download or write a cache, on a shared disk or on one each. An InputError of one is raised in all."""
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
        """With gradients averaged over the processes. Buffers are `average_buffers`' to keep equal."""
        if self.size == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

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


@contextmanager
def world(device: str | None):
    """The processes of this run. `device` None: this process's GPU where there is one, else the CPU."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE={size} is set, but no MASTER_ADDR: start several processes by torchrun")
    if size > 1 and name.startswith("cuda:"):
        raise InputError(f"--device {name}: {size} processes cannot share it: leave it out, each takes a GPU of its own")
    if name == "cuda" and size > 1:
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun started process {local} here, but there are {torch.cuda.device_count()} GPUs: one each")
        name = f"cuda:{local}"
    where = torch.device("cuda:0" if name == "cuda" else name)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size == 1:
        yield World(0, 1, where)
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    yield World(rank, size, where, local, dist.new_group(backend="gloo"))
    # Not after an error: it would wait for the other processes, which torchrun ends once this one has left.
    dist.destroy_process_group()
