"""The machine code, read where no GPU can run it: every kernel is there for every architecture, keeps to registers, and moves
packets of 16 bytes."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import triton

import spat_kernels
from tests.ops.helpers import OPS

CHECKOUT = Path(__file__).parents[1]
EXTENSION = next(Path(spat_kernels.__file__).parent.glob("_C.*"), None)
CUDA = spat_kernels.config()["cuda"]
KERNELS = sorted(f"{op.rstrip('_')}_kernel" for op in OPS)
pytestmark = pytest.mark.slow
needs_cuda_code = pytest.mark.skipif(not CUDA, reason="this installation holds no CUDA code (no nvcc when it was built)")


def cuobjdump(*flags: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *flags, str(EXTENSION)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    return [code for code in CUDA.split() if code.startswith("sm_")]


@needs_cuda_code
def test_every_architecture_is_there():
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert CUDA.split()[1:] == ["sm_80", "sm_90", "sm_100", "compute_100"]
    elf = cuobjdump("-lelf")
    sources = list((CHECKOUT / "csrc").glob("*.cu"))
    assert sources
    for arch in architectures():
        for source in sources:
            assert f"{source.stem}.{arch}.cubin" in elf
    if "compute_" in CUDA:
        assert "linf.sm_" in cuobjdump("-lptx")


@needs_cuda_code
def test_no_kernel_spills_or_uses_local_memory():
    usage = re.findall(r"Function (\S+):\s+(REG:.*)", cuobjdump("-res-usage"))
    assert {k for name, _ in usage for k in KERNELS if k in name} == set(KERNELS)
    for name, resources in usage:
        assert "STACK:0 " in resources, (name, resources)
        assert "LOCAL:0 " in resources, (name, resources)
        assert int(re.search(r"REG:(\d+)", resources)[1]) <= 80, (name, "three blocks of 256 threads must fit a multiprocessor")


@needs_cuda_code
@pytest.mark.parametrize("arch", architectures())
def test_packets_are_16_bytes(arch):
    """Every variant for aligned tensors loads and stores 16 bytes at once, none goes to local memory, and those whose results
    are bitwise those of the reference hold no fused multiply-add and no approximation."""
    body = defaultdict(list)
    for line in cuobjdump("-sass", "-arch", arch).splitlines():
        if "Function :" in line:
            name = line.split()[-1]
        elif found := re.search(r"\b(LDG|STG|LDL|STL|FFMA|MUFU)\S*", line):
            body[name].append(found[0])
    # Their last argument is the elements of a packet, or whether there are packets; of a step also whether it hashes.
    wide = {name for name in body if re.search(r"(linf_step_kernel\S*Li[2-8]ELb0E|Li[2-8]E|(?<!Li1E)Lb1E)EEv", name)}
    assert {k for name in wide for k in KERNELS if k in name} == set(KERNELS)
    for name in wide:
        # a pixel of three colours has 12 bytes, a crop begins anywhere
        assert "split_image" in name or "crop_flip" in name or any(op.startswith("LDG.E.128") for op in body[name]), name
        logits = "pool_linear_kernel" in name  # one by one
        assert logits or any(op.startswith("STG.E.128") for op in body[name]), name
    for name, ops in body.items():
        assert not any(op.startswith(("LDL", "STL")) for op in ops), name
        if any(exact in name for exact in ("linf", "keep_best", "scale_shift_relu", "split_image", "crop_flip")):
            assert not any(op.startswith(("FFMA", "MUFU")) for op in ops), name


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels_compile(capability):
    env = os.environ | {"TRITON_INTERPRET": "0"}
    dtypes = ["float32", "bfloat16", "float16", "float64"] if capability == 90 else ["float32", "bfloat16"]
    command = [sys.executable, "-m", "tests.codegen_triton", str(capability), *dtypes]
    result = subprocess.run(command, env=env, cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {r["kernel"] for r in report} == set(KERNELS)
    assert {r["dtype"] for r in report} == set(dtypes)
    for r in report:
        assert not r["local_memory"], r
        # one tile, spread over the threads
        small_rows = r["K"] is not None and r["K"] * getattr(torch, r["dtype"]).itemsize < 1024
        pixels = r["kernel"] in ("split_image_kernel", "crop_flip_kernel")  # of 12 bytes, and single ones
        logits = r["kernel"] == "pool_linear_kernel"  # which are few
        assert small_rows or ((r["wide_loads"] or pixels) and (r["wide_stores"] or logits)), r
        # exact arithmetic on images; Triton's exp and log have fused steps of their own
        assert not r["fused_multiply_add"] or r["kernel"] in ("lsce_grad_kernel", "kl_grad_kernel", "pma_grad_kernel"), r
        assert not r["may_be_fused"], (r, "without .rn ptxas may fuse, in one variant of a kernel and not in another")
        assert set(r["approximations"]) <= {"rcp.approx.ftz.f64"}, (r, "but for the log of fp64")
