"""Images to train on: scikit-learn's digits, or an .npz file, checked when it is read."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # and, optionally, classes
MIN_SIZE = 8  # below, the strides of SmallCNN leave BatchNorm one pixel


class InputError(ValueError):
    """What the user gave does not fit. The message is one line: argument, value, remedy."""


@dataclass(frozen=True)
class Dataset:
    """Images as fp32 [N, C, H, W] in [0, 1] and labels as int64 [N], indices into `classes`."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.x_train.shape[1:])

    def to(self, device: str) -> "Dataset":
        tensors = (t.to(device) for t in (self.x_train, self.y_train, self.x_test, self.y_test))
        return Dataset(self.name, *tensors, self.classes)


def digits(limit: int | None = None, seed: int = 0) -> Dataset:
    """scikit-learn's bundled 8x8 handwritten digits, 1347 to train and 450 to test on, always split alike.

    `limit` keeps that many random images of each split, chosen by `seed`.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()  # grey levels 0..16
    images = (source.images / 16).astype(np.float32)[:, None]
    labels = source.target.astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train = _subset(x_train, y_train, limit, seed)
    test = _subset(x_test, y_test, limit, seed)
    classes = tuple(map(str, source.target_names))
    return Dataset("digits", *map(torch.from_numpy, (*train, *test)), classes)


def load_npz(path: Path, limit: int | None = None, seed: int = 0) -> Dataset:
    """The data set in `path`, an .npz file of x_train, y_train, x_test, y_test and, optionally, classes.

    Images are uint8 [N, H, W] or [N, H, W, 3], labels int64 [N], classes the K names (without them K is the largest label + 1
    and the names are numbers). `limit` as in `digits`.

    Raises:
        InputError: the file or an array in it does not fit.
    """
    arrays = _read(path)
    classes = arrays["classes"] if "classes" in arrays else _numbered(arrays)
    if classes.ndim != 1 or len(classes) < 2 or classes.dtype.kind not in "Uiu":
        raise InputError(f"--data {path}: classes is {_kind(classes)}: save two or more class names as an array of strings")
    for split in ("train", "test"):
        _check_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"], len(classes))
    train_shape, test_shape = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if train_shape != test_shape:
        raise InputError(f"--data {path}: x_test has images {test_shape}, x_train {train_shape}: save both in one size")
    train = _subset(arrays["x_train"], arrays["y_train"], limit, seed)
    test = _subset(arrays["x_test"], arrays["y_test"], limit, seed)
    (x_train, y_train), (x_test, y_test) = ((_images(x), torch.from_numpy(y)) for x, y in (train, test))
    return Dataset(path.stem, x_train, y_train, x_test, y_test, tuple(map(str, classes)))


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
            return {name: archive[name] for name in (*ARRAYS, "classes") if name in archive}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--data {path}: cannot be read as .npz ({reason}): write it with numpy.savez") from error


def _numbered(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Names 0 to K - 1, at least two; labels that are no class indices are for `_check_split` to refuse."""
    labels = [arrays[name] for name in ("y_train", "y_test") if arrays[name].dtype == np.int64]
    return np.arange(1 + min(max([1, *(int(y.max(initial=1)) for y in labels)]), 10**6))


def _check_split(path: Path, split: str, x: np.ndarray, y: np.ndarray, num_classes: int) -> None:
    where = f"--data {path}:"
    if x.dtype != np.uint8:
        raise InputError(f"{where} x_{split} is {_kind(x)}: save images as uint8, 0 to 255")
    if x.ndim not in (3, 4) or x.shape[3:] not in ((), (3,)) or min(x.shape[1:3]) < MIN_SIZE:
        raise InputError(f"{where} x_{split} is {_kind(x)}: save [N, H, W] or [N, H, W, 3], H and W at least {MIN_SIZE}")
    if len(x) == 0:
        raise InputError(f"{where} x_{split} is {_kind(x)}: it is empty, save at least one image")
    if y.dtype != np.int64 or y.ndim != 1:
        raise InputError(f"{where} y_{split} is {_kind(y)}: save labels as int64 [N]")
    if len(y) != len(x):
        raise InputError(f"{where} y_{split} has {len(y)} labels for {len(x)} images: save one label per image")
    if y.min() < 0 or y.max() >= num_classes:
        wrong = y.min() if y.min() < 0 else y.max()
        raise InputError(f"{where} y_{split} contains {wrong}: save labels from 0 to {num_classes - 1}, one per entry of classes")


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _subset(x: np.ndarray, y: np.ndarray, limit: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if limit is None or limit >= len(x):
        return x, y
    # Drawn, not the first: files sorted by class exist.
    chosen = np.random.default_rng(seed).permutation(len(x))[:limit]
    return x[chosen], y[chosen]


def _images(x: np.ndarray) -> Tensor:
    """uint8 [N, H, W] or [N, H, W, 3] -> fp32 [N, C, H, W] in [0, 1]."""
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(x)).float() / 255
