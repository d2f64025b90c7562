"""Random views of pictures: torchvision's, and a function of seed, epoch, step and image alone, wherever they are read."""

import pytest
import torch

from spat_train.data.datasets import load
from spat_train.data.images import Images
from spat_train.data.loader import Loader, Order
from spat_train.data.pictures import RandomView, crop_place, square
from spat_train.runtime.seeding import derived_seed, model_draws
from tests.data.helpers import random_images, write_folder, write_shards
from tests.data.test_loader import assert_batches_equal

pytest.importorskip("PIL")
v2 = pytest.importorskip("torchvision.transforms.v2", exc_type=Exception)

SIZE = 24
VIEWS = {"crop": (True, None), "crop and RandAugment": (True, (2, 9)), "RandAugment": (False, (2, 9))}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The training images of a folder, and of shards of the same pictures, in the same order."""
    folder = write_folder(tmp_path_factory.mktemp("folder"))
    packed = load(str(write_shards(folder, tmp_path_factory.mktemp("made") / "shards")), image_size=SIZE).train
    train = load(str(folder), image_size=SIZE).train
    names = [name.rpartition(".tar/")[2].replace("-", "/") for name in packed.files]
    return {"folder": train.subset(torch.tensor([train.files.index(name) for name in names])), "shards": packed}


def order(images, batch_size=8, seed=3) -> Order:
    return Order(torch.arange(0, len(images)), batch_size, seed, shard=torch.arange(len(images)) // 7)


@pytest.mark.parametrize("view", VIEWS)
def test_batches_are_alike_for_folders_and_shards_workers_and_starts(sources, view, device):
    settings = {"view": RandomView(*VIEWS[view]), "flip": True, "device": device}
    folder, shards = sources["folder"], sources["shards"]
    state = torch.get_rng_state()
    expected = [list(Loader(folder, order(folder), **settings, workers=0).epoch(number)) for number in (0, 1)]
    for images in (folder, shards):
        for workers in (0, 2):
            loader = Loader(images, order(images), **settings, workers=workers)
            assert_batches_equal(loader.epoch(1), expected[1])
        assert_batches_equal(loader.epoch(0, first_step=2), expected[0][2:])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("source", ["folder", "shards"])
def test_ranks_share_each_batch(sources, source, world):
    images = sources[source]
    settings = {"view": RandomView(True, (2, 9)), "flip": True}
    whole = Loader(images, order(images), **settings, workers=1).epoch(2)
    ranks = [Loader(images, order(images), **settings, workers=0, rank=r, world=world).epoch(2) for r in range(world)]
    for (x, y), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(x, torch.cat([x for x, _ in parts]))
        assert torch.equal(y, torch.cat([y for _, y in parts]))


def test_views_differ_between_epochs_steps_images_and_seeds(sources):
    picture = sources["folder"].picture(0)
    seen = {key: RandomView(True, None)(picture, (SIZE, SIZE), *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len({tuple(x.flatten().tolist()) for x in seen.values()}) == 4


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_those_of_torchvision(sources, view):
    resized, operations = VIEWS[view]
    different = 0
    for row in range(8):
        picture = sources["folder"].picture(row)
        seen = RandomView(resized, operations)(picture, (SIZE, SIZE), 5, 6, row)
        cropped = RandomView(resized, None)(picture, (SIZE, SIZE), 5, 6, row)
        if resized:
            draws = torch.rand(22, generator=torch.Generator().manual_seed(derived_seed("crop", 5, 6, row))).tolist()
            expected = v2.functional.resized_crop(picture, *crop_place(*picture.shape[1:], draws), [SIZE, SIZE], antialias=True)
        else:
            expected = v2.CenterCrop(SIZE)(v2.Resize(SIZE)(picture))
        assert (cropped.int() - expected.int()).abs().max() <= 1  # the same sums, in another layout of memory
        if operations:
            with model_draws(torch.device("cpu"), 5, 6, row):
                expected = v2.PILToTensor()(v2.RandAugment(*operations)(v2.ToPILImage()(cropped)))
            assert torch.equal(seen, expected)
        different += not torch.equal(seen, square(picture, (SIZE, SIZE)))
    assert different >= 6


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (40, 200), (200, 40), (10, 900)])
def test_crops_are_as_torchvision_draws_them(height, width):
    """By quantiles of area, shape and place. Of the last, ten draws rarely hold one that fits: its middle is taken."""
    theirs, picture = v2.RandomResizedCrop(8), torch.empty(3, height, width)
    drawn = [theirs.make_params([picture]) for _ in range(3000)]
    places = [[tuple(p[name] for name in ("top", "left", "height", "width")) for p in drawn]]
    places.append([crop_place(height, width, draws) for draws in torch.rand(3000, 22).tolist()])
    quantiles = []
    for found in places:
        top, left, h, w = torch.tensor(found, dtype=torch.float64).T
        assert ((top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width) & (h > 0) & (w > 0)).all()
        values = torch.stack([h * w / (height * width), (w / h).log(), (top + h / 2) / height, (left + w / 2) / width])
        quantiles.append(values.quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64), 1))
    assert (quantiles[0] - quantiles[1]).abs().max() < 0.04  # 3000 draws give a tenth of them to about 0.01


def test_images_in_memory_have_views_too(device):
    images, extra = random_images(), random_images(70)
    settings = {"view": RandomView(True, (1, 5)), "extra": extra, "pad": 1, "device": device}
    whole = Order(torch.arange(50), 8, seed=3, extra=70, extra_fraction=0.4)
    batches = list(Loader(images, whole, **settings, workers=0).epoch(0))
    assert_batches_equal(Loader(images, whole, **settings, workers=2).epoch(0), batches)
    plain = list(Loader(images, whole, extra=extra, pad=1, device=device).epoch(0))
    assert all(not torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(batches, plain, strict=True))
    with pytest.raises(ValueError, match="cannot be resident"):
        Loader(images, whole, extra=extra, view=settings["view"], resident=True)
    grey = Images(images.pixels[..., :1].contiguous(), images.labels)
    assert next(iter(Loader(grey, order(grey), view=RandomView(False, (2, 9)), workers=0).epoch(0)))[0].shape[1] == 1


def test_a_batch_decoded_by_threads_is_that_of_one(sources):
    images, rows, threads = sources["folder"], torch.tensor([5, 0, 9, 3, 3]), torch.get_num_threads()
    batches = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            batches.append(images.batch(rows))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*batches)
    assert torch.equal(batches[0][3], square(images.picture(3), (SIZE, SIZE)).permute(1, 2, 0))
