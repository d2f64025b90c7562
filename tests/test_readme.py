"""Every block of README.md runs as pasted, on small inputs: code, commands, the rows of tables, and the tree of the layout."""

import re
import shlex
import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spat_kernels

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from sklearn.datasets import load_digits

from spat_train import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
MY_MODEL = next(text for language, text in BLOCKS if text.startswith("# my_model.py"))
SHELL = [
    [shlex.split(part, comments=True) for line in text.splitlines() for part in line.split(" && ")]
    for language, text in BLOCKS
    if language == "bash"
]
PYTHON = [text for language, text in BLOCKS if language == "python" and text != MY_MODEL]
# The options that make a command small, in place of those in the README.
SMALL = {
    "train": {"--data": "small.npz", "--model": "small-cnn", "--epochs": "1", "--limit": "60", "--batch-size": "20",
              "--milestones": "None", "--device": "cpu", "--precision": "fp32", "--image-size": "None", "--crop": "None",
              "--warmup": "0"},
    "demo": {"--epochs": "1", "--limit": "60"},
    "evaluate": {"--limit": "4", "--device": "cpu"},
    "table": {"--data": "small.npz", "--test-images": "4", "--device": "cpu"},
    "figure": {"--test-images": "4", "--device": "cpu"},
    "sweep": {"--dry-run": ""},
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with small.npz, 10 classes of images [32, 32, 3], and MNIST's files, both of digits."""
    monkeypatch.chdir(tmp_path)
    pictures, y = load_digits(return_X_y=True)
    images, y = (16 * pictures[:200]).clip(0, 255).astype(np.uint8).reshape(-1, 8, 8), y[:200]
    colour = np.repeat(np.kron(images, np.ones((4, 4), np.uint8))[..., None], 3, axis=3)
    np.savez("small.npz", x_train=colour[:100], y_train=y[:100], x_test=colour[100:], y_test=y[100:])
    grey = np.pad(np.kron(images, np.ones((3, 3), np.uint8)), ((0, 0), (2, 2), (2, 2)))
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for name, rows in (("train", slice(100)), ("t10k", slice(100, 200))):
        header = struct.pack(">IIII", 2051, *grey[rows].shape)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + grey[rows].tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 100) + y[rows].astype(np.uint8).tobytes())
    Path("my_model.py").write_text(MY_MODEL)
    return tmp_path


def spat_train(monkeypatch, command: str, *words: str) -> None:
    """The command in this process, with its options of SMALL."""
    small, rest = SMALL.get(command, {}), [word for word in words if word != "--download"]
    for option in small.keys() & set(rest):
        at = rest.index(option)
        del rest[at : at + 2]
    monkeypatch.setattr(sys, "argv", ["spat-train", command, *rest, *filter(None, chain(*small.items()))])
    cli.main()


def run(monkeypatch, program: str, *words: str) -> None:
    """A command of the README. Installing, and the tests themselves, are checked and not run."""
    if program == "pip":
        assert words[0] == "install"
        extra = words[-1].removeprefix(".[").removesuffix("]")
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    elif program == "pytest":
        assert not words
    elif program == "python":
        subprocess.run([sys.executable, *words], check=True)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words)
        assert parsed.no_python
        run(monkeypatch, parsed.training_script, *parsed.training_script_args)
    else:
        assert program == "spat-train"
        spat_train(monkeypatch, *words)


def test_python_blocks(here):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    names = {"spat_kernels": spat_kernels, "model": model, "x": torch.rand(4, 3, 32, 32), "y": torch.randint(10, (4,))}
    assert [len(blocks) for blocks in (PYTHON, SHELL)] == [4, 5]
    for block in PYTHON:
        for library in re.findall(r"compat\.(foolbox|art) ", block):
            pytest.importorskip(library)
        exec(compile(block, "README.md", "exec"), names)


def test_commands(here, monkeypatch):
    for block in SHELL:
        for words in block:
            run(monkeypatch, *words)
    reports = ["report/report.html", "my_model-evaluation/report.html"]
    for written in (
        *reports,
        "mine.json",
        "figure.png",
        "curves.png",
        "tables/table-6.1.md",
        "figures/figure-budget.json",
        "mine/README.md",
    ):
        assert Path(written).is_file(), written


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`spat-train ([a-z]+)`", README))))
def test_commands_in_the_text(command, monkeypatch, capsys):
    spat_train(monkeypatch, command)
    assert len(capsys.readouterr().out.splitlines()) > 3


SLOW = {"AutoAttack": [pytest.mark.slow]}  # torchattacks' Square, with 5,000 queries
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in README.splitlines() if re.match(r"\| `\w+\(", line)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [pytest.param(row[0].strip("`"), row[2].strip("`| "), marks=SLOW.get(row[0][1:11], [])) for row in ROWS],
)
@pytest.mark.filterwarnings("ignore")  # AutoAttack's, on a network that was not trained
def test_attacks_in_the_table(ours, theirs):
    """Ours and torchattacks' leave about as many images right, and are equal where nothing is random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
    x = torch.rand(64, 3, 4, 4)
    y = model(x).argmax(1)
    names = {"model": model, "x": x, "y": y}
    x_adv = eval(ours, vars(spat_kernels) | names)
    right = int((model(x_adv).argmax(1) == y).sum())
    assert x_adv.shape == x.shape
    if not theirs:
        return
    torchattacks = pytest.importorskip("torchattacks")
    expected = eval(theirs, vars(torchattacks) | names)
    assert 0 < right < 64
    assert right == pytest.approx(int((model(expected).argmax(1) == y).sum()), abs=4)
    if theirs.startswith(("FGSM", "BIM")):
        torch.testing.assert_close(x_adv, expected, atol=1e-6, rtol=0)


def test_the_layout_is_that_of_the_repository():
    (tree,) = (text for _, text in BLOCKS if text.startswith("csrc/"))
    folder = ROOT
    for line in tree.splitlines():
        path, words = line.split(maxsplit=1)
        room = folder / path if line.startswith(" ") else ROOT / path
        folder = folder if line.startswith(" ") else room
        assert room.is_dir(), line
        for file in re.findall(r"\w+\.(?:py|md)", words):
            assert (room / file).is_file(), line


def test_the_citation_is_of_this_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f'\nversion: "{version}"\n' in (ROOT / "CITATION.cff").read_text()
