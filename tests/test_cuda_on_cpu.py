"""The CUDA kernels without a GPU: the tests of the ops and of Hopper's convolutions, run on csrc/*.cu compiled for the CPU (see
tests/cuda_on_cpu)."""

import re
import subprocess
from collections import Counter

import pytest

from tests import cuda_on_cpu, native, sanitizers

pytestmark = pytest.mark.skipif(not sanitizers.available(), reason=f"needs {native.COMPILER} and its sanitizers")


def test_it_reports_what_a_gpu_would_not(tmp_path):
    """Shuffles without all lanes, barriers without all threads, launches without blocks, and shared memory read too early."""
    source, program = tmp_path / "misuse.cpp", tmp_path / "misuse"
    source.write_text(cuda_on_cpu.as_cpp(cuda_on_cpu.HERE / "misuse.cu"))
    cuda_on_cpu.compile_all([source], program)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_kernels_pass_their_tests(tmp_path):
    """In a process of their own, which a sanitizer would end."""
    tests = ["tests/ops", "tests/fused_conv/test_hopper.py", "-k", "compiled-cpu or emulated"]
    done = sanitizers.run(cuda_on_cpu.SANITIZE, cuda_on_cpu.build(tmp_path), *tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = Counter(re.findall(r"^tests/(\w+)/.* PASSED", done.stdout, re.MULTILINE))
    assert passed["ops"] > 200
    assert passed["fused_conv"] > 100
