"""The progress of a run: a bar, one JSON line for each event in log.jsonl, and trackers."""

import json
import os
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError, printable
from . import atomic_write
from .atomic_write import SaveError
from .trackers import Trackers

MINUTE = 60.0
LONGEST = 2**16  # bytes of a line of the log
FIELDS = {  # numbers that an event has, by its kind
    "start": ("steps_per_epoch",), "train": ("epoch", "loss", "lr"), "validation": ("epoch", "clean", "pgd"),
}  # fmt: skip


class _Bar(tqdm):
    """A bar that ignores that nobody reads stderr any more: `head` has enough, or the terminal was closed."""

    def display(self, msg=None, pos=None) -> None:
        with suppress(OSError):
            super().display(msg, pos)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Lines(_Bar):
    """A bar for a file, where nothing can be overwritten: a line at most once a minute."""

    def __init__(self, **options):
        self.shown = time.monotonic()
        super().__init__(**options | {"leave": False, "mininterval": MINUTE})

    def display(self, msg=None, pos=None) -> None:
        if time.monotonic() - self.shown >= MINUTE:
            self.line()

    def line(self, text: str = "") -> None:
        self.shown = time.monotonic()
        with suppress(OSError):
            self.fp.write(f"{text or self}\n")
            self.fp.flush()


def bar(total: int, name: str | None, **options) -> tqdm:
    """A progress bar of images on stderr; `name` None shows none."""
    kind = _Bar if sys.stderr.isatty() else _Lines
    return kind(total=total, desc=name, disable=name is None, **{"unit": "img", "mininterval": 0.5} | options)


class Log:
    """The log of the main process. `folder` None writes nothing. `trackers` get the numbers of each line but the first.

    A resumed run first drops the lines that were written after its checkpoint, so that the log reads like an uninterrupted run's.
    The others go to the trackers again, which may have lost some when the run was killed, or be new to it.

    Args:
        position, crc: of the checkpoint: the bytes of the log, and their CRC-32, which checkpoints of older versions lack.

    Raises:
        InputError: the log is not the one that the checkpoint knows.
    """

    def __init__(
        self, folder: Path | None, *, total: int, done: int, position: int, crc: int | None, name: str, trackers: Trackers
    ):  # fmt: skip
        self.bar, self.shown = bar(total, name, initial=done, unit_scale=True, smoothing=0.1), dict[str, object]()
        self.start, self.images, self.last_rate = time.perf_counter(), 0, 0.0
        self.file, self.trackers, self.crc = None, trackers, 0  # of what is in the file
        if folder is None:
            return
        self.path = folder / "log.jsonl"
        with self.saving():
            self.file = atomic_write.open_to_append(self.path)
            if self.path.stat().st_size:
                self.crc = self._kept(position, crc)
        for event in _events(folder) if position and trackers.open else []:
            self._track(event)

    def _kept(self, position: int, crc: int | None) -> int:
        """Cut off what follows the first `position` bytes, whose checksum it returns; that of the checkpoint is `crc`."""
        kept = self.path.read_bytes()[:position]
        if len(kept) < position or crc not in (None, zlib.crc32(kept)):
            remedy = "restore it, or remove it, and a new log begins there"
            raise InputError(f"--resume: {self.path} is damaged: the checkpoint knows other lines: {remedy}")
        os.truncate(self.path, position)
        return zlib.crc32(kept)

    def advance(self, images: int) -> None:
        self.images += images
        self.bar.update(images)

    def show(self, **values) -> None:
        """Show the values beside the bar, with those that are there already."""
        self.shown |= {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in values.items()}
        self.bar.set_postfix(self.shown, refresh=False)

    def rate(self) -> float:
        """Images a second since the last call; without new images, the last rate."""
        now = time.perf_counter()
        if self.images:
            self.last_rate = round(self.images / max(now - self.start, 1e-9), 1)
        self.start, self.images = now, 0
        return self.last_rate

    def line(self, text: str = "") -> None:
        """Where stderr is no terminal: a line of `text`, or of what the bar shows."""
        if isinstance(self.bar, _Lines):
            self.bar.line(text)

    def write(self, kind: str, **values) -> None:
        with self.saving():
            if self.file:
                line = (json.dumps({"kind": kind, **values}) + "\n").encode()
                self.file.write(line)
                self.file.flush()
                self.crc = zlib.crc32(line, self.crc)
        self._track({"kind": kind, **values})

    def _track(self, event: dict) -> None:
        if (kind := event["kind"]) != "start":
            numbers = {name: v for name, v in event.items() if isinstance(v, (int, float)) and name not in ("epoch", "step")}
            self.trackers.scalars({f"{kind}/{name}": v for name, v in numbers.items()}, event["step"])

    def position(self) -> int:
        """The bytes of log.jsonl that are on the disk."""
        if not self.file:
            return 0
        with self.saving():
            os.fsync(self.file.fileno())
            return self.file.seek(0, os.SEEK_END)

    def close(self, complete: bool) -> None:
        """`complete`: the run did not stop early."""
        self.bar.close()
        if self.file:
            with suppress(OSError):  # a full disk, which was reported when it was written to
                self.file.close()
        self.trackers.close(complete)

    @contextmanager
    def saving(self):
        try:
            yield
        except OSError as error:
            raise SaveError(f"cannot write {self.path} ({error.strerror}): make room, or choose another --out") from error


def read(folder: Path, kind: str) -> list[dict]:
    """The events of one kind in a run's log, in order. What is no event is left out, such as half a line of a killed run.

    Raises:
        InputError: the log cannot be read, or an event is not as a run writes it.
    """
    return [event for event in _events(folder) if event["kind"] == kind]


def _events(folder: Path) -> list[dict]:
    events, path = [], folder / "log.jsonl"
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
                event = None
                with suppress(ValueError, RecursionError):
                    event = json.loads(line)
                if not isinstance(event, dict) or not {"kind", "step"} <= event.keys():
                    continue
                if not _as_written(event):
                    shown = printable(line[:80].decode(errors="replace").strip())
                    raise InputError(f"{path}: line {number} is of no run ({shown}): remove it")
                events.append(event)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): restore it") from error
    return events


def _as_written(event: dict) -> bool:
    """Whether the event has the numbers of its kind, and finite ones."""
    if not isinstance(kind := event["kind"], str):
        return False
    numbers = {"step", *FIELDS.get(kind, ())} | (event.keys() - {"kind"} if kind in ("train", "validation") else set())
    finite = (
        isinstance(event.get(n), (int, float)) and abs(event[n]) < 2**63 and not isinstance(event[n], bool) for n in numbers
    )
    return all(finite) and event["step"] >= 0 and event.get("steps_per_epoch", 1) > 0
