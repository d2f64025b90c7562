"""What a checkpoint holds beside the weights, and whether a run may go on from it. The files: runtime/run_folder.py."""

import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from ..config import Config
from ..data.images import Dataset, Folder, Images, fingerprint
from ..errors import InputError
from ..runtime.distributed import World
from ..runtime.run_folder import RunFolder
from .messages import say


@dataclass
class Progress:
    """Where a run is."""

    epoch: int = 0  # epochs that are trained and validated
    step: int = 0  # updates done in the current one
    best: dict | None = None  # a validation's record
    stale: int = 0  # validations since the best
    sums: dict[str, float] = field(default_factory=dict)  # of the loss and its terms, since the last line of the log
    count: int = 0  # steps in these sums
    log_bytes: int = 0


def find_saved(config: Config, world: World, folder: RunFolder) -> dict | None:
    """The checkpoint to go on from, or None. Claims the folder for this run.

    Raises:
        InputError: there is one that cannot be used, that was made with other options, or that not all processes see.
    """
    if world.main:
        folder.claim()  # before reading: another run may be at its last save
    saved = folder.open(config.resume)
    if len(set(world.gather(saved and saved["id"]))) > 1:
        raise InputError(
            f"--out {folder.path}: processes find different checkpoints there: give a folder that all machines share"
        )
    if saved and (changed := config.differences(saved["config"])):
        raise InputError(
            f"--resume: {folder.path} was made with other options ({'; '.join(changed)}): give the same, or choose another --out"
        )
    return saved


class ImageRecord:
    """The images of a run as fingerprints, by which --resume sees whether they are the same.

    Attributes:
        fingerprints: of "train", "test" and, where there are any, "extra" images.
        file_sizes: by the same names, int64 [N]: bytes of each picture in a folder. Of the main process alone.
    """

    def __init__(self, dataset: Dataset, extra: Images | None, world: World):
        self.world = world
        self.images: dict[str, Images | Folder] = {"train": dataset.train, "test": dataset.test}
        self.images |= {"extra": extra} if extra else {}
        self.fingerprints = {name: fingerprint(images) for name, images in self.images.items()}
        folders = {name: images for name, images in self.images.items() if isinstance(images, Folder)}
        self.file_sizes = {name: images.bytes() for name, images in folders.items()} if world.main else {}

    def compare(self, saved: dict, folder: RunFolder) -> None:
        """Refuse other images than the run began with. Files of another size may have been repaired: a note names them."""
        before, now = saved["data"], self.fingerprints
        if changed := [kind for kind in {**before, **now} if before.get(kind) != now.get(kind)]:
            given = ", ".join(f"--{name} {saved['config'][name]}" for name in ("data", "extra") if saved["config"][name])
            raise InputError(
                f"--resume: {' and '.join(changed)} images or labels differ from those that {folder.path} was trained on "
                f"({given}): give those, or choose another --out"
            )
        for kind, sizes in self.file_sizes.items():
            images, others = self.images[kind], (sizes != saved["file_sizes"][kind]).nonzero()[:, 0].tolist()
            if others and isinstance(images, Folder):
                say(
                    self.world,
                    f"{len(others)} of {len(images)} {kind} pictures, {images.files[others[0]]} the first, have another size "
                    "than before: right if they were repaired",
                )


def arithmetic(world: World) -> dict:
    """What rounding depends on: versions, device, numbers of threads and processes."""
    on_gpu = world.device.type == "cuda"
    return {
        "spat_kernels": version("spat_kernels"),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else f"{platform.machine()} CPU",
        "threads": None if on_gpu else torch.get_num_threads(),
        "processes": world.size,
    }


def environment(world: World) -> dict:
    """`arithmetic` and the time, for the log and result.json."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return arithmetic(world) | {"threads": torch.get_num_threads(), "time": now}


def warn_of_rounding(saved: dict, world: World) -> None:
    """Say that another machine goes on with the run, which changes its rounding."""
    was, now = saved.get("arithmetic", {}), arithmetic(world)
    if changed := [f"{name} {value}, now {now[name]}" for name, value in was.items() if value != now[name]]:
        say(world, f"saved with {'; '.join(changed)}: going on is equal but for rounding")
