"""Which images make up each batch, and the batches themselves: cropped, flipped, on the device.

Every random choice is a function of (seed, epoch, step, image) and of nothing else. A run that stops can therefore go on at any
step, all ranks agree on a batch without talking, and an image is cropped alike wherever it lies: on the device, where a batch is
one gather per source, or in host memory or files, from where worker processes bring it.
"""

import math
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, repeat
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from spat_kernels.ops import crop_flip

from ..errors import InputError, is_out_of_memory
from .images import Folder, Images, View
from .pictures import RandomView

Parts = tuple[Tensor, Tensor]  # rows of the training set, rows of the extra images
BUFFERS = 4  # of a worker process: two batches may be under way, and one be cropped, when it begins another
WINDOW = 16  # shards, usually of a thousand images and more each


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of every batch, a function of (seed, epoch).

    Args:
        rows: int64, rows of the training set in use.
        batch_size: images in a batch, over all ranks.
        seed: 0 to 2**63 - 1.
        extra: number of extra images.
        extra_fraction: share of each batch that is drawn from them.
        shard: int64 [len(rows)], the shard that each row is in. An epoch then goes through shards in a random order, and draws
            from `WINDOW` of them at a time, so that they are read one after the other.
    """

    rows: Tensor
    batch_size: int
    seed: int
    extra: int = 0
    extra_fraction: float = 0.0
    shard: Tensor | None = None

    def __post_init__(self):
        if len(self.rows) == 0 or self.batch_size < 1 or not 0 <= self.extra_fraction <= 1:
            raise ValueError("an order needs rows, a batch size of at least 1 and an extra fraction in [0, 1]")
        if self.extra_fraction and not self.extra:
            raise ValueError("an extra fraction needs extra images")

    @property
    def steps(self) -> int:
        """Batches in an epoch: what the training set alone would fill, as RST counts (196 of 256 for all 50,000 images)."""
        return math.ceil(len(self.rows) / self.batch_size)

    def epoch(self, number: int) -> list[Parts]:
        """Rows of the training set and rows of the extra images, for each step.

        Alone, the training set is a permutation cut into batches, the last one ragged. With extra images every batch is full:
        `batch_size * (1 - extra_fraction)` rows of a permutation, and extra rows drawn with replacement: they may be 50 million.
        """
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        if not self.extra_fraction:
            batches = self._permutation(generator).split(self.batch_size)
            if self.shard is not None:
                batches = tuple(rows.sort().values for rows in batches)  # by shards, so that ranks open others
            return [(rows, rows.new_empty(0)) for rows in batches]
        labelled = round(self.batch_size * (1 - self.extra_fraction))
        # A share close to 1 takes more rows than there are: the last batch goes on in a second permutation.
        rounds = math.ceil(self.steps * labelled / len(self.rows))
        orders = [self._permutation(generator) for _ in range(rounds)]
        order = torch.cat([self.rows[:0], *orders])[: self.steps * labelled].view(self.steps, labelled)
        extra = torch.randint(self.extra, (self.steps, self.batch_size - labelled), generator=generator)
        return list(zip(order, extra, strict=True))

    def _permutation(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(self.rows), generator=generator)
        if self.shard is not None:
            place = torch.randperm(int(self.shard.max()) + 1, generator=generator)
            order = order[(place[self.shard[order]] // WINDOW).argsort(stable=True)]
        return self.rows[order]


class Loader:
    """Batches of `order`: x fp32 [B, C, H, W] in [0, 1], in `memory_format`, y int64 [B], on `device`.

    Args:
        train: the training set.
        order: its rows, and those of `extra`, batch by batch.
        device: where batches go.
        extra: further images, mixed in as `order` says.
        pad: zeros on each side, from which a random crop of the old size is cut.
        flip: mirror half of the images.
        view: what images are brought to before, each at random. None takes them as they are, and pictures' squares in the middle.
        rank, world: of each batch this is part `rank` of `world`; it may be empty where the last batch is small.
        workers: processes that read ahead what is not on the device; 0 reads in this one.
        resident: keep the images on the device (True), or read each batch from where they are (False). Default: on the device,
            unless they are pictures in files, have a `view`, or take more than half of the GPU's free memory.
    """

    def __init__(
        self,
        train: Images | Folder,
        order: Order,
        *,
        device: str | torch.device = "cpu",
        extra: Images | None = None,
        pad: int = 0,
        flip: bool = False,
        view: RandomView | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        resident: bool | None = None,
        memory_format: torch.memory_format = torch.channels_last,
    ):
        if order.extra != (0 if extra is None else len(extra)):
            raise ValueError(f"the order counts {order.extra} extra images, {0 if extra is None else len(extra)} are given")
        if extra is not None and extra.image_shape != train.image_shape:
            raise ValueError(f"extra images are {extra.image_shape}, those of the training set {train.image_shape}")
        if view is not None and resident:
            raise ValueError("images with a view are made by the CPU, and cannot be resident")
        self.order, self.device, self.pad, self.flip, self.view = order, torch.device(device), pad, flip, view
        self.rank, self.world, self.workers, self.memory_format = rank, world, workers, memory_format
        self.sources = [train] if extra is None else [train, extra]
        self.first_ids = [0, len(train)]  # extra images are counted on from the training set
        self.resident = [_placed(source, self.device, False if view else resident) for source in self.sources]
        self.memory = _Memory()

    def epoch(self, number: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from `first_step` on. Worker processes end with the iterator.

        Raises:
            InputError: an image cannot be read, or worker processes lack memory.
            RuntimeError: a worker process died; `death` says how.
        """
        parts, first = self._parts(number)[first_step:], number * self.order.steps + first_step
        if all(pixels is not None for pixels in self.resident):
            yield from self._batches(parts, first, repeat([None, None]))
            return
        loader = DataLoader(
            _Reader(self, parts, first),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,  # BUFFERS counts on it
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals if self.workers else None,
            generator=torch.Generator(),  # workers get seeds that they do not use: the global generator stays as it is
            multiprocessing_context=_Workers() if self.workers else None,
        )
        if not self.workers:
            yield from self._batches(parts, first, loader)
            return
        try:
            arrivals: Any = iter(loader)
        except OSError as error:
            raise InputError(f"--workers {self.workers}: they cannot start ({error.strerror}): {REMEDY}") from error
        try:
            yield from self._batches(parts, first, arrivals)
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # the connection to one that died
            raise RuntimeError("DataLoader worker (pid 0) exited unexpectedly") from error
        finally:
            arrivals._shutdown_workers()  # now, whoever still refers to this iterator, such as a traceback

    def _parts(self, number: int) -> list[Parts]:
        """This rank's rows for each step: its share of either source, so that every rank sees the same mix."""
        # The first ranks take the rest of one source, the last ones that of the other: no part is empty before it must be.
        rank, last = self.rank, self.world - 1 - self.rank
        return [
            (rows.tensor_split(self.world)[rank], extra.tensor_split(self.world)[last])
            for rows, extra in self.order.epoch(number)
        ]

    def _batches(self, parts: list[Parts], first: int, arrivals: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
        # Rows, ids and labels of all batches go over in one copy.
        columns = [
            torch.stack([rows, rows + first_id, source.labels[rows]])
            for step in parts
            for source, first_id, rows in zip(self.sources, self.first_ids, step, strict=False)
        ]
        table = torch.cat([torch.empty(3, 0, dtype=torch.int64), *columns], 1).to(self.device)
        seeds = torch.tensor([[self.order.seed, first + i] for i in range(len(parts))]).to(self.device)
        end = 0
        for step, seed, arrived in zip(parts, seeds, arrivals, strict=False):
            if isinstance(arrived, InputError):
                raise arrived
            start, count = end, sum(map(len, step))
            x = self._empty(count, *self.sources[0].image_shape)
            for source, pixels, read, part in zip(self.sources, self.resident, arrived, step, strict=False):
                if isinstance(source, Images) and pixels is source.pixels:
                    source.check()
                begin, end = end, end + len(part)
                rows, ids, _ = table[:, begin:end]
                if pixels is None:
                    pixels, rows = read.to(self.device, non_blocking=True), torch.arange(len(part), device=self.device)
                if len(part):
                    crop_flip(pixels, rows, ids, seed, x[begin - start : end - start], pad=self.pad, flip=self.flip)
            yield x, table[2, start:end]

    def _empty(self, *shape: int) -> Tensor:
        if self.device.type == "cpu":
            return self.memory.empty(shape, self.memory_format)
        return torch.empty(shape, device=self.device, memory_format=self.memory_format)


class _Memory:
    """Memory of batches on the CPU, used again when nothing refers to a batch any more.

    The system takes back that of a large one at once, and new pages cost four times what it costs to fill them.
    """

    def __init__(self):
        self.free: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], memory_format: torch.memory_format) -> Tensor:
        """fp32 [B, C, H, W]."""
        whole = self.free.pop() if self.free else torch.empty(0)
        if whole.numel() < math.prod(shape):
            whole = torch.empty(math.prod(shape))
        batch = torch.as_strided(whole, shape, torch.empty(shape, device="meta", memory_format=memory_format).stride()).numpy()
        finalize(batch, self._give_back, whole).atexit = False
        return torch.from_numpy(batch)  # which holds the array until the last tensor of this memory is gone

    def _give_back(self, whole: Tensor) -> None:
        if len(self.free) < 2:  # one that is trained on, one in the making
            self.free.append(whole)


REMEDY = "use fewer --workers, or --workers 0, or give more memory (in /dev/shm by docker run --shm-size 8g)"


def death(error: BaseException) -> str:
    """What killed a worker process, where `error` is that; else "". torch raises it wherever the trainer is at that moment."""
    for text in map(str, (error.__cause__, error)):
        if found := re.match(r"DataLoader worker \(pid.*?\d\) (.*?)(\. |$)", text):
            return f"a reader process {found[1].replace('is killed', 'was killed')}: {REMEDY}"
    return ""


def _ignore_signals(worker: int) -> None:
    """Signals to a whole process group are for the trainer to handle: it ends its workers when it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Worker(ForkProcess):
    """Ended by SIGKILL, as it ignores other signals: it holds nothing that could be lost."""

    @staticmethod
    def _Popen(process):
        process = ForkProcess._Popen(process)
        process.terminate = process.kill
        return process


class _Workers(ForkContext):
    Process = _Worker  # forked: others would copy mapped images


class _Reader(TorchDataset):
    """Batch i as worker processes read it: uint8 [B, H, W, C] of each source, None of those on the device."""

    def __init__(self, loader: Loader, parts: list[Parts], first: int):
        self.sources = [
            source if pixels is None else None for source, pixels in zip(loader.sources, loader.resident, strict=True)
        ]
        self.view, self.first_ids, self.key = loader.view, loader.first_ids, (loader.order.seed, first)
        self.parts, self.turns = parts, count()
        self.buffers: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # each worker process has its own

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> list[Tensor | None] | InputError:
        worker = get_worker_info()
        try:
            parts = zip(self.sources, self.parts[i], self.first_ids, strict=False)
            batch = [None if source is None else self._read(source, rows, self._view(i, first)) for source, rows, first in parts]
            # Shared here: where the thread that sends batches fails to, nobody notices, and the trainer waits forever.
            return [read.share_memory_() if worker and read is not None else read for read in batch]
        except InputError as error:  # returned, as the DataLoader would wrap it into a page of traceback
            return error
        except (RuntimeError, MemoryError) as error:
            if worker is None or not (is_out_of_memory(error) or "shared memory" in str(error)):
                raise
            where = "memory" if is_out_of_memory(error) else "/dev/shm"
            return InputError(f"--workers {worker.num_workers}: there is no room for their batches in {where}: {REMEDY}")

    def _read(self, source: Images | Folder, rows: Tensor, view: View | None) -> Tensor:
        if isinstance(source, Images) or get_worker_info() is None or not len(rows):
            return source.batch(rows, view)
        # Of memory that is shared each page costs as much as some rows of a picture: the first batches' is used again.
        shape, turn = (len(rows), source.size, source.size, 3), next(self.turns) % BUFFERS
        if (turn, shape) not in self.buffers:
            self.buffers[turn, shape] = torch.empty(shape, dtype=torch.uint8).share_memory_()
        return source.batch(rows, view, self.buffers[turn, shape])

    def _view(self, i: int, first_id: int) -> View | None:
        """What is made of the images of batch i, of a source whose first image is `first_id`."""
        view, (seed, first) = self.view, self.key
        return view and (lambda picture, size, row: view(picture, size, seed, first + i, first_id + row))


def _placed(source: Images | Folder, device: torch.device, resident: bool | None) -> Tensor | None:
    """The pixels on the device, None where they are to be read batch by batch."""
    if isinstance(source, Folder):
        if resident:
            raise ValueError("pictures in files cannot be resident")
        return None
    if resident is None and device.type == "cuda" and source.pixels.device.type != "cuda":
        resident = source.pixels.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
    return None if resident is False else source.pixels.to(device)
