"""The folder of a run: last.pt, to resume from; previous.pt, the one before; best.pt, the weights to use; small files."""

import fcntl
import io
import os
import uuid
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import InputError, InUseError, first_line
from . import atomic_write, json_files

FORMAT = "spat_train 3"
MADE_BY_A_RUN = ("last.pt", "previous.pt", "best.pt", "result.json")

_locks: set[int] = set()  # forked processes close these descriptors: a data worker that outlives its run must hold no lock


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks)


class RunFolder:
    """Reads, writes and locks the folder `path`. None writes nothing."""

    def __init__(self, path: Path | None):
        self.path = path
        self.lock: int | None = None
        self.made: list[Path] = []  # the folders that this run made: its own, and those above
        self.saved_id = ""  # of last.pt
        self.best: dict | None = None  # the validation whose weights are in best.pt

    def open(self, resume: bool) -> dict | None:
        """The checkpoint to resume from, or None.

        Raises:
            InputError: it holds a run and `resume` does not ask for it, or a checkpoint cannot be read.
        """
        if self.path is None:
            return None
        there = [name for name in MADE_BY_A_RUN if (self.path / name).exists()]
        if there and not resume:
            raise InputError(f"--out {self.path}: it holds a run: add --resume to go on with it, or choose another --out")
        if there and there[0] not in MADE_BY_A_RUN[:2]:
            raise InputError(f"--out {self.path}: it holds {there[0]} but no last.pt to go on from: choose another --out")
        state = self._read(self.path / there[0]) if there else None
        self.saved_id = state["id"] if state else ""
        return state

    def claim(self) -> None:
        """Make the folder, and keep other runs out of it until `release`, or the end of this process.

        Raises:
            InputError: it cannot be made, or not be written to.
            InUseError: another run is at work there.
        """
        if self.path is None:
            return
        try:
            for folder in reversed((self.path, *self.path.parents)):
                with suppress(FileExistsError):
                    folder.mkdir()
                    self.made.insert(0, folder)
            if not os.access(self.path, os.W_OK):
                raise InputError(f"--out {self.path}: nothing can be written there: make it writable, or choose another folder")
            self.lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be made ({error.strerror}): choose another folder") from error
        _locks.add(self.lock)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            self.made = []  # they are the other's
            raise InUseError(f"--out {self.path}: another run is at work there: wait for it, or choose another --out") from error
        except OSError:  # a file system without locks
            self._unlock()

    def release(self) -> None:
        """Unlock the folder, and remove it if this run made it and wrote nothing."""
        with suppress(OSError):  # rmdir's, of a folder that holds something
            for folder in self.made:
                folder.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            _locks.discard(self.lock)
            os.close(self.lock)
            self.lock = None

    def _read(self, path: Path) -> dict:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"--resume: {path} cannot be read ({error.strerror}): try again when it can") from error
        try:
            atomic_write.check_sums(io.BytesIO(content))
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises almost anything on a damaged file
            previous = path.with_name("previous.pt")
            usable = path != previous and previous.exists()
            remedy = f"remove it, and --resume goes on from {previous}" if usable else "start again in another --out"
            raise InputError(f"--resume: {path} is damaged ({first_line(error)[:120]}): {remedy}") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise InputError(f"--resume: {path} is no checkpoint of this version ({FORMAT}): start again in another --out")
        return state

    def save(self, state: dict) -> None:
        """Write last.pt, then best.pt, which last.pt contains: a run that is killed between the two writes it when it resumes."""
        if self.path is None:
            return
        state = {"format": FORMAT, "id": uuid.uuid4().hex} | state
        atomic_write.write_torch(self.path / "last.pt", state, keep=self.path / "previous.pt")
        self.saved_id = state["id"]
        self.write_best(state)

    def write_best(self, state: dict) -> None:
        if self.path is not None and state["best"] is not None and self.best != state["progress"]["best"]:
            best = {key: state[key] for key in ("format", "config", "classes", "image_shape") if key in state}  # older: two
            best |= {"model": state["best"], "ema": None}
            atomic_write.write_torch(self.path / "best.pt", best | {"validation": state["progress"]["best"]})
            self.best = state["progress"]["best"]

    def write(self, name: str, content: dict) -> None:
        """Write a JSON file."""
        if self.path:
            atomic_write.write(self.path / name, json_files.to_bytes(content))

    def result(self) -> dict | None:
        """The content of result.json, if it is of the checkpoint that was opened or saved last."""
        try:
            found = json_files.read(self.path / "result.json") if self.path else {}
            test = found["test"]
            ours = found["checkpoint"] == self.saved_id and all(0 <= float(test[name]) <= 100 for name in (*test, "clean"))
        except (AttributeError, KeyError, TypeError, ValueError):  # missing, altered or not ours
            return None  # the test writes it
        return found if ours else None

    def kept(self) -> str:
        last = [self.path / name for name in MADE_BY_A_RUN[:2] if (self.path / name).exists()] if self.path else []
        return f"the last good checkpoint is {last[0]}" if last else "no checkpoint was written yet"
