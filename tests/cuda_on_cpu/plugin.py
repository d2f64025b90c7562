"""For pytest: from here on `spat_kernels` runs its CUDA kernels on CPU tensors."""

import tempfile
from pathlib import Path

from . import build, load

with tempfile.TemporaryDirectory() as folder:
    load(build(Path(folder)))
