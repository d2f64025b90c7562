"""Files that are complete or not there: written beside, flushed to the disk, then renamed."""

import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch


class SaveError(RuntimeError):
    """A file could not be written. What was there before is unchanged."""


def write(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Replace `path` by `content` in one step; what was there before goes to `keep`, if given.

    Raises:
        SaveError: the disk is full, or the folder not writable; `path` is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    kept = f"; {path} is as it was" if path.exists() else ""
    try:
        temporary.unlink(missing_ok=True)  # of a killed run, or a link that would lead elsewhere
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        kept = ""
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else the rename may be lost with the power
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):  # on a read-only file system
            temporary.unlink(missing_ok=True)
        raise SaveError(f"cannot write {path} ({error.strerror}){kept}: make room, or choose another --out") from error


def open_to_append(path: Path) -> BinaryIO:
    """Open a file for adding to its end. An OSError where it is a link or a pipe, which a folder of others may hold."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))


def make_folder(path: Path) -> None:
    """Make the folder `path`, and those above it.

    Raises:
        SaveError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make {path} ({error.strerror}): make room, or choose another --out") from error


def write_torch(path: Path, value: object, keep: Path | None = None) -> None:
    """`write` what torch.save makes of `value`. It saves to memory first, so that only the file can raise an OSError."""
    content = io.BytesIO()
    torch.save(value, content)
    write(path, content.getbuffer(), keep)


def check_sums(file: Path | BinaryIO) -> None:
    """Compare the parts of a zip, such as torch.save writes, with the checksums beside them, which torch.load does not.

    Raises:
        zipfile.BadZipFile: one differs, or it is no whole zip. Flipped bits may raise other exceptions too.
    """
    with zipfile.ZipFile(file) as parts:
        assert parts.fp is not None  # until it is closed
        held, said = parts.fp.seek(0, os.SEEK_END), sum(part.file_size for part in parts.infolist())
        if said > held or any(part.compress_type for part in parts.infolist()):  # they would take any time and memory
            raise zipfile.BadZipFile(f"{said:,} bytes in {held:,}: torch.save neither compresses parts nor lets them overlap")
        written = any(part.CRC for part in parts.infolist())  # torch.serialization.set_crc32_options(False) leaves them all 0
        if written and (part := parts.testzip()):
            raise zipfile.BadZipFile(f"{part} differs from its checksum")
