"""Compile the Triton kernels for a GPU that is not here: each launcher runs on CPU tensors, and what it would launch is compiled.

Run as a program, with TRITON_INTERPRET=0 (conftest.py has Triton interpret, which replaces the kernels); prints one JSON list.
"""

import json
import re
import sys
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from spat_kernels.ops.scale_shift_act import LEAKY
from tests.ops.helpers import all_samples, launcher

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Captured(Exception):
    pass


def capture(launch) -> tuple[JITFunction, dict]:
    """The kernel that `launch()` launches first, and its arguments."""

    def run(self, *args, grid, warmup, **kwargs):
        raise Captured(self, args, kwargs)

    original, JITFunction.run = JITFunction.run, run
    try:
        launch()
    except Captured as call:
        kernel, args, kwargs = call.args
        return kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    finally:
        JITFunction.run = original
    raise AssertionError(f"{launch} launches no kernel")


def compile_for(kernel: JITFunction, arguments: dict, capability: int):
    options = {k: v for k, v in arguments.items() if k not in kernel.arg_names}
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if kernel.params[i].is_constexpr or value is None:
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            attrs |= {(i,): [["tt.divisibility", 16]]} if value % 16 == 0 else {}
        else:
            signature[name] = kernel.params[i].annotation_type
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def samples(dtype: str, capability: int) -> list[tuple[str, tuple]]:
    """Every activation once, in fp32, the arithmetic of all dtypes but fp64; elsewhere two, the first and the one that reads
    slopes."""
    every = capability == 90 and dtype == "float32"
    found = all_samples(getattr(torch, dtype))
    return [(op, sample) for op, sample in found if every or op != "scale_shift_act" or sample[-1] in (0, LEAKY)]


def main(capability: int, dtypes: list[str]) -> None:
    report = []
    for dtype in dtypes:
        for op, sample in samples(dtype, capability):
            kernel, arguments = capture(partial(launcher(op), *sample))
            compiled = compile_for(kernel, arguments, capability)
            ptx = compiled.asm["ptx"]
            report.append(
                {
                    "kernel": kernel.__name__,
                    "dtype": dtype,
                    "K": arguments.get("K"),
                    "wide_loads": ptx.count("ld.global.v4.b32") + ptx.count("ld.global.v2.b64"),
                    "wide_stores": ptx.count("st.global.v4.b32") + ptx.count("st.global.v2.b64"),
                    "local_memory": ".local" in ptx,
                    # sm_80 multiplies bf16 by fma.rn.bf16, with -0 as the summand: a product, rounded once
                    "fused_multiply_add": "fma.rn.f" in ptx,
                    "may_be_fused": re.findall(r"\b(?:add|sub|mul)\.(?:ftz\.)?f\d+", ptx),
                    "approximations": re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?:full|approx)[.\w]*", ptx),
                }
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
