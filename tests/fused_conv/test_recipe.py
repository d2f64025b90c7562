"""Recipes: what they are called, and what PyTorch and the ops make of them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from spat_kernels.fused_conv.recipe import Epilogue, Recipe, apart
from spat_kernels.ops.scale_shift_relu import as_rows, pack_bits, unpack_bits
from tests.fused_conv.engines import poisoned, recipes, tensors_for


def test_reads_well():
    recipe = Recipe("forward", torch.bfloat16, 128, (160, 32, 32), (160, 32, 32), (3, 3), padding=(1, 1))
    assert str(recipe) == "forward bf16 128x160x32x32 -> 160, 3x3"
    carries = replace(recipe, epilogue=Epilogue(("b", "shift"), ("mask",), True))
    assert str(carries) == "forward bf16 128x160x32x32 -> 160, 3x3 + b, shift, relu, mask"
    strided = replace(recipe, stride=(2, 2), output=(160, 16, 16), bias=True, padding=(0, 1), layout=torch.contiguous_format)
    assert str(strided) == "forward bf16 128x160x32x32 -> 160, 3x3, stride 2x2, padding 0x1, contiguous, bias"


def test_different_recipes_have_different_names():
    base = Recipe("forward", torch.bfloat16, 4, (8, 9, 7), (8, 9, 7), (3, 3), padding=(1, 1))
    epilogues = [
        Epilogue(), Epilogue(relu=True), Epilogue(relu=True, writes=("mask",)), Epilogue(("b",)), Epilogue(("b",), ("total",)),
        Epilogue(("scale",)), Epilogue(("shift",)), Epilogue(("scale", "shift")),
    ]  # fmt: skip
    others = [
        replace(base, **change)
        for change in (
            {"way": "gradient"}, {"dtype": torch.float16}, {"batch": 5}, {"input": (4, 9, 7)}, {"output": (9, 9, 7)},
            {"kernel": (1, 3)}, {"stride": (2, 1)}, {"padding": (1, 0)}, {"dilation": (1, 2)}, {"groups": 2},
            {"layout": torch.contiguous_format}, {"bias": True}, {"tf32": True}, *({"epilogue": e} for e in epilogues),
        )
    ]  # fmt: skip
    assert len({*map(str, [base, *others])}) == len({base, *others}) == len(others) + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_apart_is_the_formula(dtype):
    """Of the convolution as it comes out in `dtype`; in fp64 against autograd too."""
    for recipe in recipes(dtype):
        x, weight, tensors = tensors_for(recipe)
        results = poisoned(recipe)
        assert apart(recipe, x, weight, **results, **tensors) is results["out"]
        conv = recipe.stride, recipe.padding, recipe.dilation, recipe.groups
        if recipe.way == "forward":
            y = F.conv2d(x, weight, tensors.get("bias"), *conv)
        else:
            source = torch.zeros(recipe.batch, *recipe.input, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
            (y,) = torch.autograd.grad(F.conv2d(source, weight, None, *conv), source, x)
        expected = _pass(recipe, y.double(), {name: t.double() for name, t in tensors.items()}, tensors.get("mask"))
        tolerance = 1e-12 if dtype == torch.float64 else 2**-7
        for name, exact in expected.items():
            torch.testing.assert_close(results[name].double(), exact, rtol=tolerance, atol=tolerance)
        if "mask" in results:
            bits = unpack_bits(results["mask"], recipe.output[0])
            assert torch.equal(bits, as_rows(results["out"]) > 0)
            assert torch.equal(results["mask"], pack_bits(bits))


def _pass(recipe, y, tensors, mask):
    one, zero = torch.ones(y.shape[1], 1, 1).double(), torch.zeros(()).double()
    scale, shift = (tensors[n].view(-1, 1, 1) if n in tensors else d for n, d in (("scale", one), ("shift", zero)))
    if recipe.way == "gradient":
        g = (y + tensors.get("grad2", zero)) * scale
        if mask is not None:
            bits = unpack_bits(mask, y.shape[1])
            g = g * bits.view(len(g), *g.shape[2:], -1).movedim(-1, 1)
        return {"out": g + tensors.get("residual", zero)}
    total = y + tensors.get("b", zero)
    v = total * scale + shift
    relu = recipe.epilogue is not None and recipe.epilogue.relu
    return {"out": v.relu() if relu else v} | (
        {"total": total} if recipe.epilogue and recipe.epilogue.writes[:1] == ("total",) else {}
    )


def test_apart_needs_no_memory_of_its_own():
    """Without `out` it writes over the convolution's result: the same bits."""
    for recipe in recipes(torch.float32):
        x, weight, tensors = tensors_for(recipe)
        results = poisoned(recipe)
        apart(recipe, x, weight, **results, **tensors)
        scratch = {name: t for name, t in poisoned(recipe).items() if name != "out"}
        assert torch.equal(apart(recipe, x, weight, None, **scratch, **tensors), results["out"])
        assert all(torch.equal(t, results[name]) for name, t in scratch.items())
