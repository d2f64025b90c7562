"""Data sets in .npz files, the checks of arrays of images and labels, and arrays that cost no memory until they are read."""

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Literal

import numpy as np

from ..errors import InputError, first_line
from ..runtime.memory import free_memory
from .images import Dataset, Images, missing_classes
from .pictures import MIN_SIZE

MOST_CLASSES = 10**6  # more is a label gone wrong, and would make a last layer of gigabytes


def load_npz(path: Path, splits: tuple[str, ...] = ("train", "test")) -> Dataset:
    """The data set in `path`, an .npz file of x_train, y_train, x_test, y_test and, optionally, classes.

    Images are uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], labels whole numbers [N], classes the K names (without them K is the
    largest label + 1 and the names are numbers). Images that are not compressed stay in the file, mapped: do not write to it
    meanwhile.

    Args:
        splits: what is read; without "train" the training set is empty.
    """
    arrays = _read(path, [f"{name}_{split}" for split in splits for name in "xy"])
    named, trained = "classes" in arrays, "y_train" in arrays
    labels = [array for name, array in arrays.items() if name[0] == "y"]
    classes = _names(path, arrays["classes"] if named else _numbered(labels))
    found = [_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"], len(classes)) for split in splits]
    if found[0].image_shape != found[-1].image_shape:
        shapes = [list(arrays[f"x_{split}"].shape[1:]) for split in ("test", "train")]
        raise InputError(f"--data {path}: x_test has images {shapes[0]}, x_train {shapes[1]}: save both in one size")
    if not named and len(found) == 2 and (missing := missing_classes(found[0].labels, len(classes))):
        raise InputError(
            f"--data {path}: y_train has no {missing[0]}, of 0 to {len(classes) - 1}: number classes from 0 without gaps, or "
            "save classes, a name for each"
        )
    return Dataset.from_splits(path.stem, found, classes, named or trained)


def _read(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise InputError(f"--data {path}: there is no such file: give an .npz file with {', '.join(names)}")
    try:
        archive = np.load(path, mmap_mode="r", allow_pickle=False)  # a single array may be of any size
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"--data {path}: it holds a single array: save {', '.join(names)} with numpy.savez")
        with archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise InputError(
                    f"--data {path}: no array {', '.join(missing)} (it has {', '.join(archive) or 'none'}): "
                    f"save {', '.join(names)} with numpy.savez"
                )
            assert archive.zip is not None  # until it is closed
            wanted = dict.fromkeys((*names, *(name for name in ("y_train", "classes") if name in archive.files)))
            return {name: read_array(archive.zip, name, mapped=name[0] == "x") for name in wanted}
    except InputError:
        raise
    except Exception as error:  # zip files may be encrypted, damaged, or packed by methods that are not here
        no_archive = not isinstance(error, OSError) and not zipfile.is_zipfile(path)
        reason = "it is no zip archive" if no_archive else first_line(error)  # NumPy would speak of pickles
        raise InputError(f"--data {path}: cannot be read as .npz ({reason}): write it with numpy.savez") from error


def _names(path: Path, classes: np.ndarray) -> list[str]:
    if classes.ndim != 1 or not 2 <= len(classes) <= MOST_CLASSES or classes.dtype.kind not in "Uiu":
        remedy = f"save the names of 2 to {MOST_CLASSES} classes as an array of strings"
        raise InputError(f"--data {path}: classes is {kind(classes)}: {remedy}")
    try:
        return list(map(str, classes.tolist()))
    except SystemError as error:  # NumPy reads any bytes as text
        raise InputError(f"--data {path}: classes is no text ({error}): save names of classes") from error


def _numbered(labels: list[np.ndarray]) -> np.ndarray:
    """Names 0 to K - 1, at least two; labels that are no class indices are for `class_labels` to refuse."""
    most = [1, *(float(y.max()) for y in labels if y.dtype.kind in "iuf" and y.size)]
    return np.arange(int(min(1 + max(most), MOST_CLASSES)))


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
    return Images.from_arrays(x, class_labels(f"{where} y_{split}", y, len(x), num_classes))


def kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def class_labels(name: str, labels: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    """`labels`, whole numbers of any dtype, as int64 [count]; an InputError about `name` where they are anything else."""
    whole = labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and bool((labels == np.rint(labels)).all()))
    if not whole or labels.ndim != 1:
        raise InputError(f"{name} is {kind(labels)}: save class indices as integers [N]")
    if len(labels) != count:
        raise InputError(f"{name} has {len(labels)} labels for {count} images: save one label per image")
    for wrong in (labels.min().item(), labels.max().item()):
        if not 0 <= wrong < num_classes:
            raise InputError(f"{name} contains {wrong}: save labels from 0 to {num_classes - 1}, one per class")
    return labels.astype(np.int64)


def npy_header(file: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    """The dtype, shape and order ("C" or "F") of the .npy array that begins where `file` is; its bytes follow."""
    version = np.lib.format.read_magic(file)
    if version > (3, 0):
        raise ValueError(f"it is of version {version[0]}.{version[1]} of NumPy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if dtype.itemsize == 0 or dtype.subdtype or any(isinstance(side, bool) or side < 0 for side in shape):
        raise ValueError(f"its header says {dtype} {list(shape)}")
    return dtype, shape, "F" if fortran else "C"


def map_npy(path: str | Path, offset: int = 0) -> tuple[np.ndarray, int]:
    """The .npy array that begins `offset` bytes into `path`, and where it ends."""
    with open(path, "rb") as file:
        file.seek(offset)
        dtype, shape, order = npy_header(file)
        if 0 in shape:
            return np.empty(shape, dtype), file.tell()
        # Copy-on-write: torch takes only writable memory, and nothing may reach the file.
        array = np.memmap(path, dtype, "c", file.tell(), shape, order)
    return array, array.offset + array.nbytes


def member_header(archive: zipfile.ZipFile, name: str) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    """As `npy_header`, of the array `name` of an .npz file. A BadZipFile unless there is one of that size.

    Whoever then reads it needs the memory or disk space that its header says, whatever the file unpacks to.
    """
    info = archive.getinfo(f"{name}.npy")
    if archive.namelist().count(info.filename) > 1:
        raise zipfile.BadZipFile(f"it has {name} twice")
    with archive.open(info) as file:
        dtype, shape, order = npy_header(file)
        size = file.tell() + _size(dtype, shape)
    if size != info.file_size:
        raise zipfile.BadZipFile(f"{name} is {dtype} {list(shape)} and should have {size} bytes, and has {info.file_size}")
    return dtype, shape, order


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def read_array(archive: zipfile.ZipFile, name: str, mapped: bool = False) -> np.ndarray:
    """The array `name` of an .npz file, in memory, or `mapped` unless it is compressed.

    Raises:
        MemoryError: there is not enough memory free.
        Exception: the file is damaged.
    """
    dtype, shape, order = member_header(archive, name)
    array = map_npz(archive, name, check=True) if mapped else None
    if (array is None or order == "F") and (size := _size(dtype, shape)) > (free := free_memory()):
        raise MemoryError(f"{name} takes {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    if array is None:
        with archive.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file)
    return array


def map_npz(archive: zipfile.ZipFile, name: str, check: bool) -> np.ndarray | None:
    """The array `name` of an .npz file, mapped where it lies in it; None where it is compressed.

    `check` reads it through once, to compare its checksum.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    assert archive.filename is not None  # it was opened by its name
    if check:
        with archive.open(info) as file:
            while file.read(1 << 20):
                pass
    with open(archive.filename, "rb") as file:
        file.seek(info.header_offset)
        # The name and the extra field of the local header may be longer than those of the central directory.
        signature, name_size, extra_size = struct.unpack("<4s22x2H", file.read(30))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile(f"no local header of {name}")
    start = info.header_offset + 30 + name_size + extra_size
    array, end = map_npy(archive.filename, start)
    if end > start + info.file_size:
        raise zipfile.BadZipFile(f"{name} is cut short")
    return array
