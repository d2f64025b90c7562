"""The CUDA kernels as C++, in the place of the C++ kernels: their indices, tails, packets, shuffles, barriers and launches run
where no GPU is. The tests of the ops and of convolutions take them by

    python -m tests.cuda_on_cpu tests/ops tests/fused_conv/test_hopper.py -k "compiled-cpu or emulated"

CUDA is C++ with some more words, which cuda_runtime.h in this folder defines, and some syntax, which `as_cpp` rewrites.
bindings.cpp calls `foo_cpu(args, begin, end)` for a part of the work; here the first such call does all of it, by `launch_foo`.
Convolutions, which have no C++ kernels, are CPU ops here. hopper.cuh in this folder stands in for TMA, its barriers and wgmma.

What this cannot show is a GPU's own: its conversions of 16-bit floats, its <cmath>, nvcc's code, threads that run at once.
"""

import re
from pathlib import Path

from tests import native, sanitizers

HERE = Path(__file__).parent
CSRC = native.CSRC
# A misaligned packet, an access outside a tensor or an array, or an overflow ends the process. More flags come from CXXFLAGS.
SANITIZE = "address,alignment,bounds,shift,signed-integer-overflow"
FLAGS = ["-O1", "-DSPAT_CUDA_ON_CPU", f"-I{HERE}", *sanitizers.flags(SANITIZE)]
STORE = re.compile(r'asm volatile\("st\.global\.v4\.b32 \[%0\], \{%1, %2, %3, %4\};" ::(.*?):\s*"memory"\)', re.DOTALL)


def as_cpp(source: Path) -> str:
    """A .cu or .cuh file as C++; compilers name the lines of the original."""
    text = re.sub(r"(\w+)<<<(.+?)>>>", r"cuda_on_cpu::Launch(\1, \2)", source.read_text())
    text = STORE.sub(lambda asm: "cuda_on_cpu::store_16_bytes(" + re.sub('"[lr]"', "", asm[1]) + ")", text)
    return f'#line 1 "{source}"\n{text}'


def cpu_functions() -> str:
    """`foo_cpu` by `launch_foo`, for every op that spat.h declares."""
    ops = re.findall(r"^SPAT_DECLARE\((\w+), (\w+)\)", (CSRC / "spat.h").read_text(), re.MULTILINE)
    check = "void check(int error) { if (error) throw std::runtime_error(cuda_error_name(error)); }"
    function = "void {1}_cpu(const {0}& args, int64_t begin, int64_t) {{ if (begin == 0) check(launch_{1}(args, nullptr)); }}"
    body = [check, *(function.format(*op) for op in ops)]
    return "\n".join(['#include "spat.h"', "#include <stdexcept>", "namespace spat {", *body, "}"])


def compile_all(sources: list[Path], target: Path, *link_flags: str) -> Path:
    return native.compile_all(FLAGS, [*sources, HERE / "threads.cpp"], target, *link_flags)


def build(folder: Path) -> Path:
    """The extension module, in `folder`."""
    texts = {f"{file.name}.cpp": as_cpp(file) for file in CSRC.glob("*.cu")} | {"cpu_functions.cpp": cpu_functions()}
    stand_ins = {file.name for file in HERE.glob("*.cuh")}
    headers = {file.name: as_cpp(HERE / file.name if file.name in stand_ins else file) for file in CSRC.glob("*.cuh")}
    for name, text in {**texts, **headers}.items():
        (folder / name).write_text(text)
    sources = [CSRC / "bindings.cpp", CSRC / "winograd.cpp", *(folder / name for name in texts)]
    return compile_all(sources, folder / "_C.so", *native.AS_EXTENSION)
