"""Extra images to train on: pseudo-labelled or generated, up to tens of millions, in files of other projects' making.

Pixels are mapped and never read as a whole. An uncompressed .npz is mapped as it is. What is compressed or pickled is written
once to FILE.pixels.npy beside it: the pixels, the labels after them, and a last line with the size and time of FILE.
"""

import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError, first_line
from .images import Images
from .npz_files import class_labels, map_npy, map_npz, member_header, read_array

NAMES = (("image", "label"), ("data", "extrapolated_targets"), ("x_train", "y_train"))  # generated; RST's; as --data
COPY = ".pixels.npy"  # what its name adds to that of the file
EXPECTED = " or ".join(f"({pixels}, {labels})" for pixels, labels in NAMES)


def load_extra(path: Path, *, image_shape: tuple[int, int, int], num_classes: int) -> Images:
    """The images in `path`: RST's pickle, or an .npz file, of (image, label), (data, extrapolated_targets) or (x_train, y_train).

    Pixels are uint8 [N, H, W, C] (or [N, H, W], of grey images) and stay in the file; labels are whole numbers [N].

    Args:
        image_shape: (C, H, W) that the images must have.
        num_classes: labels must be below.
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
        labels = read_array(archive, labels_name)
        check(*member_header(archive, pixels_name), labels)
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


def _read_copy(path: Path, stamp: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Pixels and labels; None where there is no copy, or one of another file than this."""
    if not os.path.isfile(f"{path}{COPY}"):
        return None
    try:
        pixels, end = map_npy(f"{path}{COPY}")
        with open(f"{path}{COPY}", "rb") as file:
            file.seek(end)
            labels = np.lib.format.read_array(file)
            return (pixels, labels) if file.read() == stamp else None
    except (OSError, ValueError, MemoryError):
        return None


def _write_copy(path: Path, stamp: bytes, labels: np.ndarray, write: Callable[[BinaryIO], None]) -> tuple[np.ndarray, np.ndarray]:
    """Under another name until it is whole: neither a crash nor another rank leaves half a copy."""
    copy = Path(f"{path}{COPY}")
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


# --- arrays in pickles, read without running what the pickle says: stand-ins replace NumPy's constructors ---


def read_pickle(path: Path) -> Any:
    """What is pickled in `path`, its arrays as stand-ins for `as_array`. An UnpicklingError where it names anything else."""
    with open(path, "rb") as file:
        return _Unpickler(file, encoding="latin1").load()  # Python 2's strings are bytes


def as_array(value: Any) -> np.ndarray:
    return value.array() if isinstance(value, _Array) else np.asarray(value)


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple):
        self.code = state[1] + self.code  # the byte order

    def array(self, content: Any) -> np.ndarray:
        """[N], a view of `content`, bytes or what Python 2 wrote for them."""
        if not re.fullmatch("[<>=|]?([iuf][1248]|b1)", self.code):
            raise pickle.UnpicklingError(f"an array of dtype {self.code}")
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, np.dtype(self.code))


class _Array:
    """Stands for numpy.ndarray: made only when it is needed, as files hold other arrays too."""

    def __init__(self, *_: Any):
        self.state: tuple = (0, _Dtype("u1"), False, b"")
        self.axes: tuple | None = None

    def __setstate__(self, state: tuple):
        self.state = state[1:]

    def array(self) -> np.ndarray:
        shape, dtype, fortran, content = self.state
        array = dtype.array(content).reshape(shape, order="F" if fortran else "C")
        return array if self.axes is None else array.transpose(self.axes)


def _from_buffer(content: bytes, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None) -> _Array:
    """As protocol 5 pickles arrays; axes come with the order K: in memory it is C."""
    array = _Array()
    array.state, array.axes = (shape, dtype, order == "F", content), axes
    return array


class _Unpickler(pickle._Unpickler):
    """Makes arrays of numbers, and calls nothing but the stand-ins above, whatever the pickle names.

    Derived from the one in Python: that in C may allocate 64 GB for the memo of a pickle of 8 bytes. Bytearrays are read as
    bytes, as they would be filled with zeros first, as many as the pickle claims.
    """

    STANDINS = {
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Array,
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy.core.multiarray.scalar": lambda dtype, content: dtype.array(content)[0],
        "numpy.core.numeric._frombuffer": _from_buffer,
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how protocol 2 writes bytes
    }

    dispatch = pickle._Unpickler.dispatch.copy()
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # as numpy 2 says
        if full not in self.STANDINS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return self.STANDINS[full]
