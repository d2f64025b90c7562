"""The machine code, read where no GPU can run it: every kernel is there for every architecture, keeps to registers, and moves
packets of 16 bytes."""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
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
CONV = re.compile(r"conv_kernel\w*?Li(\d+)ELb([01])ELb([01])E")  # tile, rows, and whether the last stage is half a one
EXACT = "linf", "keep_best", "scale_shift_relu", "scale_shift_act_grad", "split_image", "crop_flip"  # without divisions, too
TRANSCENDENTAL = "lsce_grad_kernel", "kl_grad_kernel", "pma_grad_kernel"
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
    hopper = [source for source in sources if source.stem.endswith("_sm90a")]
    built = Counter(re.findall(r"\.(sm_\d+)\w*\.cubin", elf))  # the library has no names of sources
    expected = Counter({arch: len(sources) - len(hopper) for arch in architectures()}) + Counter(sm_90=len(hopper))
    assert built == expected
    if "compute_" in CUDA:
        assert len(re.findall(r"\.ptx", cuobjdump("-lptx"))) == len(sources) - len(hopper)


@needs_cuda_code
def test_no_kernel_spills_or_uses_local_memory():
    usage = re.findall(r"Function (\S+):\s+(REG:.*)", cuobjdump("-res-usage"))
    assert {k for name, _ in usage for k in KERNELS if k in name} == set(KERNELS)
    assert {CONV.search(name)[1] for name, _ in usage if "conv_kernel" in name} == {"64", "128", "160"}
    for name, resources in usage:
        # that in fp64 reads three images ahead, or holds four parameters of four pixels, or two rows in 128 bytes a thread
        two = "conv_kernel" in name or "scale_shift_relu_grad_kernelId" in name or "adt_step_kernelId" in name
        two = two or re.search("layer_norm_grad_kernel(IdLi2|.*Li4)E", name)
        blocks, most = (2, 128) if two else (3, 80)
        assert "STACK:0 " in resources, (name, resources)
        assert "LOCAL:0 " in resources, (name, resources)
        registers = int(re.search(r"REG:(\d+)", resources)[1])
        assert registers <= most, (name, f"{blocks} blocks of 256 threads must fit a multiprocessor")


def instructions(arch: str, kinds: str) -> dict[str, list[str]]:
    """Those that begin with one of `kinds`, by kernel."""
    body = defaultdict(list)
    for line in cuobjdump("-sass", "-arch", arch).splitlines():
        if "Function :" in line:
            name = line.split()[-1]
        elif found := re.search(rf"\b({kinds})\S*", line):
            body[name].append(found[0])
    return body


@needs_cuda_code
@pytest.mark.parametrize("arch", architectures())
def test_packets_are_16_bytes(arch):
    """Every variant for aligned tensors loads and stores 16 bytes at once, none goes to local memory, and those whose results
    are bitwise those of the reference hold no fused multiply-add and no approximation."""
    body = instructions(arch, "LDG|STG|LDL|STL|FFMA|MUFU")
    # Their last argument is the elements of a packet, or whether there are packets; of a step also whether it hashes.
    wide = {name for name in body if re.search(r"(linf_step_kernel\S*Li[2-8]ELb0E|Li[2-8]E|(?<!Li1E)Lb1E)EEv", name)}
    assert {k for name in wide for k in KERNELS if k in name} == set(KERNELS)
    for name in wide:
        # a pixel of three colours has 12 bytes, a crop begins anywhere
        assert "split_image" in name or "crop_flip" in name or any(op.startswith("LDG.E.128") for op in body[name]), name
        narrow = "pool_linear_kernel" in name or "adt_sample" in name  # logits one by one; four of 16 bits, as Philox gives words
        assert narrow or any(op.startswith("STG.E.128") for op in body[name]), name
    for name, ops in body.items():
        assert not any(op.startswith(("LDL", "STL")) for op in ops), name
        if any(exact in name for exact in EXACT):
            assert not any(op.startswith(("FFMA", "MUFU")) for op in ops), name


@needs_cuda_code
def test_convolutions_use_what_hopper_has():
    """In every variant TMA copies, the tensor cores multiply without a wait after each product (of which ptxas only warns, by
    C7510), and packets have 16 bytes. Nothing goes to local memory, and the arithmetic of the passes is exact."""
    body = instructions("sm_90a", "LDG|STG|LDL|STL|FFMA|HGMMA|UTMALDG|WARPGROUP.DEPBAR")
    convolutions = {name: ops for name, ops in body.items() if CONV.search(name)}
    assert len(convolutions) == 2 * 3 * 2 * 2 * 2  # dtypes, tiles, rows, halves and passes
    for name, ops in convolutions.items():
        tile, rows, half = map(int, CONV.search(name).groups())
        count = Counter(op.split(".")[0] for op in ops)
        assert count["HGMMA"] == (6 if half else 4), name  # 64 channels, and the last 32
        assert all(f".64x{tile}x16.F32" in op for op in ops if op.startswith("HGMMA")), name
        assert count["WARPGROUP"] == (3 if half else 2), (name, "a wait after each product")
        copies = {"UTMALDG.3D", "UTMALDG.4D" if rows else "UTMALDG.4D.IM2COL"}
        assert {op for op in ops if op.startswith("UTMALDG")} == copies, name
        assert {op.split(".")[2] for op in ops if op.startswith(("LDG", "STG"))} == {"128", "U8"}, name  # images, and masks
        assert not {"LDL", "STL", "FFMA"} & {*count}, name


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels_compile(capability):
    env = os.environ | {"TRITON_INTERPRET": "0"}
    # each on one GPU at least; sm_80 has its own arithmetic of bf16
    dtypes = {80: ["float32", "bfloat16"], 90: ["float32", "bfloat16", "float16", "float64"], 100: ["float32"]}[capability]
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
        library_in_fp64 = r["kernel"].startswith(("adt", "scale_shift_act")) and r["dtype"] == "float64"
        assert not r["fused_multiply_add"] or r["kernel"] in TRANSCENDENTAL or library_in_fp64, r
        assert not r["may_be_fused"], (r, "without .rn ptxas may fuse, in one variant of a kernel and not in another")
        assert set(r["approximations"]) <= {"rcp.approx.ftz.f64"}, (r, "but for the log of fp64")
