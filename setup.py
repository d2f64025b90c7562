"""Build csrc/ into spat_kernels/_C.abi3.so: CPU code always, CUDA code wherever nvcc is found (no GPU is needed).

CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the architectures ("8.0;9.0;10.0+PTX"), MAX_JOBS the number of compilers at
once. SPAT_CUDA=0 leaves CUDA out, SPAT_CUDA=1 insists on it. Files named *_sm90a.cu are for sm_90a alone, whatever the list says.

Equal sources give byte-identical wheels and sdists, whatever their folder, owner, times and modes. With CUDA, the folder's path
must be equal too: nvcc names kernels by its hash. SOURCE_DATE_EPOCH is the time of all files in them, in seconds since 1970.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
import torch
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = sorted(map(str, Path("csrc").iterdir()))  # the headers and .cu files too, for the sdist
TORCH_TARGET = "0x020b000000000000"  # runs on torch 2.11 and later
WITHOUT = "or build without CUDA kernels by SPAT_CUDA=0"


def need(condition, message):
    """Leave with one line where `condition` does not hold."""
    if not condition:
        sys.exit(f"spat_kernels cannot be built: {message}")


def find_nvcc():
    wish, home = os.environ.get("SPAT_CUDA", ""), os.environ.get("CUDA_HOME")
    need(wish in ("", "0", "1"), f"SPAT_CUDA={wish}: give 0, 1, or leave it out")
    if wish == "0":
        return None
    places = [f"{home}/bin"] if home else ["/usr/local/cuda/bin", *os.get_exec_path()]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    need(found or not home, f"CUDA_HOME={home}: there is no bin/nvcc: name the CUDA toolkit, unset it, {WITHOUT}")
    need(found or wish != "1", "SPAT_CUDA=1, but there is no nvcc: name the CUDA toolkit by CUDA_HOME, or leave SPAT_CUDA out")
    return found


def nvcc(*arguments):
    """What nvcc prints."""
    try:
        done = subprocess.run([NVCC, *arguments], capture_output=True, text=True)
        answer, failed = done.stdout + done.stderr, done.returncode
    except OSError as error:
        answer, failed = str(error), True
    reason = (answer.strip().splitlines() or ["no output"])[-1]
    need(not failed, f"{NVCC} {' '.join(arguments)} fails ({reason}): mend it, name another toolkit by CUDA_HOME, {WITHOUT}")
    return answer


def gencode():
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, and their short names."""
    known, codes = set(re.findall(r"sm_(\d+)", nvcc("--list-gpu-code"))), []
    default = "8.0;9.0;10.0+PTX" if "100" in known else "8.0;9.0+PTX"
    for arch in re.findall(r"[^\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or default):
        number = arch.removesuffix("+PTX").replace(".", "")
        need(
            number.rstrip("af") in known,
            f"TORCH_CUDA_ARCH_LIST: {NVCC} has no architecture {arch}: give some of "
            f"{', '.join(f'{n[:-1]}.{n[-1]}' for n in sorted(known, key=int))}, such as {default}, {WITHOUT}",
        )
        codes += [(number, f"sm_{number}")] + [(number, f"compute_{number}")] * arch.endswith("+PTX")
    return [f"-gencode=arch=compute_{n},code={c}" for n, c in codes], " ".join(c for _, c in codes)


class Build(BuildExtension):
    """The .cu files hold no torch header, so plain nvcc compiles them, whichever torch is installed."""

    def build_extension(self, ext):
        compiler = (os.environ.get("CXX") or "c++").split()[0]
        need(shutil.which(compiler), f"there is no C++ compiler {compiler}: install g++, or name one by CXX")
        print(f"spat_kernels: CPU kernels, and {f'CUDA {CUDA} by {NVCC}' if NVCC else 'no CUDA kernels (no nvcc found)'}")
        with ThreadPoolExecutor(int(JOBS)) as pool:  # as many as torch's build takes
            ext.extra_objects += pool.map(self.compile_cuda, sorted(Path("csrc").glob("*.cu")) if NVCC else [])
        super().build_extension(ext)

    def compile_cuda(self, source):
        target = Path(self.build_temp, source.name).with_suffix(".cu.o").absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
        archs = ["-gencode=arch=compute_90a,code=sm_90a"] if source.stem.endswith("_sm90a") else ARCHS
        failed = subprocess.call([NVCC, *flags, *archs, "-c", str(source), "-o", str(target)])
        need(not failed, f"nvcc fails on {source}, as it says above: name another toolkit by CUDA_HOME, {WITHOUT}")
        return str(target)


class Wheel(bdist_wheel):
    """Without leftovers of earlier builds, and with modes that do not depend on the umask. Its times are SOURCE_DATE_EPOCH."""

    def run(self):
        if not self.skip_build:
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def write_wheelfile(self, *arguments, **options):
        super().write_wheelfile(*arguments, **options)
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


class Sdist(sdist):
    """A .tar.gz of names and contents alone: all files have the same owner and time."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **_):
        need(format == "gztar", f"--formats {format}: give gztar, or leave it out")
        self.mkpath(self.dist_dir)
        with (
            open(f"{base_name}.tar.gz", "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=EPOCH) as packed,
            tarfile.open(fileobj=packed, mode="w", dereference=True) as archive,  # contents, where files are linked
        ):
            archive.add(base_dir, filter=self.plain)
        return file.name

    @staticmethod
    def plain(entry):
        entry.mtime, entry.mode = EPOCH, 0o755 if entry.mode & 0o100 else 0o644
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry


os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # 1980, the first year that wheels can hold
need(os.environ["SOURCE_DATE_EPOCH"].isdecimal(), "SOURCE_DATE_EPOCH: give a number of seconds since 1970, or unset it")
EPOCH = int(os.environ["SOURCE_DATE_EPOCH"])
JOBS = os.environ.get("MAX_JOBS") or str(os.cpu_count())
need(JOBS.isdecimal() and int(JOBS), f"MAX_JOBS={JOBS}: give the number of compilers at once, at least 1, or unset it")
releases = [tuple(map(int, re.findall(r"\d+", module.__version__)[:2])) for module in (setuptools, torch)]
need(releases[0] >= (77, 0), f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")
need(releases[1] >= (2, 11), f"torch {torch.__version__} is too old: pip install 'torch>=2.11'")

target = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DPy_LIMITED_API=0x030a0000"]
# No path of this computer: messages of torch's headers have their file's, debug information has all.
named = {Path.cwd(): ".", Path(torch.__file__).parent: "torch"}
paths = ["-g0", *(f"-ffile-prefix-map={folder}={name}" for folder, name in named.items())]
compile_args = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-Wno-psabi", *paths, *target]
link_args = ["-Wl,--no-as-needed", "-ltorch"]  # keeps libtorch_cuda, where there is one, within reach of the weak symbol
link_args += ["-Wl,-s"]  # no symbols, since nvcc puts its process's id into them
if NVCC := find_nvcc():
    release = re.search(r"release (\d+)\.(\d+)", nvcc("--version"))
    need(release, f"{NVCC} --version names no release: name a CUDA toolkit by CUDA_HOME, {WITHOUT}")
    need(int(release[1]) >= 12, f"{NVCC} is of CUDA {release[1]}.{release[2]}: give 12.0 or later by CUDA_HOME, {WITHOUT}")
    toolkit = Path(re.search(r"_HERE_=(.*)", nvcc("--dryrun", "-x", "cu", os.devnull))[1]).parent  # NVCC may be a wrapper script
    ARCHS, names = gencode()
    CUDA = f"{release[1]}.{release[2]} {names}"
    compile_args.append(f'-DSPAT_CUDA="{CUDA}"')
    link_args += [f"-L{toolkit}/lib64", f"-L{toolkit}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

extension = CppExtension("spat_kernels._C", [f for f in SOURCES if f.endswith(".cpp")], py_limited_api=True, depends=SOURCES,
                         extra_compile_args=compile_args, extra_link_args=link_args)  # fmt: skip
setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": Build, "bdist_wheel": Wheel, "sdist": Sdist},
                 options={"bdist_wheel": {"py_limited_api": "cp310"}})  # fmt: skip
