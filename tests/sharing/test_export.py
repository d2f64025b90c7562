"""Exports of trained runs: the model to the bit, a card whose numbers are about these weights alone, and whose code runs."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

import spat_train
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import floats
from spat_train.errors import InputError
from spat_train.evaluation.report import FORMAT
from spat_train.models.checkpoints import load_model
from spat_train.models.run_config import run_config
from spat_train.runtime.atomic_write import SaveError
from spat_train.sharing.card import Subject, edited
from spat_train.sharing.card import card as markdown
from spat_train.sharing.results import Results
from spat_train.training.trainer import train
from tests.evaluation.helpers import command, contents, error
from tests.helpers import edit_json
from tests.training.helpers import settings

ROOT = Path(__file__).parents[2]
X, _ = floats(load("digits").test, torch.arange(40), "cpu", torch.contiguous_format)
EVALUATE = ["--attacks", "fgsm,pgd-7", "--limit", "60", "--no-alarms", "--device", "cpu", "--model-name", "small-cnn"]
CODE = "tests.training.helpers:network"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name: madry (small-cnn, with a test), ema (TRADES+SPAT, normalised, with SiLU), code."""
    folder = tmp_path_factory.mktemp("runs")
    base = settings(folder / "madry", model="small-cnn", epochs=2, test=True)
    train(base)
    ema = {"method": "trades", "alpha": 0.3, "ema": 0.9, "activation": "silu", "mean": (0.3,), "std": (0.4,), "holdout": 0}
    train(replace(base, out=folder / "ema", test=False, **ema))
    train(replace(base, out=folder / "code", test=False, model=CODE))
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run madry, to change."""
    return Path(shutil.copytree(runs / "madry", tmp_path / "run"))


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory):
    """The run madry with an evaluation in it, which takes seconds."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(runs / "madry", folder)
    with pytest.MonkeyPatch.context() as patch:
        command(patch, "evaluate", folder, *EVALUATE)
    return folder


def card(folder) -> str:
    return (folder / "README.md").read_text()


def header(folder) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(card(folder).split("---\n")[1])


@pytest.mark.parametrize("name", ["madry", "ema", "code"])
def test_the_model_of_a_run(runs, tmp_path, name):
    code = CODE if name == "code" else None
    spat_train.export(runs / name, tmp_path / "out", model_name=code)
    model, config = load_model(runs / name, load("digits"), code)
    loaded = spat_train.from_folder(tmp_path / "out", model=code)
    assert torch.equal(loaded(X), model(X))
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")  # it needs nothing of the run
    assert torch.equal(spat_train.from_pretrained(tmp_path / "elsewhere", model=code)(X), model(X))
    found = run_config(tmp_path / "elsewhere")
    private = (set(spat_train.config.FREE_ON_RESUME) - {"data"}) & vars(found).keys()
    assert found == replace(config, **{key: getattr(found, key) for key in private})
    if name == "ema":  # the averaged weights, which are not the others
        last = torch.load(runs / "ema" / "last.pt", weights_only=True)
        assert torch.equal(loaded.state_dict()["model.classifier.weight"], last["ema"]["model.classifier.weight"])
        assert not torch.equal(last["ema"]["model.classifier.weight"], last["model"]["model.classifier.weight"])
        assert "They are the averaged ones." in card(tmp_path / "elsewhere")
        assert "mean 0.3, std 0.4" in card(tmp_path / "elsewhere")


def test_the_card_of_a_run_with_a_test(runs, tmp_path):
    spat_train.export(runs / "madry", tmp_path / "out", license="cc-by-4.0")
    text, result = card(tmp_path / "out"), json.loads((runs / "madry" / "result.json").read_text())
    assert "# small-cnn trained by Madry on digits\n" in text
    for name, value in result["test"].items():
        assert f"| {name} | {value:.2f} |" in text
    assert f"on {result['test_images']} test images with eps 25.5/255." in text
    best = result["best"]
    assert (
        f"epoch {best['epoch']}, the best on held-out training images: clean {best['clean']:.2f} %, pgd {best['pgd']:.2f} %"
        in text
    )
    for row in ("| epochs | 2 |", "| batch size | 32 |", "| eps | 25.5/255 |", "| attack steps | 2 |", "| seed | 0 |"):
        assert row in text
    assert "## Evaluation" not in text
    assert str(runs) not in text
    found = header(tmp_path / "out")
    assert (found["license"], found["library_name"], found["datasets"]) == ("cc-by-4.0", "spat_kernels", ["digits"])
    assert {"adversarial-robustness", "adversarial-training", "image-classification"} <= set(found["tags"])
    (results,) = found["model-index"][0]["results"]
    assert [metric["value"] for metric in results["metrics"]] == [round(value, 2) for value in result["test"].values()]
    assert results["metrics"][1]["args"] == {"norm": "L-infinity", "eps": "25.5/255"}
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(text).data
    assert [each.metric_value for each in data.eval_results] == [round(value, 2) for value in result["test"].values()]


def test_a_run_without_any_test(runs, tmp_path):
    spat_train.export(runs / "ema", tmp_path / "out")
    assert "These weights were not evaluated" in card(tmp_path / "out")
    assert "model-index" not in card(tmp_path / "out")
    assert "# small-cnn trained by TRADES+SPAT(.3) on digits\n" in card(tmp_path / "out")


def test_the_evaluation_is_in_the_card(evaluated, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "export", evaluated, "--out", tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out'} written: config.json, model.safetensors, model.pt, README.md\n"
    found = json.loads((evaluated / "evaluation" / "evaluation.json").read_text())
    text = card(tmp_path / "out")
    for name, result in found["results"].items():
        assert f"| {name} | {result['accuracy']:.2f} | {result['interval'][0]:.2f} to {result['interval'][1]:.2f} |" in text
    assert "on 60 of 450 images of digits, with eps 25.5/255 " in text
    assert header(tmp_path / "out")["model-index"][0]["results"][0]["dataset"]["args"] == {"images": "60 of 450"}
    assert "## Test" in text
    (results,) = header(tmp_path / "out")["model-index"][0]["results"]
    assert [m["value"] for m in results["metrics"]] == [round(r["accuracy"], 2) for r in found["results"].values()]
    command(monkeypatch, "export", evaluated, "--out", tmp_path / "same", "--evaluation", evaluated / "evaluation")
    assert contents(tmp_path / "same") == contents(tmp_path / "out")

    # The folder as a model: the same accuracies, and again an export, which finds its own files.
    command(monkeypatch, "evaluate", tmp_path / "out", *EVALUATE, "--data", "digits")
    again = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
    assert again["results"] == found["results"]
    assert again["settings"] == found["settings"]  # the hash of the weights, and eps, which config.json says
    command(monkeypatch, "export", evaluated, "--out", tmp_path / "out")


def test_alarms_are_in_the_card(evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "run")
    path = tmp_path / "run" / "evaluation" / "evaluation.json"
    raised = {"name": "more steps break more images", "numbers": {}, "raised": True, "meaning": "Gradients may be masked."}
    edit_json(path, alarms=[raised, raised | {"name": "no", "raised": False}])
    text = card(spat_train.export(tmp_path / "run", tmp_path / "out"))
    assert text.count("Alarm: ") == 1
    assert "- Alarm: it was expected that more steps break more images. Gradients may be masked." in text


def test_the_code_of_the_card_runs(runs, tmp_path, monkeypatch):
    """In a new process, and where the architecture is code that can be imported."""
    for name, code in (("madry", None), ("code", CODE)):
        out = spat_train.export(runs / name, tmp_path / name, model_name=code)
        (block,) = re.findall(r"```python\n(.*?)```", card(out), re.S)
        if code:
            monkeypatch.chdir(out)
            names: dict = {}
            exec(block, names)
            assert torch.equal(names["model"](X), load_model(runs / name, load("digits"), code)[0](X))
        else:
            last = "print(tuple(classes.shape), model.training)"
            words, env = [sys.executable, "-c", block + last], {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=out, env=env)
            assert (done.returncode, done.stdout, done.stderr) == (0, "(2,) False\n", "")


# ---- whose numbers they are


def train_other(folder: Path) -> Path:
    """The run madry from another seed."""
    train(settings(folder, model="small-cnn", epochs=2, test=True, seed=1))
    return folder


def test_numbers_of_other_weights_are_left_out(evaluated, tmp_path, capsys):
    """best.pt was replaced by that of another run, with its config; last.pt, result.json and the evaluation were not."""
    run, other = Path(shutil.copytree(evaluated, tmp_path / "run")), train_other(tmp_path / "other")
    for name in ("best.pt", "config.json"):
        shutil.copy(other / name, run / name)
    capsys.readouterr()
    text = card(spat_train.export(run, tmp_path / "out"))
    err = capsys.readouterr().err
    assert f"{run / 'result.json'} is left out of the card: it is not about the weights in {run / 'best.pt'}" in err
    assert f"left out of the card: {run / 'evaluation' / 'evaluation.json'}: it is about another model" in err
    assert "These weights were not evaluated" in text
    with pytest.raises(InputError, match="--evaluation: .*it is about another model"):
        spat_train.export(run, tmp_path / "out", evaluation=run / "evaluation")
    with pytest.raises(InputError, match="--evaluation: .*it is no evaluation of this version"):
        spat_train.export(run, tmp_path / "out", evaluation=run / "result.json")
    with pytest.raises(InputError, match="--evaluation: .*nowhere cannot be read"):
        spat_train.export(run, tmp_path / "out", evaluation=run / "nowhere")


def test_a_config_of_another_run_is_refused(run, tmp_path):
    other = train_other(tmp_path / "other")
    shutil.copy(other / "best.pt", run / "best.pt")
    with pytest.raises(InputError, match=r"config.json: best.pt was made with other options \(seed: 1 -> 0\): restore it"):
        spat_train.export(run, tmp_path / "out")


def test_a_result_that_is_out_of_date(tmp_path, capsys):
    """The run went on, and was not tested again."""
    config = settings(tmp_path / "run", model="small-cnn", epochs=1, schedule="constant", test=True)
    train(config)
    assert "## Test" in card(spat_train.export(tmp_path / "run", tmp_path / "one"))
    train(replace(config, epochs=2, resume=True, test=False))
    capsys.readouterr()
    assert "## Test" not in card(spat_train.export(tmp_path / "run", tmp_path / "two"))
    assert "result.json is left out of the card: it is not about the weights in" in capsys.readouterr().err


def test_the_test_is_of_the_best_weights(run, tmp_path, capsys):
    """best.pt was removed: last.pt has other weights than those that were tested."""
    last = torch.load(run / "last.pt", weights_only=True)
    last["best"] = {name: value + value.is_floating_point() for name, value in last["best"].items()}
    torch.save(last, run / "last.pt")
    (run / "best.pt").unlink()
    text = card(spat_train.export(run, tmp_path / "out"))
    assert "## Test" not in text
    assert "| last trained with | spat\\_kernels " in text
    assert f"it is not about the weights in {run / 'last.pt'}" in capsys.readouterr().err
    torch.save(last | {"best": None}, run / "last.pt")  # without validation they are the tested ones
    assert "## Test" in card(spat_train.export(run, tmp_path / "two"))


def test_radii_budget_and_passes(run, tmp_path, monkeypatch):
    attacks = ["--attacks", "pgd-20:eps=1/255,pgd:steps=2:norm=l2", "--budget", "50", "--limit", "40", "--device", "cpu"]
    command(monkeypatch, "evaluate", run, *attacks, "--no-alarms", "--model-name", "small-cnn")
    out = spat_train.export(run, tmp_path / "out")
    (results,) = header(out)["model-index"][0]["results"]
    args = [{key: value for key, value in m.get("args", {}).items() if key != "attack"} for m in results["metrics"]]
    assert args == [{}, {"norm": "L-infinity", "eps": "1/255"}, {"norm": "L2", "eps": 0.5}, {}]
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())["results"]["pgd-20:eps=1/255"]
    assert f"| {found['forwards']:.0f} + {found['backwards']:.0f} |" in card(out)
    assert "the mean of those that it attacked, 50 at most. It was not checked for signs of masked gradients" in card(out)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", [1]),
        ("result.json", {"checkpoint": ...}),
        ("last.pt", "arithmetic"),
        ("evaluation/evaluation.json", {"format": FORMAT}),
        ("evaluation/evaluation.json", {"format": FORMAT, "settings": {"weights": ..., "source_weights": None}}),
    ],
)
def test_files_that_were_edited(evaluated, tmp_path, name, content):
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    last = torch.load(run / "last.pt", weights_only=True)
    if name == "last.pt":
        torch.save({key: value for key, value in last.items() if key != content}, run / name)
    else:
        hashed = json.loads((run / "evaluation" / "evaluation.json").read_text())["settings"]["weights"]
        known = json.dumps(content, default=lambda _: last["id"] if name == "result.json" else hashed)
        (run / name).write_text(known)
    with pytest.raises(InputError, match="is not as it was written .*: restore or remove it") as caught:
        spat_train.export(run, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_flipped_digits(evaluated, tmp_path):
    """They are noticed. A damaged result.json is written again, and a config may be changed by who says so."""
    run, out, digits = Path(shutil.copytree(evaluated, tmp_path / "run")), tmp_path / "out", load("digits")
    evaluation, test = run / "evaluation", json.loads((run / "result.json").read_bytes())["test"]
    spat_train.export(run, out, evaluation=evaluation)
    for file, entry, reads in (
        (evaluation / "evaluation.json", b'"broken": ', lambda: spat_train.export(run, out, evaluation=evaluation)),
        (run / "result.json", b'"clean": ', lambda: spat_train.export(run, out)),
        (run / "config.json", b'"eps": ', lambda: load_model(run, digits)),
        (out / "config.json", b'"eps": ', lambda: load_model(out, digits)),
        (out / "model.safetensors", rb"\"eps\": ", lambda: load_model(out, digits)),
    ):
        kept = file.read_bytes()
        at = kept.index(entry) + len(entry)
        file.write_bytes(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
        with pytest.raises(InputError, match=f"{file}: it was altered since it was written"):
            reads()
        if file.name == "config.json":
            edit_json(file)
            reads()
        elif file.name != "result.json":
            file.write_bytes(kept)
    train(replace(run_config(run), eps=run_config(evaluated).eps, out=run, resume=True))
    assert json.loads((run / "result.json").read_bytes())["test"] == test


# ---- what is in the card


def described(**changes) -> str:
    values: dict = {"code": False, "config": Config(), "data": "cifar10", "normalisation": "", "version": "1"}
    values |= {"name": "wrn-10-1", "classes": ("cat", "dog"), "image_shape": (3, 32, 32)}
    return markdown(Subject(**values | changes), Results())


def test_names_are_no_markdown():
    odd = "cat\n\n## Evaluation\n\n| AutoAttack | 99.00 | <script> [x](javascript:y) `a` *b* _c_ &lt;"
    text = described(classes=(odd, "dog"), config=Config(preset=odd, init=odd))
    assert text.count("## Evaluation") == 1
    assert "| AutoAttack |" not in text
    for part in ("<script>", "[x]", " `a`", " *b*", " _c_", " &lt;"):
        assert part not in text
    escaped = "cat \\#\\# Evaluation &#124; AutoAttack &#124; 99.00 &#124; "
    escaped += "\\<script\\> \\[x\\](javascript:y) \\`a\\` \\*b\\* \\_c\\_ \\&lt;"
    assert f"for 2 classes: {escaped}, dog." in text
    assert f"| preset | {escaped} |" in text


def test_names_that_are_not_utf8():
    assert "for 2 classes: \\udcff, dog." in described(classes=("\udcff", "dog")).encode().decode()


def test_settings_of_the_card():
    assert "| activation |" not in described()  # DeepMind's networks and others have no ReLU
    assert "| activation | silu |" in described(config=Config(activation="silu"))
    assert "| lr drops | from epoch 5 and 6 on |" in described(config=Config(epochs=6))
    assert "lr drops" not in described(config=Config(schedule="cosine"))
    assert "CenterCrop" not in described()
    assert "`torchvision.transforms.Resize(64)` and `CenterCrop(64)`" in described(config=Config(image_size=64))


@pytest.mark.parametrize(
    ("data", "name"),
    [("cifar10", "cifar10"), ("/a/cifar10.npz", "cifar10"), ("/a/fold.v2", "fold.v2"), ("v1.5 x.npz", "v1.5 x")],
)
def test_names_of_data(data, name):
    assert f"# wrn-10-1 trained by Madry on {name}\n" in described(data=data)
    assert ("datasets:" in described(data=data)) is (data == "cifar10")


def test_classes_are_in_checkpoints(runs):
    for name in ("best.pt", "last.pt"):
        content = torch.load(runs / "madry" / name, weights_only=True)
        assert (content["classes"], content["image_shape"]) == ([str(digit) for digit in range(10)], [1, 8, 8])


def test_without_last_pt_nothing_says_whose_result_it_is(run, tmp_path, capsys):
    (run / "last.pt").unlink()
    text = card(spat_train.export(run, tmp_path / "out"))
    assert "## Test" not in text
    assert "the best on held-out training images" in text  # which best.pt itself says
    assert "without last.pt it does not show which weights it is about" in capsys.readouterr().err


def test_an_unfinished_run(tmp_path):
    from spat_train.runtime.signals import Stopped
    from tests.training.helpers import after, send

    config = settings(tmp_path / "run", model="small-cnn", test=True)
    with pytest.raises(Stopped):
        train(config, on_step=after(7, send))
    assert "The run has finished 1 of its 4 epochs." in card(spat_train.export(tmp_path / "run", tmp_path / "out"))


# ---- where it goes


def test_twice_gives_the_same_files(runs, tmp_path):
    out = spat_train.export(runs / "madry", tmp_path / "out")
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    spat_train.export(runs / "madry", tmp_path / "out")
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert contents(spat_train.export(runs / "madry", tmp_path / "another")) == before
    for name in ("model.safetensors", "README.md", "model.pt"):  # stopped between two files, and within one
        (out / name).unlink()
        (out / f"{name}.tmp").write_bytes(b"half")
        spat_train.export(runs / "madry", out)
        assert contents(out) == before


def test_folders_that_hold_something_else(runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".gitattributes").touch()  # of a new repository
    spat_train.export(runs / "madry", out)
    before = contents(out)

    def refusal(run=runs / "madry", to=out) -> str:
        files = contents(tmp_path)
        with pytest.raises(InputError) as caught:
            spat_train.export(run, to)
        assert contents(tmp_path) == files
        return str(caught.value)

    assert refusal(runs / "ema") == f"--out {out}: it holds another model: remove it, or choose another folder"
    assert re.search(r"it holds \S+, and no model that spat-train export wrote", refusal(to=runs / "madry"))
    assert refusal(to=out / "README.md") == f"--out {out / 'README.md'}: it is a file: choose another folder"
    assert "it is an export already" in refusal(out, tmp_path / "two")
    assert "it is an export already" in refusal(out / "model.safetensors", tmp_path / "two")
    (out / "README.md").write_text(card(out).replace("A classifier", "My classifier"))
    assert refusal() == f"--out {out}: its README.md was changed by hand: move it away, or choose another folder"
    (out / "README.md").unlink()
    spat_train.export(runs / "madry", out)
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "it holds notes.txt, and no model" in refusal(to=tmp_path / "mine")
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    assert "it holds README.md, and no model" in refusal()


def test_what_counts_as_edited(runs, tmp_path):
    text = card(spat_train.export(runs / "madry", tmp_path / "out"))
    assert not edited(text)
    for other in ("", "# A card\n", text + "more\n", "a" + text, text.replace("digits", "mnist"), text[:-5]):
        assert edited(other)


def test_a_full_disk(runs, tmp_path, monkeypatch):
    from spat_train.runtime import atomic_write

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        spat_train.export(runs / "madry", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---- by command


def test_a_checkpoint_of_others(runs, tmp_path, monkeypatch, capsys):
    """Of the card it is only said what is known."""
    model, _ = load_model(runs / "madry", load("digits"))
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    options = ["--model-name", "small-cnn", "--data", "digits", "--mean", "0.5", "--std", "0.5"]
    command(monkeypatch, "export", tmp_path / "theirs.pt", "--out", tmp_path / "out", *options)
    loaded = spat_train.from_folder(tmp_path / "out")
    assert torch.equal(loaded(X), model((X - 0.5) / 0.5))
    text = card(tmp_path / "out")
    assert "# small-cnn on digits\n" in text
    assert "The file of its weights does not say how it was trained." in text
    assert "adversarial-training" not in text
    assert "datasets" not in header(tmp_path / "out")  # it does not say that either
    assert "eps: " not in text
    capsys.readouterr()
    err = error(monkeypatch, capsys, "export", tmp_path / "theirs.pt", "--out", tmp_path / "two", "--model-name", "small-cnn")
    assert "--data: " in err
    err = error(monkeypatch, capsys, "export", tmp_path / "theirs.pt", "--out", tmp_path / "two", "--data", "digits")
    assert "it does not say which architecture it is: give --model-name" in err
    err = error(monkeypatch, capsys, "export", runs / "code", "--out", tmp_path / "two", "--image-size", "8")
    assert "--image-size 8: it is of the pictures in --data: give both, or neither" in err
    err = error(monkeypatch, capsys, "export", runs / "code", "--out", tmp_path / "two")
    assert f"if you trust it, give --model-name {CODE}" in err
    assert not (tmp_path / "two").exists()


def test_data_that_moved(run, tmp_path, monkeypatch, capsys):
    edit_json(run / "config.json", data="/nowhere/digits.npz")
    command(monkeypatch, "export", run, "--out", tmp_path / "out")
    assert run_config(tmp_path / "out").data == "digits.npz"
    assert "/nowhere" not in card(tmp_path / "out")
    assert "datasets" not in header(tmp_path / "out")  # whatever the file is called
    capsys.readouterr()
    err = error(monkeypatch, capsys, "export", run, "--out", tmp_path / "two", "--data", "digits")
    assert f"--data digits: {run} says its classes and the shape of its images: leave it out" in err

    for name in ("best.pt", "last.pt"):  # as older versions wrote them
        content = torch.load(run / name, weights_only=True)
        torch.save({key: value for key, value in content.items() if key not in ("classes", "image_shape")}, run / name)
    err = error(monkeypatch, capsys, "export", run, "--out", tmp_path / "two")
    assert "was trained on --data /nowhere/digits.npz; give --data where that is now" in err
    command(monkeypatch, "export", run, "--out", tmp_path / "two", "--data", "digits")
    assert contents(tmp_path / "two") == contents(tmp_path / "out")
    edit_json(run / "config.json", data="elsewhere.npz")
    command(monkeypatch, "export", run, "--out", tmp_path / "two", "--data", "digits")  # of the same weights
    assert run_config(tmp_path / "two").data == "elsewhere.npz"


def test_fine_tuning_from_an_export(runs, tmp_path):
    out = spat_train.export(runs / "ema", tmp_path / "out")
    config = replace(run_config(runs / "ema"), init=out, out=tmp_path / "tuned", lr=1e-12, epochs=1, ema=0.0)
    train(config)
    tuned, _ = load_model(tmp_path / "tuned", load("digits"))
    for name, value in spat_train.from_folder(out).named_parameters():
        torch.testing.assert_close(tuned.get_parameter(name), value)
