"""The processes of a run: one, or those that torchrun starts (one a GPU; gloo on CPUs)."""

import hashlib
import io
import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError, first_line
from .atomic_write import SaveError

T = TypeVar("T")

PATIENCE = timedelta(days=365)  # a timeout for `world` where processes wait for each other's work, which may take days
_PEER = r"Connection (closed|reset) by peer|[Tt]imed out|ncclRemoteError|Broken pipe"


class PeerError(RuntimeError):
    """Another process of the job ended."""


def is_of_a_peer(error: BaseException) -> bool:
    """Whether `error` is what a process sees of another that ended."""
    initialized = dist.is_available() and dist.is_initialized()
    return initialized and (isinstance(error, dist.DistError) or bool(re.search(_PEER, str(error))))


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

    def on_main(self, act: Callable[[], T]) -> T:
        """Call `act` in the main process alone. What it returns, or the error that it raises, is every process's."""
        if self.size == 1:
            return act()
        found: list = [None, None]
        if self.main:
            try:
                found[0] = act()
            except (InputError, SaveError) as wrong:
                found[1] = wrong
        dist.broadcast_object_list(found, 0, group=self.control)
        value, error = found
        if error:
            raise error
        return value

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

    def no_sync(self, module: Any) -> AbstractContextManager:
        """Within, the gradients of `module`, which `wrap` gave, stay this process's own, to be averaged with later ones."""
        return module.no_sync() if self.size > 1 and hasattr(module, "no_sync") else nullcontext()

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


ALONE = World(0, 1, torch.device("cpu"))  # where processes share nothing; it chooses no device


class Dealer:
    """Deals numbers to processes that work at their own pace, and adds up how far they are. Nobody waits, except in `join`.

    All processes of a world make its dealers in the same order.
    """

    _number = itertools.count()

    def __init__(self, world: World):
        self.world, self.counts, self.store = world, Counter[str](), None
        if world.size > 1:
            shared = dist.distributed_c10d._get_default_store()
            self.store = dist.PrefixStore(f"spat_train/dealer{next(self._number)}", shared)

    def deal(self, count: int) -> Iterator[int]:
        """Numbers below `count`: each goes to one process, the next one to whoever asks."""
        while (number := self._add("dealt", 1) - 1) < count:
            yield number

    def total(self, own: int) -> int:
        """The sum over all processes of the `own` that each reported last."""
        more, self.counts["own"] = own - self.counts["own"], own
        return self._add("done", more)

    def _add(self, what: str, amount: int) -> int:
        if self.store:
            return self.store.add(what, amount)
        self.counts[what] += amount
        return self.counts[what]

    def join(self, waiting: Callable[[], object]) -> None:
        """Wait for all processes, and call `waiting` ten times a second meanwhile.

        Raises:
            RuntimeError: one ended (`is_of_a_peer`).
        """
        if self.world.size == 1:
            return
        arrived = dist.barrier(group=self.world.control, async_op=True)
        while not arrived.is_completed():  # not in wait(): signals would not be heard there
            waiting()
            time.sleep(0.1)
        arrived.wait()


def first_to_say(text: str) -> bool:
    """Whether this process is the first of the job with `text`, which all may have to say. True where they cannot tell."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    key = hashlib.sha256(text.encode()).hexdigest()
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"spat_train/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{key}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # torchrun has ended
        return True


@contextmanager
def said_once() -> Iterator[None]:
    """Within, what several processes print is held back, and in the end printed by one of them."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    streams, held = (sys.stdout, sys.stderr), (io.StringIO(), io.StringIO())
    try:
        with redirect_stdout(held[0]), redirect_stderr(held[1]):
            yield
    finally:
        for stream, text in zip(streams, (h.getvalue() for h in held), strict=True):
            if text and first_to_say(text):
                stream.write(text)


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
def world(device: str | None, patience: timedelta | None = None):
    """The processes of this run.

    Args:
        device: None is this process's GPU where there is one, else the CPU.
        patience: how long one may wait for the others. None is torch's default of 30 minutes.
    """
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
    yield World(rank, size, own_device, local, dist.new_group(backend="gloo", timeout=patience))
    # Not after an error: it would wait for the other processes, which torchrun ends once this one has left.
    dist.destroy_process_group()
