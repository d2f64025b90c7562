"""Extra images to train on: pseudo-labelled or generated, up to tens of millions, in files of other projects' making.

Pixels are mapped and never read as a whole. An uncompressed .npz is mapped as it is. What is compressed or pickled is written
once to FILE.pixels.npy beside it: the pixels, the labels after them, and a last line with the size and time of FILE.
"""

import os
import secrets
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError, first_line
from .array_pickle import as_array, read_pickle
from .images import Images
from .npz_files import class_labels, map_npy, map_npz, npy_header

NAMES = (("image", "label"), ("data", "extrapolated_targets"), ("x_train", "y_train"))  # generated; RST's; as --data
EXPECTED = " or ".join(f"({pixels}, {labels})" for pixels, labels in NAMES)


def load_extra(path: Path, *, image_shape: tuple[int, int, int], num_classes: int) -> Images:
    """The images in `path`: RST's pickle, or an .npz file, of (image, label), (data, extrapolated_targets) or (x_train, y_train).

    Pixels are uint8 [N, H, W, C] (or [N, H, W], of grey images) and stay in the file; labels are whole numbers [N].

    Args:
        image_shape: (C, H, W) that the images must have.
        num_classes: labels must be below.

    Raises:
        InputError: the file does not fit, or the copy of its pixels cannot be written.
    """
    where = f"--extra {path}:"
    if not os.path.isfile(path):
        raise InputError(f"{where} there is no such file: give an .npz file or a pickle with {EXPECTED}")

    def check(dtype: np.dtype, shape: tuple[int, ...], order: str, labels: np.ndarray) -> None:
        """Before a copy of 100 GB is written."""
        channels, height, width = image_shape
        grey = channels == 1 and shape[1:] == (height, width)
        if dtype != np.uint8 or not (grey or shape[1:] == (height, width, channels)):
            expected = f"uint8 [N, {height}, {width}, {channels}]"
            raise InputError(f"{where} images are {dtype} {list(shape)}: save {expected}, as the training images are")
        if order != "C":
            raise InputError(f"{where} images are in Fortran order: save numpy.ascontiguousarray of them")
        if shape[0] == 0:
            raise InputError(f"{where} it is empty: give at least one image")
        class_labels(f"{where} the array of labels", labels, shape[0], num_classes)

    try:
        pixels, labels = _open(path, check)
    except InputError:
        raise
    except Exception as error:  # unpickling and unzipping what is none of either raise anything
        raise InputError(f"{where} cannot be read as .npz or pickle ({first_line(error)}): give one with {EXPECTED}") from error
    return Images.from_arrays(pixels, labels.astype(np.int64))


def _open(path: Path, check: Callable[..., None]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, mapped, and labels, both checked."""
    status = path.stat()
    stamp = f"made from {status.st_size} bytes of {status.st_mtime_ns}\n".encode()
    if zipfile.is_zipfile(path):
        pixels, labels = _open_npz(path, stamp, check)
    elif (copy := _read_copy(path, stamp)) is not None:
        pixels, labels = copy
    else:
        pixels, labels = _unpickled(path)
        check(pixels.dtype, pixels.shape, "C", labels)
        pixels, labels = _write_copy(path, stamp, labels, partial(np.save, arr=np.ascontiguousarray(pixels)))
    check(pixels.dtype, pixels.shape, "C", labels)  # a copy may be older than this training set
    return pixels, labels


def _open_npz(path: Path, stamp: bytes, check: Callable[..., None]) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        pixels_name, labels_name = _chosen(path, {name.removesuffix(".npy") for name in archive.namelist()})
        with archive.open(f"{labels_name}.npy") as file:
            labels = np.lib.format.read_array(file)
        with archive.open(f"{pixels_name}.npy") as file:
            check(*npy_header(file), labels)
        # No checksum: that would read all of it.
        if (mapped := map_npz(archive, pixels_name, check=False)) is not None:
            return mapped, labels
        if (copy := _read_copy(path, stamp)) is not None:
            return copy
        with archive.open(f"{pixels_name}.npy") as file:
            return _write_copy(path, stamp, labels, lambda copy: shutil.copyfileobj(file, copy, 1 << 24))


def _unpickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"--extra {path}: it holds a {type(content).__name__}: save a dictionary with {EXPECTED}")
    pixels, labels = (as_array(content[name]) for name in _chosen(path, content))
    return pixels, labels


def _chosen(path: Path, names: Any) -> tuple[str, str]:
    for pair in NAMES:
        if all(name in names for name in pair):
            return pair
    raise InputError(f"--extra {path}: it has {', '.join(sorted(map(str, names))) or 'nothing'}: save {EXPECTED}")


# --- the copy of the pixels ---


def _copy_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.pixels.npy")


def _read_copy(path: Path, stamp: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Pixels and labels; None where there is no copy, or one of another file than this."""
    try:
        pixels, end = map_npy(_copy_name(path))
        with open(_copy_name(path), "rb") as file:
            file.seek(end)
            labels = np.lib.format.read_array(file)
            return (pixels, labels) if file.read() == stamp else None
    except (OSError, ValueError):
        return None


def _write_copy(path: Path, stamp: bytes, labels: np.ndarray, write: Callable[[BinaryIO], None]) -> tuple[np.ndarray, np.ndarray]:
    """Under another name until it is whole: neither a crash nor another rank leaves half a copy."""
    copy = _copy_name(path)
    unfinished = copy.with_name(f"{copy.name}.{secrets.token_hex(4)}")
    try:
        try:
            with open(unfinished, "xb") as file:
                write(file)
                np.save(file, labels)
                file.write(stamp)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(copy)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        remedy = "make the folder writable, or save an .npz with numpy.savez, which needs no copy"
        raise InputError(f"--extra {path}: its pixels cannot be written to {copy} ({reason}): {remedy}") from error
    if (result := _read_copy(path, stamp)) is None:
        raise InputError(f"--extra {path}: {copy} changed while it was written: start again")
    return result
