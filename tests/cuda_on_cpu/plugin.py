"""For pytest: from here on `spat_kernels` runs its CUDA kernels on CPU tensors."""

import tempfile
from pathlib import Path

from tests.cuda_on_cpu import build, load

with tempfile.TemporaryDirectory() as folder:
    load(build(Path(folder)))
