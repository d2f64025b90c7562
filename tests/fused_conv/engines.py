"""Engines for tests, which compute by `apart`: right in another way, wrong, failing, and recipes with tensors for them."""

from contextlib import contextmanager

import torch

from spat_kernels.fused_conv import choose
from spat_kernels.fused_conv.recipe import Epilogue, Recipe, apart, empty_results
from spat_kernels.ops.scale_shift_relu import pack_bits, unpack_bits


class Twin:
    """Does it apart, in one variant for each of `names`, from weights that are stored the other way round.

    Attributes:
        calls: the variants and recipes that it ran.
        prepared: how often weights were made ready.
    """

    name = "twin"

    def __init__(self, *names: str):
        self.names = list(names or ("plain",))
        self.calls, self.prepared = [], 0

    def runs_on(self, device):
        return True

    def variants(self, recipe, device):
        return self.names

    def prepare_weight(self, recipe, weight):
        self.prepared += 1
        return weight.permute(1, 2, 3, 0).contiguous()

    def run(self, variant, recipe, x, weight, out, **tensors):
        self.calls.append((variant, recipe))
        given = {name: t.data_ptr() for name, t in tensors.items()}
        assert out.data_ptr() not in (x.data_ptr(), *given.values())
        weight = weight.permute(3, 0, 1, 2).contiguous(memory_format=recipe.layout)
        apart(recipe, x, weight, out, **tensors)
        self.spoil(variant, recipe, out, **tensors)

    def spoil(self, variant, recipe, out, **tensors):
        """What a wrong engine does wrong."""


class Wrong(Twin):
    """Its variants name what it does wrong."""

    name = "wrong"

    def spoil(self, variant, recipe, out, **tensors):
        if variant == "one element":
            out[0, 0, -1, -1] += 1
        elif variant == "unwritten":
            out[-1, :, -1, -1] = torch.nan
        elif variant == "larger":
            out *= 1.05
        elif variant == "total":
            tensors["total"][0, 0, 0, 0] += 1
        elif variant == "leaks":
            off = ~unpack_bits(tensors["mask"], out.shape[1]).view(len(out), *out.shape[2:], -1).movedim(-1, 1)
            out[off] += 1e-6
        elif variant == "a bit":
            tensors["mask"][0, 0] ^= 1
        elif variant == "unused bits":
            tensors["mask"][:, -1] |= 128
        elif variant == "raises":
            raise RuntimeError("no kernel image is available\nfor this device")


class Picky(Twin):
    """Raises while it is asked what it can do."""

    name = "picky"

    def runs_on(self, device):
        raise LookupError("nobody home")

    def variants(self, recipe, device):
        raise LookupError("nobody home")


def by_names(**seconds: float):
    """A timer that takes no time: `apart` is 1 s, and an engine's variant what it is called with here."""

    def timer(function):
        code = function.__closure__ or ()
        found = [c.cell_contents for c in code if isinstance(c.cell_contents, choose.Choice)]
        function()
        return seconds.get(found[0].variant, 0.5) if found else seconds.get("apart", 1.0)

    return timer


def chooser(*engines, **settings) -> choose.Chooser:
    """One that applies on CPUs."""
    settings.setdefault("timer", by_names())
    return choose.Chooser(tuple(engines), applies=lambda device: True, **settings)


@contextmanager
def installed(new: choose.Chooser):
    """Within: attacks ask `new`."""
    old, choose.chooser = choose.chooser, new
    try:
        yield new
    finally:
        choose.chooser = old


CONVS = [
    {"input": (5, 9, 7), "output": (6, 9, 7), "kernel": (3, 3), "padding": (1, 1)},
    {"input": (16, 8, 8), "output": (24, 4, 4), "kernel": (1, 1), "stride": (2, 2)},
    {"input": (6, 9, 8), "output": (9, 3, 6), "kernel": (2, 3), "stride": (3, 1), "dilation": (2, 1), "groups": 3},
]
EVERYTHING = Epilogue(("b", "scale", "shift"), ("total", "mask"), True)
FORWARD = [None, Epilogue(("shift",), ("mask",), True), EVERYTHING, Epilogue(("b",))]
GRADIENT = [None, Epilogue(("mask", "scale")), Epilogue(("grad2", "mask", "scale", "residual")), Epilogue(("grad2",))]


def recipes(dtype=torch.bfloat16, batch=3):
    for conv in CONVS:
        for epilogue in FORWARD:
            yield Recipe("forward", dtype, batch, **conv, bias=epilogue is None, epilogue=epilogue)
        for epilogue in GRADIENT:
            yield Recipe("gradient", dtype, batch, **conv, epilogue=epilogue)


def tensors_for(recipe: Recipe, seed=0):
    """x, weight, and what else is read, at random."""
    generator = torch.Generator().manual_seed(seed)

    def image(shape, layout=torch.channels_last):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(recipe.dtype, memory_format=layout)

    acc = torch.float64 if recipe.dtype == torch.float64 else torch.float32
    out_channels, in_channels = recipe.output[0], recipe.input[0] // recipe.groups
    read = recipe.input if recipe.way == "forward" else recipe.output
    x, weight = image((recipe.batch, *read), recipe.layout), image((out_channels, in_channels, *recipe.kernel), recipe.layout)
    channels, tensors = recipe.result[1], {}
    if recipe.bias:
        tensors["bias"] = torch.randn(out_channels, generator=generator).to(recipe.dtype)
    for name in recipe.epilogue.reads if recipe.epilogue else ():
        if name in ("scale", "shift"):
            tensors[name] = torch.randn(channels, dtype=acc, generator=generator)
        elif name == "mask":
            pixels = recipe.batch * recipe.result[2] * recipe.result[3]
            tensors[name] = pack_bits(torch.rand(pixels, channels, generator=generator) < 0.5)
        else:
            tensors[name] = image(recipe.result)
    return x, weight, tensors


def poisoned(recipe: Recipe):
    """Memory for its results, full of NaN and of ones."""
    return {name: t.fill_(255 if name == "mask" else torch.nan) for name, t in empty_results(recipe, torch.device("cpu")).items()}
