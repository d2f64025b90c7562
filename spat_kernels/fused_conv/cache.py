"""Choices on disk: which engine was the fastest at a recipe, on which card, by which versions.

`choices.json` in SPAT_KERNELS_CACHE, or in ~/.cache/spat_kernels, is made when there is something to write. What cannot be read
is as good as empty. What cannot be written is not kept. `problem` says so. Processes that write at once keep each other's.
"""

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .._library import compiled

VERSION = 1
NAME = "choices.json"
TRIES, PAUSE = 20, 0.05  # for a second in all, an attack waits for another process that writes


class Cache:
    """Choices by device and recipe, each a dict with "choice", "candidates" and "seconds".

    Args:
        folder: where; None is as above, looked up when it is needed.

    Attributes:
        problem: why choices are not kept, or "".
    """

    def __init__(self, folder: Path | None = None):
        self._folder, self.problem = folder, ""
        self._choices: dict[str, dict[str, Any]] | None = None  # as read, and written since
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        folder = self._folder or os.environ.get("SPAT_KERNELS_CACHE") or Path.home() / ".cache" / "spat_kernels"
        return Path(folder).expanduser() / NAME

    def get(self, device: torch.device, recipe: str) -> dict[str, Any] | None:
        """What is known of `recipe` on a device like this one, or None."""
        with self._lock:
            if self._choices is None:
                self._choices = self._read()
            return self._choices.get(environment(device), {}).get(recipe)

    def put(self, device: torch.device, recipe: str, entry: dict[str, Any]) -> None:
        """Keep `entry`. Errors of the file system are noted in `problem`."""
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _alone(self.path.with_suffix(".lock")):
                    choices = self._read()
                    choices.setdefault(environment(device), {})[recipe] = entry
                    self._write(choices)
            except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
                self.problem = f"choices are not kept in {self._shown_path()}: {error}"
                choices = self._choices or {}
                choices.setdefault(environment(device), {})[recipe] = entry
            self._choices = choices

    def _shown_path(self) -> str:
        try:
            return str(self.path)
        except RuntimeError:
            return NAME

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            stored = json.loads(self.path.read_text())
            if stored["version"] != VERSION:
                raise ValueError(f"it is of version {stored['version']}")
            return {name: {r: e for r, e in known.items() if _fits(e)} for name, known in stored["choices"].items()}
        except FileNotFoundError:
            pass
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            self.problem = f"{self._shown_path()} cannot be used: {error or type(error).__name__}"
        return {}

    def _write(self, choices: dict[str, dict[str, Any]]) -> None:
        handle, temporary = tempfile.mkstemp(prefix=NAME, dir=self.path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"version": VERSION, "choices": choices}, file, indent=1, sort_keys=True)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # others may share the folder
            os.replace(temporary, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def environment(device: torch.device) -> str:
    """What choices depend on beside the recipe: the card, and the versions of all that computes."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    benchmark = ", benchmark" * torch.backends.cudnn.benchmark
    return f"{card}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}{benchmark}, {_build()}"


@cache
def _build() -> str:
    """The kernels that were timed: a hash of the extension."""
    if compiled is None:
        return "no extension"
    return f"extension {hashlib.sha256(Path(compiled.__file__).read_bytes()).hexdigest()[:16]}"


def _fits(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("choice"), str)
        and isinstance(entry.get("candidates"), list)
        and isinstance(entry.get("seconds"), dict)
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within: no other process is here too, where the system can lock files."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        for last in (False,) * TRIES + (True,):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last:
                    raise
                time.sleep(PAUSE)
        yield
