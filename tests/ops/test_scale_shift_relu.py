"""Between convolutions: bitwise equal to the reference, whatever the channels, layout, alignment and choice of arguments, and the
gradient is the forward's vector-Jacobian product."""

import itertools

import pytest
import torch

from spat_kernels import ops
from spat_kernels.ops.scale_shift_relu import as_rows, pack_bits
from tests.ops.helpers import acc, bits_of, channels_last, image, mask_like, reference, sentinels, values

CHANNELS = [1, 3, 8, 10, 16, 20, 160]
SHAPES = [(0,), (1,), (127,), (1, 1, 1), (2, 3, 5), (3, 7)]  # N and the spatial sizes
OPTIONAL = {
    "scale_shift_relu": ("b", "scale", "shift", "total", "mask"),
    "scale_shift_relu_grad": ("grad2", "mask", "scale", "residual"),
}
USUAL = {"scale_shift_relu": ("scale", "shift", "mask"), "scale_shift_relu_grad": ("mask", "scale")}
FLAGS = {"scale_shift_relu": (True,), "scale_shift_relu_grad": ()}  # `relu`, the last argument


def samples(dtype):
    a, out, total = (channels_last(torch.randn(4, 16, 8, 8).to(dtype)) for _ in range(3))
    v, mask = torch.rand(16, dtype=acc(dtype)), torch.zeros(4 * 64, 2, dtype=torch.uint8)
    yield "scale_shift_relu", (a, a + 1, v, v - 1, total, out, mask, True)
    yield "scale_shift_relu", (a, None, None, None, None, out, None, False)
    yield "scale_shift_relu_grad", (a, a + 1, mask, v, total, out)
    yield "scale_shift_relu_grad", (a, None, None, None, None, out)


def choices(names):
    return [set(itertools.compress(names, chosen)) for chosen in itertools.product((0, 1), repeat=len(names))]


def case(op, shape, channels, dtype, device, given, offset):
    """Arguments of `op`, of which `given` of the optional ones are there, by name, and a check of every rim."""
    rims = []

    def new(sentinel, fill=None):
        t, intact = sentinel
        rims.append(intact)
        return t if fill is None else fill(t)

    def images(fill=values):
        return new(image(shape, channels, dtype, device, offset), fill)

    def vector():
        return new(sentinels((channels,), acc(dtype), device, offset), lambda t: t.copy_(torch.randn(channels)))

    first = images()
    mask, mask_intact = mask_like(first, offset)
    rims.append(mask_intact)
    if op == "scale_shift_relu":
        made = {"a": first, "b": images, "scale": vector, "shift": vector, "total": lambda: images(None)}
        made |= {"out": images(None), "mask": lambda: mask}
    else:
        mask.copy_(pack_bits(torch.rand(as_rows(first).shape) < 0.5))
        made = {"grad": first, "grad2": images, "mask": lambda: mask, "scale": vector, "residual": images, "dx": images(None)}
    arguments = {n: t if isinstance(t, torch.Tensor) else t() if n in given else None for n, t in made.items()}
    return arguments, lambda: all(intact() for intact in rims)


def copies(arguments):
    return {n: None if t is None else t.clone(memory_format=torch.preserve_format) for n, t in arguments.items()}


def assert_bitwise(op, impl, shape, channels, dtype, given, offset=0, relu=True):
    arguments, intact = case(op, shape, channels, dtype, impl.device, given, offset)
    expected, last = copies(arguments), FLAGS[op] and (relu,)
    reference(op)(*expected.values(), *last)
    impl(op)(*arguments.values(), *last)
    for got, want in zip(arguments.values(), expected.values(), strict=True):
        assert got is None or torch.equal(bits_of(got), bits_of(want)), (dtype, shape, offset, given, relu)
    assert intact(), (dtype, shape, offset, given, relu)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("op", OPTIONAL)
def test_is_bitwise_the_reference(impl, op, channels):
    for dtype, shape, offset in itertools.product(impl.dtypes, SHAPES, impl.offsets):
        for given in (USUAL[op], OPTIONAL[op]):
            assert_bitwise(op, impl, shape, channels, dtype, given, offset)


@pytest.mark.parametrize("channels", [10, 16])
@pytest.mark.parametrize("op", OPTIONAL)
def test_every_choice_of_arguments(impl, op, channels):
    for dtype, given in itertools.product(impl.dtypes, choices(OPTIONAL[op])):
        assert_bitwise(op, impl, (3, 7), channels, dtype, given)
        if FLAGS[op] and "mask" not in given:
            assert_bitwise(op, impl, (3, 7), channels, dtype, given, relu=False)


@pytest.mark.parametrize("channels", [3, 20, 64])
@pytest.mark.parametrize(
    ("op", "results", "places"),
    [
        ("scale_shift_relu", ("out", "total", "mask"), ("a", "b")),
        ("scale_shift_relu_grad", ("dx",), ("grad", "grad2", "residual")),
    ],
)
def test_results_may_take_the_place_of_inputs(impl, op, results, places, channels):
    for dtype, place in itertools.product(impl.dtypes, places):
        arguments, _ = case(op, (2, 3, 5), channels, dtype, impl.device, OPTIONAL[op], 0)
        apart = copies(arguments)
        arguments[results[0]] = arguments[place]
        for given in (arguments, apart):
            impl(op)(*given.values(), *FLAGS[op])
        assert all(torch.equal(bits_of(arguments[r]), bits_of(apart[r])) for r in results), (dtype, place)


def test_formula_by_hand(impl):
    """Signed zeros are off, NaN is on and stays; off is the residual exactly, whatever the gradient."""
    a = torch.tensor([[1.0, -1.0, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]], device=impl.device)
    out, mask = torch.full_like(a, torch.nan), torch.full((1, 2), 0xA5, dtype=torch.uint8, device=impl.device)
    impl("scale_shift_relu")(a, None, None, None, None, out, mask, True)
    torch.testing.assert_close(out, a.relu(), rtol=0, atol=0, equal_nan=True)
    assert mask.tolist() == [[0b10110001, 0]]
    assert not out.signbit().logical_and(out == 0).any()
    grad = torch.full_like(a, torch.nan)
    grad[0, 0], grad[0, 5], grad[0, 7] = 2.0, 3.0, 4.0
    dx, residual = torch.full_like(a, torch.nan), torch.full_like(a, -0.0)
    impl("scale_shift_relu_grad")(grad, None, mask, None, residual, dx)
    assert dx.nan_to_num(nan=-7).tolist() == [[2.0, 0.0, 0.0, 0.0, -7.0, 3.0, 0.0, 4.0, 0.0]]
    assert dx[0, [1, 2, 3, 6, 8]].signbit().all(), "the residual's zeros keep their sign"


def test_gradient_is_the_forwards(device):
    """Two residual blocks' worth in fp64: relu(bn(total)) with total = a + b, whose gradient arrives by both ways."""
    a, b, g_out, g_total = (torch.randn(2, 10, 3, 5, dtype=torch.float64, device=device) for _ in range(4))
    a, b, g_out, g_total = map(channels_last, (a, b, g_out, g_total))
    scale, shift = (torch.randn(10, dtype=torch.float64, device=device) for _ in range(2))
    out, total, dx = (torch.empty_like(a) for _ in range(3))
    mask, _ = mask_like(a)
    ops.scale_shift_relu(a, out, b=b, scale=scale, shift=shift, total=total, mask=mask)
    ops.scale_shift_relu_grad(g_out, dx, mask=mask, scale=scale, residual=g_total)

    leaf = a.clone().requires_grad_()
    t = leaf + b
    v = torch.relu(t * scale[:, None, None] + shift[:, None, None])
    (exact,) = torch.autograd.grad([v, t], leaf, [g_out, g_total])
    torch.testing.assert_close(out, v, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dx, exact, rtol=1e-14, atol=1e-14)
    assert torch.equal(total, t)

    leaf = a.clone().requires_grad_()
    ops.scale_shift_relu(a, out, mask=mask)
    ops.scale_shift_relu_grad(g_out, dx, grad2=g_total, mask=mask)  # two convolutions read one activation
    (exact,) = torch.autograd.grad(leaf.relu(), leaf, g_out + g_total)
    torch.testing.assert_close(dx, exact, rtol=1e-14, atol=1e-14)


def test_more_than_one_thread(device):
    """Rows enough to be split; the bits too."""
    a = channels_last(torch.randn(40, 24, 32, 32, device=device))
    mask, _ = mask_like(a)
    out = ops.scale_shift_relu(a, torch.empty_like(a), mask=mask)
    assert torch.equal(out, a.relu())
    assert torch.equal(mask, pack_bits(as_rows(a) > 0))
    assert torch.equal(ops.scale_shift_relu_grad(a, torch.empty_like(a), mask=mask), a.relu())
