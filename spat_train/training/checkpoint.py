"""What a checkpoint holds beside the weights, and whether a run may continue from it. The files: runtime/run_folder.py."""

import sys
import time
from pathlib import Path

import torch

from ..config import Config
from ..data.images import Dataset, Folder, Images, fingerprint
from ..errors import InputError
from ..runtime import json_files, rounding
from ..runtime.distributed import World
from ..runtime.run_folder import RunFolder
from .saved_form import as_written, check_form


def find_saved(config: Config, world: World, folder: RunFolder) -> dict | None:
    """The checkpoint to continue from, or None. Claims the folder for this run.

    Raises:
        InputError: there is one that cannot be used, that was made with other options, or that not all processes see.
    """
    if world.main:
        folder.claim()  # before reading: another run may be at its last save
    saved = folder.open(config.resume)
    changed: list[str] = []
    if saved:
        with as_written(folder.path):
            check_form(saved, folder.path)
            changed = config.differences(saved["config"])
    if len(set(world.gather(saved and saved["id"]))) > 1:
        remedy = "give a folder that all machines share"
        raise InputError(f"--out {folder.path}: processes find different checkpoints there: {remedy}")
    if changed:
        remedy = "give the same, or choose another --out"
        raise InputError(f"--resume: {folder.path} was made with other options ({'; '.join(changed)}): {remedy}")
    if saved and folder.path and world.main:
        _warn_if_altered(config, folder.path / "config.json")
    return saved


def _warn_if_altered(config: Config, file: Path) -> None:
    """Say so where the file of a run's options does not say what the checkpoint does, by which the run goes on."""
    try:
        altered = file.exists() and bool(config.differences(json_files.read(file)))
    except (InputError, TypeError):
        altered = True
    if altered:
        say(f"{file} was altered or damaged: the run keeps the options it began with, and writes them there again")


def image_record(dataset: Dataset, extra: Images | None, world: World) -> dict:
    """What a checkpoint has of the images, by which --resume sees whether they are the same, by "train", "test" and "extra".

    `data`: their fingerprints; `file_sizes`: bytes of each picture in a folder, int64 [N], of the main process alone.
    """
    images = {"train": dataset.train, "test": dataset.test} | ({"extra": extra} if extra else {})
    folders = {name: part for name, part in images.items() if isinstance(part, Folder) and world.main}
    return {
        "data": {name: fingerprint(part) for name, part in images.items()},
        "file_sizes": {name: folder.bytes() for name, folder in folders.items()},
    }


def compare_images(dataset: Dataset, record: dict, saved: dict, folder: RunFolder) -> None:
    """Refuse other images than the run began with. Files of another size may have been repaired: a note names them."""
    before, now = saved["data"], record["data"]
    if changed := [kind for kind in {**before, **now} if before.get(kind) != now.get(kind)]:
        given = ", ".join(f"--{name} {saved['config'][name]}" for name in ("data", "extra") if saved["config"][name])
        raise InputError(
            f"--resume: {' and '.join(changed)} images or labels differ from those that {folder.path} was trained on "
            f"({given}): give those, or choose another --out"
        )
    for kind, sizes in record["file_sizes"].items():
        if others := (sizes != saved["file_sizes"][kind]).nonzero()[:, 0].tolist():
            first = getattr(dataset, kind).files[others[0]]
            say(
                f"{len(others)} of {len(sizes)} {kind} pictures, {first} the first, have another size than before: right if they "
                "were repaired"
            )


def arithmetic(world: World) -> dict:
    """What rounding depends on: versions, device, numbers of threads and processes."""
    return rounding.arithmetic(world.device) | {"processes": world.size}


def environment(world: World) -> dict:
    """`arithmetic` and the time, for the log and result.json."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return arithmetic(world) | {"threads": torch.get_num_threads(), "time": now}


def warn_of_rounding(saved: dict, world: World) -> None:
    """Say that the run continues with another arithmetic."""
    if world.main:
        what = "rounding differs from here on, and grows: the weights will be close to those of a run without a stop, not equal"
        rounding.say_changes(saved.get("arithmetic", {}), arithmetic(world), what)


def say(text: str, world: World | None = None) -> None:
    """A line on stderr, by the main process of `world`."""
    if world is None or world.main:
        print(f"spat-train: {text}", file=sys.stderr)
