"""LayerNorm: at most twice the error that eager PyTorch makes in the same dtype, with a floor of two roundings, for every number
of channels, layout, alignment and choice of arguments; autograd's gradient in fp64; NaN stays in its row.

The gradient is what is left of g after two of its components are taken away, and of a few channels nothing may be left. So its
floor is two roundings of the magnitudes of what is added up, as in test_pool_linear.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from spat_kernels import ops
from spat_kernels.ops.layer_norm import MAX_CHANNELS
from tests.ops.helpers import acc, bits_of, channels_last, image, reference, sentinels
from tests.ops.test_pool_linear import assert_as_good, in_fp64

CHANNELS = [1, 2, 3, 8, 10, 96, 100, 257, 384, 768, 1000, 1024, 1032, 2056, MAX_CHANNELS]
EPS = 1e-6
OPTIONAL = {
    "layer_norm": ("b", "weight", "bias", "total", "mean", "rstd"),
    "layer_norm_grad": ("grad2", "weight", "residual"),
}
USUAL = {"layer_norm": ("weight", "bias", "mean", "rstd"), "layer_norm_grad": ("weight",)}
IMAGES = ("a", "b", "total", "out", "grad", "grad2", "t", "residual", "dx")
RESULTS = {"layer_norm": ("total", "out", "mean", "rstd"), "layer_norm_grad": ("dx",)}


def samples(dtype):
    a, out, total = (channels_last(torch.randn(4, 64, 8, 8).to(dtype)) for _ in range(3))
    v, mean = torch.rand(64, dtype=acc(dtype)), torch.rand(256, dtype=acc(dtype))
    yield "layer_norm", (a, a + 1, v, v - 1, total, out, mean, mean + 1, EPS, 1)
    yield "layer_norm_grad", (a, a + 1, total, mean, mean + 1, v, out + 1, out, 1)
    a, mean = torch.randn(4, 5, 384).to(dtype), torch.rand(20, dtype=acc(dtype))
    yield "layer_norm", (a, None, None, None, None, a + 1, None, None, EPS, -1)
    yield "layer_norm_grad", (a, None, a + 1, mean, mean + 1, None, None, a + 2, -1)
    a, mean = torch.randn(3, 4096).to(dtype), torch.rand(3, dtype=acc(dtype))  # a block a row
    yield "layer_norm", (a, None, None, None, None, a + 1, mean, None, EPS, -1)
    yield "layer_norm_grad", (a, None, a + 1, mean, mean + 1, None, None, a + 2, -1)


def case(op, shape, n, dtype, device, given, offset=0, channels=-1):
    """Arguments of `op` on rows `shape` of n channels, by name, of which `given` of the optional ones are there, and a check of
    every rim. Weights are numbers of `dtype`, so that eager may have them in it."""
    rims, arguments = [], {}
    for argument in getattr(torch.ops.spat, op).default._schema.arguments:
        name = argument.name
        if name in OPTIONAL[op] and name not in given:
            arguments[name] = None
        elif name in ("eps", "channels"):
            arguments[name] = EPS if name == "eps" else channels
        else:
            if name in IMAGES:
                make = image if channels == 1 else (lambda s, c, *rest: sentinels((*s, c), *rest))
                t, intact = make(shape, n, dtype, device, offset)
            else:
                rows = torch.Size(shape).numel()
                t, intact = sentinels((rows if name in ("mean", "rstd") else n,), acc(dtype), device, offset)
            if name not in RESULTS[op]:
                t.copy_(torch.randn(t.shape).to(dtype))
            rims.append(intact)
            arguments[name] = t
    if op == "layer_norm_grad":
        t = as_rows(arguments["t"], channels).to(acc(dtype))
        arguments["mean"].copy_(t.mean(1))
        arguments["rstd"].copy_(((t - t.mean(1, keepdim=True)).square().mean(1) + EPS).rsqrt())
    return arguments, lambda: all(intact() for intact in rims)


def as_rows(t, channels):
    return t if t is None else (t.movedim(1, -1) if channels == 1 else t).flatten(0, -2)


def rows_of(arguments):
    """Every image as rows, and what is not an image as it is."""
    channels = arguments["channels"]
    return {name: as_rows(t, channels) if name in IMAGES else t for name, t in arguments.items()}


def cast(t, like):
    return t if t is None else t.to(like.dtype)


def eager_forward(a, b, weight, bias, **_):
    """Pass by pass, rounding between them."""
    t = a if b is None else a + b
    return t, F.layer_norm(t, t.shape[1:], cast(weight, t), cast(bias, t), EPS)


def eager_backward(grad, grad2, t, weight, residual, **_):
    leaf = t.clone().requires_grad_()
    out = F.layer_norm(leaf, t.shape[1:], cast(weight, t), None, EPS)
    (dx,) = torch.autograd.grad(out, leaf, grad if grad2 is None else grad + grad2)
    return dx if residual is None else dx + residual


def magnitudes(grad, grad2, t, weight, residual, mean, rstd, **_):
    """What a gradient's rounding errors are measured by, in fp64."""
    g = grad.abs() + (0 if grad2 is None else grad2.abs())
    g = g if weight is None else g * weight.abs()
    xhat = (t.abs() + mean[:, None].abs()) * rstd[:, None]
    terms = rstd[:, None] * (g + g.mean(1, keepdim=True) + xhat * (g * xhat).mean(1, keepdim=True))
    return terms if residual is None else terms + residual.abs()


def exactly(arguments):
    names = [name for name, t in arguments.items() if isinstance(t, torch.Tensor)]
    return arguments | dict(zip(names, in_fp64([arguments[name] for name in names]), strict=True))


def assert_statistics(t, mean, rstd, eps):
    """A row's deviations are up to 4, rounded by eps, and in one direction where values have few bits, as in 16-bit images."""
    var, size = t.var(1, correction=0) if t.shape[1] > 1 else torch.zeros_like(mean), t.abs().amax(1)
    torch.testing.assert_close(mean, t.mean(1), rtol=eps, atol=4 * eps)
    error = (rstd**-2 - EPS - var).abs()
    assert (error <= 8 * eps * (EPS + var + var.sqrt() * size)).all(), error


def rows_like(n):
    """Batches that leave threads of a block without a row, and that fill several blocks where rows are short."""
    return [(0,), (1,), (3, 7), (2, 3, 5)] if n < 300 else [(1,), (9,)] if n < 2000 else [(2,)]


@pytest.mark.parametrize("n", CHANNELS)
def test_results_are_as_good_as_eagers(impl, n):
    for dtype, shape, offset, channels in itertools.product(impl.dtypes, rows_like(n), impl.offsets, (-1, 1)):
        for given in (OPTIONAL["layer_norm"], USUAL["layer_norm"]):
            arguments, intact = case("layer_norm", shape, n, dtype, impl.device, given, offset, channels)
            impl("layer_norm")(*arguments.values())
            got, where = rows_of(arguments), (dtype, shape, offset, channels, given)
            exact_t, exact = eager_forward(**exactly(got))
            _, rival = eager_forward(**got)
            assert_as_good(got["out"], rival, exact, where)
            if got["total"] is not None:
                assert torch.equal(got["total"], got["a"] + got["b"]), where
            if exact_t.numel():
                assert_statistics(exact_t, got["mean"].double(), got["rstd"].double(), torch.finfo(acc(dtype)).eps)
            assert not got["out"].isnan().any(), where
            assert intact(), where


@pytest.mark.parametrize("n", CHANNELS)
def test_gradients_are_as_good_as_eagers(impl, n):
    for dtype, shape, offset, channels in itertools.product(impl.dtypes, rows_like(n), impl.offsets, (-1, 1)):
        for given in (OPTIONAL["layer_norm_grad"], USUAL["layer_norm_grad"]):
            arguments, intact = case("layer_norm_grad", shape, n, dtype, impl.device, given, offset, channels)
            impl("layer_norm_grad")(*arguments.values())
            got, where = rows_of(arguments), (dtype, shape, offset, channels, given)
            exact, terms = eager_backward(**exactly(got)), magnitudes(**exactly(got))
            assert_as_good(got["dx"], eager_backward(**got), exact, where, terms)
            assert not got["dx"].isnan().any(), where
            assert intact(), where


@pytest.mark.parametrize("n", [10, 64])
@pytest.mark.parametrize("op", OPTIONAL)
def test_every_choice_of_arguments(impl, op, n):
    for dtype, chosen in itertools.product(impl.dtypes, itertools.product((0, 1), repeat=len(OPTIONAL[op]))):
        given = set(itertools.compress(OPTIONAL[op], chosen))
        arguments, intact = case(op, (3, 7), n, dtype, impl.device, given)
        expected = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
        before = {name: t for name, t in expected.items() if isinstance(t, torch.Tensor) and name not in RESULTS[op]}
        before = {name: t.clone() for name, t in before.items()}
        reference(op)(*expected.values())
        impl(op)(*arguments.values())
        ulp = 8 * torch.finfo(dtype).eps  # one rounding to either side of values below 8, and sums in another order
        for name in RESULTS[op]:
            if arguments[name] is not None:
                torch.testing.assert_close(arguments[name], expected[name], rtol=ulp, atol=ulp)
        assert all(torch.equal(arguments[name], t) for name, t in before.items()), "inputs stay"
        assert intact(), (dtype, given)


@pytest.mark.parametrize("n", [3, 20, 96, 1600])
@pytest.mark.parametrize(
    ("op", "places"),
    [
        ("layer_norm", {"out": ("a", "b"), "total": ("a", "b")}),
        ("layer_norm_grad", {"dx": ("grad", "grad2", "t", "residual")}),
    ],
)
def test_results_may_take_the_place_of_inputs(impl, op, places, n):
    for dtype, (result, inputs) in itertools.product(impl.dtypes, places.items()):
        for place in inputs:
            arguments, _ = case(op, (2,) if n > 1000 else (3, 7), n, dtype, impl.device, OPTIONAL[op])
            apart = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
            arguments[result] = arguments[place]
            for given in (arguments, apart):
                impl(op)(*given.values())
            for name in RESULTS[op]:
                assert torch.equal(bits_of(arguments[name]), bits_of(apart[name])), (dtype, result, place, name)


@pytest.mark.parametrize("n", [5, 96, 100, 1032])
def test_a_row_is_the_same_in_every_batch(impl, n):
    """To the bit, by itself and for any number of threads."""
    for op, dtype in itertools.product(OPTIONAL, impl.dtypes):
        arguments, _ = case(op, (19,), n, dtype, impl.device, OPTIONAL[op])
        impl(op)(*arguments.values())
        for i in (0, 7, 18):
            per_row = {*IMAGES, "mean", "rstd"}
            alone = {name: t[i : i + 1].clone() if name in per_row else t for name, t in arguments.items()}
            for name in RESULTS[op]:
                alone[name].fill_(torch.nan)
            impl(op)(*alone.values())
            for name in RESULTS[op]:
                assert torch.equal(alone[name][0], arguments[name][i]), (op, dtype, name, i)


@pytest.mark.parametrize("op", OPTIONAL)
def test_threads_change_nothing(op):
    arguments, _ = case(op, (4000,), 96, torch.float32, "cpu", OPTIONAL[op])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            getattr(torch.ops.spat, op)(*arguments.values())
            results.append([arguments[name].clone() for name in RESULTS[op]])
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("n", [3, 16, 100, 1600])
def test_not_finite_stays_in_its_row(impl, n):
    for dtype, bad in itertools.product(impl.dtypes, (torch.nan, torch.inf, -torch.inf)[: 3 if n < 1000 else 2]):
        clean, _ = case("layer_norm", (9,), n, dtype, impl.device, OPTIONAL["layer_norm"])
        impl("layer_norm")(*clean.values())
        arguments = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in clean.items()}
        arguments["a"][2, n - 1] = arguments["b"][8, 0] = bad
        impl("layer_norm")(*arguments.values())
        _, expected = eager_forward(**rows_of(arguments))
        assert torch.equal(arguments["out"].isnan(), expected.isnan())
        assert arguments["out"][[2, 8]].isnan().all()
        good = [i for i in range(9) if i not in (2, 8)]
        assert all(torch.equal(arguments[name][good], clean[name][good]) for name in RESULTS["layer_norm"])

        clean, _ = case("layer_norm_grad", (9,), n, dtype, impl.device, ("weight",))
        impl("layer_norm_grad")(*clean.values())
        for name, rows in (("grad", [2, 8]), ("t", [0, 5])):
            arguments = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in clean.items()}
            arguments[name][rows[0], 0] = arguments[name][rows[1], n - 1] = bad
            impl("layer_norm_grad")(*arguments.values())
            assert not arguments["dx"][rows].isfinite().any(), (dtype, bad, name)
            good = [i for i in range(9) if i not in rows]
            assert torch.equal(arguments["dx"][good], clean["dx"][good])


@pytest.mark.parametrize("n", [7, 96, 1000, 2056])
def test_a_large_mean_costs_no_digits(impl, n):
    """Rows far from 0: the difference of two means of squares would have no digit left. Constant rows give the bias."""
    a = torch.randn(6, n, device=impl.device) + 3000
    a[3:] = torch.tensor([[0.1], [3.0], [-12345.678]], device=impl.device)
    bias, out, mean, rstd = torch.randn(n, device=impl.device), torch.empty_like(a), a.new_empty(6), a.new_empty(6)
    impl("layer_norm")(a, None, None, bias, None, out, mean, rstd, 1e-5, -1)
    exact = F.layer_norm(a.double(), (n,), None, bias.double(), 1e-5)
    # the mean is rounded to half of its ulp, 2^-13, and deviations are about 1
    torch.testing.assert_close(out[:3].double(), exact[:3], rtol=0, atol=2**-12)
    torch.testing.assert_close(rstd[:3].double(), (a[:3].double().var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert torch.equal(mean[3:], a[3:, 0])
    torch.testing.assert_close(out[3:], bias.expand(3, n), rtol=1e-6, atol=1e-6)  # where the correction is not rounded, equal


@pytest.mark.parametrize(("shape", "channels"), [((2, 12, 3, 5), 1), ((2, 7, 12), -1), ((2, 3, 4, 33), -1)])
def test_gradient_is_autograds(device, shape, channels):
    """A residual block's in fp64: layer_norm(total) with total = a + b, whose gradient arrives by both ways."""
    a, b, g_out, g_out2, g_total = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(5))
    if channels == 1:
        a, b, g_out, g_out2, g_total = map(channels_last, (a, b, g_out, g_out2, g_total))
    n = shape[channels]
    weight, bias = (torch.randn(n, dtype=torch.float64, device=device) for _ in range(2))
    mean, rstd = (a.new_empty(a.numel() // n) for _ in range(2))
    out, total, dx = (torch.empty_like(a) for _ in range(3))
    keep = {"mean": mean, "rstd": rstd, "channels": channels}
    assert ops.layer_norm(a, out, b=b, weight=weight, bias=bias, total=total, eps=EPS, **keep) is out
    ops.layer_norm_grad(g_out, total, mean, rstd, dx, weight=weight, grad2=g_out2, residual=g_total, channels=channels)

    leaf = a.clone().requires_grad_()
    t = leaf + b
    expected = F.layer_norm(t.movedim(channels, -1), (n,), weight, bias, EPS).movedim(-1, channels)
    (exact,) = torch.autograd.grad([expected, t], leaf, [g_out + g_out2, g_total])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(dx, exact, rtol=1e-10, atol=1e-13)
    assert torch.equal(total, t)


def test_layouts_are_asked_for():
    """A contiguous [B, C, H, W] has its channels elsewhere, and so has a channels_last image for channels=-1."""
    a = torch.randn(2, 4, 3, 5)
    with pytest.raises(RuntimeError, match="a must be .*channels innermost"):
        ops.layer_norm(a, torch.empty_like(a), eps=EPS, channels=1)
    with pytest.raises(RuntimeError, match=r"a must be contiguous.*channels=1 takes channels_last"):
        ops.layer_norm(channels_last(a), torch.empty_like(a), eps=EPS)
