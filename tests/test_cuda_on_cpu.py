"""The CUDA kernels without a GPU: the tests of the ops, run on csrc/*.cu compiled for the CPU (see tests/cuda_on_cpu)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs g++"),
]


def test_the_ops_pass_on_the_cuda_kernels():
    """In a process of its own, which a misaligned access would end; without capture, so that it can say so."""
    selection = ["tests/ops", "-k", "cpu and not triton", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-p", "tests.cuda_on_cpu.plugin", "-p", "no:cacheprovider", "-q", "-s", *selection]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 200
