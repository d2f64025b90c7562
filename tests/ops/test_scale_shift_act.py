"""Activations between layers: bitwise the reference in fp32, whatever the channels, layout, alignment and choice of arguments.
Functions and derivatives are torch's."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from spat_kernels import ops
from spat_kernels.ops.scale_shift_act import ACTIVATIONS, LEAKY, activated
from tests.ops.helpers import EXTREMES, acc, bits_of, channels_last, image, reference, sentinels, values

CHANNELS = [1, 3, 4, 8, 10, 16, 160]
SHAPES = [(0,), (1,), (127,), (1, 1, 1), (2, 3, 5), (3, 7)]  # N and the spatial sizes
OPTIONAL = {"scale_shift_act": ("b", "scale", "shift", "total", "slope"), "scale_shift_act_grad": ("grad2", "residual")}
TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": lambda v: F.relu6(v + 3) / 6,  # the 1/6 of F.hardsigmoid's derivative is fp32 in fp64 too
    "relu6": F.relu6,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.25),
    "tanh": torch.tanh,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
}
NOT_FINITE = [torch.nan, torch.inf, -torch.inf]
# Where branches and exponentials end.
ENDS = [v * s for v in (0.17, 0.35, 3, 6, 10.03, 10.05, 13.2, 13.3, 20, 20.5, 43.9, 44.1, 87.6, 88.2, 800, 1e20) for s in (1, -1)]


def samples(dtype):
    a, out, total, slope = (channels_last(torch.randn(4, 16, 8, 8).to(dtype)) for _ in range(4))
    v = torch.rand(16, dtype=acc(dtype))
    for act in range(len(ACTIVATIONS)):
        yield "scale_shift_act", (a, a + 1, v, v - 1, v / 8 if act == LEAKY else None, total, out, slope, act)
    yield "scale_shift_act", (a, None, None, None, v[:1].clone(), None, out, None, LEAKY)
    yield "scale_shift_act", (a, None, None, None, None, None, out, None, 0)
    yield "scale_shift_act_grad", (a, a + 1, slope, total, out)
    yield "scale_shift_act_grad", (a, None, slope, None, out)


def choices(names):
    return [set(itertools.compress(names, chosen)) for chosen in itertools.product((0, 1), repeat=len(names))]


def case(op, shape, channels, dtype, device, given, offset=0, act=0):
    """Arguments of `op`, of which `given` of the optional ones are there, by name, and a check of every rim."""
    rims = []

    def new(sentinel, fill=None):
        t, intact = sentinel
        rims.append(intact)
        return t if fill is None else fill(t)

    def images(fill=values):
        return lambda: new(image(shape, channels, dtype, device, offset), fill)

    def vector(size=channels):
        return lambda: new(sentinels((size,), acc(dtype), device, offset), lambda t: t.copy_(torch.randn(size)))

    if op == "scale_shift_act":
        negative = vector(1 if "one negative" in given else channels)
        made = {"a": images(), "b": images(), "scale": vector(), "shift": vector(), "negative": negative}
        made |= {"total": images(None), "out": images(None), "slope": images(None)}
        given = {"a", "out", *given} | ({"negative"} if act == LEAKY else set())
    else:
        made = {"grad": images(), "grad2": images(), "slope": images(), "residual": images(), "dx": images(None)}
        given = {"grad", "slope", "dx", *given}
    return {n: make() if n in given else None for n, make in made.items()}, lambda: all(intact() for intact in rims)


def copies(arguments):
    return {n: None if t is None else t.clone(memory_format=torch.preserve_format) for n, t in arguments.items()}


def same(found, expected, dtype, what):
    """To the bit, but in fp64 a library's functions, an ulp or two apart, in values that extremes make as large as 1e39."""
    if found is None:
        return
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        assert torch.equal(bits_of(found), bits_of(expected)), (dtype, what)


def assert_same(op, impl, shape, channels, dtype, given, offset=0, act=0):
    arguments, intact = case(op, shape, channels, dtype, impl.device, given, offset, act)
    expected, last = copies(arguments), (act,) if op == "scale_shift_act" else ()
    reference(op)(*expected.values(), *last)
    impl(op)(*arguments.values(), *last)
    for name, got in arguments.items():
        same(got, expected[name], dtype, (name, shape, offset, given, last))
    assert intact(), (dtype, shape, offset, given, last)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("op", OPTIONAL)
def test_is_bitwise_the_reference(impl, op, channels):
    for dtype, shape, offset in itertools.product(impl.dtypes, SHAPES, impl.offsets):
        for given in ((), OPTIONAL[op]):
            assert_same(op, impl, shape, channels, dtype, given, offset)


@pytest.mark.parametrize("channels", [10, 16])
@pytest.mark.parametrize("op", OPTIONAL)
def test_every_choice_of_arguments(impl, op, channels):
    for dtype, given in itertools.product(impl.dtypes, choices(OPTIONAL[op])):
        assert_same(op, impl, (3, 7), channels, dtype, given)


@pytest.mark.parametrize("act", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_every_activation(impl, act):
    """On extremes, at the ends of its branches, and on 2000 numbers up to 30: more than a block, and no whole number of them."""
    grid = torch.tensor([*EXTREMES, *ENDS, *torch.linspace(-30, 30, 2000)])
    for dtype, negative in itertools.product(impl.dtypes, [torch.tensor([0.25]), torch.linspace(-1, 1, 12)]):
        a = grid[: len(grid) // 12 * 12].view(-1, 12).to(impl.device, dtype)
        found = [torch.full_like(a, torch.nan) for _ in range(2)]
        expected = [t.clone() for t in found]
        per_channel = negative.to(impl.device, acc(dtype)) if act == LEAKY else None
        for call, (out, slope) in ((impl, found), (reference, expected)):
            call("scale_shift_act")(a, None, None, None, per_channel, None, out, slope, act)
        for got, want in zip(found, expected, strict=True):
            same(got, want, dtype, ACTIVATIONS[act])


@pytest.mark.parametrize("channels", [3, 20, 64])
@pytest.mark.parametrize(
    ("op", "results", "places"),
    [
        ("scale_shift_act", ("out", "total", "slope"), ("a", "b")),
        ("scale_shift_act_grad", ("dx",), ("grad", "grad2", "slope", "residual")),
    ],
)
def test_results_may_take_the_place_of_inputs(impl, op, results, places, channels):
    for dtype, place in itertools.product(impl.dtypes, places):
        arguments, _ = case(op, (2, 3, 5), channels, dtype, impl.device, OPTIONAL[op])
        apart, last = copies(arguments), (0,) if op == "scale_shift_act" else ()
        arguments[results[0]] = arguments[place]
        for given in (arguments, apart):
            impl(op)(*given.values(), *last)
        assert all(torch.equal(bits_of(arguments[r]), bits_of(apart[r])) for r in results), (dtype, place)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values_and_derivatives_are_torchs(device, act):
    """fp64, with all the arguments: act(bn(total)) with total = a + b, whose gradient arrives by both ways.

    torch's functions run on the CPU: on GPUs its hardswish rounds 1/6 to fp32, in fp64 too.
    """
    shape = 2, 10, 7, 9
    a, b, g_out, g_out2, g_total = (3 * channels_last(torch.randn(shape, dtype=torch.float64, device=device)) for _ in range(5))
    scale, shift = (torch.randn(10, dtype=torch.float64, device=device) for _ in range(2))
    out, total, slope, dx = (torch.full_like(a, torch.nan) for _ in range(4))
    negative = scale.new_full((1,), 0.25) if act == "leaky_relu" else None
    kept = ops.scale_shift_act(a, out, act=act, b=b, scale=scale, shift=shift, total=total, slope=slope, negative=negative)
    assert kept is out
    assert ops.scale_shift_act_grad(g_out, slope, dx, grad2=g_out2, residual=g_total) is dx

    a, b, scale, shift, g_out, g_out2, g_total = (t.cpu() for t in (a, b, scale, shift, g_out, g_out2, g_total))
    leaf = a.clone().requires_grad_()
    t = leaf + b
    v = TORCH[act](t * scale[:, None, None] + shift[:, None, None])
    (exact,) = torch.autograd.grad([v, t], leaf, [g_out + g_out2, g_total])
    torch.testing.assert_close(out.cpu(), v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx.cpu(), exact, rtol=1e-10, atol=1e-10)
    assert torch.equal(total.cpu(), t)


def test_prelu_is_torchs(device):
    a, grad = (channels_last(torch.randn(2, 5, 3, 4, dtype=torch.float64, device=device)) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, device=device)
    out, slope, dx = (torch.empty_like(a) for _ in range(3))
    ops.scale_shift_act(a, out, act="leaky_relu", slope=slope, negative=weight)
    ops.scale_shift_act_grad(grad, slope, dx)
    leaf = a.clone().requires_grad_()
    expected = F.prelu(leaf, weight)
    assert torch.equal(out, expected)
    assert torch.equal(dx, torch.autograd.grad(expected, leaf, grad)[0])


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_end_of_the_line_is_torchs(device, act):
    """NaN and the infinities give what torch's functions give on the CPU, zeros keep their sign, derivatives are the limits."""
    a = torch.tensor([[*NOT_FINITE, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]], device=device).T.contiguous()
    out, slope = (torch.empty_like(a) for _ in range(2))
    negative = torch.tensor([0.25], device=device) if act == "leaky_relu" else None
    ops.scale_shift_act(a, out, act=act, slope=slope, negative=negative)
    out, slope, double = out.cpu(), slope.cpu(), a.double().cpu().requires_grad_()
    expected = TORCH[act](double)
    torch.testing.assert_close(out, expected.float(), rtol=4e-7, atol=0, equal_nan=True)
    zero = out == 0
    assert torch.equal(out.signbit()[zero], expected.signbit()[zero])
    (exact,) = torch.autograd.grad(expected.sum(), double)
    torch.testing.assert_close(slope[3:], exact.float()[3:], rtol=4e-7, atol=0)
    steep = {"sigmoid": 0, "hardsigmoid": 0, "relu6": 0, "tanh": 0}.get(act, 1)
    assert slope[1:3, 0].tolist() == [steep, 0.25 if act == "leaky_relu" else 0]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_fp32_is_as_close_to_fp64_as_the_module_says(act):
    v = torch.cat([torch.linspace(-30, 30, 100_001), torch.randn(100_001), torch.logspace(-30, 2, 10_001)])
    code, negative = ACTIVATIONS.index(act), torch.tensor([0.25]) if act == "leaky_relu" else None
    found = activated(v, code, negative)
    exact = activated(v.double(), code, None if negative is None else negative.double())
    exponent = {"gelu": v * v / 2, "gelu_tanh": 1.6 * v.abs() + 0.0713548 * v.abs() ** 3}.get(act, v.abs())
    off = 4e-7 + 2e-7 * torch.where((v < 0) | (act in ("sigmoid", "tanh")), exponent, 0).double()
    tiny = 2.0**-121 * (1 + v.abs().double())  # powers of e end at the normal numbers
    assert ((found[0] - exact[0]).abs() <= off * exact[0].abs() + tiny).all()
    # derivatives are sums of terms up to 2 in magnitude
    terms = exact[1].abs() if act in ("sigmoid", "tanh", "elu", "softplus") else exact[1].abs() + exact[0].abs().clamp(max=1)
    assert ((found[1] - exact[1]).abs() <= off * terms + tiny).all()


def test_more_than_one_thread(device):
    """Rows enough to be split; channels that do not divide a block."""
    a = channels_last(torch.randn(40, 24, 32, 32, device=device))
    out, slope, scale = torch.empty_like(a), torch.empty_like(a), torch.rand(24, device=device)
    ops.scale_shift_act(a, out, act="silu", slope=slope, scale=scale)
    leaf = a.double().requires_grad_()
    expected = F.silu(leaf * scale[:, None, None])
    torch.testing.assert_close(out, expected.float(), rtol=1e-6, atol=1e-6)
    dx = ops.scale_shift_act_grad(a, slope, torch.empty_like(a))
    torch.testing.assert_close(dx, torch.autograd.grad(expected, leaf, a.double())[0].float(), rtol=1e-5, atol=1e-6)


def test_unknown_activations_are_refused_by_name(device):
    a = torch.zeros(1, 1, device=device)
    with pytest.raises(RuntimeError, match=r"act='swish': give one of gelu, .*silu"):
        ops.scale_shift_act(a, a, act="swish")
    assert math.isclose(ops.scale_shift_act(a, a, act="sigmoid").item(), 0.5)
