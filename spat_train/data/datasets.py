"""Data sets by name, from .npz files and from folders of pictures, checked when they are opened."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, check_count, did_you_mean, first_line
from . import shards
from .images import Dataset, Images
from .npz_files import load_npz
from .picture_folders import load_folders
from .pictures import check_pictures


def load(
    data: str,
    *,
    root: Path = Path("data"),
    download: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    test_only: bool = False,
) -> Dataset:
    """The data set called `data`.

    Args:
        data: a name in `DATASETS`, the path of an .npz file (see `load_npz`), that of a folder with train/ and test/ or val/,
            each with one folder of pictures per class, or tar files of pictures (see `shards.find`).
        root: where the files of torchvision's data sets are, or are downloaded to.
        download: fetch them where they are missing.
        image_size: H and W that pictures in files are resized and cropped to.
        limit: number of training images, and the most test images, drawn at random by `seed`. Default: all.
        skip_broken: decode every picture in files now, and leave out those that cannot be.
        test_only: read the test images of a file or folder alone; it need not have others.

    Raises:
        InputError: an argument, or what is in the files, does not fit.
    """
    check_count("--limit", limit)
    data = os.fspath(data)
    path, splits = Path(data), ("test",) if test_only else ("train", "test")
    if data in DATASETS:
        dataset = DATASETS[data](root, download)
    elif os.path.isdir(path) or ".tar" in data:
        check_pictures(data, image_size)
        assert image_size is not None
        if found := shards.find(data, splits):
            dataset = shards.load(data, found, splits, image_size, skip_broken)
        else:
            dataset = load_folders(path, image_size, splits, skip_broken)
        return dataset.limited(limit, seed)
    elif path.suffix == ".npz" or os.path.isfile(path):
        dataset = load_npz(path, splits)
    else:
        beside = os.scandir(path.parent) if os.path.isdir(path.parent) else ()
        near = [str(path.parent / entry.name) for entry in beside if entry.is_dir() or entry.name.endswith(".npz")]
        names = f"{did_you_mean(data, [*DATASETS, *near])}give {', '.join(DATASETS)}"
        raise InputError(f"--data {data}: there is none: {names}, an .npz file, a folder with train/ and test/, or shards")
    _, height, width = dataset.image_shape
    if image_size not in (None, height) or (image_size and height != width):
        raise InputError(
            f"--image-size {image_size}: {data} has {height}x{width} images: leave it out, only pictures in files are resized"
        )
    return dataset.limited(limit, seed)


# ---- by name: to add a data set, write a function here that reads it, and enter it in DATASETS


def _digits(root: Path, download: bool) -> Dataset:
    """scikit-learn's bundled 8x8 handwritten digits, 1347 to train and 450 to test on, always split alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()  # grey levels 0..16
    pixels = (source.images * 255 / 16).round().astype(np.uint8)
    labels = source.target.astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    train, test = Images.from_arrays(x_train, y_train), Images.from_arrays(x_test, y_test)
    return Dataset("digits", train, test, tuple(map(str, source.target_names)))


def _torchvision(name: str, read: Callable[..., tuple]) -> Callable[[Path, bool], Dataset]:
    """A data set of torchvision. `read(torchvision.datasets, train, root=..., download=...)` gives pixels, labels and classes."""

    def load(root: Path, download: bool) -> Dataset:
        try:
            from torchvision import datasets
        except Exception as error:  # a torchvision built for another torch raises RuntimeError and others
            reason = f"torchvision does not import ({first_line(error)}): install the one for this torch"
            raise InputError(f"--data {name}: {reason}") from error
        try:
            splits = [read(datasets, train, root=root, download=download) for train in (True, False)]
        except Exception as error:  # torchvision raises whatever its parsers run into
            remedy = "delete what is there and try again" if download else "add --download, or give the --root that holds it"
            raise InputError(f"--data {name}: cannot be read from --root {root} ({first_line(error)}): {remedy}") from error
        train, test = (Images.from_arrays(pixels, labels) for pixels, labels, _ in splits)
        return Dataset(name, train, test, tuple(splits[0][2]))

    return load


def _usual(kind: str, classes: Sequence[str] | None = None) -> Callable[..., tuple]:
    def read(datasets: Any, train: bool, **options) -> tuple:
        source = getattr(datasets, kind)(train=train, **options)
        return source.data, source.targets, classes or source.classes

    return read


def _stl10(datasets: Any, train: bool, **options) -> tuple:
    source = datasets.STL10(split="train" if train else "test", **options)
    return source.data.transpose(0, 2, 3, 1), source.labels, source.classes


DATASETS: dict[str, Callable[[Path, bool], Dataset]] = {
    "cifar10": _torchvision("cifar10", _usual("CIFAR10")),
    "cifar100": _torchvision("cifar100", _usual("CIFAR100")),
    "stl10": _torchvision("stl10", _stl10),
    "mnist": _torchvision("mnist", _usual("MNIST", "0123456789")),
    "digits": _digits,
}
