"""Our convolutions for Hopper: on a Hopper, or on the CPU in the process that tests/test_cuda_on_cpu.py starts.

Sums of small whole numbers are exact in any order, so results are compared bit for bit. Random values are held to judge.py.
"""

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from torch import nn

import spat_kernels as sk
from spat_kernels.fused_conv.hopper import Hopper, _in_rows, conv_scale_shift_relu, conv_scale_shift_relu_grad, turned
from spat_kernels.fused_conv.judge import Judge
from spat_kernels.fused_conv.recipe import Epilogue, Recipe
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.ops.scale_shift_relu import as_rows, pack_bits, unpack_bits
from spat_train.models.registry import create
from tests.fused_conv.engines import EVERYTHING, FORWARD, GRADIENT, chooser, installed, tensors_for
from tests.input_gradient.models import EPS, images, logits_and_gradient, planned, randomized
from tests.ops.helpers import bits_of, channels_last, image, mask_like, sentinels

CPU = torch.device("cpu")
ON_CPU = torch._C._dispatch_has_kernel_for_dispatch_key("spat::conv_scale_shift_relu", "CPU")
TILES = (64, 128, 160)
HALVES = (torch.bfloat16, torch.float16)


def is_hopper() -> bool:
    return torch.cuda.is_available() and Hopper().runs_on(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "emulated" and not ON_CPU:
        pytest.skip("runs in tests/test_cuda_on_cpu.py")
    if request.param == "cuda" and not is_hopper():
        pytest.skip("needs a Hopper, and an installation with CUDA code")
    return "cpu" if request.param == "emulated" else "cuda"


def conv(n, c, size, k, kernel, stride=1, padding=(0, 0), dtype=torch.bfloat16, way="forward", epilogue=None) -> Recipe:
    output = tuple((s + 2 * p - r) // stride + 1 for s, p, r in zip(size, padding, kernel, strict=True))
    return Recipe(way, dtype, n, (c, *size), (k, *output), kernel, (stride, stride), padding, epilogue=epilogue)


GEOMETRIES = [
    conv(2, 160, (9, 9), 40, (1, 1)),
    conv(3, 96, (7, 11), 136, (3, 3), padding=(1, 1)),  # a partial last tile
    conv(2, 8, (9, 11), 24, (5, 3), padding=(2, 1)),
    conv(1, 72, (10, 9), 24, (5, 3), padding=(1, 0)),
    conv(2, 32, (6, 7), 40, (2, 4), padding=(1, 3)),
    conv(13, 72, (5, 7), 328, (3, 3), 2, (1, 1)),  # here and below, tiles begin within an image
    conv(5, 32, (9, 13), 136, (1, 1), 2),
    conv(2, 96, (13, 8), 40, (5, 3), 2, (2, 1)),
    conv(1, 8, (17, 19), 24, (3, 3), 3, (2, 2)),
    conv(1, 16, (20, 20), 16, (3, 3), 8, (1, 1)),
]
IN_ROWS = [
    conv(1, 96, (16, 16), 136, (3, 3), padding=(1, 1)),
    conv(3, 32, (8, 8), 40, (3, 3), padding=(1, 1)),  # two images a tile, and an odd one
    conv(3, 72, (8, 8), 40, (5, 3), padding=(2, 1)),
    conv(1, 160, (8, 8), 24, (1, 1)),
    conv(3, 8, (4, 16), 24, (3, 3), padding=(1, 1)),
    conv(1, 8, (32, 32), 24, (3, 3), padding=(1, 1)),
    conv(2, 72, (2, 64), 40, (1, 3), padding=(0, 1)),
    conv(2, 136, (16, 8), 72, (3, 1), padding=(1, 0)),
]


def in_turns(recipes: list[Recipe]) -> list[Recipe]:
    """Of one dtype and the other, whose pixels lie in the same places and whose formulas are the same."""
    return [replace(recipe, dtype=dtype) for recipe, dtype in zip(recipes, cycle(HALVES), strict=False)]


def name_of(value) -> str | None:
    return str(value).removeprefix("forward ") if isinstance(value, Recipe) else None


def whole(shape, dtype, device, most=2):
    """Whole numbers from -most to most, channels_last."""
    return channels_last(torch.randint(-most, most + 1, shape, device=device).to(dtype))


def operands(recipe: Recipe, device):
    """Whole numbers. Images lie between NaN, which would show in what reads them."""
    read = recipe.input if recipe.way == "forward" else recipe.output
    x, _ = sentinels((recipe.batch, *read), recipe.dtype, device, channels_last=True, rim=torch.nan)
    x.copy_(whole(x.shape, x.dtype, device))
    return x, whole((recipe.output[0], recipe.input[0], *recipe.kernel), recipe.dtype, device, 1)


def convolved(recipe: Recipe, x, weight):
    """In fp64 on the CPU, by PyTorch: exact for whole numbers."""
    x, weight = x.cpu().double(), weight.cpu().double()
    if recipe.way == "forward":
        y = torch.conv2d(x, weight, None, recipe.stride, recipe.padding)
    else:
        y = nn.grad.conv2d_input((recipe.batch, *recipe.input), weight, x, recipe.stride, recipe.padding)
    assert y.abs().max() < 2**24
    return y.float()


def results(recipe: Recipe, device):
    """(out, total, mask) and whether nothing was written around them."""
    batch, channels, *size = recipe.result
    (out, *rims), (total, *more) = (image((batch, *size), channels, recipe.dtype, device) for _ in range(2))
    mask, last = mask_like(out)
    return (out, total, mask), lambda: all(rim() for rim in (*rims, *more, last))


def relu(v):
    return v.masked_fill(v <= 0, 0)  # -0, too


def assert_same(found, expected):
    assert torch.equal(bits_of(found.cpu()), bits_of(expected)), (found.cpu().float() - expected.float()).abs().max()


def tilings(recipe: Recipe):
    return [{"tile": tile, "rows": rows} for tile in TILES for rows in (False, True)[: 1 + _in_rows(recipe)]]


# ---- the convolution


@pytest.mark.parametrize("recipe", in_turns([*GEOMETRIES, *IN_ROWS]), ids=name_of)
def test_the_convolution_is_exact(device, recipe):
    assert _in_rows(recipe) == (replace(recipe, dtype=torch.bfloat16) in IN_ROWS)
    x, weight = operands(recipe, device)
    y = convolved(recipe, x, weight)
    for tiling in tilings(recipe):
        (out, total, mask), intact = results(recipe, device)
        conv_scale_shift_relu(
            x, weight, out, stride=recipe.stride[0], padding=recipe.padding, total=total, mask=mask, **tiling
        )  # fmt: skip
        assert_same(total, y.to(recipe.dtype))
        assert_same(out, relu(y).to(recipe.dtype))
        assert torch.equal(mask.cpu(), pack_bits(as_rows(y) > 0)), tiling
        assert intact(), tiling


@pytest.mark.parametrize("recipe", [r for r in [*GEOMETRIES, *IN_ROWS] if r.stride == (1, 1)], ids=name_of)
def test_its_gradient_is_exact(device, recipe):
    recipe = replace(recipe, way="gradient")
    grad, weight = operands(recipe, device)
    g = convolved(recipe, grad, weight)
    for tiling in tilings(recipe):
        (dx, _, _), intact = results(recipe, device)
        conv_scale_shift_relu_grad(grad, turned(weight), dx, padding=recipe.padding, **tiling)
        assert_same(dx, g.to(recipe.dtype))
        assert intact(), tiling


@pytest.mark.parametrize("recipe", [r for r in GEOMETRIES if r.stride == (1, 1)], ids=name_of)
def test_turned_weights_give_the_gradient(recipe):
    x, weight = operands(replace(recipe, way="gradient"), "cpu")
    inner = [k - 1 - p for k, p in zip(recipe.kernel, recipe.padding, strict=True)]
    found = turned(weight)
    assert found.is_contiguous(memory_format=torch.channels_last)
    found = torch.conv2d(x.double(), found.double(), None, padding=inner)
    assert torch.equal(found.float(), convolved(replace(recipe, way="gradient"), x, weight))


def test_an_empty_batch_does_nothing(device):
    x, weight = (
        channels_last(torch.empty(0, 8, 8, 8, dtype=torch.bfloat16, device=device)),
        whole((16, 8, 3, 3), torch.bfloat16, device),
    )
    out, mask = channels_last(x.new_empty(0, 16, 8, 8)), x.new_empty(0, 2, dtype=torch.uint8)
    for rows in (False, True):
        conv_scale_shift_relu(x, weight, out, padding=(1, 1), mask=mask, rows=rows)
        conv_scale_shift_relu_grad(out, turned(weight), x, padding=(1, 1), rows=rows)


# ---- the passes


SMALL = [conv(3, 16, (8, 8), 40, (1, 1)), conv(1, 32, (5, 9), 176, (1, 1))]


def subsets(recipe: Recipe, *names):
    """Which tensors to use, and two tilings for each, in turn."""
    tilings_ = cycle(tilings(recipe))
    for used in product((False, True), repeat=len(names)):
        for tiling in (next(tilings_), next(tilings_)):
            yield dict(zip(names, used, strict=True)), tiling


@pytest.mark.parametrize("recipe", in_turns(SMALL), ids=name_of)
def test_every_pass_forward(device, recipe):
    """Each tensor absent and present: the formula in fp32, in its order, with one rounding at the end."""
    dtype = recipe.dtype
    x, weight = operands(recipe, device)
    y, channels = convolved(recipe, x, weight), recipe.output[0]
    given = {"b": whole(recipe.result, dtype, device), "scale": torch.randn(channels, device=device)}
    given["shift"] = torch.randn(channels, device=device)
    for use, tiling in subsets(recipe, "b", "scale", "shift", "total", "relu", "mask"):
        if use["mask"] and not use["relu"]:
            continue
        tensors = {name: t for name, t in given.items() if use[name]}
        b, scale, shift = (tensors[name].cpu().float() if use[name] else None for name in given)
        v = sum_ = y if b is None else y + b
        v = v if scale is None else v * scale.view(-1, 1, 1)
        v = v if shift is None else v + shift.view(-1, 1, 1)
        (out, total, mask), intact = results(recipe, device)
        written = {name: t for name, t in (("total", total), ("mask", mask)) if use[name]}
        conv_scale_shift_relu(x, weight, out, relu=use["relu"], **tensors, **written, **tiling)
        assert_same(out, (relu(v) if use["relu"] else v).to(dtype))
        assert_same(total, sum_.to(dtype) if use["total"] else torch.full_like(sum_, torch.nan, dtype=dtype))
        assert torch.equal(mask.cpu(), pack_bits(as_rows(v) > 0) if use["mask"] else torch.full_like(mask.cpu(), 0xA5))
        assert intact(), (use, tiling)


@pytest.mark.parametrize("recipe", in_turns(SMALL), ids=name_of)
def test_every_pass_backward(device, recipe):
    recipe, dtype = replace(recipe, way="gradient"), recipe.dtype
    grad, weight = operands(recipe, device)
    g, (batch, channels, *size) = convolved(recipe, grad, weight), recipe.result
    bits = torch.rand(batch * size[0] * size[1], channels) < 0.5
    given = {"grad2": whole(recipe.result, dtype, device), "scale": torch.randn(channels, device=device)}
    given |= {"mask": pack_bits(bits).to(device), "residual": whole(recipe.result, dtype, device)}
    keep = bits.view(batch, *size, channels).movedim(-1, 1)
    for use, tiling in subsets(recipe, "grad2", "scale", "mask", "residual"):
        tensors = {name: t for name, t in given.items() if use[name]}
        v = g + tensors["grad2"].cpu().float() if use["grad2"] else g
        v = v * tensors["scale"].cpu().view(-1, 1, 1) if use["scale"] else v
        v = v.where(keep, torch.zeros(())) if use["mask"] else v
        v = v + tensors["residual"].cpu().float() if use["residual"] else v
        (dx, _, _), intact = results(recipe, device)
        conv_scale_shift_relu_grad(grad, turned(weight), dx, **tensors, **tiling)
        assert_same(dx, v.to(dtype))
        assert intact(), (use, tiling)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_masked_out_is_exact(device, value):
    """0 or the residual, whatever the convolution gives."""
    recipe = replace(SMALL[0], way="gradient")
    grad, weight = operands(recipe, device)
    weight[:, ::3] = value
    batch, channels, *size = recipe.result
    bits = torch.rand(batch * size[0] * size[1], channels) < 0.5
    off = ~bits.view(batch, *size, channels).movedim(-1, 1)
    residual, scale = whole(recipe.result, recipe.dtype, device), torch.randn(channels, device=device)
    for tiling in tilings(recipe):
        for tensors in ({}, {"residual": residual}, {"residual": residual, "scale": scale, "grad2": residual}):
            (dx, _, _), intact = results(recipe, device)
            mask = pack_bits(bits).to(device)
            conv_scale_shift_relu_grad(grad, turned(weight), dx, padding=recipe.padding, mask=mask, **tensors, **tiling)
            expected = tensors.get("residual", torch.zeros_like(residual)).cpu()
            assert torch.equal(dx.cpu()[off], expected[off])
            assert not dx.cpu()[:, ::3][~off[:, ::3]].isfinite().all()
            assert dx.cpu()[:, 1::3].isfinite().all()
            assert intact()


def test_nan_passes_the_relu(device):
    """With its bit set, as every value that is not <= 0."""
    recipe = SMALL[0]
    x, weight = operands(recipe, device)
    weight.fill_(0)
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        weight[channel, :2] = value  # inf - inf is NaN, too
    x[:, :2] = 1
    x[0, 1, 2, 3] = -1
    shift = torch.zeros(recipe.output[0], device=device)
    shift[4:7] = torch.tensor([0.0, -0.0, 1e-45])
    for tiling in tilings(recipe):
        (out, total, mask), intact = results(recipe, device)
        conv_scale_shift_relu(x, weight, out, shift=shift, total=total, mask=mask, **tiling)
        bits = unpack_bits(mask.cpu(), recipe.output[0]).view(recipe.batch, *recipe.output[1:], -1).movedim(-1, 1)
        found = out.cpu()
        assert found[:, 0].isnan().all()
        assert bits[:, 0].all()
        lost = torch.zeros_like(bits[:, 0])
        lost[0, 2, 3] = True
        for channel, (other, bit) in {1: (torch.inf, True), 2: (0.0, False)}.items():
            assert torch.equal(found[:, channel].isnan(), lost)
            assert (found[:, channel][~lost] == other).all()
            assert torch.equal(bits[:, channel], lost | bit)
        assert (found[:, 3:] == 0).all()
        assert not bits[:, 3:6].any()
        assert bits[:, 6].all(), "denormal numbers count"
        assert intact()


def engine_recipes():
    for i, recipe in enumerate([*GEOMETRIES, *IN_ROWS]):
        recipe = replace(recipe, dtype=HALVES[i % 2])
        yield replace(recipe, epilogue=EVERYTHING)
        if recipe.stride == (1, 1):
            yield replace(recipe, way="gradient", epilogue=GRADIENT[2])
    for recipe in (GEOMETRIES[2], IN_ROWS[1]):
        yield from (replace(recipe, epilogue=epilogue) for epilogue in FORWARD)
        yield from (replace(recipe, way="gradient", epilogue=epilogue) for epilogue in GRADIENT)


@pytest.mark.parametrize("recipe", [*dict.fromkeys(engine_recipes())], ids=str)
def test_the_engine_is_right(device, recipe):
    x, weight, tensors = tensors_for(recipe)
    x, weight, tensors = x.to(device), weight.to(device), {name: t.to(device) for name, t in tensors.items()}
    engine, judge = Hopper(), Judge(recipe, x, weight, tensors)
    variants = engine.variants(recipe, x.device)
    assert variants
    assert not judge.unfit
    prepared = engine.prepare_weight(recipe, weight)
    prepared = weight if prepared is None else prepared
    for variant in variants:
        problem = judge.problem(lambda results: engine.run(variant, recipe, x, prepared, **results, **tensors))  # noqa: B023
        assert not problem, (variant, problem)


# ---- what is refused


ALIGNED = "must begin at a multiple of 16 bytes"
SHAPES = {"x": (2, 8, 9, 8), "weight": (16, 8, 3, 3), "out": (2, 16, 9, 8)}


def arguments(device, **shapes):
    shapes = SHAPES | shapes
    return {name: channels_last(torch.zeros(shape, dtype=torch.bfloat16, device=device)) for name, shape in shapes.items()}


def moved(t):
    """As `t`, two bytes off alignment."""
    found, _ = sentinels(t.shape, t.dtype, t.device, 1, channels_last=t.ndim == 4)
    return found


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: {name: t.float() for name, t in a.items()}, "x must be float16 or bfloat16"),
    (lambda a: {"weight": a["weight"].half()}, "weight has the wrong dtype"),
    (lambda a: {"out": a["out"].half()}, "out has the wrong dtype"),
    *[(lambda a, name=name: {name: moved(a[name])}, f"{name} {ALIGNED}") for name in SHAPES],
    *[(lambda a, name=name: {name: a[name].contiguous()}, f"{name} must be channels_last") for name in SHAPES],
    *[(lambda a, name=name: {name: a[name][0]}, f"{name} must be channels_last") for name in SHAPES],
    (lambda a: arguments(a["x"].device, x=(2, 12, 9, 8), weight=(16, 12, 3, 3)), "x must be .* multiple of 8 channels"),
    (lambda a: arguments(a["x"].device, weight=(12, 8, 3, 3), out=(2, 12, 9, 8)), "out must be .* multiple of 8 channels"),
    (lambda a: arguments(a["x"].device, x=(2, 0, 9, 8)), "x must be .* multiple of 8 channels"),
    (lambda a: arguments(a["x"].device, weight=(16, 16, 3, 3)), r"weight must be \[K, 8, R, S\]"),
    (lambda a: arguments(a["x"].device, out=(2, 16, 9, 9)), r"out must be \[2, 16, 9, 8\]"),
    (lambda a: arguments(a["x"].device, out=(3, 16, 9, 8)), r"out must be \[2, 16, 9, 8\]"),
    (lambda a: arguments(a["x"].device, out=(2, 24, 9, 8)), r"out must be \[2, 16, 9, 8\]"),
    (lambda a: {"stride": 0}, "stride must be 1 to 8"),
    (lambda a: {"stride": 9}, "stride must be 1 to 8"),
    (lambda a: {"padding": (3, 1)}, "padding less than the kernel"),
    (lambda a: {"padding": (1, 3)}, "padding less than the kernel"),
    (lambda a: {"padding": (-1, 1)}, "padding less than the kernel"),
    (lambda a: arguments(a["x"].device, weight=(16, 8, 65, 3)), "at most 64 by 64"),
    (lambda a: arguments(a["x"].device, weight=(16, 8, 3, 65)), "at most 64 by 64"),
    (lambda a: arguments(a["x"].device, weight=(16, 8, 3, 0)), "padding less than the kernel"),
    (lambda a: arguments(a["x"].device, weight=(16, 8, 12, 3)), "weight is larger than x"),
    (lambda a: arguments(a["x"].device, weight=(16, 8, 3, 11)), "weight is larger than x"),
    (lambda a: {"tile": 96}, "tile must be 64, 128 or 160, got 96"),
    (lambda a: {"rows": True}, "rows needs stride 1, .* whole rows"),  # 72 pixels
    (lambda a: {"b": a["out"][:, :8]}, "b must have the shape of out"),
    (lambda a: {"b": a["x"].half()}, "b has the wrong dtype"),
    (lambda a: {"b": a["out"].contiguous()}, "b must be .* channels innermost"),
    (lambda a: {"total": a["x"]}, "total must have the shape of out"),
    (lambda a: {"scale": torch.ones(8, device=a["x"].device)}, r"scale must be contiguous \[16\]"),
    (lambda a: {"shift": torch.ones(16, device=a["x"].device).half()}, "shift has the wrong dtype"),
    (lambda a: {"mask": torch.ones(144, 3, dtype=torch.uint8, device=a["x"].device)}, r"mask must be contiguous \[144, 2\]"),
    (lambda a: {"mask": torch.ones(144, 2, dtype=torch.uint8, device=a["x"].device), "relu": False}, "mask goes with relu"),
    *[(lambda a, name=name: {name: moved(a["out"])}, f"every tensor but mask {ALIGNED}") for name in ("b", "total")],
    *[
        (lambda a, name=name: {name: moved(torch.ones(16, device=a["x"].device))}, f"every tensor but mask {ALIGNED}")
        for name in ("scale", "shift")
    ],
])  # fmt: skip
def test_what_does_not_fit_is_refused(device, change, message):
    given = {"padding": (1, 1), **arguments(device)}
    conv_scale_shift_relu(**given)
    given |= change(arguments(device))
    given["out"] = given["out"].fill_(7)
    with pytest.raises(RuntimeError, match=message):
        conv_scale_shift_relu(**given)
    assert (given["out"] == 7).all()


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: {"grad2": a["out"]}, "grad2 must have the shape of out"),
    (lambda a: {"residual": a["out"]}, "residual must have the shape of out"),
    (lambda a: {"residual": a["x"].half()}, "residual has the wrong dtype"),
    (lambda a: {"scale": torch.ones(16, device=a["x"].device)}, r"scale must be contiguous \[8\]"),
    (lambda a: {"mask": torch.ones(144, 2, dtype=torch.uint8, device=a["x"].device)}, r"mask must be contiguous \[144, 1\]"),
    *[(lambda a, name=name: {name: moved(a["x"])}, f"every tensor but mask {ALIGNED}") for name in ("grad2", "residual")],
    (lambda a: {"scale": moved(torch.ones(8, device=a["x"].device))}, f"every tensor but mask {ALIGNED}"),
    (lambda a: {"rows": True}, "rows needs stride 1"),
    (lambda a: {"tile": 0}, "tile must be 64, 128 or 160, got 0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_backward(device, change, message):
    a = arguments(device)
    given = {"grad": a["out"], "turned_weight": turned(a["weight"]), "dx": a["x"], "padding": (1, 1)}
    conv_scale_shift_relu_grad(**given)
    with pytest.raises(RuntimeError, match=message):
        conv_scale_shift_relu_grad(**given | change(arguments(device)))


@pytest.mark.gpu
def test_other_devices_are_refused():
    if not is_hopper():
        pytest.skip("needs a Hopper, and an installation with CUDA code")
    for name in SHAPES:
        given = arguments("cuda")
        given[name] = given[name].cpu()
        with pytest.raises((RuntimeError, NotImplementedError), match="device|CPU"):
            conv_scale_shift_relu(**given, padding=(1, 1))


def test_rows_are_taken_where_the_engine_says_so(device):
    """`variants` and the op agree on which images tiles of whole rows are for."""
    sizes = [*product((1, 2, 4, 8, 12, 16, 24, 32), repeat=2), (2, 64), (3, 64), (64, 64), (1, 128), (4, 40)]
    kernels = [(1, 1), (3, 3), (3, 1), (1, 3), (5, 3), (7, 1), (2, 2)]
    cases = [(size, kernel, stride, tuple(k // 2 for k in kernel)) for size, kernel, stride in product(sizes, kernels, (1, 2))]
    cases += [((8, 8), (8, 8), 2, (7, 7))]  # as large as its result, but not of stride 1
    assert {_in_rows(conv(1, 8, size, 8, *rest)) for size, *rest in cases} == {False, True}
    for size, kernel, stride, padding in cases:
        recipe = conv(1, 8, size, 8, kernel, stride, padding)
        x, weight = torch.zeros(1, 8, *size), torch.zeros(8, 8, *kernel)
        x, weight, out = (channels_last(t.bfloat16().to(device)) for t in (x, weight, torch.zeros(recipe.result)))
        call = {"stride": stride, "padding": padding, "tile": 64, "rows": True}
        if _in_rows(recipe):
            conv_scale_shift_relu(x[:0], weight, out[:0], **call)
        else:
            with pytest.raises(RuntimeError, match="rows needs stride 1"):
                conv_scale_shift_relu(x[:0], weight, out[:0], **call)


# ---- the engine


def recipes_of(name: str, size: int, dtype=torch.bfloat16) -> list[Recipe]:
    """Of the convolutions of a network, forward and backward."""
    found = []

    def note(module: nn.Conv2d, inputs, output):
        input_, pass_ = inputs[0].shape, Epilogue(("shift",), ("mask",), True)
        sizes = tuple(input_[1:]), tuple(output.shape[1:]), module.kernel_size, module.stride, module.padding
        found.append(Recipe("forward", dtype, 64, *sizes, groups=module.groups, bias=module.bias is not None, epilogue=pass_))
        found.append(Recipe("gradient", dtype, 64, *sizes, groups=module.groups, epilogue=Epilogue(("mask", "scale"))))

    with torch.device("meta"):
        model = create(name).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, size, size))
    return found


@pytest.mark.parametrize(("name", "size"), [("wrn-34-10", 32), ("preactresnet-18", 32), ("resnet-18", 224), ("resnet-50", 224)])
@pytest.mark.parametrize("dtype", HALVES)
def test_it_does_the_convolutions_of_networks(name, size, dtype):
    """All but the first, of three channels, and gradients of stride 2."""
    if name.startswith("resnet"):
        pytest.importorskip("torchvision")
    found = recipes_of(name, size, dtype)
    assert len(found) > 35
    for recipe in found:
        does = recipe.input[0] != 3 and (recipe.way == "forward" or recipe.stride == (1, 1))
        variants = Hopper().variants(recipe, CPU)
        assert bool(variants) == does, str(recipe)
        assert len({*variants}) == len(variants)
        assert any("rows" in variant for variant in variants) == (does and _in_rows(recipe))


def test_the_tiles_of_wide_resnets():
    """160 columns fit their channels, and tiles that do as few are tried, too."""
    base = conv(64, 160, (32, 32), 160, (3, 3), padding=(1, 1))
    for way in ("forward", "gradient"):
        assert Hopper().variants(replace(base, way=way), CPU) == ["tile 160", "tile 64", "tile 160 rows", "tile 64 rows"]
    strided = replace(base, output=(320, 16, 16), stride=(2, 2))
    assert Hopper().variants(strided, CPU) == ["tile 160", "tile 128", "tile 64"]
    assert Hopper().variants(replace(base, output=(64, 32, 32)), CPU) == ["tile 64", "tile 64 rows"]


def test_it_does_nothing_else():
    base = conv(64, 64, (16, 16), 64, (3, 3), padding=(1, 1))
    assert Hopper().variants(base, CPU)
    others = [
        {"dtype": torch.float32}, {"dtype": torch.float32, "tf32": True}, {"dtype": torch.float64}, {"groups": 2}, {"bias": True},
        {"dilation": (2, 2)}, {"layout": torch.contiguous_format}, {"input": (12, 16, 16)}, {"output": (12, 16, 16)},
        {"stride": (1, 2)}, {"stride": (9, 9)}, {"padding": (3, 1)}, {"kernel": (3, 65)}, {"way": "gradient", "stride": (2, 2)},
    ]  # fmt: skip
    for change in others:
        assert not Hopper().variants(replace(base, **change), CPU), change
    assert not Hopper().runs_on(CPU)
    for batch in (1, 65, 128):
        assert Hopper().variants(replace(base, batch=batch), CPU) == Hopper().variants(base, CPU), "batches share decisions"


class Counting:
    """A timer that takes no time: every engine is faster than `apart`, which comes first, and the first variant the fastest."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function) -> float:
        function()
        self.calls += 1
        return 1 - 1 / (1 + self.calls)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_networks_are_right(device, precision):
    """Logits and gradient are at most as far from fp64 as those of fuse=False, twice over, and a rounding."""
    torch.manual_seed(0)
    model, x = randomized(create("wrn-10-1"), torch.float32).to(device), images(2, 16, torch.float32).to(device)
    dlogits = torch.randn(2, 10, device=device)
    exact = logits_and_gradient(planned(model.double(), x.double()), x.double(), dlogits.double())
    model.float()
    timer = Counting()
    with installed(chooser(Hopper(), timer=timer)), torch.no_grad():
        ways = {fuse: input_gradient(model, x, "plan", precision, fuse=fuse) for fuse in (False, True)}
        found = {}
        for fuse, gradient in ways.items():
            gradient.prepare()
            found[fuse] = logits_and_gradient(gradient, x, dlogits)
            assert bool(timer.calls) == fuse
    unit = torch.finfo(torch.bfloat16 if precision == "bf16" else torch.float16).eps / 2
    for apart_, ours, right in zip(found[False], found[True], exact, strict=True):
        limit = 2 * (apart_ - right).norm() + unit * right.norm()
        assert (ours - right).norm() <= limit
    decisions = [
        ways[True].engines.chooser.decision(recipe, x.device, True)
        for recipes in ways[True].engines.used.values()
        for recipe in recipes
    ]
    taken = [decision for decision in decisions if decision.choice]
    assert len(taken) >= 12
    assert not any(decision.problems for decision in decisions), "every variant is right"


def test_attacks_take_it(device, precision="bf16"):
    torch.manual_seed(0)
    model, x, y = randomized(create("wrn-10-1"), torch.float32), images(2, 16, torch.float32), torch.arange(2)
    model, x, y = model.to(device), x.to(device), y.to(device)
    settings = {"steps": 2, "random_start": False, "precision": precision, "graph": False}
    expected = sk.pgd(model, x, y, EPS, fuse=False, **settings)
    with installed(chooser(Hopper(), timer=Counting())) as new:
        found = sk.pgd(model, x, y, EPS, fuse=True, **settings)
        explained = str(sk.explain(model, x, precision=precision, fuse=True))
        calls = new.timer.calls
        sk.pgd(model, x, y, EPS, fuse=True, **settings)
        assert new.timer.calls == calls, "chosen once"
    assert "forward 7 of 7 passes ride in convolutions" in explained
    assert "hopper tile" in explained
    assert (found - x).abs().max() <= EPS + 2**-23
    assert (found == expected).float().mean() > 0.9  # signs of gradients that are as good as 0 may differ
