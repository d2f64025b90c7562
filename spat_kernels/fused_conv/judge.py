"""Whether an engine's results are right: as close to the exact ones as PyTorch's convolution and our pass are, twice over.

The exact result is computed in fp32 from 16-bit values (fp64 from others), convolution and pass with nothing rounded between. The
errors of "out" and "total" are taken in norm and at the largest element. Both may be at most

    2 * the error of `apart` + the rounding to the dtype, u * (norm, or largest element)

A gradient that is masked out must be 0, or the residual, exactly. A bit of a mask that is written says whether v > 0, and may be
wrong where v is as good as 0: within the rounding u |y s| of the convolution's result y, scaled by s, and the error of summing
its n products in fp32, 4 sqrt(n) 2^-24 sum |x w| |s|. Rounding errors of sums are independent enough to grow as sqrt(n), and 4 of
their deviations are hardly reached. The rest of the pass adds roundings in fp32.
"""

import math
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._common import Maybe, acc_dtype, as_rows
from ..ops.scale_shift_relu import pack_bits, unpack_bits
from ..precision import HALVES, tf32_switches
from .recipe import Recipe, apart, convolve, empty_results

UNFIT = "its values are all 0 or not finite, so nothing could be compared"


class Errors(NamedTuple):
    norm: float
    largest: float


class Judge:
    """Knows what a recipe's results should be on some tensors, which are as in `recipe.apart`.

    Attributes:
        unfit: why nothing can be compared on these tensors, or "".
    """

    def __init__(self, recipe: Recipe, x: Tensor, weight: Tensor, tensors: dict[str, Tensor]):
        self.recipe, self.device = recipe, x.device
        self.unit = _rounding(recipe.dtype)
        with tf32_switches("fp32", x.device.type):
            self.expected, self.value, self.slack = _exact(recipe, x, weight, tensors)
        self.masked = _masked(recipe, tensors.get("mask"))
        norms = [float(t.norm()) for t in self.expected.values()]
        self.unfit = "" if all(0 < n < float("inf") for n in norms) else UNFIT
        if not self.unfit:
            results = self.buffers()
            apart(recipe, x, weight, **results, **tensors)
            self.limits = {name: self._limit(name, results[name]) for name in self.expected}
            if not all(math.isfinite(limit) for limits in self.limits.values() for limit in limits):
                self.unfit = UNFIT

    def buffers(self) -> dict[str, Tensor]:
        """Memory for the results, filled with what none of them is: NaN, and in the mask the opposite bits."""
        results = empty_results(self.recipe, self.device)
        for name in self.expected:
            results[name].fill_(torch.nan)
        if "mask" in results:
            results["mask"].copy_(~pack_bits(self._bits()))
        return results

    def problem(self, run: Callable[[dict[str, Tensor]], object]) -> str:
        """What is wrong with what `run` writes into buffers, or ""."""
        results = self.buffers()
        run(results)
        for name, limit in self.limits.items():
            found = self.errors(name, results[name])
            if not (found.norm <= limit.norm and found.largest <= limit.largest):  # NaN is not
                return (
                    f"wrong: {name} is off by {found.norm:.2e} in norm (limit {limit.norm:.2e}) and {found.largest:.2e} at the "
                    f"largest (limit {limit.largest:.2e})"
                )
        if self.masked is not None and (results["out"] != self.expected["out"])[self.masked].any():
            return "wrong: what is masked out is neither 0 nor the residual"
        return self._mask_problem(results["mask"]) if "mask" in results else ""

    def errors(self, name: str, found: Tensor) -> Errors:
        """The errors of a result, "out" or "total", against the exact one."""
        error = found.to(self.expected[name].dtype) - self.expected[name]
        return Errors(float(error.norm()), float(error.abs().max()))

    def _limit(self, name: str, by_apart: Tensor) -> Errors:
        own, exact = self.errors(name, by_apart), self.expected[name]
        return Errors(
            2 * own.norm + self.unit * float(exact.norm()), 2 * own.largest + self.unit * float(exact.abs().max())
        )  # fmt: skip

    def _bits(self) -> Tensor:
        assert self.value is not None
        return ~(as_rows(self.value) <= 0)

    def _mask_problem(self, mask: Tensor) -> str:
        assert self.value is not None
        assert self.slack is not None
        channels = self.value.shape[1]
        bits, clear = unpack_bits(mask, channels), as_rows(self.value).abs() > as_rows(self.slack)
        wrong = int(((bits != self._bits()) & clear).sum())
        if wrong:
            return f"wrong: {wrong} of {bits.numel()} bits of the mask"
        return "" if torch.equal(mask, pack_bits(bits)) else "wrong: unused bits of the mask are not 0"


def _rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a rounding. Nothing more exact than fp64 is at hand, so there it is that of a long sum."""
    return 2.0**-44 if dtype == torch.float64 else torch.finfo(dtype).eps / 2


def _exact(recipe: Recipe, x: Tensor, weight: Tensor, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Maybe, Maybe]:
    """Exact results by name; with a mask also the value v that its bits are of, and what counts as 0 there."""
    dtype = torch.float32 if recipe.dtype in HALVES else torch.float64
    given = {name: t.to(dtype) for name, t in tensors.items() if name != "mask"}
    y = convolve(recipe, x.to(dtype), weight.to(dtype), given.get("bias"))
    if recipe.epilogue is None:
        return {"out": y}, None, None
    scale, shift = (_per_channel(given.get(name)) for name in ("scale", "shift"))
    if recipe.way == "gradient":
        return {"out": _exact_gradient(y, given, scale, _masked(recipe, tensors.get("mask")))}, None, None
    total = _added(y, given.get("b"))
    v = total if scale is None else total * scale
    v = _added(v, shift)
    expected = {"out": v.clamp_min(0) if recipe.epilogue.relu else v}
    if "total" in recipe.epilogue.writes:
        expected["total"] = total
    if "mask" not in recipe.epilogue.writes:
        return expected, None, None
    sums = convolve(recipe, x.to(dtype).abs(), weight.to(dtype).abs())
    return expected, v, _slack(recipe, y, total, sums, scale, shift)


def _exact_gradient(y: Tensor, given: dict[str, Tensor], scale: Maybe, masked: Maybe) -> Tensor:
    g = _added(y, given.get("grad2"))
    g = g if scale is None else g * scale
    g = g if masked is None else g.masked_fill(masked, 0)
    return _added(g, given.get("residual"))


def _masked(recipe: Recipe, mask: Maybe) -> Maybe:
    """bool, like `out`: where a mask that is read has no bit."""
    if mask is None:
        return None
    batch, channels, *pixels = recipe.result
    return ~unpack_bits(mask, channels).view(batch, *pixels, channels).movedim(-1, 1)


def _slack(recipe: Recipe, y: Tensor, total: Tensor, sums: Tensor, scale: Maybe, shift: Maybe) -> Tensor:
    """How far from 0 a value may be whose sign is not known (see the module)."""
    unit = torch.finfo(acc_dtype(recipe.dtype)).eps / 2
    terms = prod(recipe.kernel) * recipe.input[0] // recipe.groups
    slack = _rounding(recipe.dtype) * y.abs() + 4 * terms**0.5 * unit * sums + 2 * unit * total.abs()
    slack = slack if scale is None else slack * scale.abs()
    return slack if shift is None else slack + 2 * unit * shift.abs()


def _added(a: Tensor, b: Maybe) -> Tensor:
    return a if b is None else a + b


def _per_channel(t: Maybe) -> Maybe:
    return None if t is None else t.view(-1, 1, 1)
