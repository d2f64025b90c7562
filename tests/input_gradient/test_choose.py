"""Which path is taken, and how `explain` puts it."""

import pytest
import torch
from torch import nn

import spat_kernels as sk
from spat_train.models.registry import create
from tests.input_gradient.models import EPS, images, randomized


class Bypass(nn.Module):
    """The image goes round the convolution: one scale for the gradients of both ways there is not."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(192, 4)

    def forward(self, x):
        return self.fc1(self.conv(x).mean((2, 3))) + self.fc2(x.flatten(1))


def test_what_does_not_run_in_half_precision_says_so():
    model, x = randomized(Bypass(), torch.float32), images(2, 8, torch.float32)
    assert sk.explain(model, x).path == "plan"
    assert "half precision" in sk.explain(model, x, precision="bf16").reason
    odd = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(288, 4)).eval()
    if sk.explain(odd, x, precision="bf16").path == "autograd":
        assert "in half precision it fails" in sk.explain(odd, x, precision="bf16").reason
    sk.pgd(odd, x, torch.tensor([0, 1]), EPS, steps=1, precision="bf16")
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    assert sk.explain(mlp, x, precision="bf16").dtype == torch.float32  # all of it is the head


def test_autocast_of_the_caller_is_the_precision():
    model, x = randomized(create("wrn-10-1"), torch.float32), images(2, dtype=torch.float32)
    assert sk.explain(model, x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sk.explain(model, x).dtype == torch.bfloat16
        assert sk.explain(model, x, precision="fp32").dtype == torch.float32
    assert sk.explain(model.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


def test_says_what_goes_with_what():
    model, x = randomized(create("wrn-10-1")), images()
    assert "plain callable" in sk.explain(lambda v: model(v), x).reason
    assert "float64" in sk.explain(model, x.float()).reason
    assert "asks for it" in sk.explain(model, x, input_gradient="autograd").reason
    for kwargs, message in [
        ({"precision": "int8"}, "precision='int8'"),
        ({"precision": "bf16"}, "float32 images"),
        ({"input_gradient": "magic"}, "input_gradient='magic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sk.pgd(model, x, torch.tensor([0, 1]), EPS, **kwargs)
    with pytest.raises(ValueError, match="CUDA tensors"):
        sk.pgd(model.float(), x.float(), torch.tensor([0, 1]), EPS, precision="tf32")


def test_explanation_reads_well():
    explanation = sk.explain(create("wrn-34-10"), images(dtype=torch.float32))
    assert explanation.path == "plan"
    assert explanation.reason == ""
    assert explanation.plan["convolutions"] == 34
    assert explanation.plan["fused pointwise passes"] == 31
    assert explanation.plan["linear layers"] == explanation.plan["of them with the pooling"] == 1
    assert explanation.plan["mask bytes per image"] < 400_000
    assert "34 convolutions" in str(explanation)


def test_wrapped_models_are_looked_into():
    model, x = randomized(create("wrn-10-1")), images()
    hooked = nn.DataParallel(model)  # moves it to the GPU, where there is one
    x = x.to(next(model.parameters()).device)
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in sk.explain(hooked, x).reason
    assert sk.explain(nn.DataParallel(model), x).path == "plan"
    assert sk.explain(torch.compile(model), x).path == "plan"
