"""An evaluation on disk, as far as it got: a line of samples.jsonl for each attack on each batch, and settings.json."""

import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime import atomic_write, json_files
from ..runtime.atomic_write import SaveError
from ..runtime.distributed import ALONE, World
from .records import EXAMPLES, from_json, to_line

FORMAT = "spat_train evaluation 3"
DIFFER = {  # settings whose values say nothing to a reader
    "weights": "the model differs, in weights, architecture or normalisation",
    "source_weights": "the source differs, in weights, architecture or normalisation",
    "data": "the images or labels of --data differ", "rows": "the chosen images differ",
    "memory_format": "the memory format differs",
}  # fmt: skip


class Samples:
    """The records of an evaluation, in `folder`, or in memory alone where it is None.

    A record is appended and flushed at once; what follows the last whole line, of a killed evaluation, is dropped. Records are
    in samples.jsonl in the order in which one process makes them. Those that several processes make out of turn wait in
    samples-RANK.jsonl.

    Args:
        settings: all that a record depends on, except its attack.
        attacks: what each attack is, by name; later evaluations may add others.
        world: the processes that share the evaluation, and see the same folder.
        arithmetic: what rounding depends on here (runtime/rounding.py).

    Attributes:
        records: by attack and batch, all that this process knows of.
        begun_with: `arithmetic` of the process that began the evaluation; {} where it is not known.

    Raises:
        InputError: the folder holds an evaluation with other settings, altered records, or something else; or the processes
            have different settings, or do not see the same folder.
    """

    def __init__(
        self, folder: Path | None, settings: dict, attacks: dict[str, str], world: World = ALONE, arithmetic: dict | None = None
    ):
        self.folder, self.world, self.settings = folder, world, settings
        self.begun_with = arithmetic or {}
        self.file: BinaryIO | None = None  # samples.jsonl, of the main process
        self.early: BinaryIO | None = None  # samples-RANK.jsonl, where there are several
        self.turns: deque[tuple[str, int]] = deque()  # what samples.jsonl lacks, in order
        self.made: list[tuple[str, int]] = []  # by this process
        given = settings | {"attacks": attacks}
        if different := next((c for c in (changes(given, other) for other in world.gather(given)) if c), None):
            raise InputError(f"the processes differ ({'; '.join(different)}): give all of them the same files")
        self.records, self.written, self.attacks = world.on_main(lambda: self._open(attacks))
        if folder is not None and world.size > 1:
            self._open_early(folder / shard(world.rank))

    def _open(self, attacks: dict[str, str]) -> tuple[dict, set[tuple[str, int]], dict[str, str]]:
        """The records on the disk, the keys of those in samples.jsonl, and all attacks that are known."""
        if self.folder is None:
            return {}, set(), attacks
        path = self.folder / "samples.jsonl"
        settings = {"format": FORMAT, **self.settings}
        attacks = self._check(self.folder / "settings.json", settings, attacks) | attacks
        try:
            written, early = _whole_lines(path, self.settings), dict[tuple[str, int], dict]()
            for each in shards(self.folder):
                early |= _whole_lines(each, self.settings)
            self.file = atomic_write.open_to_append(path)
        except OSError as error:
            raise SaveError(f"cannot write {path} ({error.strerror}): make room, or choose another --out") from error
        content = {"settings": settings, "attacks": attacks, "begun_with": self.begun_with}
        atomic_write.write(self.folder / "settings.json", json_files.to_bytes(content))
        return early | written, set(written), attacks

    def _check(self, path: Path, settings: dict, attacks: dict[str, str]) -> dict[str, str]:
        """The attacks that are known there."""
        folder = path.parent
        if not has_records(folder):  # it ended before the first one: other settings may follow
            return {}
        if not path.exists():
            if there := [each.name for each in (folder / "samples.jsonl", *shards(folder)) if each.exists()]:
                raise InputError(f"--out {folder}: it holds {there[0]} without {path.name}: choose another --out")
            return {}
        content = json_files.read(path)
        try:
            before, known = dict(content["settings"]), {str(name): str(spec) for name, spec in content["attacks"].items()}
            self.begun_with = dict(content.get("begun_with", {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({type(error).__name__}): choose another --out") from error
        if before.get("format") != FORMAT:
            made = f"{before.get('format')!r}"[:100]
            raise InputError(f"--out {folder}: another version made what it holds ({made}, now {FORMAT!r}): choose another --out")
        changed = changes(before, settings)
        changed += [f"attack {n} was {known[n]}, now {what}" for n, what in attacks.items() if known.get(n, what) != what]
        if changed:
            raise InputError(
                f"--out {folder}: it holds another evaluation ({'; '.join(changed)}): give the same, or choose another --out"
            )
        return known

    def _open_early(self, path: Path) -> None:
        """Open this process's own file, and compare what it and the main process see of it."""
        with suppress(OSError):  # then it is no file to the main process either
            self.early = atomic_write.open_to_append(path)
        identities = self.world.gather(_identity(path))

        def compare() -> None:
            for rank, identity in enumerate(identities):
                if identity is None or _identity(path.with_name(shard(rank))) != identity:
                    raise InputError(f"--out {path.parent}: process {rank} cannot write there: choose a folder that all share")

        self.world.on_main(compare)

    def finished(self, batches: int) -> dict[str, str]:
        """Those of `attacks` that all batches have a record of."""
        return {name: spec for name, spec in self.attacks.items() if all((name, k) in self.records for k in range(batches))}

    def expect(self, tasks: Iterable[tuple[str, int]]) -> None:
        """`tasks`: attacks and batches in the order of samples.jsonl, those that it has among them."""
        self.turns = deque(task for task in tasks if task not in self.written)
        self._take_turns()

    def add(self, record: dict) -> None:
        """Keep the record of `record["attack"]` on `record["batch"]`."""
        key = _key(record)
        self.records[key] = record
        self.made.append(key)
        self._take_turns()
        if self.early and not (self.file and key in self.written):
            self._append(self.early, record)

    def _append(self, file: BinaryIO, record: dict) -> None:
        try:
            file.write(to_line(record, self.settings))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            remedy = "make room, and give the same command again"
            raise SaveError(f"cannot write {file.name} ({error.strerror}): {remedy}") from error

    def wanted(self, attack: str, batch: int) -> int:
        """How many examples a record may have: EXAMPLES less those of the earlier batches, as far as they are known."""
        earlier = (self.records.get((attack, number), {}) for number in range(batch))
        return max(0, EXAMPLES - sum(len(record.get("examples", ())) for record in earlier))

    def _take_turns(self) -> None:
        """Write records to samples.jsonl as far as they are known without a gap."""
        while self.turns and self.turns[0] in self.records:
            key = self.turns.popleft()
            record = self.records[key]
            if "examples" in record:  # it may have been made before those of earlier batches
                self.records[key] = record = record | {"examples": record["examples"][: self.wanted(*key)]}
            if self.file:
                self._append(self.file, record)
            self.written.add(key)

    def merge(self) -> None:
        """Bring the records of all processes to all, and to samples.jsonl. All have to call it, when all is done."""
        for theirs in self.world.gather([self.records[key] for key in self.made]):
            self.records = {_key(record): record for record in theirs} | self.records
        self._take_turns()
        if self.file and self.folder and (paths := shards(self.folder)):
            # A record may have no turn: of an attack that is not asked for, and that some batches lack.
            left = [record for key, record in self.records.items() if key not in self.written]
            if left:
                atomic_write.write(self.folder / shard(0), b"".join(to_line(record, self.settings) for record in left))
            for path in paths:
                if not left or path.name != shard(0):
                    path.unlink(missing_ok=True)

    def save(self, attack: str, batch: int, **arrays: Tensor) -> None:
        """Write images/ATTACK/BATCH.npz; before the record, so that what has a record has its images."""
        content = io.BytesIO()
        copies = {name: np.ascontiguousarray(t.cpu().numpy()) for name, t in arrays.items()}
        np.savez(content, **copies)  # type: ignore[arg-type]  # NumPy's hints take one of them for allow_pickle
        assert self.folder is not None  # else there is nothing to save for
        folder = self.folder / "images" / file_name(attack)
        atomic_write.make_folder(folder)
        atomic_write.write(folder / f"{batch:05}.npz", content.getbuffer())

    def close(self) -> None:
        """Close the files, and remove empty ones, so that an evaluation with other settings may follow. Where there are several
        processes, samples.jsonl and settings.json stay: the others may have records."""
        for file in (self.file, self.early):
            if file:
                with suppress(OSError):  # a line that could not be written, which `add` has reported
                    file.close()
        if self.folder is None:
            return
        unused = ["samples.jsonl", "settings.json"] if self.world.size == 1 and not self.records else []
        own = self.folder / shard(self.world.rank)
        for path in shards(self.folder) if self.world.size == 1 else [own] if self.early else []:
            with suppress(FileNotFoundError):  # the main process removes what it has merged
                if not path.stat().st_size:
                    unused.append(path.name)
        for name in unused:
            (self.folder / name).unlink(missing_ok=True)


def shard(rank: int) -> str:
    """The name of the file for what a process finishes out of turn."""
    return f"samples-{rank}.jsonl"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("samples-*.jsonl"))


def has_records(folder: Path) -> bool:
    """Whether an evaluation there has finished anything."""
    return any(path.exists() and path.stat().st_size for path in (folder / "samples.jsonl", *shards(folder)))


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from one of the same name on another disk."""
    with suppress(OSError):
        return path.stat().st_ino, path.stat().st_size
    return None


def _key(record: dict) -> tuple[str, int]:
    return record["attack"], record["batch"]


def _whole_lines(path: Path, settings: dict) -> dict[tuple[str, int], dict]:
    """The records in a file, whose end is cut off from the first broken line on, such as a kill leaves.

    Raises:
        InputError: a whole line is not as it was written.
    """
    found, whole = dict[tuple[str, int], dict](), 0
    if not path.is_file():
        return found
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                content = None
            if content is None:
                break
            if (record := from_json(content, settings)) is None:
                remedy = "remove that line, and its batch is attacked again, or choose another --out"
                raise InputError(f"{path}: line {number}: it was altered, or is of another evaluation: {remedy}")
            whole += len(line)
            found[_key(record)] = record
    if whole < path.stat().st_size:
        with atomic_write.open_to_append(path) as file:
            file.truncate(whole)
    return found


def changes(before: dict, now: dict) -> list[str]:
    """How settings differ, by the options of `spat-train evaluate`."""
    names = [name for name in now | before if before.get(name) != now.get(name)]
    if {"images", "seed", "data"} & set(names):  # which images are chosen follows from these
        names = [name for name in names if name != "rows"]
    found = []
    for name in names:
        was, is_now = (_shown(name, s.get(name)) for s in (before, now))
        option = "limit" if name == "images" else name.replace("_", "-")
        found.append(DIFFER.get(name) or f"--{option} was {was}, now {is_now}")
    return found


def _shown(name: str, value: object) -> str:
    return f"{255 * value:.6g}" if name == "eps" and isinstance(value, float) else str(value)[:80]


def weights_hash(model: nn.Module) -> str:
    """A short hash of all parameters and buffers with their names, and of the modules with the settings that they print: an
    activation, a stride or a dilation leaves no trace in the weights."""
    kinds = " ".join(f"{name} {type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules())
    # Without the addresses of functions and the devices of parameters in lists, which are not alike everywhere.
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+| \((cuda|xpu|mps)[^)]*\)", "", kinds).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of the values."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def file_name(attack: str) -> str:
    """The name of an attack, with _ for what file systems do not take."""
    return re.sub(r"[^\w.+=-]", "_", attack)
