"""RobustBench's entries: its layout, the evaluation's numbers, and fields of the user's that stay."""

import json
import re
from pathlib import Path

import pytest
import torch

from spat_train.errors import InputError
from spat_train.evaluation.attack_specs import parse_all
from spat_train.evaluation.result import Evaluation
from spat_train.evaluation.robustbench import architecture_of, eps_text, read_entry, robustbench_entry, write_entry
from tests.evaluation.helpers import FEATURES, command, error, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the 188 entries in model_info/{cifar10,cifar100,imagenet}/{Linf,L2} of RobustBench: what each has, and what some have besides
# (footnote 103, unreliable 147, external 25).
EACH = {
    "link": str, "name": str, "authors": str, "additional_data": bool, "number_forward_passes": int, "dataset": str, "venue": str,
    "architecture": str, "eps": str, "clean_acc": str, "reported": str, "autoattack_acc": str,
}  # fmt: skip
SOME = {"external": str, "footnote": str, "unreliable": bool}

# As Rice2020Overfitting.json (L2) and Gowal2020Uncovering_70_16_extra.json (Linf) are laid out, with other text.
THEIRS = {
    "link": "https://example.org/paper", "name": "A Paper", "authors": "A. Author, B. Author", "additional_data": True,
    "number_forward_passes": 2, "dataset": "cifar10", "venue": "ICML 2030", "architecture": "Two networks", "eps": "0.5",
    "clean_acc": "12.34", "reported": "67.8", "footnote": "With a trick.", "autoattack_acc": "1.23", "external": "50.00",
    "unreliable": False,
}  # fmt: skip
ABOUT = {"test_images": 7, "name": "mine", "architecture": "WideResNet-28-10", "dataset": "cifar10"}


def evaluation(attacks="autoattack", right=(6, 3), count=7, **settings) -> Evaluation:
    """Of `count` images, with that many right before and after AutoAttack."""
    parsed, labels = parse_all(attacks), torch.ones(count, dtype=torch.int64)
    predicted = {name: (torch.arange(count) < right[i > 0]).long() for i, name in enumerate(parsed)}
    settings = {"eps": 8 / 255, "eps_l2": 0.5, "eps_l1": 12.0, "precision": "fp32"} | settings
    settings = {"attack_wrong": False, "source_weights": None, "budget": None} | settings
    return Evaluation(settings, parsed, 10, torch.arange(count), labels, predicted, {})


def test_the_layout_and_the_numbers():
    entry = robustbench_entry(evaluation(), **ABOUT)
    assert list(entry) == list(EACH)
    assert {key: type(value) for key, value in entry.items()} == EACH
    assert (entry["clean_acc"], entry["autoattack_acc"], entry["eps"]) == ("85.71", "42.86", "8/255")
    assert (entry["name"], entry["architecture"], entry["dataset"]) == ("mine", "WideResNet-28-10", "cifar10")
    assert (entry["additional_data"], entry["number_forward_passes"]) == (False, 1)
    assert {entry[key] for key in ("link", "authors", "venue", "reported")} == {""}
    l2 = robustbench_entry(evaluation("autoattack:norm=l2"), "autoattack:norm=l2", **ABOUT, additional_data=True)
    assert (l2["eps"], l2["additional_data"]) == ("0.5", True)
    own = robustbench_entry(evaluation("fgsm,autoattack:eps=4/255", right=(7, 0)), "autoattack:eps=4/255", **ABOUT)
    assert (own["eps"], own["clean_acc"], own["autoattack_acc"]) == ("4/255", "100.00", "0.00")


def test_what_a_user_filled_in_stays():
    entry = robustbench_entry(evaluation(), **ABOUT, before=THEIRS)
    assert entry.keys() == EACH.keys() | SOME.keys()
    assert {key: type(value) for key, value in entry.items()} == EACH | SOME
    updated = {"eps": "8/255", "clean_acc": "85.71", "autoattack_acc": "42.86"}
    assert entry == THEIRS | updated
    assert robustbench_entry(evaluation(), **ABOUT, before={"footnote": ""})["footnote"] == ""
    empty = dict.fromkeys([*EACH, "footnote", "corruptions_acc"])  # as RobustBench's own tool leaves what is to be filled in
    assert robustbench_entry(evaluation(), **ABOUT, before=empty) == robustbench_entry(evaluation(), **ABOUT)


def test_a_footnote_says_what_is_unlike_their_evaluations_as_long_as_it_is():
    about = ABOUT | {"test_images": 10_000}
    some = evaluation(count=1000, right=(900, 500))
    entry = robustbench_entry(some, **about)
    assert entry["footnote"] == "AutoAttack on 1,000 of the 10,000 test images."
    entry["footnote"] = "With a trick. " + entry["footnote"]
    half = robustbench_entry(evaluation(count=2000, precision="bf16"), **about, before=entry)
    assert half["footnote"] == "With a trick. AutoAttack on 2,000 of the 10,000 test images, in bf16."
    whole = robustbench_entry(evaluation(precision="tf32"), **ABOUT, before=half)
    assert whole["footnote"] == "With a trick. AutoAttack in tf32."
    assert robustbench_entry(evaluation(), **ABOUT, before=whole)["footnote"] == "With a trick."
    assert "footnote" not in robustbench_entry(evaluation(), **ABOUT, before=robustbench_entry(some, **about))


@pytest.mark.parametrize(
    ("found", "attack", "message"),
    [
        (evaluation("fgsm"), "autoattack", "attack autoattack: the evaluation has clean, fgsm: add it"),
        (
            evaluation("fgsm"),
            "fgsm",
            "attack fgsm: RobustBench reports AutoAttack's standard version",
        ),
        *(
            (evaluation(name), name, "RobustBench reports AutoAttack's standard version")
            for name in ("autoattack-plus", "autoattack-rand", "autoattack:steps=50", "autoattack:queries=9", "autoattackx2")
        ),
        (evaluation(attack_wrong=True), "autoattack", "attacks the model itself, where it is right"),
        (evaluation(source_weights="abc"), "autoattack", "attacks the model itself, where it is right"),
    ],
)
def test_other_evaluations_are_refused(found, attack, message):
    with pytest.raises(InputError, match=message):
        robustbench_entry(found, attack, **ABOUT)


def test_names_and_radii():
    names = {
        "wrn-34-10": "WideResNet-34-10", "resnet-18": "ResNet-18", "resnet-50/imagenet": "ResNet-50",
        "preactresnet-18/raw-no-bn": "PreActResNet-18", "dm-wrn-70-16": "WideResNet-70-16", "timm:vit_tiny": "vit_tiny",
        "torchvision:wide_resnet50_2": "wide_resnet50_2", "small-cnn": "small-cnn",
    }  # fmt: skip
    assert {name: architecture_of(name) for name in names} == names
    assert [eps_text(eps, "linf") for eps in (8 / 255, 4 / 255, 0.031, 0.3, 0.5 / 255)] == [
        "8/255", "4/255", "0.031", "0.3", "0.00196078",
    ]  # fmt: skip
    assert [eps_text(eps, "l2") for eps in (0.5, 128 / 255)] == ["0.5", "0.501961"]


def test_a_file_that_is_no_entry(tmp_path):
    file = tmp_path / "entry.json"
    assert read_entry(file, "cifar10") == {}
    for content, message in {
        "{": "it cannot be read as JSON",
        "[1]": "it holds no entry of RobustBench",
        '{"name": "a", "title": "b"}': 'no entry of AutoAttack has "title": "b"',
        '{"clean_acc": 85.3}': 'no entry of AutoAttack has "clean_acc": 85.3',
        '{"number_forward_passes": true}': 'no entry of AutoAttack has "number_forward_passes": true',
        '{"corruptions_acc": "80.1"}': 'no entry of AutoAttack has "corruptions_acc": "80.1"',
        '{"dataset": "cifar100"}': "it is about cifar100, and --data is cifar10: choose another file",
    }.items():
        file.write_text(content)
        with pytest.raises(InputError, match=re.escape(f"--robustbench {file}: {message}")):
            read_entry(file, "cifar10")
        assert file.read_text() == content
    for content in ({"authors": "A"}, THEIRS, dict.fromkeys([*EACH, "corruptions_mce"])):
        file.write_text(json.dumps(content))
        assert read_entry(file, "cifar10") == content
    said = write_entry(file, robustbench_entry(evaluation(), **ABOUT, before={"authors": "Ö", "venue": "ICML"}))
    assert said == f"{file} written: fill in link, reported, which later evaluations keep"
    assert read_entry(file, "cifar10")["authors"] == "Ö"
    assert write_entry(file, THEIRS) == f"{file} written"


# ---- the command


@pytest.fixture
def a_run(tmp_path) -> Path:
    return write_run(tmp_path / "a-run", eps=128)


def test_the_command_writes_and_updates_a_file(monkeypatch, capsys, a_run, tmp_path):
    """At half of the range the first attack breaks nearly all, so that the others take no time."""
    file = tmp_path / "entry.json"
    options = ("--device", "cpu", "--no-alarms", "--robustbench", file, "--attacks", "fgsm,AA")
    command(monkeypatch, "evaluate", a_run, *options, "--limit", 30)
    assert f"{file} written: fill in link, authors, venue, reported, which later" in capsys.readouterr().out
    entry = json.loads(file.read_text())
    results = json.loads((a_run / "evaluation" / "evaluation.json").read_text())["results"]
    assert [f"{results[name]['accuracy']:.2f}" for name in ("clean", "autoattack")] == [
        entry["clean_acc"],
        entry["autoattack_acc"],
    ]
    assert (entry["name"], entry["dataset"], entry["architecture"], entry["eps"]) == ("a-run", "digits", FEATURES, "128/255")
    assert entry["footnote"] == "AutoAttack on 30 of the 450 test images."
    assert {key: type(value) for key, value in entry.items()} == EACH | {"footnote": str}
    file.write_text(json.dumps(entry | {"authors": "Me", "clean_acc": "1.00", "number_forward_passes": 3}))
    command(monkeypatch, "evaluate", a_run, *options, "--limit", 20, "--out", tmp_path / "fewer")
    again = json.loads(file.read_text())
    assert (again["authors"], again["number_forward_passes"]) == ("Me", 3)
    assert again["footnote"] == "AutoAttack on 20 of the 450 test images."
    assert float(again["clean_acc"]) > 80


def test_what_the_command_refuses_at_once(monkeypatch, capsys, a_run, tmp_path):
    (tmp_path / "L2").mkdir()
    (tmp_path / "list.json").write_text("[]")
    entry = ("--robustbench", tmp_path / "entry.json")
    for options, message in [
        ((*entry, "--attacks", "fgsm"), "an entry needs one AutoAttack, and --attacks has none: give --attacks autoattack"),
        ((*entry, "--attacks", "aa,aa:norm=l2"), "--attacks has autoattack, autoattack:norm=l2: give --attacks autoattack"),
        ((*entry, "--attacks", "aa-plus"), "attack autoattack-plus: RobustBench reports AutoAttack's standard version"),
        ((*entry, "--attacks", "aa", "--attack-wrong"), "leave out --source, --attack-wrong and --budget"),
        ((*entry, "--attacks", "aa", "--budget", "100"), "leave out --source, --attack-wrong and --budget"),
        ((*entry, "--attacks", "aa", "--source", a_run), "leave out --source, --attack-wrong and --budget"),
        (("--robustbench", tmp_path / "no" / "e.json", "--attacks", "aa"), "there is no folder .*/no: make it, or choose"),
        (("--robustbench", tmp_path / "L2" / "e.json", "--attacks", "aa"), "that folder is for L2, and the attack is Linf"),
        (("--robustbench", tmp_path / "list.json", "--attacks", "aa"), "it holds no entry of RobustBench"),
    ]:
        assert re.search(message, error(monkeypatch, capsys, "evaluate", a_run, *options, "--device", "cpu"))
    assert not (a_run / "evaluation").exists()
