"""The notes of a training run on stderr, and the errors that end it: one line each, with what was saved and what to change."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..config import Config
from ..data.loader import death
from ..errors import InputError, first_line, is_out_of_memory
from ..runtime.atomic_write import write_torch
from ..runtime.distributed import World
from ..runtime.run_folder import RunFolder
from .step import Launched

PEER = r"Connection (closed|reset) by peer|[Tt]imed out|ncclRemoteError"  # what a process sees of another that ended
FINER = "with a lower --lr, or --precision bf16 or fp32"


class TrainingError(RuntimeError):
    """The run cannot go on. The message says what was saved, and what to change."""


def say(world: World, text: str) -> None:
    """A line on stderr, by the main process."""
    if world.main:
        print(f"spat-train: {text}", file=sys.stderr)


@contextmanager
def explained(config: Config, world: World, folder: RunFolder) -> Iterator[None]:
    """Within, what torch raises of dead readers, other processes and memory becomes a message with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if reason := death(error):
            raise TrainingError(f"{reason}; {folder.kept()}; with --resume the same command goes on") from error
        if world.size > 1 and not is_out_of_memory(error) and re.search(PEER, str(error)):
            raise TrainingError(
                f"another process ended, and may say why ({first_line(error)}); {folder.kept()}, to go on with by --resume"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"--batch-size {config.batch_size}: out of memory on {world.device}: lower it, or use --precision bf16 or "
            "more GPUs (torchrun); where that is enough, and on --resume too: --graph never, --stream, or a lower "
            f"--eval-batch-size ({config.evaluation_batch}); {folder.kept()}"
        ) from error


def not_finite(folder: RunFolder, rank: int, batch: Launched, losses: dict[str, float], epoch: int, step: int) -> TrainingError:
    """The error for a loss of NaN or infinity in this step, counted from 0. Writes its batch to the folder."""
    where = ""
    if folder.path:
        folder.path.mkdir(parents=True, exist_ok=True)  # other machines may have a disk of their own
        path = folder.path / f"nonfinite-rank{rank}.pt"
        tensors = {name: getattr(batch, name).cpu() for name in ("x", "x_adv", "y")}
        write_torch(path, tensors | {"epoch": epoch, "step": step, "loss": losses})
        where = f" its batch is in {path};"
    place = f"epoch {epoch + 1}, step {step + 1}"
    return TrainingError(f"the loss of {place} is not finite ({losses});{where} {folder.kept()}: start again {FINER}")
