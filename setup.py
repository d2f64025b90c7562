"""Build csrc/ into spat_kernels/_C.abi3.so: CPU code always, CUDA code wherever nvcc is found (no GPU is needed).

CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the architectures ("8.0;9.0;10.0+PTX"), SPAT_CUDA=0 leaves CUDA out.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = sorted(map(str, Path("csrc").iterdir()))  # the headers and .cu files too, for the sdist
TORCH_TARGET = "0x020b000000000000"  # runs on torch 2.11 and later
PLACES = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
NVCC = None if os.environ.get("SPAT_CUDA") == "0" else shutil.which("nvcc", path=os.pathsep.join(PLACES))


def gencode():
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, and their short names."""
    codes = []
    for arch in re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS):
        number = arch.removesuffix("+PTX").replace(".", "")
        codes += [(number, f"sm_{number}")] + [(number, f"compute_{number}")] * arch.endswith("+PTX")
    return [f"-gencode=arch=compute_{n},code={c}" for n, c in codes], " ".join(c for _, c in codes)


class Build(BuildExtension):
    """The .cu files hold no torch header, so plain nvcc compiles them, whichever torch is installed."""

    def build_extension(self, ext):
        print(f"spat_kernels: CPU kernels, and {f'CUDA {CUDA} by {NVCC}' if NVCC else 'no CUDA kernels (no nvcc found)'}")
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:  # as many as torch's build takes
            ext.extra_objects += pool.map(self.compile_cuda, sorted(Path("csrc").glob("*.cu")) if NVCC else [])
        super().build_extension(ext)

    def compile_cuda(self, source):
        target = Path(self.build_temp, source.name).with_suffix(".cu.o").absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++20", "-fmad=false", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
        subprocess.check_call([NVCC, *flags, *gencode()[0], "-c", str(source), "-o", str(target)])
        return str(target)


target = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DPy_LIMITED_API=0x030a0000"]
compile_args = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-Wno-psabi", *target]
link_args = ["-Wl,--no-as-needed", "-ltorch"]  # keeps libtorch_cuda, where there is one, within reach of the weak symbol
if NVCC:
    plan = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"_HERE_=(.*)", plan)[1]).parent  # NVCC itself may be a wrapper script
    release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([NVCC, "--version"], text=True)).groups()
    DEFAULT_ARCHS = "8.0;9.0;10.0+PTX" if tuple(map(int, release)) >= (12, 8) else "8.0;9.0+PTX"
    CUDA = f"{'.'.join(release)} {gencode()[1]}"
    compile_args.append(f'-DSPAT_CUDA="{CUDA}"')
    link_args += [f"-L{toolkit}/lib64", f"-L{toolkit}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

extension = CppExtension("spat_kernels._C", [f for f in SOURCES if f.endswith(".cpp")], py_limited_api=True, depends=SOURCES,
                         extra_compile_args=compile_args, extra_link_args=link_args)  # fmt: skip
setup(ext_modules=[extension], cmdclass={"build_ext": Build}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
