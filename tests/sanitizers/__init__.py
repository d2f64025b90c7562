"""The C++ kernels under GCC's sanitizers, in the place of the installed ones:

    python -m tests.sanitizers address,undefined tests/ops    # or thread; then any arguments of pytest

An access outside a tensor, undefined behaviour or a race ends the process, with the line of csrc/ on stderr. Work is always split
between threads (threads.cpp), which the sanitizers know of.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests import native

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
LIBRARY = "SPAT_SANITIZED"  # the variable that plugin.py reads
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own; benchmarks/leaks.py measures ours
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def available() -> bool:
    return bool(native.runtime("libasan.so") and native.runtime("libubsan.so"))


def flags(kinds: str) -> list[str]:
    return [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def build(kinds: str, folder: Path) -> Path:
    """The extension module, in `folder`. Of each kernel there is one clone, and no work is too small to be split."""
    sources = [HERE / "threads.cpp", *native.CSRC.glob("*.cpp")]
    options = ["-O1", "-DSPAT_CLONES=", "-DSPAT_GRAIN=1", *flags(kinds)]
    return native.compile_all(options, sources, folder / "_C.so", "-Wl,-Bsymbolic", *native.AS_EXTENSION)


def environment(kinds: str) -> dict[str, str]:
    """For a process that loads what `build` made. C++'s own library is there to throw exceptions with."""
    names = [RUNTIMES[kind] for kind in kinds.split(",") if kind in RUNTIMES]
    preload = " ".join(str(native.runtime(name)) for name in [*names, "libstdc++.so.6"])
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not this run's -n
    return own | OPTIONS | {"LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"}


def run(kinds: str, library: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    """Runs pytest in a process with `library` for the extension. Without capture, so that a sanitizer can say what ends it."""
    plugins = ["-p", "tests.sanitizers.plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "-v", "-s", *plugins, *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=environment(kinds) | {LIBRARY: str(library)}, **how)
