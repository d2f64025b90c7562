"""The switches for TF32: set for an attack, and as they were after it."""

import contextlib

import pytest
import torch

from spat_kernels import precision

SWITCHES = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def test_precision_leaves_the_switches_as_they_were(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none for a missing GPU
    before = [s.fp32_precision for s in SWITCHES]
    first, second = precision.arithmetic("fp32", "cuda"), precision.arithmetic("tf32", "cuda")
    with first:
        assert [s.fp32_precision for s in SWITCHES] == ["ieee"] * 3
        second.__enter__()
    assert [s.fp32_precision for s in SWITCHES] == ["tf32"] * 3  # of the thread that is still inside
    second.__exit__(None, None, None)
    assert [s.fp32_precision for s in SWITCHES] == before


def test_switches_that_inherited_their_value_inherit_again():
    before, each = torch.backends.fp32_precision, [s.fp32_precision for s in SWITCHES]
    try:
        torch.backends.fp32_precision = "tf32"
        with precision.tf32_switches("tf32", "cuda"), precision.tf32_switches("fp32", "cuda"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
        for switch, value in zip(SWITCHES, each, strict=True):  # the line above sets them all, and not to what they were
            switch.fp32_precision = value


@pytest.mark.parametrize(("outer", "inner"), [("fp32", "tf32"), ("tf32", "fp32"), ("tf32", "tf32"), ("bf16", "tf32")])
def test_what_an_outer_precision_wants_is_set_again(outer, inner):
    values = {"fp32": ["ieee"] * 3, "tf32": ["tf32"] * 3, "bf16": [s.fp32_precision for s in SWITCHES]}
    with precision.tf32_switches(outer, "cuda"):
        for _ in range(2):
            with precision.tf32_switches(inner, "cuda"):
                assert [s.fp32_precision for s in SWITCHES] == values[inner]
            assert [s.fp32_precision for s in SWITCHES] == values[outer]
    assert [s.fp32_precision for s in SWITCHES] == values["bf16"]
