"""What an evaluation has found so far, in a file from which it goes on."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

IDENTITY = ("norm", "eps", "version", "attacks_to_run", "images")


@dataclass
class State:
    """The state of an evaluation.

    Attributes:
        norm, eps, version, attacks_to_run, images: what is evaluated; `images` is their number.
        run_attacks: the attacks that are done.
        robust: for each image, whether it is still classified as labelled; empty before the first batch.
        clean_accuracy: the share that is without an attack.
    """

    norm: str
    eps: float
    version: str
    attacks_to_run: list[str]
    images: int
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
            whole = len(saved.robust) == saved.images
        except (ValueError, TypeError) as error:
            raise ValueError(f"state_path={path}: no evaluation here wrote it ({error}): remove it, or name another") from error
        if other := [name for name in IDENTITY if getattr(saved, name) != getattr(self, name)]:
            found = ", ".join(f"{name}={getattr(saved, name)!r}, here {getattr(self, name)!r}" for name in other)
            raise ValueError(f"state_path={path}: it is of another evaluation ({found}): remove it, or name another")
        return saved if whole else self

    def save(self, path: Path | None, robust: Tensor) -> None:
        """Replace the file by one with `robust`, bool [N], in one step."""
        self.robust = robust.tolist()
        if path is not None:
            beside = path.with_name(path.name + ".tmp")
            beside.write_text(json.dumps(asdict(self)))
            os.replace(beside, path)

    @property
    def flags(self) -> Tensor:
        """`robust` as bool [N]."""
        return torch.tensor(self.robust, dtype=torch.bool)
