"""`import spat_train`: its functions, that each says how it is called, and that the import itself needs nothing."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spat_train

ROOT = Path(spat_train.__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_import_is_cheap_and_needs_no_extra():
    missing = "import sys; sys.modules |= dict.fromkeys(('torchvision', 'tyro', 'matplotlib', 'sklearn', 'tqdm'));"
    done = run(missing + "import spat_train; print('torch' in sys.modules, spat_train.Config(data='digits').data)")
    assert (done.returncode, done.stdout) == (0, "False digits\n"), done.stderr
    done = run(missing + "from spat_train.__main__ import main; main()")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "spat-train: error: tyro is not installed: pip install 'spat_kernels[train]'\n"


@pytest.mark.parametrize("name", spat_train.__all__)
def test_every_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(spat_train, name))
    assert name in dir(spat_train)
    with pytest.raises(AttributeError, match="module 'spat_train' has no attribute"):
        getattr(spat_train, f"{name}_")


def test_train_save_load_and_evaluate(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    config = spat_train.Config(
        data="digits", model="small-cnn", eps=51, epochs=1, limit=120, device="cpu", test=False, track="none",
        out=tmp_path / "run",
    )  # fmt: skip
    result = spat_train.train(config)
    assert isinstance(result, spat_train.Result)
    data = spat_train.load_data("digits", limit=20)
    model, saved = spat_train.load_model(tmp_path / "run", data)
    same = spat_train.create_model("small-cnn", 10, (1, 8, 8)).eval()
    spat_train.load_checkpoint(same, tmp_path / "run" / "best.pt")
    for network in (model, same):
        torch.testing.assert_close(network.state_dict(), result.model.state_dict(), rtol=0, atol=0)
    assert saved == config
    x, y = data.test.pixels.permute(0, 3, 1, 2) / 255, data.test.labels
    evaluation = spat_train.evaluate(model, (x, y), "fgsm,pgd-20", eps=0.2)
    assert isinstance(evaluation, spat_train.Evaluation)
