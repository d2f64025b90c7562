"""What training and evaluation need of any images: rows held out, fingerprints, batches of floats."""

import os
import re
import shutil

import pytest
import torch

from spat_train.data.datasets import load
from spat_train.data.images import Images, fingerprint, floats, hold_out
from spat_train.errors import InputError
from tests.data.helpers import random_images


def test_hold_out_is_stratified():
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate((700, 200, 0, 95, 5))])
    labels = labels[torch.randperm(1000)]
    train, held = hold_out(labels, 100, seed=0)
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(1000))
    assert torch.equal(held, held.sort().values)
    assert torch.equal(train, train.sort().values)
    assert train.dtype == held.dtype == torch.int64
    assert labels[held].bincount(minlength=5).tolist() in ([70, 20, 0, 10, 0], [70, 20, 0, 9, 1])
    assert torch.equal(held, hold_out(labels, 100, seed=0)[1])
    assert not torch.equal(held, hold_out(labels, 100, seed=1)[1])


@pytest.mark.parametrize("count", [0, 1, 7, 999])
def test_hold_out_counts(count):
    train, held = hold_out(torch.arange(1000) % 10, count, seed=0)
    assert (len(train), len(held)) == (1000 - count, count)


@pytest.mark.parametrize("count", [-1, 10])
def test_hold_out_refuses(count):
    with pytest.raises(InputError, match=f"--holdout {count}: give 0 to 9"):
        hold_out(torch.arange(10), count, seed=0)


def test_fingerprint():
    images = random_images()
    value = fingerprint(images)
    assert re.fullmatch("[0-9a-f]{16}", value)
    assert fingerprint(random_images()) == value
    for tensor, index in ((images.pixels, (49, 7, 8, 2)), (images.labels, (0,))):
        tensor[index] += 1
        assert fingerprint(images) != value
        tensor[index] -= 1
    assert fingerprint(images) == value
    assert fingerprint(Images(images.pixels.view(50, 9, 8, 3), images.labels)) != value
    assert fingerprint(Images(images.pixels[:0], images.labels[:0])) != value


def test_fingerprint_of_many_is_a_sample(monkeypatch):
    monkeypatch.setattr("spat_train.data.images.HASHED", 1000)
    monkeypatch.setattr("spat_train.data.images.SAMPLED", 8)
    images = random_images()
    value = fingerprint(images)
    images.pixels[49] += 1  # the last is in it
    assert fingerprint(images) != value


def test_fingerprint_of_a_folder(pictures):
    def value(**arguments) -> str:
        return fingerprint(load(str(pictures), **{"image_size": 16} | arguments).train)

    before, contents = value(), fingerprint(load(str(pictures), image_size=16).train, contents=True)
    assert value() == before
    assert value(image_size=20) != before
    shutil.copy(pictures / "train" / "dog" / "2.png", pictures / "train" / "dog" / "0.png")
    assert value() == before  # of another size: it may have been repaired
    assert fingerprint(load(str(pictures), image_size=16).train, contents=True) != contents
    path = (pictures / "train" / "dog" / "0.png").rename(pictures / "train" / "dog" / "7.png")
    assert value() != before
    os.rename(path, os.fsencode(path.parent) + b"/caf\xe9.png")  # not UTF-8
    assert value() != before


def test_floats(device):
    images = random_images()
    rows = torch.tensor([4, 4, 49])
    x, y = floats(images, rows, device)
    assert (x.shape, x.dtype, x.device.type) == ((3, 3, 8, 9), torch.float32, device)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.cpu(), (images.pixels[rows].float() / 255).permute(0, 3, 1, 2))
    assert torch.equal(y.cpu(), images.labels[rows])
