"""What a run is built from: its images, model and loader, as the config says."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..data.datasets import load
from ..data.images import Dataset, Images, hold_out
from ..data.loader import Loader, Order
from ..data.pictures import RandomView
from ..data.pseudo_labels import load_extra
from ..data.sizes import parse_sizes
from ..errors import InputError
from ..models.checkpoints import load_checkpoint
from ..models.registry import create
from ..models.run_config import checkpoint_file
from ..models.try_on import try_on
from ..models.wrapping import normalisation
from ..runtime.distributed import World
from .checkpoint import say


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
    extra = load_extra(c.extra, image_shape=data.image_shape, num_classes=data.num_classes) if c.extra else None
    return data, extra


def make_model(c: Config, dataset: Dataset, world: World, *, init: bool) -> tuple[nn.Module, torch.memory_format]:
    """The model on its device, with the same weights in all processes, and the memory format that it works in.

    `init`: fill it from `c.init`, if given.
    """
    seed_generators(c.seed)
    shape, classes = dataset.image_shape, dataset.num_classes
    try:
        model = create(c.model, classes, shape, activation=c.activation, mean=c.mean, std=c.std, classifier=c.last_layer)
    except ValueError as error:
        raise InputError(f"--model {c.model}: {error}") from error
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"--model {c.model}: it has no parameter to train")
    model = model.to(world.device).eval()
    try:  # before any work, and before the weights are filled: lazy layers have none yet
        _, memory_format = try_on(model, shape, classes, c.memory_format, differentiate=True)
    except ValueError as error:
        raise InputError(f"--model {c.model}: for {c.data}, {error}") from error
    _try_sizes(c, model, shape, memory_format)
    model.train()
    if memory_format != c.memory_format:
        say(f"--model {c.model} fails on channels_last: it gets contiguous images", world)
    if c.init and init:
        try:
            given = normalisation(model)
            load_checkpoint(model, checkpoint_file(c.init))
            if (its := normalisation(model)) != given:
                raise InputError(f"--mean, --std: {c.init} has others: give its own ({its})")
        except InputError as error:
            raise InputError(f"--init: {error}") from error
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's hints do not know this form
    if c.fsdp and world.size == 1:
        raise InputError("--fsdp: there is one process: leave it out, or start several by torchrun")
    if c.sync_bn:
        if world.size == 1:
            raise InputError("--sync-bn: there is one process: leave it out, or start several by torchrun")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, memory_format


def _try_sizes(c: Config, model: nn.Module, shape: tuple[int, int, int], memory_format: torch.memory_format) -> None:
    """Raise InputError unless `model`, for images of `shape`, takes those of all training sizes too."""
    channels, height, width = shape
    for side in dict.fromkeys(side for side, _ in parse_sizes(c.train_sizes)):
        if height != width or side > height:
            remedy = "give square images, and sides of at most theirs"
            raise InputError(f"--train-sizes {side}: the images of {c.data} are {height}x{width}: {remedy}")
        try:
            try_on(model, (channels, side, side), None, memory_format)
        except ValueError as error:
            remedy = "" if "give" in str(error) else ": give other sizes, or a network that takes any"
            raise InputError(f"--train-sizes {side}: --model {c.model}, made for {height}x{width}: {error}{remedy}") from error


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
    shard = None if train.shard is None else train.shard[rows]
    order = Order(rows, c.batch_size, c.seed, *((len(extra), c.extra_fraction) if extra else (0, 0.0)), shard=shard)
    if order.batch_size < world.size:
        raise InputError(f"--batch-size {c.batch_size}: it is over all {world.size} processes: give at least as many")
    if c.accumulate > 1 and order.batch_size // world.size < 2 * c.accumulate:
        share = f"a batch of {order.batch_size} over {world.size} process{'es' if world.size > 1 else ''}"
        raise InputError(f"--accumulate {c.accumulate}: of {share} it leaves parts of less than 2 images: give fewer parts")
    resized = c.crop == "resized"
    view = RandomView(resized, c.rand_augment) if resized or c.rand_augment else None
    loader = Loader(
        train, order, device=world.device, extra=extra, workers=c.workers, rank=world.rank, world=world.size, view=view,
        pad=c.pad if c.pad is not None else side // 8 if colour and not resized else 0,
        flip=colour if c.flip is None else c.flip, resident=False if c.stream else None, memory_format=memory_format,
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
