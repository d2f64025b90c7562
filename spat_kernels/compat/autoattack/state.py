"""What an evaluation has found so far, in a file from which it goes on."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

IDENTITY = ("norm", "eps", "version", "attacks_to_run", "data")


@dataclass
class State:
    """The state of an evaluation.

    Attributes:
        norm, eps, version, attacks_to_run, data: what is evaluated; `data` is a hash of the images and labels.
        run_attacks: the attacks that are done, the first of `attacks_to_run`.
        robust: for each image, whether it is still classified as labelled.
        clean_accuracy: the share that is without an attack.
    """

    norm: str
    eps: float
    version: str
    attacks_to_run: list[str]
    data: str
    run_attacks: list[str] = field(default_factory=list)
    robust: list[bool] = field(default_factory=list)
    clean_accuracy: float = float("nan")

    def restored(self, path: Path) -> "State":
        """The state in the file `path`, of the same evaluation as this one.

        Raises:
            ValueError: it is no such file, or that of another evaluation.
        """
        try:
            saved = State(**json.loads(path.read_bytes()))
            torch.tensor(saved.robust, dtype=torch.bool)
        except (ValueError, TypeError) as error:
            raise ValueError(f"state_path={path}: no evaluation here wrote it ({error}): remove it, or name another") from error
        if other := [name for name in IDENTITY if getattr(saved, name) != getattr(self, name)]:
            found = ", ".join(f"{name}={getattr(saved, name)!r}, here {getattr(self, name)!r}" for name in other)
            raise ValueError(f"state_path={path}: it is of another evaluation ({found}): remove it, or name another")
        return saved

    def save(self, path: Path | None, robust: Tensor) -> None:
        """Replace the file by one with `robust`, bool [N], in one step."""
        if path is not None:
            self.robust = robust.tolist()
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as beside:
                json.dump(asdict(self), beside)
            os.replace(beside.name, path)


def digest(x: Tensor, y: Tensor) -> str:
    """A hash of images and labels."""
    found = hashlib.sha256()
    for t in (x, y):
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
