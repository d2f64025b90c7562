"""Files from strangers: each reader gives what is in them, or refuses by an InputError that names the file."""

import copy
import io
import json
import pickle
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from spat_train.config import Config
from spat_train.data import shards
from spat_train.data.npz_files import load_npz
from spat_train.data.pictures import decode
from spat_train.data.pseudo_labels import load_extra
from spat_train.errors import InputError
from spat_train.models.hub import from_folder, packed
from spat_train.models.registry import create
from spat_train.models.run_config import run_config
from spat_train.models.weight_files import read_weights
from spat_train.runtime.json_files import DIGEST
from spat_train.runtime.logs import read as read_log
from spat_train.sweeps import spec
from tests.fuzz.campaign import Target

# ---- files as they should be


def _npz(compressed: bool, **arrays) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def _pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def _data(compressed: bool) -> bytes:
    labels = np.arange(6) % 2
    return _npz(compressed, x_train=_pixels(6), y_train=labels, x_test=_pixels(6), y_test=labels)


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_pixels(1)[0]).save(file, kind)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(4):
            for name, content in ((f"{i}.png", _picture("png")), (f"{i}.cls", str(i % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _checkpoint() -> bytes:
    file, model = io.BytesIO(), torch.nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "epoch": 3, "config": {"lr": 0.1}, "names": ["a", "b"]}, file)
    return file.getvalue()


@cache
def _exported() -> dict[str, bytes]:
    """The files of an export."""
    config = Config(model="mnist-cnn/1", data="mnist")
    model = create("mnist-cnn/1", num_classes=3, image_shape=(1, 28, 28))
    return packed(model, config, ["a", "b", "c"], (1, 28, 28), trained=False)


CONFIG = {
    "format": "spat_train 1",
    "model": "small-cnn",
    "data": "digits",
    "method": "trades",
    "epochs": 3,
    "mean": [0.5],
    "lr": 0.1,
    "eps": 8.0,
}
EVENT = {"epoch": 1, "loss": 0.5, "lr": 0.1, "clean": 50.0, "pgd": 5.0}
LOG = "\n".join(json.dumps({"kind": kind, "step": step} | EVENT) for step in range(3) for kind in ("train", "validation"))
YAML = """base: {data: digits, epochs: 2, method: trades}
grid: {alpha: [0.0, 0.2], seed: [0, 1]}
hypotheses:
- {factor: alpha, better: 0.2, than: 0.0}
"""


# by kind: file's name, its content, what reads it
KINDS = {
    "npz": ("data.npz", lambda: _data(False), load_npz),
    "compressed npz": ("data.npz", lambda: _data(True), load_npz),
    "extra npz": ("extra.npz", lambda: _npz(False, image=_pixels(5), label=np.arange(5) % 2), lambda p: _extra(p)),
    "extra pickle": (
        "extra.pickle",
        lambda: pickle.dumps({"data": _pixels(5), "extrapolated_targets": np.arange(5) % 2}),
        lambda p: _extra(p),
    ),
    "shard": ("0.tar", _tar, lambda p: _shards(p)),
    "png": ("a.png", lambda: _picture("png"), lambda p: decode(p.read_bytes())),
    "jpeg": ("a.jpg", lambda: _picture("jpeg"), lambda p: decode(p.read_bytes())),
    "checkpoint": ("a.pt", _checkpoint, read_weights),
    "safetensors": ("a.safetensors", lambda: save({"a": torch.ones(3), "b": torch.zeros(2, 2)}), read_weights),
    "config": ("config.json", lambda: json.dumps(CONFIG).encode(), lambda p: run_config(p.parent)),
    "log": ("log.jsonl", lambda: LOG.encode(), lambda p: read_log(p.parent, "train")),
    "export": ("model.safetensors", lambda: _exported()["model.safetensors"], lambda p: _export(p)),
    "export config": ("config.json", lambda: _without_digest(_exported()["config.json"]), lambda p: _export(p)),
    "sweep": ("sweep.yaml", lambda: YAML.encode(), lambda p: spec.read(str(p))),
}


def _without_digest(content: bytes) -> bytes:
    return json.dumps({name: value for name, value in json.loads(content).items() if name != DIGEST}, indent=1).encode()


def _extra(path: Path):
    return load_extra(path, image_shape=(1, 8, 8), num_classes=2)


def _export(path: Path):
    for name, content in _exported().items():
        if name != path.name:
            (path.parent / name).write_bytes(content)
    return from_folder(path.parent)


def _shards(path: Path):
    return shards.load(str(path), shards.find(str(path), ("test",)), ("test",), 8, False)


STRUCTURED = ("config", "export config", "log", "sweep")

# ---- changes

INTS = [0, 1, 255, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]
VALUES = (
    None,
    True,
    -1,
    0,
    1e999,
    float("nan"),
    2**70,
    "",
    "x",
    "../../etc",
    "a.b:c",
    [],
    {},
    [[]],
    {"a": 1},
    [1, "x"],
    10**400,
    "\0",
    "9" * 5000,
)


@st.composite
def inputs(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    place = st.floats(0, 1, exclude_max=True)
    edits = {
        "flip": st.tuples(st.just("flip"), place, st.integers(0, 7)),
        "byte": st.tuples(st.just("byte"), place, st.integers(0, 255)),
        "word": st.tuples(st.just("word"), place, st.sampled_from(INTS)),
        "cut": st.tuples(st.just("cut"), place),
        "drop": st.tuples(st.just("drop"), place, st.integers(1, 64)),
        "again": st.tuples(st.just("again"), place, st.integers(1, 512)),
        "insert": st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8)),
        "zeros": st.tuples(st.just("zeros"), place),
    }
    value = st.tuples(st.just("value"), place, st.sampled_from(range(len(VALUES))))
    usual = st.one_of(*edits.values())
    return kind, draw(st.lists(usual | value if kind in STRUCTURED else usual, max_size=3))


def changed(content: bytes, edits: list) -> bytes:
    for what, place, *more in edits:
        at, data = int(place * max(1, len(content))), bytearray(content)
        if what == "flip":
            data[at : at + 1] = bytes(b ^ 1 << more[0] for b in data[at : at + 1])
        elif what == "byte":
            data[at : at + 1] = bytes(more)
        elif what == "word":
            data[at : at + 4] = more[0].to_bytes(4, "little")
        elif what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + more[0]]
        elif what == "again":
            data[at:at] = data[at : at + more[0]]
        elif what == "insert":
            data[at:at] = more[0]
        elif what == "zeros":
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        else:
            data = bytearray(_with_value(content, place, VALUES[more[0]]))
        content = bytes(data)
    return content


def _with_value(content: bytes, place: float, value) -> bytes:
    """JSON, or lines of it, with one value replaced by another."""
    lines = content.split(b"\n")
    chosen = int(place * len(lines))
    try:
        document = json.loads(lines[chosen])
    except ValueError:
        return content.replace(b"0", json.dumps(value).encode(), 1)
    if not isinstance(document, dict) or not document:
        return content
    document = copy.deepcopy(document)
    keys = sorted(document)
    document[keys[int(place * 997) % len(keys)]] = value
    lines[chosen] = json.dumps(document).encode()
    return b"\n".join(lines)


CONTENTS: dict[str, bytes] = {}
FOLDER: list[tempfile.TemporaryDirectory] = []  # of this process


def trial(given) -> str:
    kind, edits = given
    name, make, read = KINDS[kind]
    if kind not in CONTENTS:
        CONTENTS[kind] = make()
    if not FOLDER:
        FOLDER.append(tempfile.TemporaryDirectory())
    path = Path(FOLDER[0].name) / kind.replace(" ", "-") / name
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.iterdir():  # such as copies made of other contents
        old.unlink()
    path.write_bytes(changed(CONTENTS[kind], edits))
    try:
        read(path)
    except InputError as error:
        assert "\n" not in str(error), f"{kind}: more than one line: {str(error)[:200]!r}"
        assert name in str(error), f"{kind}: the file is not named: {str(error)[:200]}"
        return "refused"
    except Exception as error:
        if kind in ("png", "jpeg") and not isinstance(error, MemoryError):  # what its callers name the picture in
            return "refused"
        raise AssertionError(f"{kind}: {type(error).__name__}: {str(error)[:200]}") from error
    return "held"


FILES = Target(inputs(), trial)
