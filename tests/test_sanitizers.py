"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer (see tests/sanitizers): no access outside a tensor, no
overflow, whatever the tests of the ops do."""

import re

import pytest

from tests import native, sanitizers

KINDS = "address,undefined"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sanitizers.available(), reason=f"needs {native.COMPILER} and its sanitizers"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return sanitizers.build(KINDS, tmp_path_factory.mktemp("sanitized"))


def run(library, *arguments):
    return sanitizers.run(KINDS, library, *arguments, capture_output=True, text=True)


def test_the_kernels_pass_their_tests(library):
    done = run(library, "tests/ops", "tests/fused_conv/test_winograd.py", "-k", "not triton and not cuda")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(re.findall(r" PASSED$", done.stdout, re.MULTILINE)) > 500


OUTSIDE = """
import numpy as np, torch, spat_kernels

def test_outside():
    memory = np.lib.stride_tricks.as_strided(np.zeros((1, 4096), np.float32), (1, 4097))  # one value more than there is
    x = torch.from_numpy(memory)
    torch.ops.spat.linf_step_(x, torch.zeros(1, 4097), torch.ones(1, 4097), *torch.ones(2, 1), 0.0, 1.0, None, None)
"""


def test_an_access_outside_is_reported(library, tmp_path):
    test = tmp_path / "test_outside.py"
    test.write_text(OUTSIDE)
    done = run(library, str(test))
    assert "heap-buffer-overflow" in done.stderr
    assert "csrc/linf.cpp" in done.stderr
    assert done.returncode != 0
