"""Arrays in files that cost no memory until they are read: .npy files and uncompressed members of .npz files."""

import struct
import zipfile
from pathlib import Path
from typing import IO, Literal

import numpy as np


def npy_header(file: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    """The dtype, shape and order ("C" or "F") of the .npy array that begins where `file` is; its bytes follow."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
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
