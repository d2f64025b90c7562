"""For pytest: from here on `spat_kernels` runs the kernels that tests.sanitizers compiled."""

import os
from pathlib import Path

from tests import native, sanitizers

native.load(Path(os.environ[sanitizers.LIBRARY]))
