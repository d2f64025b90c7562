"""The head: at most twice the error that eager PyTorch makes in the same dtype, with a floor of two roundings, on every shape,
alignment and choice of arguments. What is masked out is exactly 0.

A gradient g = dlogits @ weight is a sum whose terms may cancel, and every order rounds partial sums as large as the terms. So its
floor is two roundings of the sum of the terms' magnitudes, which the error of a dot product is measured by (Higham, Accuracy
and Stability of Numerical Algorithms, section 3.1): with 3 classes it has been 34 times as large as g.
"""

import pytest
import torch
import torch.nn.functional as F

from spat_kernels import ops
from spat_kernels.ops.pool_linear import MAX_CHANNELS
from spat_kernels.ops.scale_shift_relu import as_rows, pack_bits, unpack_bits
from tests.ops.helpers import acc, bits_of, channels_last, image, mask_like, reference, sentinels

SHAPES = [  # B and the spatial sizes, C, K
    ((0, 4, 4), 8, 10),
    ((1, 1, 1), 1, 2),
    ((2, 1), 3, 3),
    ((6,), 33, 17),
    ((3, 7, 7), 10, 10),
    ((5, 4, 4), 64, 10),
    ((4, 2, 3), 20, 100),
    ((2, 8, 8), 160, 10),
    ((7, 3, 5), 300, 7),
    ((2, 4, 4), 264, 1000),
    ((3, 1, 2), MAX_CHANNELS, 9),
]
SCALED = ("factor", "mask", "scale")


def samples(dtype):
    x, dx = (channels_last(torch.randn(4, 64, 4, 4).to(dtype)) for _ in range(2))
    weight, logits, bias, scale, factor = (torch.rand(*n, dtype=acc(dtype)) for n in ((12, 64), (4, 12), (12,), (64,), (4,)))
    mask = torch.randint(256, (64, 8), dtype=torch.uint8)
    yield "pool_linear", (x, weight, bias, logits)
    yield "pool_linear", (x, weight, None, logits)
    yield "pool_linear_grad", (logits + 1, weight, mask, scale, factor, dx)
    yield "pool_linear_grad", (logits + 1, weight, None, None, None, dx)


def pixels_of(t):
    return t.shape[2:].numel()


def tensor(shape, dtype, device, offset=0, fill=True):
    t, intact = sentinels(shape, dtype, device, offset)
    return (t.copy_(torch.randn(shape)) if fill else t), intact


def forward_case(shape, channels, classes, dtype, device, offset=0, bias=True):
    """Arguments of pool_linear, and a check of the rim of its result."""
    x, _ = image(shape, channels, dtype, device, offset)
    x.copy_(torch.randn(x.shape))
    weight, _ = tensor((classes, channels), acc(dtype), device, offset)
    offsets, _ = tensor((classes,), acc(dtype), device, offset)
    logits, intact = tensor((shape[0], classes), acc(dtype), device, offset, fill=False)
    return [x, weight, offsets if bias else None, logits], intact


def backward_case(shape, channels, classes, dtype, device, given=SCALED, offset=0):
    dx, dx_intact = image(shape, channels, dtype, device, offset)
    dlogits, _ = tensor((shape[0], classes), acc(dtype), device, offset)
    weight, _ = tensor((classes, channels), acc(dtype), device, offset)
    scale, _ = tensor((channels,), acc(dtype), device, offset)
    factor, factor_intact = tensor((shape[0],), acc(dtype), device, offset, fill=False)
    mask, mask_intact = mask_like(dx, offset)
    mask.copy_(pack_bits(torch.rand(as_rows(dx).shape) < 0.5))
    optional = {"mask": mask, "scale": scale, "factor": factor}
    arguments = [dlogits, weight, *(t if name in given else None for name, t in optional.items()), dx]
    return arguments, lambda: dx_intact() and factor_intact() and mask_intact()


def eager_forward(x, weight, bias):
    pooled = as_rows(x).view(len(x), pixels_of(x), x.shape[1]).mean(1, dtype=weight.dtype)
    return F.linear(pooled, weight, bias)


def eager_backward(dlogits, weight, mask, scale, factor, dx):
    """Pass by pass, rounding between them as a network in dx's dtype does; factor and dx as rows."""
    g = dlogits @ weight
    if factor is not None:
        largest = g.abs().amax(1).clamp_min(torch.finfo(g.dtype).tiny)
        factor, g = largest / pixels_of(dx), g / largest[:, None]
    else:
        g = g / pixels_of(dx)
    rows = g.to(dx.dtype).repeat_interleave(pixels_of(dx), 0)
    rows = rows if scale is None else (rows * scale).to(dx.dtype)
    return factor, rows if mask is None else rows.where(unpack_bits(mask, dx.shape[1]), 0)


def in_fp64(arguments):
    return [t if t is None or t.dtype == torch.uint8 else t.double() for t in arguments]


def assert_as_good(ours, rival, exact, case, terms=None):
    if exact.numel():
        error, rivals_error = ((t.double() - exact).norm() for t in (ours, rival))
        # in fp64 the rival is the yardstick itself, and a few numbers may have come out well by chance
        floor = (64 if ours.dtype == torch.float64 else 2) * torch.finfo(ours.dtype).eps * exact.norm()
        if terms is not None:
            floor += 2 * torch.finfo(acc(ours.dtype)).eps * terms.norm()
        assert error <= max(2 * rivals_error, floor), (case, error / exact.norm(), rivals_error / exact.norm())


@pytest.mark.parametrize(("shape", "channels", "classes"), SHAPES, ids=str)
def test_logits_are_as_good_as_eagers(impl, shape, channels, classes):
    for dtype in impl.dtypes:
        for offset in impl.offsets:
            for bias in (True, False):
                arguments, intact = forward_case(shape, channels, classes, dtype, impl.device, offset, bias)
                impl("pool_linear")(*arguments)
                *given, logits = arguments
                assert_as_good(logits, eager_forward(*given), eager_forward(*in_fp64(given)), (dtype, offset, bias))
                assert intact()
                assert not logits.isnan().any()


@pytest.mark.parametrize(("shape", "channels", "classes"), SHAPES, ids=str)
def test_gradients_are_as_good_as_eagers(impl, shape, channels, classes):
    choices = [SCALED, ("mask", "scale")] + [("factor",), ("mask",), ("scale",), ()] * (channels < 200)
    for dtype in impl.dtypes:
        for given, offset in [(given, offset) for given in choices for offset in impl.offsets]:
            arguments, intact = backward_case(shape, channels, classes, dtype, impl.device, given, offset)
            before = [None if t is None else t.clone() for t in arguments[:4]]
            impl("pool_linear_grad")(*arguments)
            factor, dx = arguments[4:]
            rival_factor, rival = eager_backward(*arguments)
            exact_factor, exact = eager_backward(*in_fp64(arguments))
            case = dtype, given, offset
            dlogits, weight, mask, scale, *_ = in_fp64(arguments)
            _, terms = eager_backward(
                dlogits.abs(), weight.abs(), mask, None if scale is None else scale.abs(), None, dx.double()
            )
            if factor is not None:  # by which the magnitudes are divided too
                terms = terms / exact_factor.repeat_interleave(pixels_of(dx))[:, None]
            assert_as_good(as_rows(dx), rival, exact, case, terms)
            if factor is not None:
                largest = (dlogits.abs() @ weight.abs()).amax(1)
                assert_as_good(factor, rival_factor, exact_factor, case, largest / pixels_of(dx))
            if "mask" in given:
                off = as_rows(dx)[~unpack_bits(arguments[2], channels)]
                assert (bits_of(off[None]) == 0).all(), "+0, whatever the gradient"
            assert intact()
            assert not dx.isnan().any()
            assert all(t is None or torch.equal(t, b) for t, b in zip(arguments, before, strict=False)), "inputs stay"


def test_a_batch_of_nothing_writes_nothing(impl):
    dlogits, weight, dx, factor = (torch.empty(shape, device=impl.device) for shape in [(0, 3), (3, 0), (0, 0), 0])
    for call in (impl("pool_linear_grad"), reference("pool_linear_grad")):
        call(dlogits, weight, None, None, factor, dx)


def test_a_sample_is_the_same_in_every_batch(impl):
    """To the bit: samples go through the weights in groups."""
    for dtype in impl.dtypes:
        (dlogits, weight, mask, scale, factor, dx), _ = backward_case((7, 3, 3), 40, 11, dtype, impl.device)
        (x, _, bias, logits), _ = forward_case((7, 3, 3), 40, 11, dtype, impl.device)
        impl("pool_linear")(x, weight, bias, logits)
        impl("pool_linear_grad")(dlogits, weight, mask, scale, factor, dx)
        for i in range(7):
            one = slice(i, i + 1)
            alone = [torch.full_like(t[one], torch.nan) for t in (logits, factor, dx)]
            impl("pool_linear")(x[one], weight, bias, alone[0])
            impl("pool_linear_grad")(dlogits[one], weight, mask.view(7, 9, 5)[i], scale, *alone[1:])
            assert all(torch.equal(a, t[one]) for a, t in zip(alone, (logits, factor, dx), strict=True)), (dtype, i)


def test_not_finite_stays_in_its_sample(impl):
    """And is what it is in the reference: NaN where inf meets -inf or 0, in the factor too."""
    for dtype in impl.dtypes:
        for bad in (torch.nan, torch.inf, -torch.inf):
            (x, weight, bias, logits), _ = forward_case((9, 2, 3), 19, 5, dtype, impl.device)
            weight[3, 7] = 0
            impl("pool_linear")(x, weight, bias, logits)
            spoilt, poisoned, expected = x.clone(memory_format=torch.preserve_format), torch.zeros_like(logits), logits.clone()
            spoilt[2, 7], spoilt[8, 18, 1] = bad, bad
            impl("pool_linear")(spoilt, weight, bias, poisoned)
            reference("pool_linear")(spoilt, weight, bias, expected)
            torch.testing.assert_close(poisoned, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
            others = [i for i in range(9) if i not in (2, 8)]
            assert torch.equal(poisoned[others], logits[others])
            assert not poisoned[[2, 8]].isfinite().all(1).any()

            arguments, _ = backward_case((9, 2, 3), 19, 5, dtype, impl.device)
            arguments[1][:, 4] = 0
            impl("pool_linear_grad")(*arguments)
            spoilt = [t.clone(memory_format=torch.preserve_format) for t in arguments]
            spoilt[0][2, 1] = spoilt[0][8, 4] = bad
            expected = [t.clone(memory_format=torch.preserve_format) for t in spoilt]
            impl("pool_linear_grad")(*spoilt)
            reference("pool_linear_grad")(*expected)
            for got, want, clean in zip(spoilt[4:], expected[4:], arguments[4:], strict=True):
                torch.testing.assert_close(got.isnan(), want.isnan())
                assert torch.equal(got[others], clean[others])
            assert spoilt[4][[2, 8]].isnan().all(), "a class of weight 0 gives NaN"
            off = ~unpack_bits(spoilt[2], 19)
            assert (as_rows(spoilt[5])[off] == 0).all()


def test_an_infinite_gradient_is_an_infinite_factor(impl):
    """As long as no weight is 0; what is divided by it is NaN or 0."""
    (dlogits, weight, _, _, factor, dx), _ = backward_case((3, 2, 2), 16, 3, torch.float32, impl.device)
    dlogits[1, 2] = torch.inf
    impl("pool_linear_grad")(dlogits, weight, None, None, factor, dx)
    assert factor[1] == torch.inf
    assert dx[1].isnan().all()
    assert dx[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e30])
def test_gradients_of_any_size_are_scaled_to_1(impl, size):
    for dtype in impl.dtypes:
        (dlogits, weight, _, _, factor, dx), _ = backward_case((3, 4, 4), 24, 10, dtype, impl.device)
        dlogits.mul_(size)
        impl("pool_linear_grad")(dlogits, weight, None, None, factor, dx)
        g = (dlogits.double() @ weight.double()).abs().amax(1)
        tiny = torch.finfo(dlogits.dtype).tiny
        largest = dx.double().abs().flatten(1).amax(1)
        if size == 0:
            assert (dx == 0).all()
            assert (factor == tiny / 16).all()
        elif size < 1e-40 and dtype != torch.float64:
            assert (factor == tiny / 16).all()
            assert (largest < 1e-5).all()
        else:
            torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-5, atol=0)
            torch.testing.assert_close(factor.double(), g / 16, rtol=1e-5, atol=0)


def test_gradient_is_the_forwards(device):
    """In fp64, through the scale, the shift and the ReLU in front."""
    a = channels_last(torch.randn(5, 12, 3, 4, dtype=torch.float64, device=device))
    weight, dlogits = (torch.randn(*s, dtype=torch.float64, device=device) for s in ((7, 12), (5, 7)))
    scale, shift, bias = (torch.randn(n, dtype=torch.float64, device=device) for n in (12, 12, 7))
    mask, _ = mask_like(a)
    x = ops.scale_shift_relu(a, torch.empty_like(a), scale=scale, shift=shift, mask=mask)
    logits = ops.pool_linear(x, weight, torch.empty_like(dlogits), bias=bias)
    dx = ops.pool_linear_grad(dlogits, weight, torch.empty_like(a), mask=mask, scale=scale)
    leaf = a.clone().requires_grad_()
    activations = torch.relu(leaf * scale[:, None, None] + shift[:, None, None])
    expected = F.linear(activations.mean((2, 3)), weight, bias)
    torch.testing.assert_close(logits, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, leaf, dlogits)[0], rtol=1e-13, atol=1e-13)
    factor = torch.empty(5, dtype=torch.float64, device=device)
    scaled = ops.pool_linear_grad(dlogits, weight, torch.empty_like(a), mask=mask, scale=scale, factor=factor)
    torch.testing.assert_close(scaled * factor.view(-1, 1, 1, 1), dx, rtol=1e-13, atol=1e-13)
