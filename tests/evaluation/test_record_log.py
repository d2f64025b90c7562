"""What an evaluation keeps in its folder: files that any kill leaves whole, continued and extended."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from spat_train.data.datasets import load
from spat_train.data.images import Images
from spat_train.errors import InputError
from spat_train.evaluation.attack_specs.families import PGD
from spat_train.runtime.atomic_write import SaveError
from tests.evaluation.helpers import Escaping, contents, digits, fitted, quiet
from tests.helpers import edit_json
from tests.training.helpers import on_one_thread, processes

pytestmark = pytest.mark.usefixtures("one_thread")


ATTACKS = "fgsm,pgd-10x3,pgd-7-random,AutoAttack:steps=2:queries=10"


def work(folder: Path, on_progress=lambda: None):
    how = {"rows": torch.arange(90), "batch_size": 30, "save_images": True}
    return quiet(fitted(), load("digits").test, ATTACKS, folder=folder, on_progress=on_progress, **how)


def work_until_killed(folder: Path, after: int) -> None:
    """Evaluate until that many attacks on batches are done."""

    def on_progress():
        if (folder / "samples.jsonl").read_bytes().count(b"\n") == after:
            os.kill(os.getpid(), signal.SIGKILL)

    work(folder, on_progress)


def test_killed_and_called_again_it_ends_with_the_same_files(tmp_path):
    found = work(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    assert len(expected) == 2 + 4 * 3
    assert expected["samples.jsonl"].count(b"\n") == 5 * 3
    for lines in (1, 9):  # attacks on batches, of 15
        child = processes().Process(target=on_one_thread, args=(work_until_killed, tmp_path / "killed", lines))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        kept = (tmp_path / "killed" / "samples.jsonl").read_bytes()
        assert kept.count(b"\n") == lines
        assert expected["samples.jsonl"].startswith(kept)
    with open(tmp_path / "killed" / "samples.jsonl", "ab") as file:
        file.write(b'{"attack": "fgsm", "batch": 2, "pred')  # as a kill while writing leaves it
    (tmp_path / "killed" / "images" / "fgsm" / "00002.npz.tmp").write_bytes(b"PK")
    again = work(tmp_path / "killed")
    assert contents(tmp_path / "killed") == expected
    assert all(torch.equal(again.predicted[name], found.predicted[name]) for name in found.attacks)
    ((name, part),) = found.part.items()
    assert torch.equal(again.part[name], part)
    assert int((part >= 0).sum()) > 3
    work(tmp_path / "killed", lambda: pytest.fail("nothing was left to do"))
    assert contents(tmp_path / "killed") == expected
    with open(tmp_path / "killed" / "samples.jsonl", "r+b") as file:  # as a lost power may leave it
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(100))
    work(tmp_path / "killed")
    assert contents(tmp_path / "killed") == expected


def test_other_attacks_are_added_and_other_settings_refused(tmp_path):
    model, images = fitted(), load("digits").test
    how = {"rows": torch.arange(40), "batch_size": 20, "folder": tmp_path}
    first = quiet(model, images, "fgsm", **how)
    more = quiet(model, images, "pgd-10,fgsm", **how)
    assert torch.equal(more.predicted["fgsm"], first.predicted["fgsm"])
    assert torch.equal(more.predicted["pgd-10"], quiet(model, images, "pgd-10", **how | {"folder": None}).predicted["pgd-10"])
    before = contents(tmp_path)
    for message, changes in {
        "--eps was 15.3, now 51": {"eps": 0.2},
        "--seed was 0, now 1": {"seed": 1, "rows": torch.arange(1, 41)},
        "--limit was 40, now 39": {"rows": torch.arange(39)},
        "the chosen images differ": {"rows": torch.arange(1, 41)},
        "the model differs, in weights, architecture or normalisation": {"model": fitted(1)},
        "the source differs, in weights, architecture or normalisation": {"source": model},
        "the images or labels of --data differ": {"images": Images(images.pixels ^ 1, images.labels)},
        "--eps-l2 was 0.5, now 1.0; --attack-wrong was False, now True": {"eps_l2": 1.0, "attack_wrong": True},
        "--eps-l1 was 12.0, now 3.0": {"eps_l1": 3.0},
        "--batch-size was 20, now 10; --precision was fp32, now bf16": {"batch_size": 10, "precision": "bf16"},
    }.items():
        with pytest.raises(InputError, match=re.escape(f"it holds another evaluation ({message}): give the same, or choose")):
            quiet(**{"model": model, "images": images, "attacks": "fgsm"} | how | changes)
    with pytest.raises(InputError, match="attack fgsm was pgd:steps=1:step=1.0:start=clean, now escaping"):
        quiet(model, images, [Escaping(name="fgsm")], **how)
    assert contents(tmp_path) == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match="it holds samples.jsonl without settings.json"):
        quiet(model, images, "fgsm", **how)


def test_another_number_of_threads_is_said_where_something_is_left_to_do(tmp_path, monkeypatch, capsys):
    """In settings.json is what began it; older folders do not know."""
    model, images, path = fitted(), load("digits").test, tmp_path / "settings.json"
    how = {"rows": torch.arange(40), "batch_size": 20, "folder": tmp_path}
    quiet(model, images, "fgsm", **how)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    quiet(model, images, "fgsm", **how)
    assert capsys.readouterr().err == ""
    quiet(model, images, "fgsm,pgd-7", **how)
    assert capsys.readouterr().err == "spat-train: begun with threads 1, now 7: what is left to do is equal but for rounding\n"
    kept = json.loads(path.read_bytes())
    assert kept["begun_with"] == json.loads(before)["begun_with"]
    edit_json(path, begun_with=...)
    quiet(model, images, "fgsm,pgd-10", **how)
    assert capsys.readouterr().err == ""


def test_altered_records_are_refused(tmp_path):
    """Also those of another evaluation, in a shard too. Nothing is changed by that."""
    model, images, rows = fitted(), load("digits").test, torch.arange(40)
    how = {"rows": rows, "batch_size": 20, "folder": tmp_path}
    quiet(model, images, "fgsm", **how)
    quiet(model, images, "fgsm", **how | {"rows": rows + 1, "folder": tmp_path / "other"})
    file, shard = tmp_path / "samples.jsonl", tmp_path / "samples-1.jsonl"
    clean, fgsm, *rest = file.read_bytes().splitlines(keepends=True)
    message = "line 2: it was altered, or is of another evaluation: remove that line, and its batch is attacked again"
    of_another = (tmp_path / "other" / "samples.jsonl").read_bytes().splitlines(keepends=True)[1]
    for line in (b"5\n", b"{}\n", b'["digest"]\n', fgsm.replace(b'"predicted": [', b'"predicted": [1'), of_another):
        for where, content in (file, b"".join([clean, line, *rest])), (shard, clean + line):
            shard.unlink(missing_ok=True)
            where.write_bytes(content)
            before = contents(tmp_path)
            with pytest.raises(InputError, match=f"{where.name}: {message}"):
                quiet(model, images, "fgsm", **how)
            assert contents(tmp_path) == before
            file.write_bytes(b"".join([clean, *rest]))  # the remedy
    shard.unlink()
    quiet(model, images, "fgsm", **how)
    assert file.read_bytes() == b"".join([clean, *rest, fgsm])


def test_settings_of_other_versions_and_odd_ones(tmp_path):
    """Those of earlier versions have records without digests."""
    arguments, path = (fitted(), digits(10), "fgsm"), tmp_path / "settings.json"
    quiet(*arguments, folder=tmp_path)
    kept = json.loads(path.read_bytes())
    del kept["digest"]
    version = "another version made what it holds ('spat_train evaluation 2', now 'spat_train evaluation 3'): choose"
    for changed, message in (
        (kept | {"settings": kept["settings"] | {"format": "spat_train evaluation 2"}}, version),
        (kept | {"settings": kept["settings"] | {"eps": "8"}}, "--eps was 8, now 15.3"),
        (kept | {"settings": kept["settings"] | {"seed": ["8"] * 1000}}, "--seed was ['8', '8'"),
        (kept | {"settings": 5}, "settings.json cannot be read (TypeError): choose another --out"),
        (kept | {"attacks": 5}, "settings.json cannot be read (AttributeError): choose another --out"),
        (kept | {"attacks": {"fgsm": 5}}, "attack fgsm was 5, now pgd"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=re.escape(message)) as refused:
            quiet(*arguments, folder=tmp_path)
        assert len(str(refused.value)) < 500
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="settings.json cannot be read"):
        quiet(*arguments, folder=tmp_path)


def test_links_and_pipes_lead_nowhere(tmp_path):
    """The folder of another may hold them: what they lead to is neither written nor awaited."""
    arguments, kept = (fitted(), digits(10), "fgsm"), tmp_path / "kept"
    kept.write_bytes(b"precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "samples.jsonl").symlink_to(kept)
    with pytest.raises(InputError, match="it holds samples.jsonl without settings.json"):
        quiet(*arguments, folder=folder)
    (folder / "samples.jsonl").unlink()
    os.mkfifo(folder / "samples.jsonl")
    with pytest.raises(SaveError, match="cannot write .*samples.jsonl"):
        quiet(*arguments, folder=folder)
    (folder / "samples.jsonl").unlink()
    (folder / "settings.json.tmp").symlink_to(kept)
    quiet(*arguments, folder=folder)
    assert kept.read_bytes() == b"precious"


def test_pictures_of_the_same_names_are_other_data(tmp_path, pictures):
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval(), load(str(pictures), image_size=16).test
    quiet(model, images, "fgsm", folder=tmp_path / "out")
    shutil.copy(pictures / "val" / "dog" / "1.png", pictures / "val" / "dog" / "0.png")
    with pytest.raises(InputError, match="the images or labels of --data differ"):
        quiet(model, images, "fgsm", folder=tmp_path / "out")


def test_a_disk_that_is_full_in_the_middle_of_a_line(tmp_path):
    resource = pytest.importorskip("resource")
    arguments = fitted(), digits(60), "fgsm,pgd-10,pgd-20"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        with pytest.raises(SaveError, match=r"samples.jsonl \(File too large\)"):
            quiet(*arguments, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "samples.jsonl").stat().st_size == 1500
    assert quiet(*arguments, folder=tmp_path).worst_case() == quiet(*arguments).worst_case()


def test_a_folder_keeps_the_attacks_that_it_has(tmp_path, capsys):
    data, attack = digits(40), PGD(steps=2, loss="margin", name="mine")
    first = quiet(fitted(), data, ["pgd-7", attack], folder=tmp_path / "kept")
    second = quiet(fitted(), data, "cw-30", folder=tmp_path / "kept")
    assert list(second.attacks) == ["clean", "cw-30", "pgd-7", "mine"]
    assert second.attacks["mine"] == attack
    assert second.worst_case() <= first.worst_case()
    assert all(torch.equal(second.predicted[name], first.predicted[name]) for name in first.attacks)
    path = tmp_path / "kept" / "settings.json"  # as of an attack that another program defined
    edit_json(path, attacks=json.loads(path.read_bytes())["attacks"] | {"mine": "theirs:steps=2"})
    assert list(quiet(fitted(), data, "pgd-7", folder=tmp_path / "kept").attacks) == ["clean", "pgd-7", "cw-30"]
    assert "has results of mine, which are left out: attack theirs: there is none" in capsys.readouterr().err


def test_an_attack_that_is_not_finished_is_left_out_and_named(tmp_path, capsys):
    model, images, samples = fitted(), load("digits").test, tmp_path / "samples.jsonl"
    how = {"rows": torch.arange(40), "batch_size": 20, "folder": tmp_path}
    quiet(model, images, "pgd-7", **how)
    samples.write_bytes(samples.read_bytes()[:-5])  # half a line of its last batch
    assert list(quiet(model, images, "fgsm", **how).attacks) == ["clean", "fgsm"]
    assert "has results of pgd-7, but not of all images: left out until --attacks pgd-7 goes on" in capsys.readouterr().err
    assert list(quiet(model, images, "pgd-7", **how).attacks) == ["clean", "pgd-7", "fgsm"]
    assert capsys.readouterr().err == ""
