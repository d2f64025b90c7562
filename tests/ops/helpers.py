"""What the tests of the ops share: where the ops are, tensors in guarded memory, and what is compared."""

import itertools
import os
import pkgutil
from importlib import import_module

import torch

import spat_kernels
from spat_kernels import ops
from spat_kernels.ops.scale_shift_relu import as_rows

FAMILIES = [
    import_module(f"spat_kernels.ops.{found.name}") for found in pkgutil.iter_modules(ops.__path__) if found.name[0] != "_"
]
OPS = {  # op -> the module that declares it
    op: next(module for module in FAMILIES if hasattr(module, f"{op.rstrip('_')}_ref")) for op in spat_kernels.config()["ops"]
}
# Where no kernel is: `redispatch` finds the reference, behind its gate.
ELSEWHERE = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)


def all_samples(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[tuple[str, tuple]]:
    """(op, arguments), with and without the optional ones: what the `samples` of the test files give."""
    tests = (import_module(f"tests.ops.{found.name}") for found in pkgutil.iter_modules([os.path.dirname(__file__)]))
    with torch.device(device):
        return [sample for test in tests if hasattr(test, "samples") for sample in test.samples(dtype)]


def reference(op: str):
    return getattr(OPS[op], f"{op.rstrip('_')}_ref")


def launcher(op: str):
    return getattr(OPS[op], f"{op.rstrip('_')}_triton")


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sentinels(shape, dtype, device, offset: int = 0, channels_last: bool = False, rim: float = 7, poison: float = torch.nan):
    """A poisoned dense tensor inside a buffer of a known value, `offset` elements off alignment, and a check of the rim."""
    numel, margin = int(torch.Size(shape).numel()), 64
    buffer = torch.full((numel + 2 * margin,), rim, dtype=dtype, device=device)
    flat = buffer[margin + offset : margin + offset + numel]
    flat.fill_(poison)  # what is not written shows
    if channels_last:
        b, c, *rest = shape
        t = flat.view(b, *rest, c).movedim(-1, 1)
    else:
        t = flat.view(shape)

    def intact() -> bool:
        return bool((buffer[: margin + offset] == rim).all() and (buffer[margin + offset + numel :] == rim).all())

    return t, intact


def layouts(impl, shape):
    """(dtype of the images, dtype of their gradient, layout for `sentinels`)"""
    halves = set(impl.dtypes) - {torch.float64}
    formats = [{}, {"offset": 1}] + [{"channels_last": True}, {"channels_last": True, "offset": 3}] * (len(shape) == 4)
    for dtype in impl.dtypes:
        yield from itertools.product([dtype], [dtype] if dtype == torch.float64 else halves, formats)


def image(shape, channels, dtype, device, offset=0):
    """Sentinels of N and the spatial sizes `shape`, channels innermost."""
    n, *size = shape
    t, intact = sentinels((n * max(1, torch.Size(size).numel()), channels), dtype, device, offset)
    return t.view(n, *size, channels).movedim(-1, 1), intact


def mask_like(t, offset=0):
    """Sentinels for a bit an element of the image `t`."""
    rows, channels = as_rows(t).shape
    return sentinels((rows, -(-channels // 8)), torch.uint8, t.device, offset, poison=0xA5)


EXTREMES = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 6e-8, -6e-8, 3e38, -3e38, 1.0]


def values(t):
    """Normal numbers into the image `t`, and at every seventh place an extreme one."""
    flat = torch.randn(t.numel())
    where = torch.arange(0, t.numel(), 7)
    flat[where] = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), (len(where),))]
    return t.copy_(flat.view(t.movedim(1, -1).shape).movedim(-1, 1))


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def bits_of(t):
    """Its bits, with one NaN for all of them: which one arithmetic gives is the processor's choice."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    t = t.contiguous()
    return (t.masked_fill(t.isnan(), torch.nan) if t.is_floating_point() else t).view(integers[t.element_size()])
