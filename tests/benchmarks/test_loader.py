"""The race of the loaders of pictures: folder and shards are alike, and the table has the decoder's share."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision", exc_type=Exception)

from benchmarks import loader
from spat_train.data.datasets import load
from spat_train.data.pictures import RandomView, decode


def test_loaders(tmp_path, capsys):
    out = tmp_path / "loader.json"
    loader.main(loader.Options(images=24, batch=8, workers=(1,), seconds=0.0, out=out))
    results = json.loads(out.read_text())
    names = [loader.DECODER, "spat_train, folder", loader.SHARDS_DECODER, "spat_train, shards"]
    assert [path["provider"] for path in results["paths"]][:4] == names
    assert all(path["cpu_ms"] > 0 and path["main_ms"] >= 0 and len(path["seconds"]) == 3 for path in results["paths"])
    shown = capsys.readouterr().out
    assert f"| {loader.DECODER} | 1 |" in shown
    assert "24 JPEGs of 500x375" in shown


def test_pictures_are_of_one_size_and_grow_with_detail():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    sizes = []
    for enlarge in (1.0, 1.5, 4.0):
        (jpeg,) = loader.mosaics(pixels, 1, enlarge)
        assert decode(jpeg).shape == (3, loader.HEIGHT, loader.WIDTH)
        sizes.append(len(jpeg))
    assert sizes == sorted(sizes, reverse=True)


def test_other_images_are_caught(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    loader.write_files(tmp_path, list(loader.mosaics(pixels, 8, 4.0)))
    folder, shards = (load(str(tmp_path / kind), image_size=loader.SIZE).train for kind in ("folder", "shards"))
    loader.verify(folder, shards, 4, RandomView(True, None))
    with pytest.raises(AssertionError, match="images of folder and shards differ"):
        loader.verify(folder, shards.subset(torch.arange(8).flip(0)), 4, RandomView(True, None))
