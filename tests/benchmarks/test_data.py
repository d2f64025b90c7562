"""The data paths give crops of the images that they say."""

import json

import pytest
import torch

from benchmarks import data
from benchmarks.data import random_images
from spat_train.data.images import Images


def test_data_paths(tmp_path, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception)
    out = tmp_path / "data.json"
    data.main(data.Options(images=200, batch=64, workers=1, device="cpu", seconds=0.0, out=out))
    results = json.loads(out.read_text())
    assert [path["provider"] for path in results["paths"]][::2] == ["spat_train", "torchvision, 1 workers"]
    assert "200 random images, batch 64, pad 4" in capsys.readouterr().out


def test_wrong_crops_are_caught():
    images = Images(random_images(64).pixels, torch.arange(64))
    x = images.pixels.movedim(3, 1) / 255
    with pytest.raises(AssertionError, match="hardly differ"):
        data.verify(lambda: iter([(x, images.labels)]), images)
    with pytest.raises(AssertionError, match="no crops"):
        data.verify(lambda: iter([(x.roll(3, 2), images.labels)]), images)
