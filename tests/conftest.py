"""Seeds, devices, worker processes, and what several folders of tests share.

Where there is no GPU, Triton interprets its kernels (TRITON_INTERPRET must be set before the first import of triton).
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
os.environ["TEARDOWN_CUPTI"] = "0"  # CUPTI that starts a second time, after CUDA graphs, has crashed

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from torch import nn

import spat_kernels


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    """Without -n: a worker for each core, up to 8; one process on a GPU, as sanitizers and profilers look at no other."""
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:  # or in what a worker's test started
        return
    option = config.option
    if option.numprocesses is None and not option.usepdb and not torch.cuda.is_available():
        option.numprocesses = min(len(os.sched_getaffinity(0)), 8)
    if option.numprocesses and option.dist == "no":
        option.dist = "worksteal"


def pytest_configure(config):
    """In a checkout, its own spat_kernels comes before an installed one: without the extension, references test themselves."""
    if spat_kernels._library.BACKEND == "auto" and spat_kernels._library.compiled is None:
        raise pytest.UsageError(f"{spat_kernels.__path__[0]} is not compiled: run pip install -e '.[test]' in the checkout")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def pytest_collection_modifyitems(items):
    # The longest come first, or one worker would end with them while the others wait.
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.path.name == "test_cuda_on_cpu.py"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_choices(tmp_path_factory):
    """Which kernels do convolutions is chosen by the tests themselves, and not kept for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPAT_KERNELS_CACHE", str(tmp_path_factory.mktemp("choices")))
        yield


@pytest.fixture
def one_thread():
    """Tiny models gain nothing from more, and forked processes must not inherit a pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """A folder of small trained runs; what tests write into it, such as evaluations, must not change what others find."""
    from tests.papers.finished_runs import write_runs

    return write_runs(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def big_npz(tmp_path):
    """200 MB of uncompressed images."""
    pixels = np.zeros((65_000, 32, 32, 3), np.uint8)
    pixels[777] = 7
    labels = np.arange(65_000) % 10
    path = tmp_path / "big.npz"
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:10], y_test=labels[:10])
    return path


@pytest.fixture
def pictures(tmp_path):
    """train/ and val/ with classes cat and dog, 3 and 2 pictures of each, of different sizes and kinds."""
    pytest.importorskip("torchvision", exc_type=Exception)
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                array = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                picture = image.fromarray(array) if i else image.fromarray(array[..., 0])
                picture.save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture(scope="session")
def task():
    """Digits, and a network in fp64 trained on them for a moment."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    x, y = torch.tensor(digits.images).unsqueeze(1) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(256, 10)).double()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model, x[:500], y[:500]
