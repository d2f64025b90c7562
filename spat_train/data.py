"""Data sets by name, .npz files and folders of pictures, checked when they are opened."""

import difflib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .images import Dataset, Folder, Images, InputError
from .mapped import map_npz

ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # and, optionally, classes
MIN_SIZE = 8  # below, the strides of SmallCNN leave BatchNorm one pixel


def load(
    data: str,
    *,
    root: Path = Path("data"),
    download: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The data set called `data`.

    Args:
        data: cifar10, cifar100, stl10, mnist, digits, the path of an .npz file (see `load_npz`), or that of a folder with train/
            and test/ or val/, each with one folder of pictures per class.
        root: where the files of the first four are, or are downloaded to.
        download: fetch them where they are missing.
        image_size: H and W that pictures in folders are resized and cropped to.
        limit: number of training images, and the most test images, drawn at random by `seed`. Default: all.

    Raises:
        InputError: an argument, or what is in the files, does not fit.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give at least 1 image, or leave it out for all")
    path = Path(data)
    if data == "digits":
        dataset = digits()
    elif data in KNOWN:
        dataset = _known(data, root, download)
    elif path.suffix == ".npz" or path.is_file():
        dataset = load_npz(path)
    elif path.is_dir():
        return _folders(path, image_size).limited(limit, seed)
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
        raise InputError(f"--data {name}: cannot be read from --root {root} ({_reason(error)}): {remedy}") from error
    train, test = (_images(x, y) for x, y, _ in splits)
    return Dataset(name, train, test, tuple(splits[0][2]))


def _torchvision(where: str) -> Any:
    try:
        import torchvision
    except Exception as error:  # a torchvision built for another torch raises RuntimeError and others
        raise InputError(f"{where}: torchvision does not import ({_reason(error)}): install the one for this torch") from error
    return torchvision


# --- folders of pictures ---


def _folders(path: Path, image_size: int | None) -> Dataset:
    where = f"--data {path}"
    if image_size is None or image_size < MIN_SIZE:
        raise InputError(
            f"--image-size {image_size}: give the size, {MIN_SIZE} or more, that the pictures in {path} are brought to"
        )
    found = [path / name for name in ("test", "val") if (path / name).is_dir()]
    if not (path / "train").is_dir() or not found:
        raise InputError(f"{where}: the folder has no train/ and test/ (or val/): give one with both, each a folder per class")
    datasets = _torchvision(where).datasets
    try:
        train, test = (datasets.ImageFolder(folder) for folder in (path / "train", found[0]))
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({_reason(error)}): put pictures into one folder per class") from error
    if train.classes != test.classes:
        name = min(set(train.classes) ^ set(test.classes))
        raise InputError(f"{where}: train/ and {found[0].name}/ differ in class {name}: give both the same folders")
    if len(train.classes) < 2:
        raise InputError(f"{where}: one class only, {train.classes[0]}: give a folder for each of two or more")
    splits = []
    for source in (train, test):
        files = [str(Path(file).relative_to(source.root)) for file, _ in source.samples]
        splits.append(Folder(Path(source.root), files, torch.tensor(source.targets), image_size))
    return Dataset(path.resolve().name, splits[0], splits[1], tuple(train.classes))


# --- .npz files ---


def load_npz(path: Path) -> Dataset:
    """The data set in `path`, an .npz file of x_train, y_train, x_test, y_test and, optionally, classes.

    Images are uint8 [N, H, W] or [N, H, W, 3], labels int64 [N], classes the K names (without them K is the largest label + 1
    and the names are numbers). Images that are not compressed stay in the file, mapped: do not write to it meanwhile.

    Raises:
        InputError: the file or an array in it does not fit.
    """
    arrays = _read(path)
    classes = arrays["classes"] if "classes" in arrays else _numbered(arrays)
    if classes.ndim != 1 or len(classes) < 2 or classes.dtype.kind not in "Uiu":
        raise InputError(f"--data {path}: classes is {kind(classes)}: save two or more class names as an array of strings")
    for split in ("train", "test"):
        _check_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"], len(classes))
    train_shape, test_shape = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if train_shape != test_shape:
        raise InputError(f"--data {path}: x_test has images {test_shape}, x_train {train_shape}: save both in one size")
    train, test = (_images(arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test"))
    return Dataset(path.stem, train, test, tuple(map(str, classes)))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"--data {path}: there is no such file: give an .npz file with {', '.join(ARRAYS)}")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"--data {path}: it holds a single array: save {', '.join(ARRAYS)} with numpy.savez")
        with archive:
            missing = [name for name in ARRAYS if name not in archive]
            if missing:
                raise InputError(
                    f"--data {path}: no array {', '.join(missing)} (it has {', '.join(archive) or 'none'}): "
                    f"save {', '.join(ARRAYS)} with numpy.savez"
                )
            assert archive.zip is not None  # until it is closed
            found = {name: map_npz(archive.zip, name, check=True) for name in ("x_train", "x_test")}
            arrays = {name: array for name, array in found.items() if array is not None}
            return {name: archive[name] for name in (*ARRAYS, "classes") if name in archive and name not in arrays} | arrays
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = _reason(error) if zipfile.is_zipfile(path) else "it is no zip archive"  # NumPy would speak of pickles
        raise InputError(f"--data {path}: cannot be read as .npz ({reason}): write it with numpy.savez") from error


def _numbered(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Names 0 to K - 1, at least two; labels that are no class indices are for `_check_split` to refuse."""
    labels = [arrays[name] for name in ("y_train", "y_test") if arrays[name].dtype == np.int64]
    return np.arange(1 + min(max([1, *(int(y.max(initial=1)) for y in labels)]), 10**6))


def _check_split(path: Path, split: str, x: np.ndarray, y: np.ndarray, num_classes: int) -> None:
    where = f"--data {path}:"
    if x.dtype != np.uint8:
        raise InputError(f"{where} x_{split} is {kind(x)}: save images as uint8, 0 to 255")
    if x.ndim not in (3, 4) or x.shape[3:] not in ((), (3,)) or min(x.shape[1:3]) < MIN_SIZE:
        raise InputError(f"{where} x_{split} is {kind(x)}: save [N, H, W] or [N, H, W, 3], H and W at least {MIN_SIZE}")
    if len(x) == 0:
        raise InputError(f"{where} x_{split} is {kind(x)}: it is empty, save at least one image")
    if y.dtype != np.int64 or y.ndim != 1:
        raise InputError(f"{where} y_{split} is {kind(y)}: save labels as int64 [N]")
    if len(y) != len(x):
        raise InputError(f"{where} y_{split} has {len(y)} labels for {len(x)} images: save one label per image")
    if y.min() < 0 or y.max() >= num_classes:
        wrong = y.min() if y.min() < 0 else y.max()
        raise InputError(f"{where} y_{split} contains {wrong}: save labels from 0 to {num_classes - 1}, one per entry of classes")


# --- what all of them need ---


def kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _images(pixels: Any, labels: Any) -> Images:
    """uint8 [N, H, W] or [N, H, W, C] and integers [N], in whatever holds them."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    return Images(pixels if pixels.ndim == 4 else pixels[..., None], torch.as_tensor(np.asarray(labels), dtype=torch.int64))
