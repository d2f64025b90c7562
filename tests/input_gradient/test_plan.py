"""The input-gradient plan against autograd: equal in fp64 on every kind of network, honest about what it does not take."""

import contextlib
import copy
import gc
import random
import threading
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spat_kernels as sk
from spat_kernels import precision
from spat_kernels.input_gradient import choose as engine
from spat_kernels.input_gradient import plan, plan_cache, trace
from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.plan import Linear, PoolLinear
from spat_kernels.input_gradient.planned_gradient import PlannedGradient
from spat_train.models.registry import SmallCNN, create

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
        gradient = engine.input_gradient(model, x, "plan", precision)
        gradient.prepare()
    return gradient


def logits_and_gradient(gradient, x, dlogits=None):
    with torch.no_grad(), gradient.arithmetic(x.device.type):
        logits = gradient.forward(x)
        if dlogits is None:
            dlogits = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=x.device).view_as(logits)
        return logits, gradient.backward(dlogits)


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
    "ResNet-18 (CIFAR)": (lambda: torchvision() and create("resnet-18"), 32),
    "ResNet-50 (CIFAR)": (lambda: torchvision() and create("resnet-50"), 32),
    "ResNet-18 (torchvision)": (lambda: torchvision().models.resnet18(), 64),
    "ResNet-50 (torchvision)": (lambda: torchvision().models.resnet50(), 64),
    "VGG-11-BN": (lambda: small_vgg("vgg11_bn"), 32),
    "VGG-11": (lambda: small_vgg("vgg11"), 32),
    "DenseNet": (lambda: torchvision().models.DenseNet(8, (2, 3), 16), 32),
    "MobileNetV3": (lambda: torchvision().models.mobilenet_v3_small(), 64),
    "SmallCNN": (lambda: SmallCNN((3, 32, 32), 10), 32),
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


@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_in_fp64_and_fp32(name):
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = randomized(make()), images(size=size)
    expected = logits_and_gradient(InputGradient(model), x)
    for ours, theirs in zip(logits_and_gradient(planned(model, x), x), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()

    model, x = model.float().to(memory_format=torch.channels_last), x.float().to(memory_format=torch.channels_last)
    model.__dict__.update({k: v.float() for k, v in vars(model).items() if isinstance(v, torch.Tensor)})
    ours, eager = logits_and_gradient(planned(model, x), x), logits_and_gradient(InputGradient(model), x)
    for a, b, exact in zip(ours, eager, expected, strict=True):
        error, own_error = ((v - exact).norm() / exact.norm() for v in (a, b))
        flipped = error > 1e-4  # by a ReLU so close to 0 that fp32 does not know its sign; autograd has as many of them
        assert error <= 2 * own_error or (flipped and error < 0.03)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 32, 32)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batches_of_any_size_and_layout(shape, memory_format):
    model = randomized(create("wrn-10-1"))
    x = torch.rand(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    for ours, theirs in zip(logits_and_gradient(planned(model, x), x), logits_and_gradient(InputGradient(model), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, check_stride=False)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin", "dlr"])
def test_attack_through_the_plan_is_the_attack_through_autograd(norm, loss):
    torch.manual_seed(0)
    model, x, y = randomized(create("wrn-10-1")), images(4), torch.tensor([0, 1, 2, 3])
    results = []
    for how in ("autograd", "plan"):
        torch.manual_seed(5)
        results.append(sk.pgd(model, x, y, EPS, loss=loss, norm=norm, steps=5, input_gradient=how))
    assert ((results[0] - results[1]).abs() < 1e-8).double().mean() > 0.999


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attack_in_half_precision_is_as_strong_as_the_plain_loop(precision):
    """Whole attacks are compared by loss; the loop in fp32 is written out here, the batch is odd and unaligned."""
    torch.manual_seed(0)
    model, x, y = randomized(create("wrn-10-1"), torch.float32), images(11, dtype=torch.float32), torch.arange(11) % 10
    x_adv = x.clone()
    for _ in range(10):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        x_adv = (x_adv + EPS / 4 * grad.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    ours = sk.pgd(model, x, y, EPS, random_start=False, precision=precision, input_gradient="plan")
    clean, plain, half = (F.cross_entropy(model(v), y) for v in (x, x_adv, ours))
    assert half - clean > 0.98 * (plain - clean)
    assert ((ours - x).abs() <= EPS * (1 + 1e-6)).all()
    assert ours.dtype == torch.float32


def test_keeps_a_bit_for_each_relu():
    """WRN-34-10: at most 1/8 of what autograd keeps (without its weights) may stay for the backward. It is 1/32 and less."""
    model, x = create("wrn-34-10").eval().requires_grad_(False), images(1, dtype=torch.float32)
    gradient = planned(model, x)
    with torch.no_grad():
        gradient.forward(x)
    storages = {}
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(x.requires_grad_())
    autograd = sum(size for address, size in storages.items() if address not in weights)
    assert logits.requires_grad
    assert 350_000 < gradient.kept_bytes() < autograd / 32


# ---- the head ------------------------------------------------------------------------------------------------------------------


class Headed(nn.Module):
    """A residual block, and a head of the caller's."""

    def __init__(self, head, classes=5):
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.fc, self.gate, self.head = nn.Linear(11, classes), nn.Linear(11, 11), head

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self, F.relu(self.bn(x + self.conv2(x))))


def pooled_by_module(m, x):
    return m.fc(F.adaptive_avg_pool2d(x, 1).squeeze(3).flatten(1))


def in_a_smooth_network(m, x):
    return m.fc(F.silu(x).mean((2, 3)))


def behind_a_sum(m, x):
    return m.fc((x.relu() + F.max_pool2d(x, 3, 1, 1)).mean((2, 3)))


def features_read_twice(m, x):
    x = x.mean((2, 3))
    return m.fc(x + m.gate(x).relu())


def logits_go_on(m, x):
    return m.fc(x.mean((2, 3))) / 3


def two_linear_layers(m, x):
    return m.fc(m.gate(x.mean((2, 3))).relu())


def mean_of_rows(m, x):
    return m.fc(x.mean(3).mean(2))


def squeezed_and_excited(m, x):
    return m.fc((x * torch.sigmoid(m.gate(x.mean((2, 3)))).unsqueeze(2).unsqueeze(3)).mean((2, 3)))


def largest_pixel(m, x):
    return m.fc(F.max_pool2d(F.avg_pool2d(x, 2), 3).flatten(1))


HEADS = {  # is it one step, and does that do the way back of the pass in front?
    pooled_by_module: (True, True),
    in_a_smooth_network: (True, False),
    behind_a_sum: (True, True),
    squeezed_and_excited: (True, False),
    features_read_twice: (False, False),
    logits_go_on: (False, False),
    two_linear_layers: (False, False),
    mean_of_rows: (False, False),
    largest_pixel: (False, False),
}


@pytest.mark.parametrize("head", HEADS)
def test_pooling_and_the_last_layer_are_one_step(head):
    torch.manual_seed(0)
    model, x = randomized(Headed(head)), images(3, 9)
    gradient = planned(model, x)
    last, one_step = gradient.plan.steps[-1], HEADS[head][0]
    assert isinstance(last, PoolLinear) == one_step == sk.explain(model, x).plan["of them with the pooling"]
    assert (getattr(last, "pointwise", None) is not None) == HEADS[head][1]
    expected = logits_and_gradient(InputGradient(model), x)
    for ours, theirs in zip(logits_and_gradient(gradient, x), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


def test_a_head_of_many_weights_stays_a_matrix_product(monkeypatch):
    x = images()
    monkeypatch.setattr(plan, "MAX_WEIGHTS", 55)
    assert type(planned(randomized(Headed(pooled_by_module)), x).plan.steps[-1]) is PoolLinear
    monkeypatch.setattr(plan, "MAX_WEIGHTS", 54)
    assert type(planned(randomized(Headed(pooled_by_module)), x).plan.steps[-1]) is Linear
    monkeypatch.undo()
    monkeypatch.setattr(plan, "MAX_CHANNELS", 10)
    assert type(planned(randomized(Headed(pooled_by_module)), x).plan.steps[-1]) is Linear


@pytest.mark.parametrize("head", [pooled_by_module, in_a_smooth_network, behind_a_sum])
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16"])
def test_one_step_gives_what_the_steps_gave(head, precision, monkeypatch):
    """Logits, gradients and their factors, which lengths depend on, as often as the way back is gone."""
    torch.manual_seed(0)
    model, x = randomized(Headed(head), torch.float32 if precision else torch.float64), images(4, 9)
    x, dlogits = x.to(model.fc.weight.dtype), torch.randn(4, 5, dtype=model.fc.weight.dtype)
    dlogits *= torch.tensor([1.0, 0.0, 1e-6, 1e4])[:, None]
    found = []
    for most in (plan.MAX_WEIGHTS, 0):
        monkeypatch.setattr(plan, "MAX_WEIGHTS", most)
        gradient = planned(copy.deepcopy(model), x, precision)
        assert isinstance(gradient.plan.steps[-1], PoolLinear) == (most > 0)
        with torch.no_grad(), gradient.arithmetic("cpu"):
            logits = gradient.forward(x)
            first = gradient.backward(dlogits, keep=True)
            factor = gradient.factor
            again = gradient.backward(-2 * dlogits)
        assert (factor is None) == (precision not in ("bf16", "fp16"))
        length = 1 if factor is None else factor.view(-1, 1, 1, 1)
        assert torch.equal(again * (1 if factor is None else gradient.factor.view(-1, 1, 1, 1)), -2 * (first * length))
        found.append((logits, first.double(), factor))
    (ours, dx, factor), (theirs, expected, expected_factor) = found
    half = {"bf16": 2**-6, "fp16": 2**-9}.get(precision, 1e-6 if precision else 1e-14)
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if precision else 1e-12, atol=1e-6 if precision else 1e-13)
    assert ((dx - expected).flatten(1).norm(dim=1) <= half * expected.flatten(1).norm(dim=1)).all()
    assert (dx[1] == 0).all()
    if factor is not None:
        torch.testing.assert_close(factor, expected_factor, rtol=1e-5, atol=0)


# ---- half precision ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_image_is_not_rounded(precision):
    """A convolution of differences sees what rounding the image to half precision would remove."""
    conv = nn.Conv2d(3, 8, (1, 2), bias=False)
    conv.weight.data[:, :, :, 0], conv.weight.data[:, :, :, 1] = 1, -1
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(8, 8, bias=False)).eval()
    model[2].weight.data.copy_(torch.eye(8))
    x = torch.full((4, 3, 1, 2), 0.7)
    x[:, :, :, 1] += torch.tensor([1e-5, 1e-4, 5e-4, 1e-3]).view(4, 1, 1)
    expected = model.double()(x.double())
    logits, _ = logits_and_gradient(planned(model.float(), x, precision), x)
    rounding = 2**-17 * 6 if precision == "bf16" else 2**-22 * 6  # of six terms below 1, in two halves
    torch.testing.assert_close(logits.double(), expected, rtol=0.02, atol=rounding)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["WRN (TRADES/MART)", "normalised", "functional", "sums", "defaults", "front", "SiLU", "GELU"])
def test_half_precision_points_where_fp32_does(name, precision):
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = randomized(make(), torch.float32), images(3, size, torch.float32)
    model.__dict__.update({k: v.float() for k, v in vars(model).items() if isinstance(v, torch.Tensor)})
    exact, half = (logits_and_gradient(planned(model, x, p), x)[1].double().flatten(1) for p in ("fp32", precision))
    # By random models, whose gradients are noise: bf16 is 1 % off in every layer.
    assert F.cosine_similarity(exact, half, eps=0).min() > (0.9 if precision == "bf16" else 0.98)


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


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6])
def test_gradients_of_any_size_survive_half_precision(factor):
    torch.manual_seed(0)
    model, x = randomized(create("wrn-10-2"), torch.float32), images(3, dtype=torch.float32)
    dlogits = torch.randn(3, 10) * factor * torch.tensor([1.0, 1e-3, 1e3])[:, None]
    _, exact = logits_and_gradient(planned(model, x), x, dlogits)
    _, half = logits_and_gradient(planned(model, x, "fp16"), x, dlogits)
    exact, half_ = (F.normalize(g.double().flatten(1), eps=0) for g in (exact, half))
    assert (exact * half_).sum(1).min() > 0.99
    assert (half == 0).float().mean() < 0.001


def test_half_precision_without_convolutions_keeps_small_gradients():
    """Such a network is all head, whose gradients stay fp32: nothing scales them."""
    model = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval().half()
    x = torch.rand(4, 16, 64, 64).half()
    _, gradient = logits_and_gradient(planned(model, x), x, torch.full((4, 10), 1e-4))
    assert (gradient != 0).float().mean() > 0.9


def test_a_zero_gradient_stays_zero_and_nan_stays_nan():
    model, x = randomized(create("wrn-10-1"), torch.float32), images(2, dtype=torch.float32)
    dlogits = torch.zeros(2, 10)
    dlogits[1, 0] = torch.nan
    _, grad = logits_and_gradient(planned(model, x, "bf16"), x, dlogits)
    assert (grad[0] == 0).all()
    assert grad[1].isnan().any()


def test_autocast_of_the_caller_is_the_precision():
    model, x = randomized(create("wrn-10-1"), torch.float32), images(2, dtype=torch.float32)
    assert sk.explain(model, x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sk.explain(model, x).dtype == torch.bfloat16
        assert sk.explain(model, x, precision="fp32").dtype == torch.float32
    assert sk.explain(model.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


# ---- what does not take the plan -----------------------------------------------------------------------------------------------


class Lambda(nn.Module):
    def __init__(self, function, *children):
        super().__init__()
        self.function = function
        self.child = nn.Sequential(*children)
        self.fc = nn.Linear(3, 4)
        self.notes = {}
        self.register_buffer("count", torch.ones((), dtype=torch.int64))

    def forward(self, x):
        return self.function(self, x)


def read_later(m, x):
    a = m.child(x)
    return m.fc((F.relu(a, inplace=True) + a).mean((2, 3)))


def writes_attribute(m, x):
    m.seen = x
    return m.fc(x.mean((2, 3)))


def writes_into_a_dict(m, x):
    m.notes["seen"] = x
    return m.fc(x.mean((2, 3)))


def counts(m, x):
    m.count += 1
    return m.fc(x.mean((2, 3)))


def added_to(m, x):
    a = m.child(x)
    skip = a
    a += a.relu()
    return m.fc((a + skip).mean((2, 3)))


def own_forward():
    model = create("wrn-10-1")
    model.conv1.forward = lambda x: -nn.Conv2d.forward(model.conv1, x)
    return model


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return -grad


def without_gradient(m, x):
    with torch.no_grad():
        brightness = x.mean((2, 3))
    return m.fc(x.mean((2, 3)) - brightness)


REFUSED = {
    "statistics of the batch": (lambda: create("wrn-10-1"), {"bn_mode": "train"}),
    "random numbers": (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10)), {"bn_mode": "train"}),
    "random numbers on the host": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * (1 + random.random()))), {}),
    "no rule for": (lambda: Lambda(lambda m, x: m.fc(x.cumsum(3).mean((2, 3)))), {}),
    "LayerNorm": (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(3072), nn.Linear(3072, 10)), {}),
    "control flow|symbolically": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * (2 if x.sum() > 0 else 1))), {}),
    "relu works in place on a value that add reads later": (lambda: Lambda(read_later, nn.Conv2d(3, 3, 3)), {}),
    "changes the images in place": (lambda: Lambda(lambda m, x: m.fc(x.mul_(2).mean((2, 3)))), {}),
    "its forward changes seen": (lambda: Lambda(writes_attribute), {}),
    "not those of the model itself": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) / x.shape[0])), {}),
    "without gradients": (lambda: Lambda(without_gradient), {}),
    "with its own backward": (lambda: Lambda(lambda m, x: m.fc(Reversed.apply(x.mean((2, 3))))), {}),
    "looks at the values of a tensor (__float__)": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * float(m.count))), {}),
    "looks at the values of a tensor (item)": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * m.fc.bias[0].item())), {}),
    "gives no tensor": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) / torch.aminmax(x).max)), {}),
    "iadd works in place on a value that add reads later": (lambda: Lambda(added_to, nn.Conv2d(3, 3, 3)), {}),
    "has a forward of its own": (own_forward, {}),
    "changes notes": (lambda: Lambda(writes_into_a_dict), {}),
    "changes count": (lambda: Lambda(counts), {}),
    "samples may mix": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)).view(1, -1, 3).mean(1).repeat(x.shape[0], 1))), {}),
    "no parameter or buffer": (lambda: Lambda(lambda m, x: F.linear(x.mean((2, 3)), m.fc.weight.abs())), {}),
    "dtype": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3))).float()), {}),
}  # fmt: skip


def snapshot(model):
    """Every attribute, containers by content, and the values of buffers."""
    attributes = [
        {k: (list(v), [id(i) for i in v.values()]) if isinstance(v, dict) else id(v) for k, v in vars(m).items()}
        for m in model.modules()
    ]
    return attributes, [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason_and_autograd_does_it(reason):
    make, settings = REFUSED[reason]
    torch.manual_seed(0)
    model, x, y = make().double(), images(3), torch.tensor([0, 1, 2])
    state, values = snapshot(model)
    explanation = sk.explain(model, x, **settings)
    assert explanation.path == "autograd"
    assert explanation.plan == {}
    assert any(part in explanation.reason for part in reason.split("|")), explanation.reason
    now, values_now = snapshot(model)
    assert now == state
    assert all(map(torch.equal, values, values_now))
    with pytest.raises(ValueError, match="input_gradient='plan', but"):
        sk.pgd(model, x, y, EPS, steps=1, input_gradient="plan", **settings)


def test_vit_takes_autograd():
    model = torchvision().models.VisionTransformer(16, 8, 1, 2, 32, 64, num_classes=10).eval()
    explanation = sk.explain(model, images(2, 16, torch.float32))
    assert explanation.path == "autograd"
    assert explanation.reason
    assert str(explanation).startswith("autograd, because")
    x, y = images(2, 16, torch.float32), torch.tensor([0, 1])
    assert sk.pgd(model, x, y, EPS, steps=1).shape == x.shape


def test_hooks_are_seen_and_never_skipped():
    model, x, calls = randomized(create("wrn-10-1")), images(), []
    assert sk.explain(model, x).path == "plan"
    handle = model.fc.register_forward_hook(lambda *_: calls.append(1))
    assert "hooks" in sk.explain(model, x).reason
    sk.pgd(model, x, torch.tensor([0, 1]), EPS, steps=3)
    assert len(calls) >= 3
    handle.remove()
    assert sk.explain(model, x).path == "plan"


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


# ---- plans and the life of a model ---------------------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch):
    """Counts the traces that are made."""
    made = []

    def counted(model, x):
        made.append(model)
        return trace.trace(model, x)

    monkeypatch.setattr(plan_cache, "trace", counted)
    yield made
    made.clear()


def test_training_needs_no_new_trace(traces):
    torch.manual_seed(0)
    model, x, y = create("wrn-10-1"), images(4, dtype=torch.float32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        x_adv = sk.pgd(model, x, y, EPS, steps=2, input_gradient="plan")
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), y).backward()
        optimizer.step()
    assert len(traces) == 1
    model.eval()
    ours, theirs = logits_and_gradient(planned(model, x), x), logits_and_gradient(InputGradient(model), x)
    assert (ours[0] - theirs[0]).norm() < 1e-4 * theirs[0].norm()
    assert len(traces) == 1


def test_a_changed_model_is_traced_again(traces):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = create("wrn-10-1"), 1.0

        def forward(self, x):
            return self.net(x) * self.scale

    model, x = Scaled().double().eval(), images()

    def check():
        ours, theirs = logits_and_gradient(planned(model, x), x), logits_and_gradient(InputGradient(model), x)
        assert (ours[1] - theirs[1]).norm() < 1e-10 * theirs[1].norm()

    check()
    model.scale = -3.0
    check()
    model.net.fc = nn.Linear(64, 5).double()
    check()
    model.net.relu = nn.SiLU()
    check()
    assert len(traces) == 4
    check()
    assert len(traces) == 4


def test_the_cache_keeps_no_model_alive():
    model, x = create("wrn-10-1"), images(dtype=torch.float32)
    sk.pgd(model, x, torch.tensor([0, 1]), EPS, steps=1, input_gradient="plan")
    alive = [weakref.ref(model), weakref.ref(model.fc.weight), weakref.ref(model.conv1)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in alive] == [None] * 3  # at once: no cycle waits for the collector
    finally:
        gc.enable()


def test_threads_share_models_and_plans():
    torch.manual_seed(0)
    models = [randomized(create("wrn-10-1"), torch.float32) for _ in range(2)]
    x, y = images(2, dtype=torch.float32), torch.tensor([0, 1])
    expected = [sk.pgd(m, x, y, EPS, steps=3, random_start=False, input_gradient="autograd") for m in models]
    wrong = []

    def attack(i):
        for _ in range(4):
            x_adv = sk.pgd(models[i % 2], x, y, EPS, steps=3, random_start=False)
            if ((x_adv - expected[i % 2]).abs() > 1e-6).float().mean() > 0.01:
                wrong.append(i)

    threads = [threading.Thread(target=attack, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_untied_weights_are_noticed(traces):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(2)), nn.Flatten(), nn.Linear(48, 4)).double().requires_grad_(False)
    x, model[1].weight = images(size=8), model[0].weight
    planned(model, x)
    model[1].weight = nn.Parameter(torch.randn_like(model[0].weight), requires_grad=False)
    ours, theirs = logits_and_gradient(planned(model, x), x), logits_and_gradient(InputGradient(model), x)
    assert (ours[0] - theirs[0]).norm() < 1e-10 * theirs[0].norm()
    assert len(traces) == 2


def test_precision_leaves_the_switches_as_they_were(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none for a missing GPU
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [s.fp32_precision for s in switches]
    first, second = precision.arithmetic("fp32", "cuda"), precision.arithmetic("tf32", "cuda")
    with first:
        assert [s.fp32_precision for s in switches] == ["ieee"] * 3
        second.__enter__()
    assert [s.fp32_precision for s in switches] == ["tf32"] * 3  # of the thread that is still inside
    second.__exit__(None, None, None)
    assert [s.fp32_precision for s in switches] == before


def test_switches_that_inherited_their_value_inherit_again():
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with precision.tf32_switches("tf32", "cuda"), precision.tf32_switches("fp32", "cuda"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize(("outer", "inner"), [("fp32", "tf32"), ("tf32", "fp32"), ("tf32", "tf32"), ("bf16", "tf32")])
def test_what_an_outer_precision_wants_is_set_again(outer, inner):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    values = {"fp32": ["ieee"] * 3, "tf32": ["tf32"] * 3, "bf16": [s.fp32_precision for s in switches]}
    with precision.tf32_switches(outer, "cuda"):
        for _ in range(2):
            with precision.tf32_switches(inner, "cuda"):
                assert [s.fp32_precision for s in switches] == values[inner]
            assert [s.fp32_precision for s in switches] == values[outer]
    assert [s.fp32_precision for s in switches] == values["bf16"]


def test_wrapped_models_are_looked_into():
    model, x = randomized(create("wrn-10-1")), images()
    hooked = nn.DataParallel(model)  # moves it to the GPU, where there is one
    x = x.to(next(model.parameters()).device)
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in sk.explain(hooked, x).reason
    assert sk.explain(nn.DataParallel(model), x).path == "plan"
    assert sk.explain(torch.compile(model), x).path == "plan"


# ---- on a GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_on_the_gpu(name):
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = randomized(make()).cuda(), images(size=size).cuda()
    model.__dict__.update({k: v.cuda() for k, v in vars(model).items() if isinstance(v, torch.Tensor)})
    expected = logits_and_gradient(InputGradient(model), x)
    for ours, theirs in zip(logits_and_gradient(planned(model, x), x), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["wrn-16-4", "preactresnet-18", "resnet-18"])
def test_graphs_of_the_plan_are_as_strong_as_the_plain_loop(name, precision):
    torch.manual_seed(0)
    model = randomized(create(name), torch.float32).cuda()
    x, y = images(64, dtype=torch.float32).cuda(), (torch.arange(64) % 10).cuda()
    rises = []
    for settings in (
        {"precision": "fp32", "input_gradient": "autograd", "graph": False},
        {"precision": precision, "input_gradient": "plan", "graph": False},
        {"precision": precision, "input_gradient": "plan", "graph": True},
        {"precision": precision, "input_gradient": "plan", "graph": True},  # a replay
    ):
        torch.manual_seed(3)
        x_adv = sk.pgd(model, x, y, EPS, **settings)
        rises.append(F.cross_entropy(model(x_adv), y) - F.cross_entropy(model(x), y))
    assert len(sk.graphs) >= 1
    assert all(rise > 0.98 * rises[0] for rise in rises[1:])


@pytest.mark.gpu
def test_the_plan_needs_less_memory_than_autograd():
    model = create("wrn-28-10").cuda().eval()
    x, y = images(64, dtype=torch.float32).cuda(), torch.zeros(64, dtype=torch.int64, device="cuda")
    peaks = {}
    for how in ("autograd", "plan"):
        sk.pgd(model, x, y, EPS, steps=2, input_gradient=how, graph=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sk.pgd(model, x, y, EPS, steps=2, input_gradient=how, graph=False)
        peaks[how] = torch.cuda.max_memory_allocated() - before
    assert peaks["plan"] < peaks["autograd"]
