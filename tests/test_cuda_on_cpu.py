"""The CUDA kernels without a GPU: the tests of the ops and of Hopper's convolutions, run on csrc/*.cu compiled for the CPU (see
tests/cuda_on_cpu)."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import cuda_on_cpu

CHECKOUT = Path(__file__).parents[1]
COMPILER = cuda_on_cpu.COMPILER[0]


def sanitizes() -> bool:
    if shutil.which(COMPILER) is None:
        return False
    found = subprocess.run([COMPILER, "-print-file-name=libubsan.so"], capture_output=True, text=True).stdout
    return Path(found.strip()).is_absolute()


pytestmark = pytest.mark.skipif(not sanitizes(), reason=f"needs {COMPILER} and its libubsan")


def test_it_reports_what_a_gpu_would_not(tmp_path):
    """Shuffles without all lanes, barriers without all threads, launches without blocks, and shared memory read too early."""
    source, program = tmp_path / "misuse.cpp", tmp_path / "misuse"
    source.write_text(cuda_on_cpu.as_cpp(cuda_on_cpu.HERE / "misuse.cu"))
    cuda_on_cpu.compile_all([source], program)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_kernels_pass_their_tests():
    """Compiled once, in a process of their own, which a misaligned access would end; without capture, so that it can say so."""
    plugins = ["-p", "tests.cuda_on_cpu.plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = ["tests/ops", "tests/fused_conv/test_hopper.py", "-k", "compiled-cpu or emulated"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not this run's -n
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-s", *plugins, *tests],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        env=own | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    passed = Counter(re.findall(r"^tests/(\w+)/.* PASSED", result.stdout, re.MULTILINE))
    assert passed["ops"] > 200
    assert passed["fused_conv"] > 100
