"""Packets of 16 bytes only where every tensor allows them: any argument may lie off alignment, alone."""

import pytest
import torch

from tests.ops.helpers import all_samples


def copied(t, offset):
    """The values and strides of the dense `t`, `offset` elements off alignment."""
    storage = torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)
    return storage[offset:].as_strided(t.shape, t.stride()).copy_(t)


def run(impl, op, arguments, off=None):
    """All arguments after the op, the one of index `off` off alignment."""
    copies = [copied(a, int(i == off)) if isinstance(a, torch.Tensor) else a for i, a in enumerate(arguments)]
    impl(op)(*copies)
    return [a for a in copies if isinstance(a, torch.Tensor)]


@pytest.mark.parametrize(("op", "arguments"), all_samples(), ids=lambda v: v if isinstance(v, str) else "")
def test_any_argument_may_be_off_alignment(impl, op, arguments):
    if impl.kind == "triton":
        pytest.skip("Triton compiles a kernel for each choice of aligned arguments by itself")
    arguments = [a.to(impl.device) if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = run(impl, op, arguments)
    for off, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            for got, want in zip(run(impl, op, arguments, off), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # sums over a row come in another order
