"""`spat-train evaluate` and `spat-train attacks`."""

import base64
import html
import io
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import Dataset
from spat_train.evaluation import evaluate as module
from spat_train.evaluation.attack_specs import NAMED
from spat_train.evaluation.command import default_folder
from spat_train.evaluation.result import WORST
from spat_train.models.checkpoints import load_model
from spat_train.training.trainer import train
from tests.evaluation.helpers import EPS, FEATURES, Features, command, error, fitted, quiet, write_run
from tests.helpers import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def a_run(tmp_path) -> Path:
    """A folder as a run leaves it, of a model that is fitted."""
    return write_run(tmp_path / "run")


@pytest.fixture
def evaluating(monkeypatch, capsys, a_run):
    """A function that evaluates the run, or `path`, and returns what evaluation.json in --out holds, and what was printed."""

    def run(*arguments, path=a_run, out=None) -> tuple[dict, str]:
        out = out or default_folder(path, None)
        command(monkeypatch, "evaluate", path, *arguments, "--out", out, "--device", "cpu")
        return json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail), capsys.readouterr().out

    return run


OPTIONS = ("--limit", 60, "--attacks", "noise,fgsm,pgd-10,pgd-l2-10", "--eps-l2", 1, "--device", "cpu", "--batch-size", 32)


def test_the_report(monkeypatch, capsys, a_run):
    image = pytest.importorskip("PIL.Image")
    command(monkeypatch, "evaluate", a_run, *OPTIONS)
    out, folder = capsys.readouterr().out, a_run / "evaluation"
    names = {"evaluation.json", "report.html", "report.md", "samples.jsonl", "settings.json", "alarms"}
    assert {path.name for path in folder.iterdir()} == names
    assert f"{folder / 'report.html'} written" in out

    model, _ = load_model(a_run, load("digits"), FEATURES)
    rows = torch.from_numpy(np.random.default_rng(0).permutation(450)[:60])
    expected = quiet(model, load("digits").test, OPTIONS[3], eps_l2=1.0, rows=rows, batch_size=32)
    assert expected.table() in out
    assert "ALARM" not in out

    saved = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert saved["settings"] == expected.settings
    assert saved["about"]["network"] == "tests.evaluation.helpers:Features"
    assert {"spat_kernels", "torch"} <= saved["versions"].keys()
    assert saved["attacks"]["fgsm"]["source"].startswith("Goodfellow")
    assert saved["results"]["pgd-10"]["interval"] == list(expected.interval("pgd-10"))
    assert saved["results"][WORST]["accuracy"] == expected.worst_case()
    assert [s["row"] for s in saved["samples"]] == rows.tolist()
    assert len(saved["alarms"]) == 14
    typed = shlex.join(["spat-train", "evaluate", *map(str, (a_run, *OPTIONS)), "--model-name", FEATURES])
    assert saved["about"]["command"] == typed
    assert saved["about"]["hardware"].endswith("1 threads")
    for i, sample in enumerate(saved["samples"]):
        assert sample["predicted"] == {name: int(p[i]) for name, p in expected.predicted.items()}
        assert sample["broken_by"] == [name for name in expected.attacks if not expected.correct(name)[i]]

    report = (folder / "report.md").read_text()
    for name in (*expected.attacks, WORST):
        low, high = expected.interval(name)
        assert f"| {name} | {expected.accuracy(name):.2f} | {low:.2f} to {high:.2f} |" in report
    assert f"```\n{typed}\n```" in report
    assert re.search(r"^\| date \| \d{4}-\d\d-\d\d \d\d:\d\d UTC \|$", report, re.MULTILINE)

    text = (folder / "report.html").read_text()
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert f"<pre>{html.escape(typed)}</pre>" in text
    assert text.count("<table") == text.count('<div class="wide"><table>') == 4
    assert not re.search(r"http|url\(|@import|href|srcset|<(script|link|iframe|object|embed|base)|src=\"(?!data:)", text)
    examples = [(name, e) for name, found in expected.examples.items() for e in found]
    assert len(pictures) == 3 * len(examples) >= 24
    for i, (name, example) in enumerate(examples):
        original, adversarial, difference = (np.array(image.open(io.BytesIO(p))) for p in pictures[3 * i : 3 * i + 3])
        clean = load("digits").test.pixels[rows[example.index], :, :, 0].numpy()
        assert (original == clean).all()
        assert (adversarial == example.image[..., 0].numpy()).all()
        moved = np.sign(adversarial.astype(int) - clean)
        # Half grey is 128; a difference of a level may round to it.
        assert ((np.sign(difference.astype(int) - 128) == moved) | (abs(adversarial.astype(int) - clean) < 2)).all()
        row, true, wrong = int(rows[example.index]), *(int(t[example.index]) for t in (expected.labels, expected.predicted[name]))
        assert f"image {row}: {true}, predicted {wrong};" in text


def test_stopped_the_command_goes_on(monkeypatch, capsys, a_run, tmp_path):
    options = (*OPTIONS, "--out", tmp_path / "stopped")
    add, count = module.Samples.add, iter(range(100))

    def stopping(self, record):
        add(self, record)
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit_info:
        patched.setattr(module.Samples, "add", stopping)
        command(monkeypatch, "evaluate", a_run, *options)
    assert exit_info.value.code == 143
    assert "the same command continues" in capsys.readouterr().err
    stopped = (tmp_path / "stopped" / "samples.jsonl").read_bytes()
    assert stopped.count(b"\n") == 4
    command(monkeypatch, "evaluate", a_run, *options)
    assert (tmp_path / "stopped" / "samples.jsonl").read_bytes().startswith(stopped)
    assert (tmp_path / "stopped" / "report.html").exists()


class Normalised(Features):
    """Takes images that were normalised; then it is as good as `fitted`."""

    def forward(self, x):
        return super().forward(0.05 * x + 1)


NORMALISED = "tests.evaluation.test_command:Normalised"


def test_a_black_box_by_command(monkeypatch, capsys, a_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(a_run, other)
    torch.save(fitted(1).state_dict(), other / "best.pt")
    options = (*OPTIONS[:2], "--attacks", "pgd-10", "--source", other, "--device", "cpu", "--source-name", FEATURES)
    command(monkeypatch, "evaluate", a_run, *options)
    assert default_folder(tmp_path / "a.pth", tmp_path / "b.pth") == tmp_path / "a-evaluation-from-b"
    report = (a_run / "evaluation-from-other" / "report.md").read_text()
    assert not (a_run / "evaluation").exists()
    assert all(text in report for text in ("black box", "black box is weaker than white box", str(other)))
    assert "ALARM" not in capsys.readouterr().out


def test_models_that_take_normalised_images(evaluating, a_run, tmp_path):
    torch.save(fitted(1).state_dict(), tmp_path / "theirs.pth")
    options = (*OPTIONS[:2], "--attacks", "fgsm", "--source", tmp_path / "theirs.pth", "--source-name", NORMALISED, "--no-alarms")
    _, out = evaluating(*options, "--model-name", NORMALISED)
    own, source = [line for line in out.splitlines() if line.startswith("ALARM")]
    assert own.startswith("ALARM: expected that clean accuracy is beyond chance; found clean ")
    assert "chance 10 %" in own
    assert "(--mean, --std)" in own
    assert "expected that the source's clean accuracy is beyond chance" in source
    assert "(--source-mean, --source-std)" in source
    assert "| ALARM | clean accuracy is beyond chance |" in (a_run / "evaluation" / "report.md").read_text()
    options += ("--source-mean", 1, "--source-std", 0.05, "--source-activation", "relu")
    saved, out = evaluating(*options, out=tmp_path / "mended")
    assert saved["about"]["source's normalisation"] == "mean 1, std 0.05"
    assert saved["about"]["source's network"].endswith("with relu")
    assert "ALARM" not in out


def test_checkpoints_and_data_of_somebody_else(evaluating, monkeypatch, capsys, a_run, tmp_path):
    theirs, options = tmp_path / "theirs.pth", ("--limit", 20, "--attacks", "fgsm", "--no-alarms")
    torch.save({"state_dict": fitted().state_dict()}, theirs)
    saved, _ = evaluating("--data", "digits", *options, path=theirs)
    assert saved["settings"]["eps"] == 8 / 255
    assert saved["results"]["clean"]["accuracy"] > 80
    saved, _ = evaluating(*options, path=a_run / "best.pt", out=tmp_path / "file")  # the checkpoint of a run has its config
    assert saved["settings"]["eps"] == EPS
    edit_json(a_run / "config.json", data="gone.npz")
    message = error(monkeypatch, capsys, "evaluate", a_run)
    assert "was trained on --data gone.npz; give --data where that is now (" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "pgd-21"], "attack pgd-21: there is none"),
        (["--eps", "0.03"], "--eps 0.03: it is in 1/255"),
        (["--limit", "0"], "--limit 0"),
        (["--device", "teapot"], "--device teapot"),
        (["--precision", "tf32", "--device", "cpu"], "--precision tf32: TF32 is for GPUs"),
        (["--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
        (["--model-name", "wrn-33-10"], "as wrn-33-10 for digits"),
        (["--model-name", "small-cnn"], r"run as small-cnn for digits \(10 classes, images \[1, 8, 8\]\).*does not fit"),
        (["--source", "nowhere"], "nowhere: there is no such run or checkpoint"),
        (["--source", ".."], "no best.pt, last.pt or model.safetensors"),
        (["--source-mean", "0.5"], "--source-mean, --source-std: give the --source that they are of, or leave them out"),
        (["--source", ".", "--source-name", FEATURES, "--source-mean", "0.5"], "--source-mean, --source-std: . has a config"),
        (["--source", "theirs.pth"], "theirs.pth: it does not say which architecture it is: give --source-name"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, a_run, arguments, message):
    monkeypatch.chdir(a_run)
    torch.save(fitted().state_dict(), "theirs.pth")
    assert re.search(message, error(monkeypatch, capsys, "evaluate", a_run, *arguments))
    assert not (a_run / "evaluation").exists()


def test_test_images_alone_leave_the_number_of_classes_to_the_model(evaluating, a_run):
    data = load("digits").test
    some = data.labels < 3
    np.savez(a_run / "test.npz", x_test=data.pixels[some], y_test=data.labels[some].to(torch.uint8))
    saved, _ = evaluating("--data", a_run / "test.npz", *OPTIONS)
    assert saved["classes"] == list("0123456789")
    assert saved["results"]["clean"]["accuracy"] > 80


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant", "bee", "cat"], None),
        ([], None),  # numbers
        (["ant", "bee", "dog"], "lacks cat, has dog, which it was not trained on"),
        (["ant", "bee"], "lacks cat"),
        (["bee", "ant", "cat"], "has another order"),
    ],
)
def test_classes_of_other_names_are_refused(evaluating, monkeypatch, capsys, tmp_path, names, message):
    data = load("digits")
    of_three = [images.subset((images.labels < 3).nonzero()[:, 0]) for images in (data.train, data.test)]
    test = of_three[1].subset((of_three[1].labels < (len(names) or 3)).nonzero()[:, 0])
    named = {"classes": np.array(names)} if names else {}
    np.savez(tmp_path / "other.npz", x_test=test.pixels, y_test=test.labels, **named)
    config = Config(
        data="digits", model="tests.evaluation.helpers:Maps", method="fgsm", limit=100, epochs=1, milestones=(1,), device="cpu",
        test=False, track="none", out=tmp_path / "trained", eps=8,
    )  # fmt: skip
    train(config, Dataset("three", *of_three, ("ant", "bee", "cat")))
    arguments = ("--attacks", "fgsm", "--limit", 20, "--no-alarms", "--model-name", config.model)
    other = tmp_path / "other.npz"
    for source in ((), ("--source", config.out, "--source-name", config.model)):
        if message is None:
            evaluating("--data", other, *arguments, *source, path=config.out, out=tmp_path / f"found{len(source)}")
        else:
            capsys.readouterr()
            expected = f"--data {other}: its classes are not those of {config.out} (it {message}): give both the same names, and"
            assert expected in error(monkeypatch, capsys, "evaluate", config.out, "--data", other, *arguments, *source)


def test_the_list_of_attacks(monkeypatch, capsys):
    command(monkeypatch, "attacks")
    text = capsys.readouterr().out
    listed = re.findall(r"^([\w+-]+) +[\w:]", text, re.MULTILINE)
    assert set(NAMED) <= set(listed)
    assert "\nls, lsce          alpha  " in text


def test_out_of_memory_says_what_to_change(monkeypatch, capsys, a_run):
    def no_memory(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    arguments = monkeypatch, capsys, "evaluate", a_run, "--device", "cpu", "--limit", 10
    monkeypatch.setattr(module, "broken_by", no_memory)
    assert error(*arguments).endswith("lower it, in another --out\n")
    monkeypatch.setattr(module, "predict", no_memory)  # of the first batch as it is: nothing is left behind
    assert error(*arguments, "--out", a_run / "none").endswith("--batch-size 256: out of memory on cpu: lower it\n")
    assert not (a_run / "none").exists()


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_run_of_such_a_model(tmp_path, monkeypatch, capsys, channels_last):
    config = Config(
        data="digits", model="tests.evaluation.helpers:Maps", method="fgsm", limit=100, epochs=1, milestones=(1,), device="cpu",
        test=False, track="none", channels_last=channels_last, out=tmp_path / "run",
    )  # fmt: skip
    train(config)
    assert ("fails on channels_last: it gets contiguous images" in capsys.readouterr().err) is channels_last
    options = ("--attacks", "fgsm", "--limit", 20, "--no-alarms", "--device", "cpu", "--model-name", config.model)
    command(monkeypatch, "evaluate", tmp_path / "run", *options)
    assert "| memory format | contiguous |" in (tmp_path / "run" / "evaluation" / "report.md").read_text()


def test_it_says_which_epoch_is_attacked(evaluating, tmp_path):
    config = Config(
        data="digits", model="tests.evaluation.helpers:Maps", limit=100, steps=1, epochs=3, device="cpu", test=False,
        track="none", out=tmp_path / "trained",
    )  # fmt: skip
    best = train(config).best["epoch"]
    arguments = ("--attacks", "fgsm", "--limit", 20, "--no-alarms", "--model-name", config.model)
    for path, file, epoch in ((config.out, "best.pt", best), (config.out / "last.pt", "last.pt", 3)):
        saved, out = evaluating(*arguments, path=path)
        assert saved["about"]["epoch"] == f"{epoch} of 3"
        assert out.startswith(f"{config.out / file}, of epoch {epoch} of 3\n")
