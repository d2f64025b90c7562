"""WebDataset shards: pictures and labels in tar files, found, indexed once, and read at any place.

A sample is a picture (0017.jpg) and its label, a number or a name, as text (0017.cls) or as "label" or "cls" in 0017.json, one
after the other under one name. The headers of all shards are scanned once into an index, which is kept beside them. With it, a
sample is read wherever it lies. So shards obey `loader.Order` as folders do, and a run goes on exactly at any step, which a
stream with a shuffle buffer cannot. An epoch still goes through a few shards at a time (`loader.WINDOW`), as disks like it.
"""

import io
import itertools
import json
import math
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from glob import glob, has_magic
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..runtime import atomic_write, logs
from .images import Dataset, Folder, check_length, missing_classes
from .npz_files import MOST_CLASSES, read_array
from .picture_folders import LISTED, readable, say
from .pictures import SUFFIXES

RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
BLOCK = 512  # bytes of a tar file's header, of which its contents are multiples
OPEN = 64  # shards that a process keeps open
MOST_SHARDS = 10**6
HEADER = 1 << 24  # bytes of one record of a tar file's headers, and of a label, at most
TEXT = 1024  # characters of a name and of a label, at most: the index gives all as much room as the longest
REMEDY = "write it again, or add --skip-broken"
INDEX = ".index.npz"
ODD = "surrogateescape"  # how Python has names that are no UTF-8


@dataclass(frozen=True, eq=False, repr=False)
class Shards(Folder):
    """Pictures in tar files, of which `files` are the names: that of the shard, relative to `root`, and that inside.

    Args:
        paths: the shards.
        shard: int64 [N], each picture's, an index into `paths`.
        start, length: int64 [N], its place in the shard, in bytes.
    """

    paths: list[Path] = field(default_factory=list)
    shard: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    length: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def read(self, row: int) -> bytes:
        start, length = int(self.start[row]), int(self.length[row])
        check_length(length)
        shard = _opened(self.paths[self.shard[row]])  # held until it is read: another thread may push it out of the cache
        content = os.pread(shard.fileno(), length, start)
        if len(content) < length:  # a mapped file that is cut short would kill the process
            raise OSError("its shard has become shorter")
        return content

    def subset(self, rows: Tensor) -> "Shards":
        files = [self.files[row] for row in rows.tolist()]
        parts = {name: getattr(self, name)[rows] for name in ("labels", "shard", "start", "length")}
        return replace(self, files=files, **parts)

    def bytes(self) -> Tensor:
        return self.length


@lru_cache(OPEN)
def _opened(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)  # closed when it drops out of the cache


# ---- which shards


def find(data: str, splits: Sequence[str]) -> dict[str, list[Path]]:
    """The shards that `data` means: those of `splits` ("train" and "test", or "test" alone), and where it names them, of "train".

    `data` is a folder with train/*.tar or *train*.tar, and the same of test or val; or TRAIN,TEST, which are names of shards with
    ranges ({000000..000099}) or *; or TRAIN alone, for TEST has its name with "test" or "val" for "train"; or, where test images
    are all that is wanted, TEST alone. {} where it is a folder without shards.

    Raises:
        InputError: some are not there.
    """
    where = f"--data {data}"
    if os.path.isdir(data):
        found = {split: _within(Path(data), split) for split in ("train", "test")}
        if any(found[split] for split in splits) and (missing := [split for split in splits if not found[split]]):
            names = " and ".join("test/*.tar or val/*.tar" if split == "test" else "train/*.tar" for split in missing)
            raise InputError(f"{where}: the folder has no {names}: give one that has, for --no-test too")
        return found if found["test"] else {}
    given = data.split(",")
    if len(given) > 2:
        raise InputError(f"{where}: these are {len(given)} names of shards: give TRAIN,TEST, with ranges such as {{000..099}}")
    before, train, after = given[0].rpartition("train")
    if len(given) == 1 and train:
        others = [RANGE.sub("*", f"{before}{name}{after}") for name in ("test", "val")]
        given.append(next((name for name in others if glob(name)), others[-1]))
    if len(given) < len(splits):
        raise InputError(f"{where}: these are shards to train or to test on: give both, as TRAIN,TEST")
    found = {"train": [], "test": _named(where, given[-1])}
    with nullcontext() if "train" in splits else suppress(InputError):
        found["train"] = _named(where, given[0]) if len(given) == 2 else []
    return found


def _within(folder: Path, split: str) -> list[Path]:
    """The shards of a split in a folder. None in one that has folders: these are classes, beside the archives they came in."""
    names = ("test", "val") if split == "test" else (split,)
    patterns = [pattern for name in names for pattern in (f"{name}/*.tar", f"*{name}*.tar")]
    if any(path.is_dir() for name in names for path in folder.glob(f"{name}/*")):
        return []
    return next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])


def _named(where: str, name: str) -> list[Path]:
    """The shards of a name with ranges or wildcards, all of them there."""
    texts = RANGE.split(name)  # text, first, last, text, first, last, text
    choices: list[list[str]] = []
    count = math.prod(max(0, int(b) - int(a) + 1) for a, b in RANGE.findall(name))
    if count > MOST_SHARDS:
        raise InputError(f"{where}: these are {count} shards: give at most {MOST_SHARDS}")
    for i, text in enumerate(texts[::3]):
        choices.append([text])
        if 3 * i + 2 < len(texts):
            first, last = texts[3 * i + 1 : 3 * i + 3]
            choices.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
    paths = ["".join(parts) for parts in itertools.product(*choices)]
    paths = [path for part in paths for path in (sorted(glob(part)) if has_magic(part) else [part])]
    if not paths:
        raise InputError(
            f"{where}: there is no shard {name}: give what is on a disk here, with a range such as {{000..099}} or *"
        )
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise InputError(
            f"{where}: {missing[0]} is not there, {len(missing)} of {len(paths)} shards are not: give the range of those that are"
        )
    return list(map(Path, paths))


def load(data: str, found: dict[str, list[Path]], splits: Sequence[str], image_size: int, skip_broken: bool) -> Dataset:
    """The pictures of `splits` in the shards that `find` has found, brought to `image_size`."""
    indices = [_index(found[split]) for split in splits]
    for index in indices:
        _check(index, skip_broken)
    texts = [index.labels for index in indices]
    if "train" not in splits and found["train"] and not _numbered(texts):
        texts.insert(0, _index(found["train"]).labels)  # labels are in the order of the training classes
    classes, labels = _classes(f"--data {data}", texts)
    images = [_shards(*parts, image_size) for parts in zip(indices, labels[-len(splits) :], strict=True)]
    if skip_broken:
        images = [readable(part) for part in images]
    if len(splits) == 2 and (missing := missing_classes(images[0].labels, len(classes))):
        remedy = "give shards with some, and number classes from 0 without gaps"
        raise InputError(f"--data {data}: no training sample is of class {classes[missing[0]]}: {remedy}")
    folder = data if os.path.isdir(data) else os.path.dirname(data.split(",")[0])
    return Dataset.from_splits(Path(folder).resolve().name, images, classes, all_classes=len(texts) == 2)


def _numbered(texts: list[np.ndarray]) -> bool:
    return all(np.char.isdigit(part).all() for part in texts)


def _classes(where: str, texts: list[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    """The names of the classes, and the labels of each split as numbers: as they are, or in the order of the training names."""
    if not all(map(len, texts)):
        raise InputError(f"{where}: there are shards, but no sample in them: give some with a picture and a .cls or .json each")
    if _numbered(texts):
        most = max(int(text) for part in texts for text in np.unique(part).tolist())
        if most >= MOST_CLASSES:
            raise InputError(f"{where}: a label is {most}: number classes from 0 without gaps")
        return [str(number) for number in range(max(most, 1) + 1)], [part.astype(np.int64) for part in texts]
    names, others = np.unique(texts[0]), np.unique(texts[-1])
    if negative := [name for name in (*names.tolist(), *others.tolist()) if re.fullmatch(rb"-\d+", name)]:
        raise InputError(f"{where}: a label is {negative[0].decode()}: number classes from 0 without gaps")
    if other := set(others.tolist()) - set(names.tolist()):
        raise InputError(
            f"{where}: test samples are of class {min(other).decode(errors=ODD)}, no training sample is: give both the same"
        )
    if len(names) < 2:
        raise InputError(f"{where}: {names[0].decode(errors=ODD)} is all its classes: give samples of two or more")
    return [name.decode(errors=ODD) for name in names.tolist()], [np.searchsorted(names, part) for part in texts]


# ---- the index


@dataclass
class _Index:
    """Samples of shards: names inside them, labels as text (bytes [N] both), shards and places, as in `Shards`.

    `damage` and `lacking`, for each shard: what is wrong from where on, and the samples without one picture or a label; or "".
    """

    paths: list[Path]
    names: np.ndarray
    labels: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    length: np.ndarray
    damage: np.ndarray
    lacking: np.ndarray


ARRAYS = ("names", "labels", "shard", "start", "length", "damage", "lacking")


def _index(paths: list[Path]) -> _Index:
    """The index kept beside the shards, where it is of these, else made and kept."""
    kept = paths[0].with_name(f"{paths[0].stem}-{paths[-1].stem}{INDEX}")
    try:
        stamp = "\n".join(map(_stamp, paths))
    except OSError as error:
        raise InputError(f"--data: {error.filename} cannot be read ({error.strerror}): repair or remove it") from error
    if found := _kept(kept, stamp, paths):
        return found
    index = _scanned(paths)
    content = io.BytesIO()
    np.savez(content, stamp=np.array(stamp), **{name: getattr(index, name) for name in ARRAYS})
    try:
        atomic_write.write(kept, content.getbuffer())
    except atomic_write.SaveError as error:
        reason = first_line(error.__cause__ or error)
        if not _kept(kept, stamp, paths):  # which another process may have written meanwhile
            say(f"{kept} cannot be written ({reason}): the {len(paths)} shards are scanned at every start, by every process")
    return index


def _stamp(path: Path) -> str:
    """What changes where a shard does: also the time of its last change of any kind, which copies cannot keep."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait forever
        raise OSError(0, "it is no regular file", str(path))
    return f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _kept(file: Path, stamp: str, paths: list[Path]) -> _Index | None:
    """The index in `file`, where it is whole and of the shards that `stamp` says."""
    if not os.path.isfile(file):
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            if str(read_array(archive, "stamp")) == stamp:
                return _Index(paths, **{name: read_array(archive, name) for name in ARRAYS})
    except Exception:  # as `read_array`: it is half of one, or none of ours, and is made again
        return None
    return None


def _scanned(paths: list[Path]) -> _Index:
    with ThreadPool(8) as pool:  # which wait for the disk, of a network often
        done = pool.imap(_scan, paths)
        parts = list(logs.bar(len(paths), f"indexing {paths[0].parent}", iterable=done, leave=False))
    samples = [(i, *sample) for i, part in enumerate(parts) for sample in part.samples]
    shard, names, starts, lengths, labels = zip(*samples, strict=True) if samples else ((),) * 5
    numbers = (np.array(column, np.int64) for column in (shard, starts, lengths))
    texts = [np.array([text.encode(errors=ODD) for text in column], np.bytes_) for column in (names, labels)]
    wrong = [np.array([getattr(part, kind) for part in parts]) for kind in ("damage", "lacking")]
    return _Index(paths, *texts, *numbers, *wrong)


@dataclass
class _Scan:
    """What is in one shard: each sample's name of the picture, start, length and label, and what `_Index` says is wrong."""

    samples: list[tuple[str, int, int, str]] = field(default_factory=list)
    damage: str = ""
    lacking: str = ""


def _scan(path: Path) -> _Scan:
    scan, lacking, key, label = _Scan(), list[str](), "", ""
    pictures: list[tuple[str, int, int]] = []
    try:
        with _Headers(io.FileIO(path)) as file:
            for key, members in itertools.groupby(_members(file), _key):
                pictures, label = [], ""
                for member in members:
                    if member.name.lower().endswith(SUFFIXES):
                        pictures.append((member.name, member.offset_data, member.size))
                    elif member.name.endswith((".cls", ".json")):
                        content = os.pread(file.fileno(), min(member.size, HEADER), member.offset_data)
                        label = label or _label(content, member.name)
                if len(pictures) == 1 and label:
                    scan.samples.append((*pictures[0], label))
                else:
                    lacking.append(key)
    except Exception as error:  # of a damaged header, tarfile raises whatever its parsers run into
        whole = len(pictures) == 1 and label
        if whole:
            scan.samples.append((*pictures[0], label))
        place = "its beginning" if not key else f"the end of sample {key}" if whole else f"sample {key}"
        scan.damage = f"from {place} on ({first_line(error)})"
    more = f" and {len(lacking) - LISTED} more" if len(lacking) > LISTED else ""
    scan.lacking = ", ".join(lacking[:LISTED]) + more
    return scan


class _Headers(io.BufferedReader):
    """A tar file whose headers are read, which may claim to be of any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= HEADER:
            raise tarfile.ReadError(f"a header says that {size} bytes of headers follow")
        return super().read(size)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The whole files in a tar file, but for hidden ones. A ReadError where it is damaged."""
    size, end = os.fstat(file.fileno()).st_size, 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data <= end - BLOCK or member.issparse() or len(member.name) > TEXT:
                raise tarfile.ReadError(f"{member.name[:TEXT]!a} has {member.size} bytes, is sparse, or has too long a name")
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            if end > size:
                break
            if member.isfile() and not member.name.rpartition("/")[2].startswith((".", "__")):
                yield member
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):  # these end a tar file; tarfile takes whatever is no header for them
        raise tarfile.ReadError("it is cut short" if end >= size else "no tar header follows")


def _key(member: tarfile.TarInfo) -> str:
    """The name of a sample: that of its files, up to the first dot behind their folder."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _label(content: bytes, name: str) -> str:
    """The text of a label, "" where there is none, such as null or a list."""
    try:
        text = content.decode().strip()
        record = json.loads(text) if name.endswith(".json") else {"cls": text}
    except (ValueError, RecursionError):
        return ""
    found = next((record[key] for key in ("label", "cls") if key in record), "") if isinstance(record, dict) else ""
    text = str(found) if type(found) in (int, str) else ""
    return text if len(text) <= TEXT else ""


def _check(index: _Index, skip_broken: bool) -> None:
    """Refuse shards that are damaged, and samples that lack something, or say which are left out."""
    wrong = [(path, what) for path, what in zip(index.paths, index.damage.tolist(), strict=True) if what]
    lacking = [(path, what) for path, what in zip(index.paths, index.lacking.tolist(), strict=True) if what]
    if wrong and not skip_broken:
        raise InputError(f"--data: {wrong[0][0]} is damaged {wrong[0][1]}: {REMEDY} to leave out the rest of it")
    if lacking and not skip_broken:
        path, what = lacking[0]
        why = "have no picture or several, or no label (.cls, or .json)"
        raise InputError(f"--data: in {path}, {what} {why}: {REMEDY} to leave them out")
    for path, what in wrong:
        used = int((index.shard == index.paths.index(path)).sum())
        say(f"{path} is damaged {what}: the {used} samples before are used, the rest is left out")
    for path, what in lacking:
        say(f"in {path}, these are left out, as they have no picture or several, or no label: {what}")


def _shards(index: _Index, labels: np.ndarray, size: int) -> Folder:
    root = Path(os.path.commonpath([path.parent for path in index.paths]))
    shards = [os.path.relpath(path, root) for path in index.paths]
    files = [f"{shards[i]}/{name.decode(errors=ODD)}" for i, name in zip(index.shard.tolist(), index.names.tolist(), strict=True)]
    numbers, *places = map(torch.from_numpy, (labels, index.shard, index.start, index.length))
    return Shards(root, files, numbers, size, index.paths, *places)
