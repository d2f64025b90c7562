"""Adversarial training as one call. The loop is in run.py, what a step does in step.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spat_kernels.precision import tf32_switches

from ..config import Config
from ..data.images import Dataset
from ..data.loader import death
from ..errors import InputError, first_line, is_out_of_memory
from ..runtime.distributed import World, is_of_a_peer, world
from ..runtime.run_folder import RunFolder
from ..runtime.signals import GracefulStop
from .check import check
from .run import OnStep, OnValidation, Result, Run, TrainingError


def train(
    config: Config,
    dataset: Dataset | None = None,
    *,
    save: bool = True,
    on_step: OnStep | None = None,
    on_validation: OnValidation | None = None,
) -> Result:
    """Train a robust model as `config` says, or go on with a run that was interrupted (`config.resume`).

    Started by torchrun, all processes share each batch. Seeds torch's, NumPy's and Python's generators.

        result = spat_train.train(spat_train.Config(data="cifar10", method="trades", alpha=0.1), save=False)
        result.model, result.test["PGD-20"]

    Args:
        config: every option, as on the command line (`spat-train train --help`).
        dataset: instead of loading `config.data`.
        save: write the run's folder, `config.folder`. If not, everything stays in memory.
        on_step: called after every step with the `Run`, whose `progress`, `step` and `pending` say where it is.
        on_validation: called with the `Run` and a validation's epoch, clean and pgd accuracy in percent, after every validation.
            The run is saved then: an exception from here ends it, and --resume goes on.

    Raises:
        InputError: an option, the data or a checkpoint does not fit, or memory does not suffice.
        TrainingError: the loss is not finite, or a reader process died.
        SaveError: the disk is full.
        Stopped: by SIGTERM or Ctrl-C, after saving.
    """
    check(config)
    if not save and config.track not in ("auto", "none"):
        raise InputError(f"track={config.track!r}: what is not saved is not tracked: leave out save=False, or track")
    folder = RunFolder(config.folder if save else None)
    # First the processes: while they wait for each other, signals act as ever.
    with world(config.device) as processes, GracefulStop(heeded=False).heard() as wish, gpu_arithmetic(config.precision):
        try:
            with explained(config, processes, folder):
                run = Run(config, dataset, processes, wish, folder, on_step=on_step, on_validation=on_validation)
                wish.heeded = True
                return run.all()
        finally:
            folder.release()


@contextmanager
def gpu_arithmetic(precision: str):
    """Within: TF32 only where `precision` asks for it, and the fastest of cuDNN's engines. Restored afterwards."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with tf32_switches(precision, "cuda" if torch.cuda.is_available() else "cpu"):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def explained(config: Config, world: World, folder: RunFolder) -> Iterator[None]:
    """Within, what torch raises of dead readers, other processes and memory becomes a message with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if reason := death(error):
            raise TrainingError(f"{reason}; {folder.kept()}; with --resume the same command goes on") from error
        if is_out_of_memory(error):
            raise InputError(
                f"--batch-size {config.batch_size}: out of memory on {world.device}: lower it, or use --precision bf16, "
                "--accumulate or more GPUs (torchrun); where that is enough, and on --resume too: --checkpoint-activations, "
                f"--fsdp (with torchrun), --graph never, --stream, or a lower --eval-batch-size ({config.evaluation_batch}); "
                f"{folder.kept()}"
            ) from error
        if world.size > 1 and is_of_a_peer(error):
            reason = f"another process ended, and may say why ({first_line(error)})"
            raise TrainingError(f"{reason}; {folder.kept()}, to go on with by --resume") from error
        raise
