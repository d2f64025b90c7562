"""Networks of every kind, and ways through them: by the plan and by autograd."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.input_gradient.planned_gradient import PlannedGradient
from spat_train.models.networks.small import SmallCNN
from spat_train.models.registry import create

EPS = 8 / 255


def randomized(model: nn.Module, dtype=torch.float64) -> nn.Module:
    """`model` in eval mode with statistics and affine parameters of BatchNorm at random, negative weights too."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias, 0, 0.3)
    return model.to(dtype).eval().requires_grad_(False)


def images(n=2, size=32, dtype=torch.float64):
    return torch.rand(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def planned(model, x, precision=None) -> PlannedGradient:
    with torch.no_grad():
        gradient = input_gradient(model, x, "plan", precision)
        gradient.prepare()
    return gradient


def logits_and_gradient(gradient, x, dlogits=None):
    with torch.no_grad(), gradient.arithmetic(x.device.type):
        logits = gradient.forward(x)
        if dlogits is None:
            dlogits = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=x.device).view_as(logits)
        return logits, gradient.backward(dlogits)


def assert_equals_autograd(model, x, gradient=None):
    """In fp64: logits and gradient of the plan, up to 1e-10 of the largest. Returns what autograd gives.

    torch's hardsigmoid, and on GPUs its hardswish, round 1/6 to fp32, in fp64 too: here they are written out.
    """

    def hardsigmoid(x, inplace=False):
        return F.relu6(x + 3) / 6

    def hardswish(x, inplace=False):
        return x * hardsigmoid(x)

    with mock.patch.object(F, "hardsigmoid", hardsigmoid), mock.patch.object(F, "hardswish", hardswish):
        expected = logits_and_gradient(InputGradient(model), x)
    for ours, theirs in zip(logits_and_gradient(gradient or planned(model, x), x), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    return expected


def moved(model, *to):
    """`model.to(*to)`, the tensors too that are plain attributes."""
    model.__dict__.update({name: v.to(*to) for name, v in vars(model).items() if isinstance(v, torch.Tensor)})
    return model.to(*to)


class Normalized(nn.Module):
    """Statistics as a buffer and as a plain tensor, one deviation negative."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.std = torch.tensor([0.2, -0.3, 0.25], dtype=torch.float64).view(3, 1, 1)

    def forward(self, x):
        return self.model((x - self.mean) / self.std)


class Functional(nn.Module):
    """Functions where others use modules; tensor methods, scalars on either side, a grouped and a dilated convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding="same")
        self.conv3 = nn.Conv2d(12, 12, 3)
        self.conv2 = nn.Conv2d(12, 12, 3, stride=2, padding=2, dilation=2, groups=3)
        self.bn = nn.BatchNorm2d(12)
        self.fc1, self.bn1, self.fc2 = nn.Linear(12 * 16, 20), nn.BatchNorm1d(20), nn.Linear(20, 7)

    def forward(self, x):
        x = 1 - 2 * x.contiguous() + 0.5
        x = torch.relu(self.conv1(x))
        x = x + F.conv2d(x, self.conv3.weight, padding=1) * 2  # a constant that was met before, with other channels
        x = F.batch_norm(self.conv2(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        x = F.dropout(F.relu(x), 0.3, training=self.training)
        x = F.max_pool2d(x, 2) * torch.sigmoid(F.avg_pool2d(x, 2))
        x = F.adaptive_avg_pool2d(x, 4).reshape(x.size(0), -1)
        return self.fc2(F.relu_(self.bn1(self.fc1(x))).div(2))


class PreAddAffine(nn.Module):
    """Sums that several read, a value added to itself, two norms on one sum, cat, mean with and without dims kept."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(4))
        self.bn = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        a = self.conv[0](x)
        b = self.conv[1](self.bn[0](a).relu()) + a
        c = torch.relu(self.bn[1](b)) + F.silu(self.bn[2](b))
        d = self.conv[3](F.relu(self.conv[2](c) + b)) + b
        e = torch.cat([torch.relu(d), self.bn[3](d + d), b.clone()], 1)
        return self.fc(e.mean([2, 3], keepdim=True).flatten(1))


class Defaults(nn.Module):
    """A norm before the first convolution, a bias and a scaled sum before a ReLU, and an argument that attacks do not give."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, affine=False)
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 4)

    def forward(self, x, features=False, scale=None):
        x = self.bn(x)
        x = F.relu(self.conv1(x) + self.conv2(x) * 0.5).mean((2, 3))
        return x if features else self.fc(x)


class Front(nn.Module):
    """Layers before the first convolution, where gradients from behind it meet others."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Unflatten(1, (3, 8, 8)))
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        z = self.dense(2 * x - 1)
        return self.fc(F.relu(self.conv(z + F.avg_pool2d(z, 3, 1, 1))).mean((2, 3)))


def smooth(activation):
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.BatchNorm2d(8), activation, nn.MaxPool2d(3, 2, 1),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Sequential(activation, nn.Dropout2d(0.2))), nn.AvgPool2d(6), nn.Flatten(),
        nn.Linear(8, 6),
    )  # fmt: skip


def torchvision():
    """The module, where there is one for this torch."""
    return pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception)


def small_vgg(name):
    """VGG with small dense layers, which hold nearly all of its weights."""
    model = getattr(torchvision().models, name)(init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return model


MODELS = {
    "WRN (TRADES/MART)": (lambda: create("wrn-16-2"), 32),
    "PreActResNet-18": (lambda: create("preactresnet-18"), 32),
    "DeepMind's WRN": (lambda: create("dm-wrn-10-1"), 32),
    "ResNet-18 (CIFAR)": (lambda: torchvision() and create("resnet-18"), 32),
    "ResNet-18 (torchvision)": (lambda: torchvision().models.resnet18(), 64),
    "ResNet-50 (torchvision)": (lambda: torchvision().models.resnet50(), 64),
    "VGG-11-BN": (lambda: small_vgg("vgg11_bn"), 32),
    "VGG-11": (lambda: small_vgg("vgg11"), 32),
    "DenseNet": (lambda: torchvision().models.DenseNet(8, (2, 3), 16), 32),
    "MobileNetV3": (lambda: torchvision().models.mobilenet_v3_small(), 64),
    "SmallCNN": (lambda: SmallCNN((3, 32, 32), 10), 32),
    "distances": (lambda: create("small-cnn", classifier="centres"), 32),
    "normalised": (lambda: Normalized(create("wrn-10-1")), 32),
    "normalised by torchvision": (
        lambda: nn.Sequential(torchvision().transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]), create("wrn-10-1")),
        32,
    ),
    "functional": (Functional, 16),
    "sums": (PreAddAffine, 8),
    "defaults": (Defaults, 8),
    "front": (Front, 8),
    "SiLU": (lambda: smooth(nn.SiLU(inplace=True)), 32),
    "GELU": (lambda: smooth(nn.GELU()), 32),
    "Softplus": (lambda: smooth(nn.Softplus(beta=5)), 32),
}
