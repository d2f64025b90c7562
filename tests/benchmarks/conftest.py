"""A data set that is large enough to train on."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import random_images


@pytest.fixture
def tiny_npz(tmp_path) -> Path:
    path, images = tmp_path / "tiny.npz", random_images(120)
    labels = np.arange(120) % 10
    np.savez(path, x_train=images.pixels, y_train=labels, x_test=images.pixels[:20], y_test=labels[:20])
    return path
