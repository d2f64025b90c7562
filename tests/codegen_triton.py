"""Compile the Triton kernels for a GPU that is not here: each launcher runs on CPU tensors, and what it would launch is compiled.

Run as a script (conftest.py has Triton interpret, which replaces the kernels); prints one JSON list.
"""

import json
import sys
from importlib import import_module

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from spat_kernels.ops import dlr, keep_best, kl, l2, linf, lsce, margin

# The functions of these names hide their modules.
crop_flip, pool_linear, scale_shift_relu, split_image = (
    import_module(f"spat_kernels.ops.{name}") for name in ("crop_flip", "pool_linear", "scale_shift_relu", "split_image")
)

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


def capture(kernel: JITFunction, launch) -> dict:
    """The arguments of the one launch that `launch()` makes."""

    def run(self, *args, grid, warmup, **kwargs):
        raise Captured(args, kwargs)

    original, JITFunction.run = JITFunction.run, run
    try:
        launch()
    except Captured as call:
        args, kwargs = call.args
        return dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    finally:
        JITFunction.run = original
    raise AssertionError(f"{kernel} was not launched")


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


def launches(dtype: torch.dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, x_adv, grad = (torch.zeros(64, 3, 32, 32, dtype=dtype) for _ in range(3))
    eps, step, seed, nan_seen = (
        torch.zeros(64, dtype=acc),
        torch.zeros(1, dtype=acc),
        torch.zeros(2).long(),
        torch.zeros(64).byte(),
    )
    success = torch.zeros(64, dtype=torch.bool)
    yield linf.linf_random_start_kernel, lambda: linf.linf_random_start_triton(x_adv, x, eps[:1], seed, 0.0, 1.0)
    yield linf.linf_step_kernel, lambda: linf.linf_step_triton(x_adv, x, grad, eps[:1], step, 0.0, 1.0, nan_seen)
    yield linf.linf_step_kernel, lambda: linf.linf_step_triton(x_adv, x, grad, eps, step, 0.0, 1.0, None)
    yield l2.l2_step_kernel, lambda: l2.l2_step_triton(x_adv, x, grad, eps, step, 0.0, 1.0, nan_seen)
    yield keep_best.keep_best_kernel, lambda: keep_best.keep_best_triton(x, eps, success, x_adv, eps, success)
    a, mask, scale = torch.zeros(64, 16, dtype=dtype), torch.zeros(64, 2).byte(), torch.zeros(16, dtype=acc)
    yield (
        scale_shift_relu.scale_shift_relu_kernel,
        lambda: scale_shift_relu.scale_shift_relu_triton(a, a, scale, scale, a, a, mask, True),
    )
    yield (
        scale_shift_relu.scale_shift_relu_grad_kernel,
        lambda: scale_shift_relu.scale_shift_relu_grad_triton(a, a, mask, scale, a, a),
    )
    features, bits = torch.zeros(64, 4, 4, 512, dtype=dtype).movedim(-1, 1), torch.zeros(1024, 64).byte()
    weight, bias, logits = (torch.zeros(*shape, dtype=acc) for shape in ((10, 512), (10,), (64, 10)))
    yield pool_linear.pool_linear_kernel, lambda: pool_linear.pool_linear_triton(features, weight, bias, logits)
    yield (
        pool_linear.pool_linear_grad_kernel,
        lambda: pool_linear.pool_linear_grad_triton(logits, weight, bits, weight[0].clone(), eps, features),
    )
    if dtype in (torch.float16, torch.bfloat16):
        image, wide = torch.zeros(4, 8, 8, 3), torch.zeros(4, 8, 8, 8, dtype=dtype)
        x, out = image.movedim(-1, 1), wide.movedim(-1, 1)
        yield split_image.split_image_kernel, lambda: split_image.split_image_triton(x, scale[:3], scale[:3], out)
    pixels, rows = torch.zeros(8, 32, 32, 3).byte(), torch.zeros(64).long()
    for out in (x_adv, x_adv.contiguous(memory_format=torch.channels_last)):
        for pad, flip in ((0, False), (4, True)):
            yield (
                crop_flip.crop_flip_kernel,
                lambda out=out, pad=pad, flip=flip: crop_flip.crop_flip_triton(pixels, rows, rows, seed, out, pad, flip),
            )
    y, loss = torch.zeros(64).long(), torch.zeros(64, dtype=acc)
    for classes in (16, 1000, 4096):
        z, q = torch.zeros(64, classes, dtype=dtype), torch.zeros(64, classes, dtype=acc)
        yield lsce.lsce_grad_kernel, lambda z=z: lsce.lsce_grad_triton(z, y, z, loss, 0.1, False, 1.0, False)
        yield lsce.lsce_grad_kernel, lambda z=z: lsce.lsce_grad_triton(z, y, z, loss, 0.0, False, 1.0, True)
        yield kl.kl_grad_kernel, lambda z=z, q=q: kl.kl_grad_triton(z, q, z, loss, 1.0)
        yield margin.margin_grad_kernel, lambda z=z: margin.margin_grad_triton(z, y, z, loss, 0.0, False, 1.0)
        yield dlr.dlr_grad_kernel, lambda z=z: dlr.dlr_grad_triton(z, y, None, z, loss, 1.0)
        yield dlr.dlr_grad_kernel, lambda z=z: dlr.dlr_grad_triton(z, y, y, z, loss, 1.0)


def main(capability: int, dtypes: list[str]) -> None:
    report = []
    for dtype in dtypes:
        for kernel, launch in launches(getattr(torch, dtype)):
            arguments = capture(kernel, launch)
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
                    "fused_multiply_add": "fma.rn" in ptx,
                }
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
