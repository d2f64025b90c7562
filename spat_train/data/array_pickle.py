"""Arrays in pickles, read without running what the pickle says: NumPy's constructors are replaced by stand-ins."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np


def read_pickle(path: Path) -> Any:
    """What is pickled in `path`, its arrays as stand-ins for `as_array`.

    Raises:
        pickle.UnpicklingError: it names anything but arrays. Files that are no pickles raise other exceptions too.
    """
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


class _Unpickler(pickle.Unpickler):
    """Makes arrays of numbers, and calls nothing but the stand-ins above, whatever the pickle names."""

    STANDINS = {
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Array,
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy.core.multiarray.scalar": lambda dtype, content: dtype.array(content)[0],
        "numpy.core.numeric._frombuffer": _from_buffer,
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how protocol 2 writes bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # as numpy 2 says
        if full not in self.STANDINS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return self.STANDINS[full]
