"""Between convolutions: bitwise equal to the reference, whatever the channels, layout, alignment and choice of arguments, and the
gradient is the forward's vector-Jacobian product."""

import itertools

import pytest
import torch

from spat_kernels import ops
from spat_kernels.ops.scale_shift_relu import as_rows, pack_bits, unpack_bits
from tests.conftest import acc, reference, sentinels

CHANNELS = [1, 3, 8, 10, 16, 20, 160]
SHAPES = [(0,), (1,), (127,), (1, 1, 1), (2, 3, 5), (3, 7)]  # N and the spatial sizes
EXTREMES = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 6e-8, -6e-8, 3e38, -3e38, 1.0]
FORWARD = ("b", "scale", "shift", "total", "mask")
BACKWARD = ("grad2", "mask", "scale", "residual")


def image(shape, channels, dtype, device, offset=0):
    """Channels innermost, poisoned, in sentinels."""
    n, *size = shape
    t, intact = sentinels((n * max(1, torch.Size(size).numel()), channels), dtype, device, offset)
    return t.view(n, *size, channels).movedim(-1, 1), intact


def values(t, extremes=True):
    """Normal numbers into `t`, and at every seventh place an extreme one."""
    flat = torch.randn(t.numel())
    if extremes:
        where = torch.arange(0, t.numel(), 7)
        flat[where] = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), (len(where),))]
    return t.copy_(flat.view(as_rows(t).shape).view(t.movedim(1, -1).shape).movedim(-1, 1))


def bits_of(t):
    """Its bits, with one NaN for all of them: which one arithmetic gives is the processor's choice."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    t = as_rows(t).clone() if t.ndim > 2 else t.clone()
    return (t.masked_fill(t.isnan(), torch.nan) if t.is_floating_point() else t).view(integers[t.element_size()])


def mask_like(t, offset=0):
    rows, channels = as_rows(t).shape
    storage = torch.full((rows * -(-channels // 8) + 128,), 7, dtype=torch.uint8, device=t.device)
    mask = storage[64 + offset : len(storage) - 64 + offset].view(rows, -(-channels // 8)).fill_(0xA5)
    return mask, lambda: bool((storage[: 64 + offset] == 7).all() and (storage[len(storage) - 64 + offset :] == 7).all())


def choices(names):
    return [set(itertools.compress(names, chosen)) for chosen in itertools.product((0, 1), repeat=len(names))]


def forward_case(shape, channels, dtype, device, given, offset):
    """Arguments of scale_shift_relu, of which `given` are there, and a check of every rim."""
    rims = []

    def new(fill=True):
        t, intact = image(shape, channels, dtype, device, offset)
        rims.append(intact)
        return values(t) if fill else t

    def vector():
        t, _ = sentinels((channels,), acc(dtype), device, offset)
        return t.copy_(torch.randn(channels))

    a, out = new(), new(fill=False)
    mask, mask_intact = mask_like(a, offset)
    arguments = [
        a,
        new() if "b" in given else None,
        vector() if "scale" in given else None,
        vector() if "shift" in given else None,
        new(fill=False) if "total" in given else None,
        out,
        mask if "mask" in given else None,
    ]
    return arguments, lambda: mask_intact() and all(intact() for intact in rims)


def backward_case(shape, channels, dtype, device, given, offset):
    rims = []

    def new(fill=True):
        t, intact = image(shape, channels, dtype, device, offset)
        rims.append(intact)
        return values(t) if fill else t

    grad, dx = new(), new(fill=False)
    mask, mask_intact = mask_like(grad, offset)
    mask.copy_(pack_bits(torch.rand(as_rows(grad).shape) < 0.5))
    scale, _ = sentinels((channels,), acc(dtype), device, offset)
    arguments = [
        grad,
        new() if "grad2" in given else None,
        mask if "mask" in given else None,
        scale.copy_(torch.randn(channels)) if "scale" in given else None,
        new() if "residual" in given else None,
        dx,
    ]
    return arguments, lambda: mask_intact() and all(intact() for intact in rims)


def assert_bitwise(op, impl, case, arguments, intact, *relu):
    expected = [None if t is None else t.clone(memory_format=torch.preserve_format) for t in arguments]
    reference(op)(*expected, *relu)
    impl(op)(*arguments, *relu)
    for got, want in zip(arguments, expected, strict=True):
        assert got is None or torch.equal(bits_of(got), bits_of(want)), case
    assert intact(), case


@pytest.mark.parametrize("channels", CHANNELS)
def test_forward_is_bitwise_the_reference(impl, channels):
    for dtype, shape, offset in itertools.product(impl.dtypes, SHAPES, impl.offsets):
        for given in ({"scale", "shift", "mask"}, set(FORWARD)):
            arguments, intact = forward_case(shape, channels, dtype, impl.device, given, offset)
            assert_bitwise("scale_shift_relu", impl, (dtype, shape, offset, given), arguments, intact, True)


@pytest.mark.parametrize("channels", CHANNELS)
def test_gradient_is_bitwise_the_reference(impl, channels):
    for dtype, shape, offset in itertools.product(impl.dtypes, SHAPES, impl.offsets):
        for given in ({"mask", "scale"}, set(BACKWARD)):
            arguments, intact = backward_case(shape, channels, dtype, impl.device, given, offset)
            assert_bitwise("scale_shift_relu_grad", impl, (dtype, shape, offset, given), arguments, intact)


@pytest.mark.parametrize("channels", [10, 16])
def test_every_choice_of_arguments(impl, channels):
    for dtype in impl.dtypes:
        for given, relu in itertools.product(choices(FORWARD), (True, False)):
            if relu or "mask" not in given:
                arguments, intact = forward_case((3, 7), channels, dtype, impl.device, given, 0)
                assert_bitwise("scale_shift_relu", impl, (dtype, given, relu), arguments, intact, relu)
        for given in choices(BACKWARD):
            arguments, intact = backward_case((3, 7), channels, dtype, impl.device, given, 0)
            assert_bitwise("scale_shift_relu_grad", impl, (dtype, given), arguments, intact)


@pytest.mark.parametrize("channels", [3, 20, 64])
def test_results_may_take_the_place_of_inputs(impl, channels):
    for dtype in impl.dtypes:
        for place in (0, 1):  # out is a, out is b
            arguments, _ = forward_case((2, 3, 5), channels, dtype, impl.device, set(FORWARD), 0)
            apart = [t.clone(memory_format=torch.preserve_format) for t in arguments]
            arguments[5] = arguments[place]
            impl("scale_shift_relu")(*arguments, True)
            impl("scale_shift_relu")(*apart, True)
            assert all(torch.equal(bits_of(arguments[k]), bits_of(apart[k])) for k in (4, 5, 6)), (dtype, place)
        for place in (0, 1, 4):  # dx is grad, grad2, residual
            arguments, _ = backward_case((2, 3, 5), channels, dtype, impl.device, set(BACKWARD), 0)
            apart = [t.clone(memory_format=torch.preserve_format) for t in arguments]
            arguments[5] = arguments[place]
            impl("scale_shift_relu_grad")(*arguments)
            impl("scale_shift_relu_grad")(*apart)
            assert torch.equal(bits_of(arguments[5]), bits_of(apart[5])), (dtype, place)


def test_formula_by_hand(impl):
    """Signed zeros are off, NaN is on and stays; off is the residual exactly, whatever the gradient."""
    a = torch.tensor([[1.0, -1.0, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]], device=impl.device)
    out, mask = torch.full_like(a, torch.nan), torch.full((1, 2), 0xA5, dtype=torch.uint8, device=impl.device)
    impl("scale_shift_relu")(a, None, None, None, None, out, mask, True)
    assert out.nan_to_num(nan=-7).tolist() == [[1.0, 0.0, 0.0, 0.0, -7.0, torch.finfo(torch.float32).max, 0.0, 1e-45, 0.0]] or (
        out[0, 5] == torch.inf
    )
    assert mask.tolist() == [[0b10110001, 0]]
    assert not out.signbit().logical_and(out == 0).any()
    grad = torch.full_like(a, torch.nan)
    grad[0, 0], grad[0, 5], grad[0, 7] = 2.0, 3.0, 4.0
    dx, residual = torch.full_like(a, torch.nan), torch.full_like(a, -0.0)
    impl("scale_shift_relu_grad")(grad, None, mask, None, residual, dx)
    assert dx.nan_to_num(nan=-7).tolist() == [[2.0, 0.0, 0.0, 0.0, -7.0, 3.0, 0.0, 4.0, 0.0]]
    assert dx[0, [1, 2, 3, 6, 8]].signbit().all(), "the residual's zeros keep their sign"


def test_bits_are_where_autograd_passes_a_gradient(impl):
    for channels in CHANNELS:
        a, _ = image((5, 3), channels, torch.float32, impl.device)
        values(a)
        mask, _ = mask_like(a)
        leaf = a.clone().requires_grad_()
        (grad,) = torch.autograd.grad(leaf.relu().sum(), leaf)
        impl("scale_shift_relu")(a, None, None, None, None, torch.empty_like(a), mask, True)
        assert torch.equal(unpack_bits(mask, channels), as_rows(grad) == 1)
        assert torch.equal(mask, pack_bits(as_rows(grad) == 1)), "unused bits are 0"


def test_gradient_is_the_forwards(device):
    """Two residual blocks' worth in fp64: relu(bn(total)) with total = a + b, whose gradient arrives by both ways."""
    a, b, g_out, g_total = (torch.randn(2, 10, 3, 5, dtype=torch.float64, device=device) for _ in range(4))
    a, b, g_out, g_total = (t.contiguous(memory_format=torch.channels_last) for t in (a, b, g_out, g_total))
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

    ops.scale_shift_relu_grad(g_out, dx, grad2=g_total, mask=mask)  # two convolutions read one activation
    leaf = a.clone().requires_grad_()
    ops.scale_shift_relu(a, out, mask=mask)
    ops.scale_shift_relu_grad(g_out, dx, grad2=g_total, mask=mask)
    (exact,) = torch.autograd.grad(leaf.relu(), leaf, g_out + g_total)
    torch.testing.assert_close(dx, exact, rtol=1e-14, atol=1e-14)


def test_more_than_one_thread(device):
    """Rows enough to be split; the bits too."""
    a = torch.randn(40, 24, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    mask, _ = mask_like(a)
    out = ops.scale_shift_relu(a, torch.empty_like(a), mask=mask)
    assert torch.equal(out, a.relu())
    assert torch.equal(mask, pack_bits(as_rows(a) > 0))
    assert torch.equal(ops.scale_shift_relu_grad(a, torch.empty_like(a), mask=mask), a.relu())


def wrong(t):
    """Mistakes in an image argument."""
    return {
        "dtype": t.to(torch.float16 if t.dtype != torch.float16 else torch.float32),
        "shape": t[:, :-1].clone(memory_format=torch.channels_last),
        "layout": t.contiguous(),
        "sparse": torch.empty(4, 3, 5, 32, device=t.device).movedim(-1, 1)[:, ::2],
    }


@pytest.mark.parametrize("op", ["scale_shift_relu", "scale_shift_relu_grad"])
def test_wrong_arguments_raise(impl, op):
    case, names = (
        (forward_case, ("a", "b", "scale", "shift", "total", "out", "mask"))
        if op == "scale_shift_relu"
        else (backward_case, ("grad", "grad2", "mask", "scale", "residual", "dx"))
    )
    relu = (True,) if op == "scale_shift_relu" else ()
    arguments, _ = case((4, 3, 5), 16, torch.float32, impl.device, set(FORWARD + BACKWARD), 0)

    def refused(name, value, message=None):
        changed = [value if n == name else t for n, t in zip(names, arguments, strict=True)]
        with pytest.raises(RuntimeError, match=message or rf"\b{name}\b"):
            impl(op)(*changed, *relu)

    impl(op)(*arguments, *relu)
    for name, t in zip(names, arguments, strict=True):
        if name == "mask":
            for mask in (t.bool(), t[:, :1].contiguous(), t[:-1], t.t().contiguous().t(), t.flatten()):
                refused(name, mask)
        elif name in ("scale", "shift"):
            for vector in (t.double(), t[:-1], torch.zeros(32, device=impl.device)[::2], t[None]):
                refused(name, vector)
        else:
            for kind, value in wrong(t).items():
                # of a wrong first argument, the second is the one that does not fit
                first = name == names[0] and kind in ("dtype", "shape")
                refused(name, value, "must|wrong" if first else None)
        if impl.device == "cuda":
            refused(name, t.cpu(), "device|CPU|cpu")
    if relu:
        with pytest.raises(RuntimeError, match="mask goes with relu"):
            impl(op)(*arguments, False)
    with pytest.raises(RuntimeError, match="float32, float16"):
        impl(op)(*[None if t is None else t.long() for t in arguments], *relu)
