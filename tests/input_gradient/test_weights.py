"""The folded weights: where they lie in memory."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spat_train.models.registry import create
from tests.input_gradient.models import images, logits_and_gradient, planned, randomized


class Launches(TorchDispatchMode):
    """Counts pointwise passes over whole octets of channels, by whether the CUDA kernels would move them in 16-byte packets."""

    def __init__(self):
        super().__init__()
        self.packets = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith("scale_shift_relu") and args[0].shape[1] % 8 == 0:
            self.packets[name, all(t.data_ptr() % 16 == 0 for t in args if isinstance(t, Tensor) and t.dtype != torch.uint8)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_odd_channels_leave_the_rest_aligned(channels):
    """Scales and shifts of all BatchNorms are parts of one tensor: one with odd channels must not shift those behind it."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 1), nn.ReLU(), nn.BatchNorm2d(channels), nn.Conv2d(channels, 3, 1), create("wrn-16-4")
    )
    model, x = randomized(model, torch.float32), images(dtype=torch.float32)
    gradient = planned(model, x)
    with Launches() as launches:
        logits_and_gradient(gradient, x)
    assert launches.packets == {
        ("scale_shift_relu", True): 13,
        ("scale_shift_relu_grad", True): 12,
    }  # pool_linear_grad does the last
