"""Operations and bytes of public models, and the limits that follow."""

import pytest
import torch

from benchmarks import workmodel
from spat_train.models.registry import create


@pytest.mark.parametrize(
    ("name", "size", "gflop"),
    [("wrn-34-10", 32, 13.3), ("wrn-28-10", 32, 10.5), ("resnet-18", 32, 1.11), ("resnet-50", 32, 2.6), ("resnet-18", 96, 10.0)],
)
def test_work_model_counts_the_operations_of_public_models(name, size, gflop):
    if name.startswith("resnet"):
        pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception)
    with torch.device("meta"):
        layers = workmodel.layers(create(name), (3, size, size))
    for direction in ("forward", "backward"):
        flops = sum(getattr(layer, direction).flops for layer in layers)
        assert 1e-9 * flops == pytest.approx(gflop, rel=0.006)


def test_work_model_bytes():
    """conv, BatchNorm, ReLU, conv with a residual: by hand, for 2 channels of 8x8 = 128 values."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = (torch.nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(3))
            self.bn = torch.nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.conv1(x)
            return self.conv3(torch.relu(x + self.conv2(torch.relu(self.bn(x))))).mean((2, 3))

    layers = {layer.name: layer for layer in workmodel.layers(Block(), (2, 8, 8))}
    conv, *pointwise = (layer for layer in layers.values())
    assert conv.forward == workmodel.Pass(flops=2 * 128 * 18, values=256, weights=36)
    # x is read by BatchNorm and addition, so BatchNorm is not folded and x's gradient comes in two parts
    kernels = {name: layer for name, layer in layers.items() if layer.kind == "pointwise"}
    first, second = kernels["pointwise native_batch_norm+relu"], kernels["pointwise add+relu"]
    assert first.forward == first.backward == workmodel.Pass(values=256, bits=128)
    assert second.forward == workmodel.Pass(values=3 * 128, bits=128)
    assert second.backward == workmodel.Pass(values=2 * 128, bits=128)
    assert layers["step"].backward.bytes(3, 2) == 3 * 128 * 16


def test_limits():
    work = workmodel.Work([workmodel.Layer("a", "conv", workmodel.Pass(10, 1, 0, 5), workmodel.Pass(2, 4))], 100, "bf16")
    limits = work.limits({"tflops": {"bf16": 1e-12}, "copy_gbps": 1e-9})
    assert limits == {"conv": 1200, "roofline": 1000 + 800}
    assert (work.flops, work.bytes) == (1200, 210 + 800)
