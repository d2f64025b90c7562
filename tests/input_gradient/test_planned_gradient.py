"""The input-gradient plan against autograd: equal in fp64 on every kind of network, as strong in half precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels.input_gradient.autograd import InputGradient
from spat_train.models.registry import create
from tests.input_gradient.models import (
    EPS,
    MODELS,
    assert_equals_autograd,
    images,
    logits_and_gradient,
    moved,
    planned,
    randomized,
)


@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_in_fp64_and_fp32(name):
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = randomized(make()), images(size=size)
    expected = assert_equals_autograd(model, x)

    model, x = moved(model, torch.float32).to(memory_format=torch.channels_last), x.float().to(memory_format=torch.channels_last)
    ours, eager = logits_and_gradient(planned(model, x), x), logits_and_gradient(InputGradient(model), x)
    for a, b, exact in zip(ours, eager, expected, strict=True):
        error, own_error = ((v - exact).norm() / exact.norm() for v in (a, b))
        flipped = error > 1e-4  # by a ReLU so close to 0 that fp32 does not know its sign; autograd has as many of them
        assert error <= 2 * own_error or (flipped and error < 0.03)


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


# ---- half precision ------------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize(
    "name", ["WRN (TRADES/MART)", "normalised", "functional", "sums", "defaults", "front", "distances", "SiLU", "GELU"]
)
def test_half_precision_points_where_fp32_does(name, precision):
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = moved(randomized(make()), torch.float32), images(3, size, torch.float32)
    exact, half = (logits_and_gradient(planned(model, x, p), x)[1].double().flatten(1) for p in ("fp32", precision))
    # By random models, whose gradients are noise: bf16 is 1 % off in every layer.
    assert F.cosine_similarity(exact, half, eps=0).min() > (0.9 if precision == "bf16" else 0.98)


@pytest.mark.parametrize("cast", ["to", "float"])
def test_what_the_model_casts_to_fp32_is_fp32_from_there_on(cast):
    """256 + 1 is 256 in bf16. The way back is through the cast, too."""

    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            f = self.conv(x).flatten(1)
            return (f.to(torch.float32) if cast == "to" else f.float()) + 256

    model, x = Casts().eval(), images(2, 1, torch.float32)
    plain = logits_and_gradient(InputGradient(model), x)
    logits, gradient = logits_and_gradient(planned(model, x, "bf16"), x)
    torch.testing.assert_close(logits - 256, plain[0] - 256, rtol=0.02, atol=0.01)
    assert F.cosine_similarity(gradient.float().flatten(1), plain[1].flatten(1)).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reshaped_images_in_half_precision_keep_their_dtype(dtype):
    class Reshapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x.flatten(1).view(-1, 3, 8, 8) + x).flatten(1)

    model, x = Reshapes().to(dtype).eval(), images(2, 8, dtype)
    half = logits_and_gradient(planned(model, x), x)
    exact = logits_and_gradient(InputGradient(model.float()), x.float())
    for ours, theirs in zip(half, exact, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.05)


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


# ---- on a GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_on_the_gpu(name):
    make, size = MODELS[name]
    torch.manual_seed(0)
    assert_equals_autograd(moved(randomized(make()), "cuda"), images(size=size).cuda())


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
