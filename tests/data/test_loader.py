"""Orders and batches: the same ones wherever images lie, whichever rank asks, and from whichever step."""

import errno
import multiprocessing

import pytest
import torch

from spat_train.data import loader as module
from spat_train.data.datasets import load
from spat_train.data.images import Images, floats
from spat_train.data.loader import Loader, Order
from spat_train.errors import InputError
from tests.data.helpers import random_images

ROWS = torch.arange(0, 50, 2)  # of 50 images


def assert_batches_equal(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for (x_a, y_a), (x_b, y_b) in zip(a, b, strict=True):
        assert torch.equal(x_a, x_b)
        assert torch.equal(y_a, y_b)


# --- the order ---


def test_an_epoch_is_a_permutation():
    def rows(batch_size, seed, number):
        return torch.cat([rows for rows, _ in Order(ROWS, batch_size, seed).epoch(number)]).tolist()

    steps = Order(ROWS, batch_size=8, seed=3).epoch(0)
    assert [len(rows) for rows, _ in steps] == [8, 8, 8, 1]
    assert all(len(extra) == 0 and extra.dtype == torch.int64 for _, extra in steps)
    assert rows(8, 3, 0) == rows(8, 3, 0) == rows(5, 3, 0)
    different = [rows(8, seed, number) for seed in (3, 4, 2**63 - 1) for number in (0, 1)]
    assert all(sorted(epoch) == ROWS.tolist() for epoch in different)
    assert len(set(map(tuple, different))) == 6


def test_extra_images_fill_every_batch():
    order = Order(torch.arange(50_000), 256, seed=0, extra=500_000, extra_fraction=0.5)
    assert order.steps == len(order.epoch(0)) == 196  # RST's epoch
    rows, extra = (torch.cat(parts) for parts in zip(*order.epoch(0), strict=True))
    assert len(rows.unique()) == len(rows) == len(extra) == 196 * 128
    assert (extra.min() < 1000, extra.max() >= 499_000, extra.max() < 500_000) == (True, True, True)
    other = torch.cat([rows for rows, _ in order.epoch(1)])
    assert len(other[~torch.isin(other, rows)]) > 10_000  # a fresh half each time


@pytest.mark.parametrize(("fraction", "labelled"), [(0.7, 3), (0.05, 10), (0.1, 9), (1.0, 0)])
def test_fractions(fraction, labelled):
    order = Order(ROWS, 10, seed=0, extra=7, extra_fraction=fraction)
    steps = order.epoch(0)
    assert [(len(rows), len(extra)) for rows, extra in steps] == [(labelled, 10 - labelled)] * 3
    counts = torch.cat([rows for rows, _ in steps]).bincount(minlength=50)[ROWS]
    assert counts.max() - counts.min() <= 1  # no image twice before all have been once


def test_arguments_that_make_no_sense():
    for changes in ({"rows": ROWS[:0]}, {"batch_size": 0}, {"extra_fraction": 0.5}, {"extra": 9, "extra_fraction": 1.5}):
        with pytest.raises(ValueError, match="needs"):
            Order(**{"rows": ROWS, "batch_size": 8, "seed": 0} | changes)
    with pytest.raises(ValueError, match="0 extra images, 70 are given"):
        Loader(random_images(), Order(ROWS, 8, 3), extra=random_images(70))
    with pytest.raises(ValueError, match=r"extra images are \(3, 9, 8\)"):
        Loader(random_images(), Order(ROWS, 8, 3, extra=7), extra=random_images(7, (9, 8, 3)))


# --- batches ---


def test_batches_are_the_images_of_the_order(device):
    images, extra, order = random_images(), random_images(70, classes=7), Order(ROWS, 8, seed=3, extra=70, extra_fraction=0.4)
    assert [len(x) for x, _ in Loader(images, Order(ROWS, 8, seed=3), device=device).epoch(1)] == [8, 8, 8, 1]
    for (x, y), (rows, others) in zip(Loader(images, order, device=device, extra=extra).epoch(1), order.epoch(1), strict=True):
        parts = zip(floats(images, rows, device), floats(extra, others, device), strict=True)
        expected_x, expected_y = map(torch.cat, parts)
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert (x.dtype, y.dtype, x.device.type, y.device.type) == (torch.float32, torch.int64, device, device)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_equal_resident_ones(device, workers):
    images, extra = random_images(), random_images(70)
    order = Order(ROWS, 8, seed=3, extra=70, extra_fraction=0.4)
    settings = {"extra": extra, "pad": 2, "flip": True, "device": device, "workers": workers}
    resident = Loader(images, order, **settings)
    streamed = Loader(images, order, **settings, resident=False)
    mixed = Loader(images, order, **settings)
    mixed.resident[1] = None  # extra images that do not fit
    for number in (0, 1):
        batches = list(resident.epoch(number))
        assert_batches_equal(streamed.epoch(number), batches)
        assert_batches_equal(mixed.epoch(number), batches)
        assert_batches_equal(streamed.epoch(number, first_step=2), batches[2:])
    assert list(streamed.epoch(0, first_step=4)) == list(resident.epoch(0, first_step=4)) == []


def test_crops_differ_between_epochs_steps_images_and_seeds():
    images = Images(random_images(1).pixels.expand(64, -1, -1, -1).contiguous(), torch.zeros(64, dtype=torch.int64))

    def crops(seed, number, **settings):
        return torch.cat([x for x, _ in Loader(images, Order(torch.arange(64), 32, seed), **settings).epoch(number)])

    values = [crops(seed, number, pad=2, flip=True) for seed, number in ((0, 0), (0, 1), (1, 0))]
    assert all(len(value.unique(dim=0)) > 25 for value in values)  # of 5 * 5 * 2
    assert len(crops(0, 0, flip=True).unique(dim=0)) == 2
    assert len(crops(0, 0).unique(dim=0)) == 1
    for i in range(3):
        assert not torch.equal(values[i], values[i - 1])


@pytest.mark.parametrize("resident", [None, False])
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_ranks_share_each_batch(resident, world, fraction):
    images, extra = random_images(classes=50), random_images(70, classes=70)
    order = Order(ROWS, 9, seed=3, extra=70 if fraction else 0, extra_fraction=fraction)
    settings = {"extra": extra if fraction else None, "pad": 2, "flip": True, "resident": resident, "workers": 0}
    whole = Loader(images, order, **settings).epoch(2)
    ranks = zip(*(Loader(images, order, **settings, rank=rank, world=world).epoch(2) for rank in range(world)), strict=True)

    def contents(x, y):
        return sorted([label, *image.flatten().tolist()] for label, image in zip(y.tolist(), x, strict=True))

    for (x, y), parts in zip(whole, ranks, strict=True):
        assert contents(x, y) == contents(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        sizes = [len(y) for _, y in parts]
        assert max(sizes) - min(sizes) <= 1 + (fraction > 0)
        assert all(x.shape == (n, 3, 8, 9) for (x, _), n in zip(parts, sizes, strict=True))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_of_batches_is_used_again_once_nothing_refers_to_it(memory_format):
    loader = Loader(random_images(), Order(ROWS, 8, seed=3), memory_format=memory_format)
    kept = [x for x, _ in loader.epoch(0)]
    places = [x.data_ptr() for x in kept]
    assert len(set(places)) == len(places) == 4
    copies, views = [x.clone() for x in kept], [x[..., 1:] for x in kept[:3]]
    del kept
    places += [x.data_ptr() for x, _ in loader.epoch(1)]
    assert len(set(places[4:]) - set(places[:4])) == 2  # that of the batch of 1 was too small
    assert all(torch.equal(view, x[..., 1:]) for view, x in zip(views, copies[:3], strict=True))
    x = next(iter(loader.epoch(0)))[0]
    assert x.data_ptr() in places[4:]
    assert (x.is_contiguous(memory_format=memory_format), x._is_view()) == (True, False)
    assert torch.equal(x, copies[0])


def test_nothing_is_taken_from_the_global_generator():
    images, state = random_images(), torch.get_rng_state()
    order = Order(ROWS, 8, 3, extra=50, extra_fraction=0.5)
    for workers in (0, 1):
        list(Loader(images, order, extra=images, resident=False, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_in_files(pictures, device):
    train = load(str(pictures), image_size=16).train
    order = Order(torch.arange(6), 4, seed=0)
    in_memory = Images(train.batch(torch.arange(6)), train.labels)
    settings = {"pad": 2, "flip": True, "device": device}
    loader = Loader(train, order, **settings)
    assert_batches_equal(loader.epoch(0), Loader(in_memory, order, **settings).epoch(0))
    assert_batches_equal(loader.epoch(0, first_step=1), list(loader.epoch(0))[1:])
    with pytest.raises(ValueError, match="resident"):
        Loader(train, order, resident=True)


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ((torch.Tensor, "share_memory_"), RuntimeError("unable to allocate shared memory(shm) for file </x>"), "room .*/dev/shm"),
        ((Images, "batch"), MemoryError(), "room for their batches in memory"),
        ((Images, "batch"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), "room for their batches in memory"),
        ((module._Worker, "start"), OSError(errno.ENOSPC, "No space left on device"), r"cannot start \(No space left on device"),
        ((Images, "batch"), InputError("--data: 1.png cannot be decoded"), ""),
        ((Images, "batch"), KeyError("a fault of the program"), ""),
    ],
)  # fmt: skip
def test_errors_in_workers(monkeypatch, place, error, message):
    """In one line, with a remedy for lack of memory. Workers end though the traceback holds on to them; they are patched too."""

    def broken(*args):
        raise error

    monkeypatch.setattr(*place, broken)
    loader = Loader(random_images(), Order(ROWS, 8, seed=0), resident=False, workers=2)
    full = f"^--workers 2: .*{message}.*--workers 0.*docker run --shm-size" if message else "^--data: 1.png cannot be decoded$"
    kind, expected = (KeyError, "a fault of the program") if isinstance(error, KeyError) else (InputError, full)
    with pytest.raises(kind, match=expected):
        list(loader.epoch(0))
    assert multiprocessing.active_children() == []


def test_abandoned_epochs_leave_no_workers():
    loader = Loader(random_images(), Order(ROWS, 1, seed=0), resident=False, workers=2)
    first = loader.epoch(0)
    second = loader.epoch(1)
    assert multiprocessing.active_children() == []  # none before a batch is asked for
    x, _ = next(first)
    next(second)  # at the same time
    assert len(multiprocessing.active_children()) == 4
    first.close()
    del second
    assert multiprocessing.active_children() == []
    assert torch.equal(next(loader.epoch(0))[0], x)


@pytest.mark.gpu
def test_images_too_big_for_the_gpu_are_streamed(monkeypatch):
    images, order = random_images(), Order(ROWS, 8, 3)
    size = images.pixels.nbytes
    for free, placed in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        loader = Loader(images, order, device="cuda", pad=2, flip=True)
        assert (loader.resident[0] is not None) == placed
        assert_batches_equal(loader.epoch(0), Loader(images, order, device="cuda", pad=2, flip=True, resident=True).epoch(0))
