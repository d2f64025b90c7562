import sys
import tempfile
from pathlib import Path

from tests.sanitizers import build, run

kinds, *arguments = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    sys.exit(run(kinds, build(kinds, Path(folder)), *arguments).returncode)
