import sys
import tempfile
from pathlib import Path

from tests import cuda_on_cpu, sanitizers

with tempfile.TemporaryDirectory() as folder:
    sys.exit(sanitizers.run(cuda_on_cpu.SANITIZE, cuda_on_cpu.build(Path(folder)), *sys.argv[1:]).returncode)
