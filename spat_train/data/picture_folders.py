"""Folders of pictures: train/ and test/ or val/, each with one folder per class."""

import os
import sys
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

from ..errors import InputError, first_line, printable
from ..runtime import logs
from .images import Dataset, Folder, missing_classes
from .pictures import SUFFIXES

LISTED = 10  # names of broken ones


def load_folders(path: Path, image_size: int, splits: tuple[str, ...], skip_broken: bool) -> Dataset:
    """The pictures in `path`, of `splits` ("train" and "test", or "test" alone), brought to `image_size`."""
    where = f"--data {path}"
    tests = [name for name in ("test", "val") if os.path.isdir(path / name)]
    test = tests[0] if tests else "test"
    if len(tests) == 2:
        say(f"{where} has test/ and val/: val/ is ignored")
    folders = [path / (test if split == "test" else split) for split in splits]
    if missing := [folder.name for folder in folders if not os.path.isdir(folder)]:
        names = " and ".join("test/ (or val/)" if name == "test" else f"{name}/" for name in missing)
        also = ", for --no-test too" if missing == ["test"] and len(splits) == 2 else ""
        raise InputError(f"{where}: the folder has no {names}: give one that has{also}, with a folder per class in each")
    try:
        classes = _classes(path, folders, test)
        found = [_by_class(folder, classes, image_size, skip_broken) for folder in folders]
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({first_line(error)}): repair or remove it") from error
    return Dataset.from_splits(path.resolve().name, found, classes)


def _classes(path: Path, folders: list[Path], test: str) -> list[str]:
    """The names of the classes, in the order of their labels: that of the training classes, for test images alone too."""
    train = path / "train" if os.path.isdir(path / "train") else folders[0]
    first, classes = ([e.name for e in _entries(folder) if e.is_dir()] for folder in (train, folders[-1]))
    if len(folders) == 1 and set(classes) <= set(first or classes):
        first = classes = first or classes
    if first != classes:
        name = min(set(first) ^ set(classes))
        raise InputError(f"--data {path}: train/ and {test}/ differ in class {name}: give both the same folders")
    if len(classes) < 2:
        remedy = "give a folder for each of two or more"
        raise InputError(f"--data {path}: {', '.join(classes) or 'nothing'} is all its classes: {remedy}")
    return classes


def _by_class(root: Path, classes: list[str], size: int, skip_broken: bool) -> Folder:
    around = {_identity(folder) for folder in (root, *root.resolve().parents)}
    files = [list(_pictures(root, name, around, skip_broken)) if os.path.isdir(root / name) else [] for name in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(names) for names in files]))
    images = Folder(root, [name for names in files for name in names], labels, size)
    if skip_broken:
        images = readable(images)
    empty = missing_classes(images.labels, len(classes))
    if empty and (root.name == "train" or len(empty) == len(classes)):
        folder = root / classes[empty[0]]
        raise InputError(f"--data: {folder} has no picture ({', '.join(SUFFIXES)}): put some there, or remove it")
    return images


def _pictures(root: Path, of: str, around: set[tuple[int, int]], skip_broken: bool) -> Iterator[str]:
    """The names of the pictures in `root / of` and in the folders there. By links, none may be `around` it or come twice."""
    seen = set(around)

    def inside(at: str) -> list[tuple[str, os.DirEntry]]:
        if (here := _identity(root / at)) in seen:
            raise InputError(f"--data: {root / at} is a link to a folder around it, or to one that is read already: remove it")
        seen.add(here)
        return [(f"{at}/{entry.name}", entry) for entry in reversed(_entries(root / at))]

    left = inside(of)  # the next is the last; no recursion, as folders may be nested deeper than Python's calls
    while left:
        name, entry = left.pop()
        if entry.is_dir():
            left += inside(name)
        elif _is_picture(entry):
            if not (entry.is_file() or skip_broken):
                raise InputError(
                    f"--data: {entry.path} is a link to nothing, or no regular file: remove it, or add --skip-broken"
                )
            yield name


def _identity(folder: Path) -> tuple[int, int]:
    """The device and the number of a folder there, which all its names share."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in `folder`, by name, but for hidden files and folders, such as .ipynb_checkpoints."""
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink() and not _is_picture(entry) and not os.path.exists(entry.path):
            raise InputError(f"--data: {entry.path} is a link to nothing: repair or remove it")  # it may have been a class
    return entries


def _is_picture(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(SUFFIXES)


def check_readable(images: Folder) -> None:
    """Decode every picture. Raises the InputError of the first that cannot be."""
    for error in _decoded(images):
        if error:
            raise error


def _decoded(images: Folder) -> Iterator[InputError | None]:
    """Decode every picture, in order, and say what is wrong with it."""

    def wrong(row: int) -> InputError | None:
        try:
            images.picture(row)
        except InputError as error:
            return error
        return None

    with ThreadPool() as pool:
        done = pool.imap(wrong, range(len(images)), chunksize=16)
        yield from logs.bar(len(images), f"decoding {images.root}", iterable=done, leave=False)


def readable(images: Folder) -> Folder:
    """Without those that cannot be decoded, which are named."""
    errors = list(_decoded(images))
    if broken := [(name, error.__cause__) for name, error in zip(images.files, errors, strict=True) if error]:
        names = ", ".join(f"{name} ({first_line(why)})" for name, why in broken[:LISTED] if why)
        more = ", ..." * (len(broken) > LISTED)
        say(f"{len(broken)} of {len(images)} pictures in {images.root} are left out: {names}{more}")
    return images.subset(torch.tensor([row for row, error in enumerate(errors) if error is None], dtype=torch.int64))


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"spat-train: {printable(text)}", file=sys.stderr)
