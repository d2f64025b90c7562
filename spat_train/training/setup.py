"""What a run is built from: its images, model, loader and log, as the config says."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..data.datasets import load
from ..data.images import Dataset, Images, hold_out
from ..data.loader import Loader, Order
from ..data.pseudo_labels import load_extra
from ..errors import InputError
from ..models.checkpoints import load_checkpoint
from ..models.registry import create
from ..models.run_config import checkpoint_file
from ..models.try_on import try_on
from ..models.wrapping import normalisation
from ..runtime.distributed import World
from ..runtime.logs import Log
from ..runtime.run_folder import RunFolder
from .checkpoint import Progress, environment
from .messages import say


def seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (for models that use the global one)


def load_images(c: Config, dataset: Dataset | None) -> tuple[Dataset, Images | None]:
    """`dataset`, or that of `c.data`, with labels checked; and the pseudo-labelled images of `c.extra`."""
    data = dataset or load(
        c.data, root=c.root, download=c.download, image_size=c.image_size, limit=c.limit, seed=c.seed, skip_broken=c.skip_broken
    )
    labels = data.train.labels
    if ((labels < 0) | (labels >= data.num_classes)).any():  # the attack does not look at them, nor do GPUs before they fail
        raise InputError(f"{data.name}: there are labels outside of 0 to {data.num_classes - 1}: give those of its classes")
    try:
        c.maximised.check_classes(data.num_classes, targeted=False)
    except ValueError as error:
        raise InputError(f"--inner {c.inner_loss}: {error}") from error
    if c.extra is None:
        return data, None
    return data, load_extra(c.extra, image_shape=data.image_shape, num_classes=data.num_classes)


def make_model(c: Config, dataset: Dataset, world: World, *, init: bool) -> tuple[nn.Module, torch.memory_format]:
    """The model on its device, with the same weights in all processes, and the memory format that it works in.

    `init`: fill it from `c.init`, if given.
    """
    seed_generators(c.seed)
    shape, classes = dataset.image_shape, dataset.num_classes
    try:
        model = create(c.model, classes, shape, activation=c.activation, mean=c.mean, std=c.std)
    except ValueError as error:
        raise InputError(f"--model {c.model}: {error}") from error
    model = model.to(world.device)
    memory_format = try_model(model, c, dataset)  # first: lazy layers have no weights before
    if memory_format != c.memory_format:
        say(world, f"--model {c.model} fails on channels_last: it gets contiguous images")
    if c.init and init:
        load_initial(model, c)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's hints do not know this form
    if c.sync_bn:
        if world.size == 1:
            raise InputError("--sync-bn: there is one process: leave it out, or start several by torchrun")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, memory_format


def try_model(model: nn.Module, c: Config, dataset: Dataset) -> torch.memory_format:
    """Two images through the model, so that one that does not fit them says so before any work."""
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"--model {c.model}: it has no parameter to train")
    model.eval()
    try:
        _, memory_format = try_on(model, dataset.image_shape, dataset.num_classes, c.memory_format, differentiate=True)
    except ValueError as error:
        raise InputError(f"--model {c.model}: for {c.data}, {error}") from error
    model.train()
    return memory_format


def load_initial(model: nn.Module, c: Config) -> None:
    assert c.init is not None
    try:
        before = normalisation(model)
        load_checkpoint(model, checkpoint_file(c.init))
        if (its := normalisation(model)) != before:
            raise InputError(f"--mean, --std: {c.init} has others: give its own ({its})")
    except InputError as error:
        raise InputError(f"--init: {error}") from error


def make_loader(
    c: Config, dataset: Dataset, extra: Images | None, world: World, memory_format: torch.memory_format
) -> tuple[Loader, Tensor]:
    """The loader of this process's part of each batch, and the rows of the training images that are held out, int64 [N]."""
    train = dataset.train
    colour, side = train.image_shape[0] == 3, train.image_shape[1]
    count = min(len(train) // 10, 1000) if c.holdout is None else c.holdout
    if count >= len(train):
        raise InputError(f"--holdout {count}: there are {len(train)} training images: hold out fewer")
    rows, held_out = hold_out(train.labels, count, c.seed)
    order = Order(rows, c.batch_size, c.seed, *((len(extra), c.extra_fraction) if extra else (0, 0.0)))
    if order.batch_size < world.size:
        raise InputError(f"--batch-size {c.batch_size}: it is over all {world.size} processes: give at least as many")
    loader = Loader(
        train, order, device=world.device, extra=extra, workers=c.workers,
        pad=c.pad if c.pad is not None else side // 8 if colour else 0,
        flip=colour if c.flip is None else c.flip,
        rank=world.rank, world=world.size, resident=False if c.stream else None,
        memory_format=memory_format,
    )  # fmt: skip
    if max(batch_sizes(order)) < smallest_batch(c, world):
        raise InputError(
            f"--data {c.data}: no batch would have {smallest_batch(c, world)} images, the fewest to train on; "
            f"of {len(train)} training images {count} are held out: give more, or a lower --holdout"
        )
    return loader, held_out


def batch_sizes(order: Order) -> list[int]:
    """Images in each batch of an epoch, over all processes; the same in every epoch."""
    return [len(rows) + len(extra) for rows, extra in order.epoch(0)]


def smallest_batch(c: Config, world: World) -> int:
    """The fewest images to train on: less would leave a process without an image, or batch norm with one."""
    return min(2 * world.size, c.batch_size)


def make_log(c: Config, order: Order, progress: Progress, folder: RunFolder, world: World) -> Log:
    """The log of the main process from `progress` on. Writes config.json too."""
    folder.write("config.json", c.to_json())
    sizes, step = batch_sizes(order), progress.epoch * order.steps + progress.step
    log = Log(
        folder.path, total=c.epochs * sum(sizes), done=progress.epoch * sum(sizes) + sum(sizes[: progress.step]),
        position=progress.log_bytes, step=step, tensorboard=c.tensorboard, name=c.preset or c.label,
    )  # fmt: skip
    log.write("start", epoch=progress.epoch + 1, step=step, steps_per_epoch=len(sizes), **environment(world))
    if progress.best:
        log.show(best_pgd=progress.best["pgd"])
    return log
