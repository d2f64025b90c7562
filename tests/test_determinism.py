"""The same bits again: what benchmarks/NOTES.md says under "Determinism" and no other test has, and that it names its tests."""

import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases import CASES
from spat_kernels.fused_conv import choose
from spat_kernels.input_gradient.fused_steps import Engines
from tests.attacks.test_contract import attackable, every_attack, seeded

ROOT = Path(__file__).parents[1]
ONE_OF_EACH = {case.op: case for case in CASES if case.build and "host" not in case.variant}


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic():
    """As PyTorch documents it; what is allocated is filled with NaN too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", ONE_OF_EACH)
def test_ops_do_not_depend_on_the_number_of_threads(op):
    case, found = ONE_OF_EACH[op], []
    for count in (1, 2, 3):
        with threads(count):
            torch.manual_seed(0)
            found.append(case.build(case.shape).ours().clone())
    assert found[0].numel() > 1000
    assert all(torch.equal(found[0], other) for other in found[1:])


@every_attack
def test_attacks_give_the_same_bits_under_deterministic_algorithms(name):
    model, x, y = attackable(8)
    expected = seeded(name, 5)(model, x, y)
    with deterministic():
        assert torch.equal(seeded(name, 5)(model, x, y), expected)


def test_no_convolution_is_chosen_by_time_where_pytorch_is_to_be_deterministic(monkeypatch):
    monkeypatch.setattr(choose, "chooser", SimpleNamespace(applies=lambda device: True))

    def active(fuse):
        return Engines(fuse, torch.device("cuda")).active

    assert active("auto")
    with deterministic():
        assert not active("auto")
        assert active(True), "asked for by name"
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert not active("auto")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_repeats_to_the_bit(tmp_path, precision):
    """With other names, other numbers of readers, and under deterministic algorithms too."""
    for package in ("sklearn", "tyro", "tqdm"):
        pytest.importorskip(package)
    from spat_train.training.trainer import train
    from tests.training.helpers import EVERYTHING, assert_same, settings, weights

    config = settings(tmp_path / "one", epochs=2, precision=precision, **EVERYTHING)
    train(config)
    train(replace(config, out=tmp_path / "two", stream=True, workers=1))
    with deterministic():
        train(replace(config, out=tmp_path / "three"))
    one, *others = (weights(tmp_path / name) for name in ("one", "two", "three"))
    for other in others:
        for part in ("model", "optimizer", "ema", "best", "processes"):
            assert_same(one[part], other[part])


@pytest.mark.gpu
def test_a_training_repeats_on_the_gpu(tmp_path, monkeypatch):
    for package in ("sklearn", "tyro", "tqdm"):
        pytest.importorskip(package)
    from spat_train.training.trainer import train
    from tests.training.helpers import EVERYTHING, assert_same, settings, weights

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    for name in ("one", "two"):
        train(settings(tmp_path / name, epochs=2, device="cuda", **EVERYTHING))
    assert_same(weights(tmp_path / "one")["model"], weights(tmp_path / "two")["model"])


def test_the_page_names_a_test_for_each_line():
    page = (ROOT / "benchmarks" / "NOTES.md").read_text().split("\n## Determinism\n")[1].split("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for path, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / path).read_text(), re.MULTILINE), (path, test)
