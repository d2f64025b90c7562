"""Labelled images, in memory, mapped or in files: what they are, and what training and evaluation need of any of them."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import InputError, first_line, is_out_of_memory, printable
from .pictures import decode, square

View = Callable[[Tensor, tuple[int, int], int], Tensor]  # of uint8 [C, H, W]: uint8 [C, *size], by the size and the row
HASHED = 256 << 20  # bytes of pixels that a fingerprint reads in full
SAMPLED = 4096  # images that it reads of more
LARGEST = 1 << 30  # bytes of a picture's file: no picture that is decoded has more


class MappedFile:
    """A file whose contents are mapped. Where it is cut short, reading them ends the process (SIGBUS)."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.before = path, os.stat(path)

    def check(self) -> None:
        """Raise InputError where it was written to. Another file may have taken its place: it is still there without a name."""
        before = self.before
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            return
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise InputError(
                f"{self.path} was written to while it was in use (it had {before.st_size} bytes, and has {now.st_size}): put it "
                "back as it was, and give what is new another name"
            )


class _Labelled:
    labels: Tensor
    shard: Tensor | None = None  # int64 [N], where images lie in files that are best read one after the other: which one

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} x {list(self.image_shape)})"


@dataclass(frozen=True, eq=False, repr=False)
class Images(_Labelled):
    """Images in memory, mapped from a file, or on a device.

    Args:
        pixels: uint8 [N, H, W, C], contiguous.
        labels: int64 [N], on the CPU.
        mapped: the file that they are mapped from, to be checked before they are read.
    """

    pixels: Tensor
    labels: Tensor
    mapped: MappedFile | None = None

    @classmethod
    def from_arrays(cls, pixels: np.ndarray, labels: ArrayLike) -> "Images":
        """uint8 [N, H, W] or [N, H, W, C], used without a copy where it is contiguous, and whole numbers [N]."""
        contiguous = np.ascontiguousarray(pixels)
        path = pixels.filename if isinstance(pixels, np.memmap) and np.may_share_memory(contiguous, pixels) else None
        x = torch.from_numpy(contiguous)
        y = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        return cls(x if x.ndim == 4 else x[..., None], y, MappedFile(path) if path else None)

    def check(self) -> None:
        """Raise InputError where the file that they are mapped from has changed."""
        if self.mapped:
            self.mapped.check()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.pixels.shape[1:]
        return channels, height, width

    def batch(self, rows: Tensor, view: View | None = None) -> Tensor:
        """The images `rows` as uint8 [B, H, W, C] on the CPU; `view`: what is made of each."""
        self.check()
        batch = self.pixels.index_select(0, rows.to(self.pixels.device)).cpu()
        if view is not None:
            for pixels, row in zip(batch, rows.tolist(), strict=True):
                picture = pixels.permute(2, 0, 1)
                picture.copy_(view(picture, self.image_shape[1:], row))
        return batch

    def subset(self, rows: Tensor) -> "Images":
        self.check()
        return Images(self.pixels.index_select(0, rows.to(self.pixels.device)), self.labels[rows])


@dataclass(frozen=True, eq=False, repr=False)
class Floats(_Labelled):
    """Images in memory that need not be on the 8-bit grid.

    Args:
        x: fp32 [N, C, H, W] in [0, 1].
        labels: int64 [N], on the CPU.
    """

    x: Tensor
    labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x.shape[1:]
        return channels, height, width


@dataclass(frozen=True, eq=False, repr=False)
class Folder(_Labelled):
    """Pictures in files, decoded when asked for.

    Args:
        root: the folder that `files` are relative to.
        files: N names.
        labels: int64 [N].
        size: H and W.
    """

    root: Path
    files: list[str]
    labels: Tensor
    size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    def read(self, row: int) -> bytes:
        """The file of a picture as it is."""
        path = f"{self.root}/{self.files[row]}"  # a Path takes as long as reading the file
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait forever
            raise OSError("it is no regular file")
        check_length(status.st_size)
        with open(path, "rb", buffering=0) as file:
            return file.read()

    def picture(self, row: int) -> Tensor:
        """uint8 [3, H, W] of any size. An InputError where it cannot be decoded."""
        try:
            return decode(self.read(row))
        except Exception as error:  # decoders raise anything on broken files
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"--data: {self.root / self.files[row]} cannot be decoded ({first_line(error)}): repair or remove it, or start "
                "with --skip-broken; a run that is under way goes on when it is repaired"
            ) from error

    def batch(self, rows: Tensor, view: View | None = None, out: Tensor | None = None) -> Tensor:
        """The images `rows` as uint8 [B, H, W, 3], in `out` if given; `view`: what is made of each. Default: its `square`."""
        size = self.size, self.size
        batch = torch.empty((len(rows), *size, 3), dtype=torch.uint8) if out is None else out

        def fill(pixels: Tensor, row: int) -> None:
            picture = self.picture(row)
            pixels.copy_((view(picture, size, row) if view else square(picture, size)).permute(1, 2, 0))

        items, threads = list(zip(batch, rows.tolist(), strict=True)), min(torch.get_num_threads(), len(rows))
        if view is None and threads > 1:  # a view draws from the one generator; worker processes have one thread
            with ThreadPool(threads) as pool:
                pool.starmap(fill, items)
        else:
            for item in items:
                fill(*item)
        return batch

    def subset(self, rows: Tensor) -> "Folder":
        return replace(self, files=[self.files[row] for row in rows.tolist()], labels=self.labels[rows])

    def bytes(self) -> Tensor:
        """The sizes of the files, int64 [N]."""
        return torch.tensor([os.stat(self.root / name).st_size for name in self.files], dtype=torch.int64)


def check_length(size: int) -> None:
    """Raise OSError where a picture's file is so large that it would take the memory of all."""
    if size > LARGEST:
        raise OSError(f"its file has {size} bytes, at most {LARGEST} are read")


@dataclass(frozen=True, eq=False)
class Dataset:
    """What to train on and what to test on; labels are indices into `classes`."""

    name: str
    train: Images | Folder
    test: Images | Folder
    classes: tuple[str, ...]
    all_classes: bool = True  # False: there may be more, the labels of test images are all that is known

    @classmethod
    def from_splits(cls, name: str, splits: Sequence, classes: Iterable[str], all_classes: bool = True) -> "Dataset":
        """`splits`: training set and test set, or the test set alone, which leaves the training set empty.

        Names of classes are made `printable`, as they go into reports.
        """
        train = splits[0] if len(splits) == 2 else splits[0].subset(torch.arange(0))
        return cls(name, train, splits[-1], tuple(map(printable, classes)), all_classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.image_shape

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def limited(self, limit: int | None, seed: int) -> "Dataset":
        """At most `limit` random images of each split, chosen by `seed`."""

        def drawn(images: Images | Folder) -> Images | Folder:
            if limit is None or limit >= len(images):
                return images
            # At random, as some files are sorted by class.
            return images.subset(torch.from_numpy(np.random.default_rng(seed).permutation(len(images))[:limit]))

        return replace(self, train=drawn(self.train), test=drawn(self.test))


def missing_classes(labels: Tensor, num_classes: int) -> list[int]:
    """The classes below `num_classes` that no label is of."""
    return (labels.bincount(minlength=num_classes) == 0).nonzero()[:, 0].tolist()


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and `count` rows held out, drawn by `seed` from each class in its proportion; both sorted."""
    if not 0 <= count < len(labels):
        raise InputError(f"--holdout {count}: give 0 to {len(labels) - 1} of the {len(labels)} training images")
    sizes = labels.bincount()
    share, rest = sizes * count // len(labels), sizes * count % len(labels)
    share[rest.argsort(descending=True, stable=True)[: count - int(share.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(share.tolist()):
        rows = (labels == label).nonzero()[:, 0]
        held[rows[torch.randperm(len(rows), generator=generator)[:number]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def fingerprint(images: Images | Floats | Folder, *, contents: bool = False) -> str:
    """A short hash of what the images are: shape, labels, and pixels (of many, a sample) or the files' names.

    Args:
        contents: take in the files' sizes too, and what is in them (of many, a sample): not for what may be repaired meanwhile.
    """
    digest = hashlib.sha256(repr((len(images), images.image_shape)).encode())
    digest.update(images.labels.contiguous().numpy().data)
    if isinstance(images, Folder):
        for name in images.files:
            digest.update(os.fsencode(name) + b"\0")
        row = 0
        if contents:
            try:
                digest.update(images.bytes().numpy().data)
                for row in _spread(min(SAMPLED, len(images)), len(images)).tolist():
                    digest.update(images.read(row))
            except OSError as error:
                file, reason = error.filename or images.root / images.files[row], error.strerror or first_line(error)
                raise InputError(f"--data: {file} cannot be read ({reason}): repair or remove it") from error
    elif isinstance(images, Floats):
        digest.update(images.x.cpu().contiguous().numpy().data)
    else:
        count = len(images) if images.pixels.nbytes <= HASHED else min(SAMPLED, len(images))
        for part in _spread(count, len(images)).split(SAMPLED):
            digest.update(images.batch(part).numpy().data)
    return digest.hexdigest()[:16]


def _spread(count: int, total: int) -> Tensor:
    """`count` rows of `total`, evenly spread, the first and the last among them."""
    return torch.arange(count) * (total - 1) // max(count - 1, 1)


def floats(
    images: Images | Floats | Folder,
    rows: Tensor,
    device: str | torch.device,
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor]:
    """The images `rows` as they are: fp32 [B, C, H, W] in [0, 1], in `memory_format`, and labels int64 [B], on `device`."""
    if isinstance(images, Floats):
        return images.x[rows].to(device, memory_format=memory_format), images.labels[rows].to(device)
    x = images.batch(rows).to(device).permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format)
    # By a tensor, as crop_flip divides: GPUs multiply by the reciprocal of a Python number, which rounds otherwise.
    return x.div_(x.new_full((1,), 255)), images.labels[rows].to(device)
