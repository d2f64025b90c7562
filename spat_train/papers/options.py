"""Options of `spat-train figure` and `spat-train table`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..command_line import DEFAULT_IN_HELP
from ..config import check_device
from ..errors import InputError, check_count, check_eps, check_seed


@dataclass(frozen=True)
class Options:
    """Which runs, which images and which attacks. Radii are in 1/255."""

    runs: Path | None = None
    """Folder that holds the folders of finished runs. Those trained with the source's preset are taken, such as by
    spat-train train --preset table6.1/mart --out RUNS/mart."""
    data: Annotated[str | None, DEFAULT_IN_HELP] = None
    """Data set, as in `spat-train train`. Default: that of the runs."""
    root: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Where torchvision's data sets are. Default: where the runs had them."""
    download: bool = False
    """Fetch torchvision's data sets."""
    test_images: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Maximum number of test images, drawn at random by --seed. Default: all."""
    eps: Annotated[float | None, DEFAULT_IN_HELP] = None
    """Radius of the attacks, in 1/255. Default: the source's, or on other data that of the runs."""
    seed: int = 0
    """Seed of the images drawn and of the attacks."""
    eval_batch_size: int = 256
    """Images that are attacked at once."""
    device: Annotated[str | None, DEFAULT_IN_HELP] = None
    """Default: cuda where there is one, else cpu."""
    model: str | None = None
    """Allow runs of this package.module:factory, whose code is imported."""


@dataclass(frozen=True)
class Extent:
    """How much the pictures and the landscape show."""

    examples: int = 5
    """Images shown, in pictures and in the landscape."""
    restarts: int = 20
    """Random starts from each of them, in the landscape."""
    ascent_steps: int = 100
    """Steps of PGD from each start, each of 2.5 eps / steps, in the landscape."""


def check(options: Options, out: Path, extent: Extent = Extent()) -> None:  # noqa: B008  (frozen)
    """Raise InputError for an option that does not fit, or where the folder `out` does not exist and cannot be made."""
    check_device(options.device)
    if options.model is not None and ":" not in options.model:
        raise InputError(f"--model {options.model}: it permits code, as package.module:factory; name runs by their folders")
    for option, folder in (("runs", options.runs), ("root", options.root)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"--{option} {folder}: there is no such folder")
    check_count("--test-images", options.test_images)
    check_count("--eval-batch-size", options.eval_batch_size)
    check_count("--examples", extent.examples)
    check_count("--restarts", extent.restarts, least=2)
    check_count("--ascent-steps", extent.ascent_steps)
    check_eps("--eps", options.eps)
    check_seed(options.seed)
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        reason = "it is not writable" if there.is_dir() else "it is no folder"
        raise InputError(f"--out {out}: cannot be written to ({there}: {reason}): give another folder")
