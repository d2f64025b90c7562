"""The implementations under test: C++ and Triton's interpreter on CPU tensors; CUDA C++ and Triton on a GPU."""

import os

import pytest
import torch

from tests.ops.helpers import launcher


class Implementation:
    """One way to run the ops: `impl("linf_step_")(x_adv, ...)` writes into its arguments."""

    def __init__(self, name: str):
        self.kind, self.device = name.split("-")
        # The interpreter passes scalars as fp32 and truncates to bf16, so those two dtypes are for a GPU to test.
        self.interpreted = self.kind == "triton" and self.device == "cpu"
        self.offsets = (1,) if self.interpreted else (0, 1)  # elements off alignment, which the interpreter does not know
        self.dtypes = [torch.float32, torch.float16] + ([] if self.interpreted else [torch.bfloat16, torch.float64])

    def __call__(self, op: str):
        return getattr(torch.ops.spat, op).default if self.kind == "compiled" else launcher(op)

    def __repr__(self):
        return f"{self.kind}-{self.device}"


@pytest.fixture(
    params=[
        "compiled-cpu",
        "triton-cpu",
        pytest.param("compiled-cuda", marks=pytest.mark.gpu),
        pytest.param("triton-cuda", marks=pytest.mark.gpu),
    ]
)
def impl(request) -> Implementation:
    implementation = Implementation(request.param)
    if implementation.interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here: Triton compiles instead of interpreting")
    return implementation
