"""Files of weights: averaged ones, unsafe, damaged and foreign ones. No code in a file runs."""

import os
import random
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from spat_train.errors import InputError
from spat_train.models.checkpoints import load_checkpoint
from spat_train.models.weight_files import read_file, read_weights
from spat_train.runtime.run_folder import FORMAT, RunFolder
from tests.models.helpers import X, network, prefixed, refusal, same, saved


def test_averaged_weights(tmp_path):
    state, averaged = network(seed=1).state_dict(), network(seed=2).state_dict()
    for content in ({"format": "spat_train", "model": state, "ema": averaged}, {"state_dict": state, "state_dict_ema": averaged}):
        path = saved(tmp_path, content)
        for weights, expected in {"auto": averaged, "ema": averaged, "model": state}.items():
            model = network(seed=3)
            load_checkpoint(model, path, weights=weights)
            assert same(model, expected)
            assert read_weights(path, weights)["conv1.weight"].equal(expected["conv1.weight"])


def test_weights_that_the_file_does_not_have(tmp_path):
    path = saved(tmp_path, {"num_classes": 10, "state_dict": prefixed("module.", network().state_dict()), "ema": None})
    assert "no averaged weights: use weights='model'" in refusal(network(seed=2), path, weights="ema")
    with pytest.raises(ValueError, match="weights='best': give 'auto', 'model' or 'ema'"):
        read_weights(path, "best")
    path = saved(tmp_path, {"ema": network().state_dict(), "net": None})
    assert "it holds no weights" in refusal(network(seed=2), path, weights="model")


def test_weights_outlive_the_file(tmp_path):
    """What was read can be written to the same file."""
    state = network().state_dict()
    path = saved(tmp_path, state)
    torch.save({"net": read_weights(path)}, path)
    model = network(seed=2)
    load_checkpoint(model, path)
    assert same(model, state)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_safetensors(tmp_path, monkeypatch, name):
    torch_files = pytest.importorskip("safetensors.torch")
    theirs, model = network(), network(seed=2)
    torch_files.save_file(theirs.state_dict(), tmp_path / name)
    load_checkpoint(model, tmp_path / name)
    assert torch.equal(model(X), theirs(X))
    (tmp_path / "short.safetensors").write_bytes((tmp_path / name).read_bytes()[:5000])
    assert "it is cut short or damaged" in refusal(model, tmp_path / "short.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refusal(model, tmp_path / name)


# ---- none or several networks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"model": s, "ema": {"decay": 0.9, "shadow_params": [*s.values()]}}, "'ema', for averaged weights, has none"),
        (lambda s: {"model": s, "model_ema": [*s.values()]}, "'model_ema', for averaged weights, has none with names"),
        (lambda s: {"student": s, "teacher": s}, "it holds several networks (student, teacher): save the state_dict of one"),
        (lambda s: {"model": s, "ema": np.ones(3)}, "'ema', for averaged weights, has none with names"),
        (lambda s: {"run": {"model": s, "ema": {"shadow_params": [*s.values()]}}}, "'ema', for averaged weights, has none"),
        (lambda s: {"model": s, "ema.shadow_params": [*s.values()]}, "'ema.shadow_params', for averaged weights, has none"),
        (lambda s: {"model": {"mine": s}, "teacher": s}, "it holds several networks (model.mine, teacher)"),
        (lambda s: {"model": s, "ema_0.999": s, "ema_0.9999": s}, "it holds several networks (ema_0.999, ema_0.9999)"),
        (lambda s: {"ema": s, "swa": s}, "it holds several networks (ema, swa): save the state_dict of one"),
        (lambda s: {"epoch": 3, "optimizer": {}}, "no weights (its entries: epoch, optimizer): save model.state_dict()"),
        (lambda s: {"state_dict": {}}, "no weights (its entries: state_dict)"),
        (lambda s: [1, 2], "no weights (a list)"),
        (lambda s: torch.ones(3), "no weights (a Tensor)"),
    ],
)  # fmt: skip
def test_no_network_or_several(tmp_path, content, message):
    assert message in refusal(network(seed=2), saved(tmp_path, content(network().state_dict())))


def test_dicts_that_hold_themselves(tmp_path):
    """Neither a cycle, deep lists, nor those that are shared billions of times take long."""
    state, cycle, deep, shared, wide = network().state_dict(), [], [], [1], {f"{k}": 1 for k in range(400)}
    cycle.append(cycle)
    for _ in range(600):
        deep = [deep]
    for _ in range(60):
        shared = [shared, shared]
    for _ in range(3):
        wide = {f"{k}": wide for k in range(400)}
    itself = {("a", "b"): 1}
    itself["ema"] = itself
    limit = sys.getrecursionlimit()
    for odd in (cycle, deep, shared):
        sys.setrecursionlimit(10 * limit)  # for torch.save
        path = saved(tmp_path, {"ema": odd, "model": state})
        sys.setrecursionlimit(limit)
        assert read_weights(path).keys() == state.keys()
    assert "it holds no weights (its entries: a tuple, ema)" in refusal(network(), saved(tmp_path, itself))
    assert "it holds too many other entries" in refusal(network(), saved(tmp_path, wide))


# ---- files that are something else, damaged or unsafe


class Payload:
    """Its unpickling would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


class Other:
    pass


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(("extra", "refused"), [(Payload(), "mkdir"), (Other(), "Other"), (nn.Linear(2, 2), "Linear")])
def test_unsafe_pickles(tmp_path, monkeypatch, extra, refused, old_format):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": network().state_dict(), "extra": extra}
    message = refusal(network(seed=2), saved(tmp_path, content, _use_new_zipfile_serialization=not old_format))
    assert f"{refused}, which was refused: only weights are read" in message
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_files_that_are_something_else(tmp_path):
    path, state = tmp_path / "weights.pt", network().state_dict()
    whole = saved(tmp_path, state).read_bytes()
    old = saved(tmp_path, state, _use_new_zipfile_serialization=False).read_bytes()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("arrays.npy", b"1")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    contents = {
        b"\n<!DOCTYPE html><html><title>Virus scan warning</title>": "it is a web page",
        b'<?xml version="1.0"?><Error>AccessDenied</Error>': "it is a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "it is a Git LFS pointer",
        b"": "it is empty",
        b"PK\x03\x04 cut short": "it is cut short or damaged (a zip without its end, 14 bytes)",
        b"not weights at all": "cannot be read",
        **{whole[: int(kept * len(whole))]: "it is cut short or damaged" for kept in (0.01, 0.5, 0.99)},
        **{old[: int(kept * len(old))]: "cannot be read" for kept in (0.01, 0.5, 0.99)},
        b"\x80\x02]q\x00.": "cannot be read",
        (tmp_path / "other.zip").read_bytes(): "it is a zip file of other things (arrays.npy)",
        (tmp_path / "script.pt").read_bytes(): "it is a TorchScript archive",
    }
    for content, message in contents.items():
        path.write_bytes(content)
        assert message in refusal(network(), path)
    for name, message in {"nowhere.pt": "there is no such file", "x" * 300: "no such file", ".": "it is a folder"}.items():
        assert message in refusal(network(), tmp_path / name)


def test_parts_that_would_take_any_memory(tmp_path):
    """torch.save writes parts one after the other as they are: others may grow a thousandfold, or hold the same bytes often."""
    path = saved(tmp_path, {"format": FORMAT, "weight": torch.zeros(10_000)})
    with zipfile.ZipFile(path) as parts:
        content = {part.filename: parts.read(part) for part in parts.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in content.items():
            packed.writestr(name, data)
    assert "it is damaged (" in (message := refusal(network(), path))
    assert "torch.save neither compresses parts nor lets them overlap" in message
    path.rename(tmp_path / "last.pt")
    with pytest.raises(InputError, match="last.pt is damaged .*neither compresses parts"):
        RunFolder(tmp_path).open(resume=True)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_was_read_stays_when_the_file_changes(tmp_path, suffix):
    """It is not mapped: a file that is cut short then would end the process."""
    path, state = tmp_path / f"a.{suffix}", {"weight": torch.rand(100, 1000)}
    torch.save(state, path) if suffix == "pt" else pytest.importorskip("safetensors.torch").save_file(state, path)
    read = read_file(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(read["weight"], state["weight"])


def test_every_flipped_bit_is_found(tmp_path):
    """In the contents of the zip, which torch.load takes as they are; no checksum at all is let through."""
    file = tmp_path / "last.pt"
    content = {"format": FORMAT, "id": "1", "weight": torch.randn(20, 20), "progress": {"epoch": 3}}
    torch.save(content, file)
    whole, generator = file.read_bytes(), random.Random(0)
    with zipfile.ZipFile(file) as parts:
        spans = {i.filename: (whole.index(parts.read(i), i.header_offset), i.file_size) for i in parts.infolist()}
    for start, size in spans.values():
        for _ in range(20):
            flipped = bytearray(whole)
            flipped[start + generator.randrange(size)] ^= 1 << generator.randrange(8)
            file.write_bytes(flipped)
            for read in (lambda: load_checkpoint(nn.Linear(2, 2), file), lambda: RunFolder(tmp_path).open(resume=True)):
                with pytest.raises(InputError, match="damaged|cannot be read|another|other things"):
                    read()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(RunFolder(tmp_path).open(resume=True)["weight"], content["weight"])
