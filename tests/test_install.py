"""What a build refuses, in one line with the remedy; what sdists and wheels hold; the package without its extra or extension."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")
NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1";;
  --list-gpu-code) for n in 80 86 90 100 120; do echo sm_$n; echo compute_$n; done;;
  --dryrun*) echo "#$ _HERE_=/opt/cuda/bin" >&2;;
  *) exit 3;;
esac
"""

WORKING = NVCC.format(release="12.9")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Runs setup.py with an nvcc of its own on the path, and returns what it hands to setuptools."""
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setattr(setuptools, "__version__", "81.0.0")  # the build's, not necessarily that of the tests
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "SPAT_CUDA", "CXX"):
        monkeypatch.delenv(name, raising=False)

    def run(nvcc=WORKING, **variables):
        (tmp_path / "cuda" / "bin").mkdir(parents=True)
        program = tmp_path / "cuda" / "bin" / "nvcc"
        program.write_text(nvcc)
        program.chmod(0o755)
        for name, value in ({"CUDA_HOME": str(tmp_path / "cuda")} | variables).items():
            monkeypatch.setenv(name, value)
        runpy.run_path("setup.py")
        return given

    return run


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere: there is no bin/nvcc: .*unset it, or build without .*SPAT_CUDA=0"),
        ({"nvcc": NVCC.format(release="11.8")}, "is of CUDA 11.8: give 12.0 or later"),
        ({"nvcc": "#!/bin/sh\necho 'Segmentation fault'; exit 139"}, "nvcc --version fails .Segmentation fault.: mend it"),
        ({"nvcc": "#!/nowhere/sh"}, "nvcc --version fails .*No such file.*: mend it"),
        ({"nvcc": "#!/bin/sh\nexit 0"}, "names no release"),
        ({"TORCH_CUDA_ARCH_LIST": "All"}, "no architecture All: give some of 8.0, 8.6, 9.0, 10.0, 12.0, such as 8.0;9.0;10.0"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;3.5"}, "no architecture 3.5"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS=0: give the number of compilers at once, at least 1"),
        ({"MAX_JOBS": "all"}, "MAX_JOBS=all"),
        ({"SPAT_CUDA": "off"}, "SPAT_CUDA=off: give 0, 1, or leave it out"),
    ],
)
def test_a_build_that_cannot_succeed_says_why(build, variables, message):
    with pytest.raises(SystemExit, match=f"^spat_kernels cannot be built: .*{message}") as leaving:
        build(**variables)
    assert "\n" not in str(leaving.value)


@pytest.mark.parametrize(("module", "old"), [(setuptools, "76.1"), (torch, "2.10.0")])
def test_old_packages_are_named(build, monkeypatch, module, old):
    """Without build isolation, pip takes what is installed."""
    monkeypatch.setattr(module, "__version__", old)
    with pytest.raises(SystemExit, match=f"{module.__name__} {old}.* is too old: pip install '{module.__name__}>="):
        build()


@pytest.mark.parametrize(
    ("archs", "built"),
    [(None, "sm_80 sm_90 sm_100 compute_100"), ("8.0;9.0a+PTX;", "sm_80 sm_90a compute_90a"), (" 8.6, 12.0 ", "sm_86 sm_120")],
)
def test_architectures(build, archs, built):
    (extension,) = build(**({"TORCH_CUDA_ARCH_LIST": archs} if archs else {}))["ext_modules"]
    assert f'-DSPAT_CUDA="12.9 {built}"' in extension.extra_compile_args
    assert "-L/opt/cuda/lib64" in extension.extra_link_args


@pytest.mark.parametrize("archs", [None, "8.0"])
def test_files_for_one_architecture(build, monkeypatch, tmp_path, archs):
    """`*_sm90a.cu` is for sm_90a alone, whatever else is built for."""
    command = build(**({"TORCH_CUDA_ARCH_LIST": archs} if archs else {}))["cmdclass"]["build_ext"](setuptools.Distribution())
    command.build_temp, calls = str(tmp_path), []
    monkeypatch.setattr(subprocess, "call", lambda words: calls.append(words) or 0)
    for name in ("conv_sm90a.cu", "linf.cu"):
        assert command.compile_cuda(Path("csrc", name)).endswith(f"{name}.o")
    special, other = ([word for word in words if "gencode" in word] for words in calls)
    assert special == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert other[0] == "-gencode=arch=compute_80,code=sm_80"
    assert not any("90a" in word for word in other)


def test_without_cuda(build):
    (extension,) = build(SPAT_CUDA="0", CUDA_HOME="/nowhere")["ext_modules"]
    assert not any("cudart" in word or "SPAT_CUDA" in word for word in extension.extra_link_args + extension.extra_compile_args)


def test_an_isolated_build_holds_what_setup_imports():
    """In exact versions, which setup.py takes."""
    requires = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    imported = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert "torch" in imported
    versions = dict(re.findall(r'"(\w+)==([\d.]+)"', requires))
    assert imported - sys.stdlib_module_names <= versions.keys()
    assert requires.count('"') == 2 * len(versions)


def test_a_failing_compiler_ends_the_build(build, tmp_path):
    command = build(CXX="no-such-compiler -O2")["cmdclass"]["build_ext"](setuptools.Distribution())
    with pytest.raises(SystemExit, match="no C.. compiler no-such-compiler: install"):
        command.build_extension(None)
    command.build_temp = str(tmp_path)
    with pytest.raises(SystemExit, match="nvcc fails on csrc/linf.cu, as it says above: .*SPAT_CUDA=0"):
        command.compile_cuda(Path("csrc/linf.cu"))


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


# ---- what is handed out

FOLDERS = ("csrc", "spat_kernels", "spat_train", "benchmarks", "tests", ".ci")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "CITATION.cff", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
EXTENSION = importlib.util.find_spec("spat_kernels._C")
# setup.py with the installed extension in place of a compiled one, since two compilations would take minutes.
BUILD = """
import os, runpy, setuptools, shutil, sys

extension, umask, setup = sys.argv[1], sys.argv[2], setuptools.setup

def with_extension(**given):
    class Built(given["cmdclass"]["build_ext"]):
        def build_extension(self, ext):
            target = self.get_ext_fullpath(ext.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(extension, target)

    setup(**given | {"cmdclass": given["cmdclass"] | {"build_ext": Built}})

os.umask(int(umask, 8))
setuptools.setup, sys.argv = with_extension, ["setup.py", "-q", "sdist", "bdist_wheel"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def two_builds(tmp_path_factory):
    """The folders `dist` of two copies of this checkout: with other paths, times and modes, and one with leftovers."""
    first, second = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two") / "deeper"
    for copy in (first, second):
        for name in FOLDERS:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in FILES:
            shutil.copy(ROOT / name, copy)
    for path in (*second.rglob("*.py"), *second.rglob("*.md")):
        path.chmod(0o600)
        os.utime(path, (1e9, 1e9))
    leftover = second / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "spat_kernels" / "gone.py"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    environment = {name: value for name, value in os.environ.items() if name not in ("SOURCE_DATE_EPOCH", "PYTHONPATH")}
    builds = [
        subprocess.Popen([sys.executable, "-c", BUILD, EXTENSION.origin, umask], cwd=copy, env=environment | {"SPAT_CUDA": "0"})
        for copy, umask in ((first, "022"), (second, "077"))
    ]
    assert [build.wait() for build in builds] == [0, 0]
    return first / "dist", second / "dist"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.tar.gz", "*.whl"])
def test_equal_sources_give_equal_bytes(two_builds, kind):
    first, second = (next(folder.glob(kind)) for folder in two_builds)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_an_sdist_can_build_and_test_itself(two_builds):
    with tarfile.open(next(two_builds[0].glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[-1] for name in archive.getnames()}
        assert {(entry.uid, entry.uname, entry.mtime) for entry in archive} == {(0, "", 315532800)}
    inside = {str(p.relative_to(ROOT)) for name in FOLDERS for p in (ROOT / name).rglob("*") if p.is_file()}
    assert {*FILES, *(name for name in inside if "__pycache__" not in name and not name.endswith(".so"))} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_a_wheel_is_the_two_packages_and_one_library(two_builds):
    with zipfile.ZipFile(next(two_builds[1].glob("*.whl"))) as wheel:
        held = {entry.filename: entry for entry in wheel.infolist()}
        for name in held:
            assert str(two_builds[1].parent).encode() not in wheel.read(name), name
    about = f"spat_kernels-{version('spat_kernels')}.dist-info"
    files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    packages = {str(p.relative_to(ROOT)) for name in ("spat_kernels", "spat_train") for p in (ROOT / name).rglob("*.py")}
    typed = {"spat_kernels/py.typed", "spat_train/py.typed"}
    assert held.keys() == {"spat_kernels/_C.abi3.so", *packages, *typed, *(f"{about}/{name}" for name in files)}
    modes = {entry.external_attr >> 16 & 0o777 for name, entry in held.items() if not name.endswith((".so", "RECORD"))}
    assert modes == {0o644}


def test_the_extension_names_no_folder_and_needs_torch_alone():
    """What could differ between two builds, or load another library than torch and the system's."""
    content = Path(EXTENSION.origin).read_bytes()
    for folder in {ROOT, Path(torch.__file__).parent, Path(sys.prefix)}:
        assert f"{folder}/".encode() not in content, f"built with {folder} inside: build it again"
    headers = subprocess.run(["readelf", "-d", EXTENSION.origin], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", headers))
    assert needed - {"ld-linux-x86-64.so.2", "libdl.so.2", "librt.so.1", "libpthread.so.0"} <= {
        "libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10_cuda.so",
        "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6",
    }  # fmt: skip
    assert "libtorch.so" in needed
    assert "PATH)" not in headers  # neither RPATH nor RUNPATH


def test_licences_of_dependencies_are_listed():
    """Each once, and as it says itself where it is installed."""
    given = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    project, requirements = given["project"], given["build-system"]["requires"]
    requirements += project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Licences")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w[\w.-]*) \| (.+) \|$", table, re.MULTILINE)[1:]
    listed = [(name, licence) for licence, names in rows for name in names.split(", ")]
    assert sorted(name for name, _ in listed) == sorted({re.match(r"[\w-]+", r)[0] for r in requirements} - {project["name"]})
    for name, licence in listed:
        with suppress(PackageNotFoundError):
            said = metadata(name)
            words = [said["License-Expression"], (said["License"] or "")[:60], *said.get_all("Classifier", [])]
            assert re.search({"PSF": "PSF|Python Software Foundation"}.get(licence, licence.split("-")[0]), str(words)), name


@pytest.mark.parametrize("use", ["import spat_kernels", "from spat_train.__main__ import main; main()"])
def test_a_checkout_that_was_not_built_does_not_run_in_silence(use):
    script = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "spat_kernels._C" else find(name, *rest)
{use}
"""
    done = run("-c", script, cwd=ROOT)
    *before, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert "is a checkout, not the installed spat_kernels" in last
    assert "pip install -e ." in last
    assert not before or use == "import spat_kernels"


@pytest.mark.parametrize("package", ["tyro", "tqdm"])
def test_the_command_without_its_extra(package):
    script = f"""
import sys
sys.modules[{package!r}], sys.argv = None, ["spat-train", "presets"]
from spat_train.__main__ import main
main()
"""
    done = run("-c", script, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"spat-train: error: {package} is not installed: pip install 'spat_kernels[train]'\n"


def test_the_command_is_a_module_too(monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr(sys, "argv", ["spat-train", "--version"])
    runpy.run_module("spat_train", run_name="__main__")
    assert capsys.readouterr().out == f"spat_kernels {version('spat_kernels')}, torch {torch.__version__}\n"


def test_the_command_whose_reader_leaves():
    """As in `spat-train attacks | head`."""
    pytest.importorskip("tyro")
    command = subprocess.Popen(
        [sys.executable, "-m", "spat_train", "attacks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait() == 141
