"""Data sets by name, .npz files and folders of pictures, checked when they are opened."""

import difflib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, first_line
from ..runtime import logs
from .images import Dataset, Folder, Images
from .mmap_npz import map_npz

ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # and, optionally, classes
PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
LISTED = 10  # names of broken ones
MIN_SIZE = 8  # below, the strides of SmallCNN leave BatchNorm one pixel


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
        data: cifar10, cifar100, stl10, mnist, digits, the path of an .npz file (see `load_npz`), or that of a folder with train/
            and test/ or val/, each with one folder of pictures per class.
        root: where the files of the first four are, or are downloaded to.
        download: fetch them where they are missing.
        image_size: H and W that pictures in folders are resized and cropped to.
        limit: number of training images, and the most test images, drawn at random by `seed`. Default: all.
        skip_broken: decode every picture of a folder now, and leave out those that cannot be.
        test_only: read the test images of a file or folder alone; it need not have others.

    Raises:
        InputError: an argument, or what is in the files, does not fit.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give at least 1 image, or leave it out for all")
    path, splits = Path(data), ("test",) if test_only else ("train", "test")
    if data == "digits":
        dataset = digits()
    elif data in KNOWN:
        dataset = _known(data, root, download)
    elif os.path.isdir(path):
        return _folders(path, image_size, splits, skip_broken).limited(limit, seed)
    elif path.suffix == ".npz" or os.path.isfile(path):
        dataset = load_npz(path, splits)
    else:
        names = [*KNOWN, "digits"]
        near = difflib.get_close_matches(data, names, n=1)
        hint = f", perhaps {near[0]}" if near else ""
        raise InputError(f"--data {data}: unknown{hint}: give {', '.join(names)}, an .npz file or a folder with train/ and test/")
    _, height, width = dataset.image_shape
    if image_size not in (None, height) or (image_size and height != width):
        raise InputError(f"--image-size {image_size}: {data} has {height}x{width} images: leave it out, only folders are resized")
    return dataset.limited(limit, seed)


def digits() -> Dataset:
    """scikit-learn's bundled 8x8 handwritten digits, 1347 to train and 450 to test on, always split alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()  # grey levels 0..16
    pixels = (source.images * 255 / 16).round().astype(np.uint8)
    labels = source.target.astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    return Dataset("digits", _images(x_train, y_train), _images(x_test, y_test), tuple(map(str, source.target_names)))


# --- torchvision's data sets ---


def _cifar(name: str) -> Callable[..., tuple]:
    def read(datasets: Any, root: Path, train: bool, download: bool) -> tuple:
        source = getattr(datasets, name)(root, train=train, download=download)
        return source.data, source.targets, source.classes

    return read


def _mnist(datasets: Any, root: Path, train: bool, download: bool) -> tuple:
    source = datasets.MNIST(root, train=train, download=download)
    return source.data, source.targets, map(str, range(10))


def _stl10(datasets: Any, root: Path, train: bool, download: bool) -> tuple:
    source = datasets.STL10(root, split="train" if train else "test", download=download)
    return source.data.transpose(0, 2, 3, 1), source.labels, source.classes


KNOWN = {"cifar10": _cifar("CIFAR10"), "cifar100": _cifar("CIFAR100"), "stl10": _stl10, "mnist": _mnist}


def _known(name: str, root: Path, download: bool) -> Dataset:
    datasets = _torchvision(f"--data {name}").datasets
    try:
        splits = [KNOWN[name](datasets, root, train, download) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever its parsers run into
        remedy = "delete what is there and try again" if download else "add --download, or give the --root that holds it"
        raise InputError(f"--data {name}: cannot be read from --root {root} ({first_line(error)}): {remedy}") from error
    train, test = (_images(x, y) for x, y, _ in splits)
    return Dataset(name, train, test, tuple(splits[0][2]))


def _torchvision(where: str) -> Any:
    try:
        import torchvision
    except Exception as error:  # a torchvision built for another torch raises RuntimeError and others
        raise InputError(f"{where}: torchvision does not import ({first_line(error)}): install the one for this torch") from error
    return torchvision


# --- folders of pictures ---


def _folders(path: Path, image_size: int | None, splits: tuple[str, ...], skip_broken: bool) -> Dataset:
    where = f"--data {path}"
    if image_size is None or image_size < MIN_SIZE:
        raise InputError(
            f"--image-size {image_size}: give the size, {MIN_SIZE} or more, that the pictures in {path} are brought to"
        )
    test = next((name for name in ("test", "val") if os.path.isdir(path / name)), "")
    folders = [path / (test if split == "test" else split) for split in splits]
    if not test or not os.path.isdir(folders[0]):
        needed = " and ".join("test/ (or val/)" if split == "test" else f"{split}/" for split in splits)
        raise InputError(f"{where}: the folder has no {needed}: give one that has, with a folder per class in each")
    try:
        train = path / "train" if os.path.isdir(path / "train") else folders[0]  # labels go by it, of test images alone too
        first, classes = ([e.name for e in _entries(folder) if e.is_dir()] for folder in (train, folders[-1]))
        if splits == ("test",) and set(classes) <= set(first or classes):
            first = classes = first or classes
        if first != classes:
            name = min(set(first) ^ set(classes))
            raise InputError(f"{where}: train/ and {test}/ differ in class {name}: give both the same folders")
        if len(classes) < 2:
            raise InputError(
                f"{where}: {', '.join(classes) or 'nothing'} is all its classes: give a folder for each of two or more"
            )
        found = [_by_class(folder, classes, image_size, skip_broken) for folder in folders]
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({first_line(error)}): repair or remove it") from error
    return _dataset(path.resolve().name, found, classes)


def _by_class(root: Path, classes: list[str], size: int, skip_broken: bool) -> Folder:
    around = {os.path.realpath(folder) for folder in (root, *root.resolve().parents)}
    files = [list(_pictures(root, name, around, skip_broken)) if os.path.isdir(root / name) else [] for name in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(names) for names in files]))
    images = Folder(root, [name for names in files for name in names], labels, size)
    if skip_broken:
        images = _readable(images)
    empty = _missing(images.labels, len(classes))
    if empty and (root.name == "train" or len(empty) == len(classes)):
        folder = root / classes[empty[0]]
        raise InputError(f"--data: {folder} has no picture ({', '.join(PICTURES)}): put some there, or remove it")
    return images


def _pictures(root: Path, at: str, around: set[str], skip_broken: bool) -> Iterator[str]:
    """The names of the pictures in `root / at` and in the folders there, in none of which a link may lead back `around` it."""
    here = os.path.realpath(root / at)
    if here in around:
        raise InputError(f"--data: {root / at} is a link to a folder around it: remove it")
    for entry in _entries(root / at):
        name = f"{at}/{entry.name}"
        if entry.is_dir():
            yield from _pictures(root, name, around | {here}, skip_broken)
        elif _is_picture(entry):
            if not (entry.is_file() or skip_broken):
                raise InputError(
                    f"--data: {entry.path} is a link to nothing, or no regular file: remove it, or add --skip-broken"
                )
            yield name


def _entries(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink() and not _is_picture(entry) and not os.path.exists(entry.path):
            raise InputError(f"--data: {entry.path} is a link to nothing: repair or remove it")  # it may have been a class
    return entries


def _is_picture(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(PICTURES)


def _readable(images: Folder) -> Folder:
    """Without those that cannot be decoded, which are named."""

    def decodes(row: int) -> bool:
        try:
            images.batch(torch.tensor([row]))
        except InputError:
            return False
        return True

    with ThreadPool() as pool:
        done = pool.imap(decodes, range(len(images)), chunksize=16)
        good = torch.tensor(list(logs.bar(len(images), f"decoding {images.root}", iterable=done, leave=False)), dtype=torch.bool)
    broken = [images.files[row] for row in (~good).nonzero()[:, 0]]
    if broken and os.environ.get("RANK", "0") == "0":
        names = ", ".join(broken[:LISTED]) + ", ..." * (len(broken) > LISTED)
        print(f"spat-train: {len(broken)} of {len(images)} pictures in {images.root} are left out: {names}", file=sys.stderr)
    return images.subset(good.nonzero()[:, 0])


# --- .npz files ---


def load_npz(path: Path, splits: tuple[str, ...] = ("train", "test")) -> Dataset:
    """The data set in `path`, an .npz file of x_train, y_train, x_test, y_test and, optionally, classes.

    Images are uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], labels whole numbers [N], classes the K names (without them K is the
    largest label + 1 and the names are numbers). Images that are not compressed stay in the file, mapped: do not write to it
    meanwhile.

    Args:
        splits: what is read; without "train" the training set is empty.

    Raises:
        InputError: the file or an array in it does not fit.
    """
    arrays = _read(path, [f"{name}_{split}" for split in splits for name in "xy"])
    named, trained = "classes" in arrays, "y_train" in arrays
    classes = arrays["classes"] if named else _numbered([array for name, array in arrays.items() if name[0] == "y"])
    if classes.ndim != 1 or len(classes) < 2 or classes.dtype.kind not in "Uiu":
        raise InputError(f"--data {path}: classes is {kind(classes)}: save two or more class names as an array of strings")
    found = [_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"], len(classes)) for split in splits]
    if found[0].image_shape != found[-1].image_shape:
        shapes = [list(arrays[f"x_{split}"].shape[1:]) for split in ("test", "train")]
        raise InputError(f"--data {path}: x_test has images {shapes[0]}, x_train {shapes[1]}: save both in one size")
    if not named and len(found) == 2 and (missing := _missing(found[0].labels, len(classes))):
        raise InputError(
            f"--data {path}: y_train has no {missing[0]}, of 0 to {len(classes) - 1}: number classes from 0 without gaps, or "
            "save classes, a name for each"
        )
    return _dataset(path.stem, found, map(str, classes), named or trained)


def _read(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise InputError(f"--data {path}: there is no such file: give an .npz file with {', '.join(names)}")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"--data {path}: it holds a single array: save {', '.join(names)} with numpy.savez")
        with archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise InputError(
                    f"--data {path}: no array {', '.join(missing)} (it has {', '.join(archive) or 'none'}): "
                    f"save {', '.join(names)} with numpy.savez"
                )
            assert archive.zip is not None  # until it is closed
            found = {name: map_npz(archive.zip, name, check=True) for name in names if name[0] == "x"}
            arrays = {name: array for name, array in found.items() if array is not None}
            return {
                name: archive[name] for name in (*names, "y_train", "classes") if name in archive and name not in arrays
            } | arrays
    except InputError:
        raise
    except Exception as error:  # zip files may be encrypted, damaged, or packed by methods that are not here
        no_archive = not isinstance(error, OSError) and not zipfile.is_zipfile(path)
        reason = "it is no zip archive" if no_archive else first_line(error)  # NumPy would speak of pickles
        raise InputError(f"--data {path}: cannot be read as .npz ({reason}): write it with numpy.savez") from error


def _numbered(labels: list[np.ndarray]) -> np.ndarray:
    """Names 0 to K - 1, at least two; labels that are no class indices are for `class_labels` to refuse."""
    most = [1, *(y.max() for y in labels if y.dtype.kind in "iuf" and y.size)]
    return np.arange(1 + int(min(max(most), 10**6)))


def _split(path: Path, split: str, x: np.ndarray, y: np.ndarray, num_classes: int) -> Images:
    where = f"--data {path}:"
    if x.dtype != np.uint8:
        raise InputError(f"{where} x_{split} is {kind(x)}: save images as uint8, 0 to 255")
    if x.ndim not in (3, 4) or x.shape[3:] not in ((), (1,), (3,)) or min(x.shape[1:3]) < MIN_SIZE:
        raise InputError(
            f"{where} x_{split} is {kind(x)}: save [N, H, W], [N, H, W, 1] or [N, H, W, 3], H and W at least {MIN_SIZE}"
        )
    if len(x) == 0:
        raise InputError(f"{where} x_{split} is {kind(x)}: it is empty, save at least one image")
    return _images(x, class_labels(f"{where} y_{split}", y, len(x), num_classes))


# --- what all of them need ---


def kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def class_labels(name: str, labels: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    """`labels`, whole numbers of any dtype, as int64 [count]; an InputError about `name` where they are anything else."""
    whole = labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and bool((labels == np.rint(labels)).all()))
    if not whole or labels.ndim != 1:
        raise InputError(f"{name} is {kind(labels)}: save class indices as integers [N]")
    if len(labels) != count:
        raise InputError(f"{name} has {len(labels)} labels for {count} images: save one label per image")
    for wrong in (labels.min(), labels.max()):
        if not 0 <= wrong < num_classes:
            raise InputError(f"{name} contains {wrong}: save labels from 0 to {num_classes - 1}, one per class")
    return labels.astype(np.int64)


def _missing(labels: torch.Tensor, num_classes: int) -> list[int]:
    return (labels.bincount(minlength=num_classes) == 0).nonzero()[:, 0].tolist()


def _dataset(name: str, found: list, classes: Iterable[str], all_classes: bool = True) -> Dataset:
    """`found`: training set and test set, or the test set alone."""
    train = found[0] if len(found) == 2 else found[0].subset(torch.arange(0))
    return Dataset(name, train, found[-1], tuple(classes), all_classes)


def _images(pixels: Any, labels: Any) -> Images:
    """uint8 [N, H, W] or [N, H, W, C] and integers [N], in whatever holds them."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    return Images(pixels if pixels.ndim == 4 else pixels[..., None], torch.as_tensor(np.asarray(labels), dtype=torch.int64))
