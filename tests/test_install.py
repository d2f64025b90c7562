"""What a build refuses, in one line with the remedy; what an sdist holds; and the package without its extra or its extension."""

import re
import runpy
import subprocess
import sys
import tarfile
from importlib.metadata import version
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
    monkeypatch.setattr(setuptools, "__version__", "77.0.3")  # the build's, not necessarily that of the tests
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
    requires = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    imported = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert "torch" in imported
    assert imported - sys.stdlib_module_names <= set(re.findall(r'"(\w+)', requires))


def test_a_failing_compiler_ends_the_build(build, tmp_path):
    command = build(CXX="no-such-compiler -O2")["cmdclass"]["build_ext"](setuptools.Distribution())
    with pytest.raises(SystemExit, match="no C.. compiler no-such-compiler: install"):
        command.build_extension(None)
    command.build_temp = str(tmp_path)
    with pytest.raises(SystemExit, match="nvcc fails on csrc/linf.cu, as it says above: .*SPAT_CUDA=0"):
        command.compile_cuda(Path("csrc/linf.cu"))


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


@pytest.mark.slow
def test_an_sdist_can_build_and_test_itself(tmp_path):
    script = (
        f"import runpy, sys; sys.argv = ['setup.py', '-q', 'egg_info', '-e', {str(tmp_path)!r}, 'sdist', '-d', {str(tmp_path)!r}]"
    )
    done = run("-c", f"{script}; runpy.run_path('setup.py', run_name='__main__')", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[-1] for name in archive.getnames()}
    folders = ("csrc", "spat_kernels", "spat_train", "benchmarks", "tests")
    wanted = {
        str(p.relative_to(ROOT))
        for folder in folders
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".typed")
    }
    assert wanted <= held
    assert {
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
        ".ci/run",
    } <= held


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
