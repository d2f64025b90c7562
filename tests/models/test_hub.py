"""Folders for the Hugging Face Hub: what is written loads to the same bits, nothing in it runs, and other folders are refused."""

import json
import math
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from spat_train.config import Config
from spat_train.data.images import Dataset, Images
from spat_train.errors import InputError
from spat_train.models import from_folder, from_pretrained, hub
from spat_train.models.checkpoints import load_checkpoint, load_model
from spat_train.models.hub import FORMAT, packed, published
from spat_train.models.run_config import checkpoint_file, run_config
from spat_train.models.weight_files import METADATA
from spat_train.models.wrapping import normalisation
from tests.helpers import edit_json
from tests.models.helpers import MEAN, STD, X, network, numbers, own, saved

SOFT = "tests.models.test_hub"


class Tied(nn.Module):
    """Two names for one weight, which safetensors refuses as it is; and a weight that is not contiguous."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)
        self.tied = nn.Linear(3 * 32 * 32, num_classes)
        self.tied.weight = self.head.weight
        self.mixing = nn.Parameter(torch.randn(4, num_classes).T)

    def forward(self, x):
        x = x.flatten(1)
        return (self.head(x) + self.tied(x)) * self.mixing.sum(1)


class Half(nn.Module):
    """Weights in bf16, which files hold in fp32."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes, dtype=torch.bfloat16)

    def forward(self, x):
        return self.head(x.flatten(1).bfloat16()).float()


def dataset(classes: int = 10, shape=(3, 32, 32)) -> Dataset:
    channels, height, width = shape
    images = Images(torch.zeros(1, height, width, channels, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    return Dataset("some", images, images, tuple(f"class {k}" for k in range(classes)))


def write(folder: Path, model: nn.Module, config: Config, data: Dataset | None = None, **how) -> Path:
    data = data or dataset()
    folder.mkdir()
    for name, content in packed(model, published(config), data.classes, data.image_shape, **{"trained": True} | how).items():
        (folder / name).write_bytes(content)
    return folder


def exported(tmp_path, net: nn.Module, **options) -> Path:
    """What is written of the model that `load_model` reads from a checkpoint."""
    path = own(tmp_path, net, **options)
    loaded, config = load_model(path, dataset(), options["model"])
    return write(tmp_path / "out", loaded, config)


def edit(folder: Path, **changes) -> None:
    edit_json(folder / "config.json", **changes)


def refused(folder, **how) -> str:
    with pytest.raises(InputError) as caught:
        from_folder(folder, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "wrn-10-1"},
        {"model": "wrn-10-1", "activation": "silu", "mean": tuple(MEAN), "std": tuple(STD)},
        {"model": "wrn-10-1", "classifier": "centres"},
        {"model": "preactresnet-18"},  # its weights alone do not say which
        {"model": "preactresnet-18/raw"},
        {"model": "timm:resnet10t"},
        {"model": "timm:resnet10t", "mean": tuple(MEAN), "std": tuple(STD), "activation": "gelu"},
        {"model": f"{SOFT}:Tied"},
        {"model": f"{SOFT}:Half"},
    ],
    ids=lambda options: "+".join(map(str, options.values()))[:30],
)
def test_equal_to_the_bit(tmp_path, options):
    changes = {name: value for name, value in options.items() if name != "model"}
    model = network(options["model"], **changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    out = exported(tmp_path, model, **options)
    before = torch.get_rng_state()
    loaded = from_folder(out, model=options["model"] if SOFT in options["model"] else None)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(m.training for m in loaded.modules())
    assert torch.equal(loaded(X), model(X))
    assert normalisation(loaded) == normalisation(model)
    # The plain state dict, which needs nothing of this package.
    plain = torch.load(out / "model.pt", weights_only=True)
    assert {t.dtype for t in plain.values()} <= {torch.float32, torch.int64}
    theirs = network(options["model"], seed=2, **changes)
    theirs.load_state_dict(plain)
    assert torch.equal(theirs(X), model(X))
    # As a checkpoint: for evaluate and --init.
    assert checkpoint_file(out) == out / "model.safetensors"
    others = network(options["model"], seed=3, **changes)
    load_checkpoint(others, checkpoint_file(out))
    assert torch.equal(others(X), model(X))
    assert load_model(out, dataset(), options["model"])[1] == run_config(out)


def test_what_the_files_hold(tmp_path):
    from safetensors import safe_open

    options = {"model": "wrn-10-1", "method": "trades", "eps": 4.0, "seed": 3}
    paths = {"data": "/home/me/pictures/", "init": "../home/me/other/best.pt", "extra": "home/more.npz"}
    out = exported(tmp_path, network(), **options, **paths, out="/home/me/run", device="cuda", root="/home/me/data")
    text = (out / "config.json").read_text()
    assert "home" not in text + str((out / "model.safetensors").read_bytes())
    content = json.loads(text)
    expected = {
        "library_name": "spat_kernels", "spat_kernels": version("spat_kernels"), "num_classes": 10, "image_shape": [3, 32, 32],
        "classes": [f"class {k}" for k in range(10)], "activation": "relu", "data": "pictures", "init": "best.pt",
        "extra": "more.npz",
    }  # fmt: skip
    assert {key: content[key] for key in expected | options} == expected | options
    assert not {"out", "device", "root", "resume", "tensorboard"} & content.keys()
    assert run_config(out) == run_config(out / "model.safetensors")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(network().state_dict())


def test_the_same_bytes_each_time(tmp_path):
    model, config = network(), Config(model="wrn-10-1")
    first = packed(model, config, "ab", (3, 32, 32), trained=True)
    for _ in range(5):
        assert packed(model, config, "ab", (3, 32, 32), trained=True) == first


def test_a_checkpoint_of_others(tmp_path):
    """With a normalisation in its file; config.json says of it what is known, and nothing of a training."""
    theirs = network(activation="silu")
    path = saved(tmp_path, numbers("mu", "sigma") | theirs.state_dict())
    model, config = load_model(path, dataset(), "wrn-10-1", activation="silu")
    assert config is None
    out = write(tmp_path / "out", model, Config(model="wrn-10-1", activation="silu", data="cifar10"), trained=False)
    loaded = from_folder(out)
    assert torch.equal(loaded(X), model(X))
    content = json.loads((out / "config.json").read_bytes())
    numbers_there = content["normalisation"]
    torch.testing.assert_close(torch.tensor(numbers_there["mean"] + numbers_there["std"]), torch.tensor(MEAN + STD))
    assert not {"method", "eps", "epochs"} & content.keys()


def test_code_runs_only_where_the_caller_repeats_its_name(tmp_path, monkeypatch):
    (tmp_path / "code_of_a_stranger.py").write_text(
        "import pathlib\nfrom torch import nn\npathlib.Path('ran').touch()\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    model.made_as = ("code_of_a_stranger:make", "relu", (3, 32, 32), 10)
    out = write(tmp_path / "out", model, Config(model="code_of_a_stranger:make"))
    assert "it names code, code_of_a_stranger:make, which would run: if you trust it, give model" in refused(out)
    assert "model.safetensors: it does not fit the model" in refused(out, model="wrn-10-1")
    assert not Path("ran").exists()
    assert torch.equal(from_folder(out, model="code_of_a_stranger:make")(X), model(X))
    assert Path("ran").exists()
    del sys.modules["code_of_a_stranger"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "out", network(), Config(model="wrn-10-1"))


@pytest.fixture
def copy(small, tmp_path):
    (tmp_path / "copy").mkdir()
    for path in small.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 12}, "no run or export writes num_classes=12: restore it, or export or download it again"),
        ({"num_classes": True}, "no run or export writes num_classes=True"),
        ({"classes": list(range(10))}, r"no run or export writes classes=\[0, 1"),
        ({"image_shape": [3, 32]}, r"no run or export writes image_shape=\[3, 32\]"),
        ({"image_shape": [3, 32, -1]}, r"no run or export writes image_shape=\[3, 32, -1\]"),
        ({"image_shape": [3, 10**5, 10**5]}, r"no run or export writes image_shape=\[3, 100000, 100000\]"),
        ({"image_shape": ...}, "no run or export writes image_shape=None"),
        ({"model": 3}, "no run or export writes model=3"),
        ({"mean": "a"}, "no run writes such a config .mean='a'"),
        ({"activation": "tanh"}, "no run writes such a config .activation='tanh'"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "do not belong together .mean, std differ."),
        ({"model": "timm:no-such"}, "do not belong together .model differ"),
        ({"model": "wrn-16-1"}, "do not belong together .model differ"),
        ({"activation": "silu"}, "do not belong together .activation differ"),
        ({"classes": [f"class {k}" for k in reversed(range(10))]}, "do not belong together .classes differ"),
        ({"image_shape": [3, 48, 48]}, "do not belong together .image_shape differ"),
        ({"num_classes": 3, "classes": ["a", "b", "c"]}, "do not belong together .num_classes, classes differ"),
        ({"format": "spat_train model 2"}, "of another version .spat_train model 2.: install a newer spat_kernels"),
        ({"format": ..., "model_type": "vit"}, "config.json: spat-train export did not write it: load the folder with"),
    ],
)
def test_edited_and_foreign_configs(copy, changes, message):
    if "timm" in str(changes):
        pytest.importorskip("timm")
    edit(copy, **changes)
    with pytest.raises(InputError, match=message) as caught:
        from_folder(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_folders(copy):
    weights, content = copy / "model.safetensors", (copy / "model.safetensors").read_bytes()
    for part in (content[: len(content) // 2], content[:-1], content[:100]):
        weights.write_bytes(part)
        assert f"checkpoint {weights}: it is cut short or damaged" in refused(copy)
    for at in (len(content) - 3, len(content) // 2):
        weights.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        assert "it is damaged (its weights differ from their SHA-256): copy or download it again" in refused(copy)
    weights.write_bytes(b"")
    assert "it is empty: copy or download it again" in refused(copy)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "it is a Git LFS pointer" in refused(copy)
    weights.unlink()
    assert refused(copy) == f"{copy}: there is no model.safetensors: give a folder that spat-train export wrote"
    (copy / "config.json").write_text('{"format": ')
    weights.touch()
    assert f"{copy / 'config.json'} cannot be read (JSONDecodeError)" in refused(copy)
    (copy / "config.json").unlink()
    assert "there is no config.json" in refused(copy)
    assert "there is no config.json" in refused("x" * 300)


def test_weights_of_another_export(small, copy, tmp_path):
    """They fit, and are of another function."""
    other = write(tmp_path / "other", network(activation="gelu"), Config(model="wrn-10-1", activation="gelu"))
    (copy / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert "do not belong together (activation differ)" in refused(copy)
    foreign = network().state_dict()
    save_file(foreign, copy / "model.safetensors")
    assert "do not belong together (format, " in refused(copy)


def rewrite(folder: Path, state: dict | None = None, **changes) -> None:
    """Both files, so that they agree."""
    edit(folder, **changes)
    about = {"format": FORMAT, "config": json.loads((folder / "config.json").read_bytes())}
    state = load_file(folder / "model.safetensors") if state is None else state
    save_file(state, folder / "model.safetensors", {METADATA: json.dumps(about)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.5], "std": [0.5]}, "mean=.*one number a channel"),
        ({"model": "wrn-11-1"}, "6n"),
        ({"model": "timm:no-such"}, "no such model"),
        ({"model": "wrn-16-1"}, "the file looks like this architecture in another depth"),
        ({"model": "dm-wrn-10-999"}, r"it has [0-9,]+ weights, the file [0-9,]+: give the network"),
        ({"model": "dm-wrn-10-1000000"}, "there is no such model"),
        ({"model": "dm-wrn-10-" + 30 * "9"}, "there is no such model"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "normalises images, with numbers that the file does not have"),
    ],
)
def test_hostile_folders(copy, changes, message):
    """Both files say it; nothing is allocated for what the file does not hold."""
    if "timm" in str(changes):
        pytest.importorskip("timm")
    rewrite(copy, **changes)
    assert re.search(message, refused(copy))


def test_memory_that_is_not_there(copy, monkeypatch):
    def full(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(hub, "matched", full)
    assert "can't allocate memory" in refused(copy)


def test_weights_that_are_nan(copy):
    model = network()
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] = math.nan
    rewrite(copy, model.state_dict())
    assert "it has weights that are NaN (" in refused(copy)
    with pytest.raises(InputError, match="wrn-10-1: it has weights that are NaN .*: take those of an earlier checkpoint"):
        packed(model, Config(model="wrn-10-1"), "ab", (3, 32, 32), trained=True)


def test_deep_json(copy):
    (copy / "config.json").write_text("[" * 100_000)
    assert "config.json cannot be read (RecursionError): restore it" in refused(copy)


def test_without_safetensors(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "needs safetensors, which is not installed: pip install safetensors" in refused(small)
    with pytest.raises(InputError, match="writing it needs safetensors, which is not installed: pip install safetensors"):
        packed(network(), Config(model="wrn-10-1"), "ab", (3, 32, 32), trained=True)


# ---- from the Hub, without a network


def cached(tmp_path, small: Path, commit: str = "a" * 40) -> Path:
    """A cache of huggingface_hub in which user/name is downloaded."""
    repo = tmp_path / "cache" / "models--user--name"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (repo / "blobs" / name).write_bytes((small / name).read_bytes())
        (repo / "snapshots" / commit / name).symlink_to(f"../../blobs/{name}")
    for ref in ("main", "v1"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return tmp_path / "cache"


def test_from_a_cache_of_the_hub(tmp_path, small):
    pytest.importorskip("huggingface_hub")
    cache = cached(tmp_path, small)
    for revision in (None, "v1", "a" * 40):
        model = from_pretrained("user/name", cache_dir=cache, local_files_only=True, revision=revision)
        assert torch.equal(model(X), network()(X))
    for repo, revision in (("user/other", None), ("user/name", "v2"), ("no/such/folder", None)):
        with pytest.raises(InputError, match="cannot be downloaded .*: give an existing folder, or USER/NAME") as caught:
            from_pretrained(repo, cache_dir=cache, local_files_only=True, revision=revision)
        assert str(caught.value).startswith(f"{repo}: ")
        assert "\n" not in str(caught.value)


def test_what_is_downloaded(small, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    seen = []
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **how: seen.append((repo, how)) or str(small))
    assert torch.equal(from_pretrained("user/name")(X), network()(X))
    from_pretrained("user/name", revision="v1", cache_dir="c", local_files_only=True, token="t")
    files = {"allow_patterns": ["config.json", "model.safetensors"]}
    assert seen[0] == ("user/name", files | {"revision": None, "cache_dir": None, "local_files_only": False, "token": None})
    assert seen[1] == ("user/name", files | {"revision": "v1", "cache_dir": "c", "local_files_only": True, "token": "t"})
    assert torch.equal(from_pretrained(small, local_files_only=True)(X), network()(X))
    assert len(seen) == 2
    for given in ({"revision": "v1"}, {"cache_dir": "c"}, {"token": "t"}):
        with pytest.raises(InputError, match=f"{next(iter(given))}: .* is a folder, of which nothing is downloaded: leave"):
            from_pretrained(small, **given)


def test_a_download_that_breaks_off(monkeypatch):
    """Whatever the HTTP library raises."""
    hub = pytest.importorskip("huggingface_hub")

    class ReadError(Exception):
        pass

    def broken(*args, **how):
        raise ReadError("peer closed connection")

    monkeypatch.setattr(hub, "snapshot_download", broken)
    with pytest.raises(InputError, match="cannot be downloaded .ReadError: peer closed connection.: give an existing folder"):
        from_pretrained("user/name")


def test_without_huggingface_hub(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="user/name: there is no such folder, .*: pip install huggingface_hub"):
        from_pretrained("user/name")
    assert torch.equal(from_pretrained(os.fspath(small))(X), network()(X))


@pytest.mark.parametrize(
    "theirs", [{"architectures": ["ViTForImageClassification"]}, {"model": "wrn-10-1", "activation": "silu"}]
)
def test_the_folder_of_another_library(tmp_path, theirs):
    """As a checkpoint it needs the name of its architecture, like any file of others, and it is no run."""
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert "spat-train export did not write it" in refused(tmp_path)
    with pytest.raises(InputError, match="it does not say which architecture it is: give --model-name"):
        load_model(tmp_path, dataset())
    assert torch.equal(load_model(tmp_path, dataset(), "wrn-10-1")[0](X), network()(X))
