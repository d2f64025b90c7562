"""C++ compiled by tests into an extension that `spat_kernels` takes for its own."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CSRC = Path(__file__).parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-g1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
INCLUDES = [f"-I{path}" for path in (CSRC, TORCH / "include", sysconfig.get_paths()["include"])]
AS_EXTENSION = ["-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


def runtime(name: str) -> Path | None:
    """The compiler's own library, such as "libasan.so"; None where there is none."""
    try:
        found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return None
    return Path(found) if Path(found).is_absolute() else None


def compile_all(flags: list[str], sources: list[Path], target: Path, *link_flags: str) -> Path:
    """`target`, linked from `sources`, whose objects lie beside it. CXXFLAGS are added."""
    flags = [*FLAGS, *flags, *os.environ.get("CXXFLAGS", "").split()]

    def compiled(source: Path) -> Path:
        file = target.parent / f"{source.name}.o"
        subprocess.run([COMPILER, *flags, *INCLUDES, "-c", source, "-o", file], check=True)
        return file

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([COMPILER, *flags, *objects, *link_flags, "-o", target], check=True)
    return target


def load(library: Path) -> None:
    """Let `spat_kernels`, when it is imported, find `library` as its own extension."""
    spec = importlib.util.spec_from_file_location("spat_kernels._C", library)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
