"""WebDataset shards: found by name, the same images as the folder that they are made of, damaged ones named or cut."""

import gzip
import json
import os
import shutil
import tarfile

import pytest
import torch

from spat_train.data import shards
from spat_train.data.datasets import load
from spat_train.data.images import Dataset, fingerprint
from spat_train.data.loader import Loader, Order
from spat_train.data.shards import Shards
from spat_train.errors import InputError
from tests.data import helpers
from tests.data.helpers import add, label_by_number, write_folder, write_shards

pytest.importorskip("PIL")
pytest.importorskip("torchvision", exc_type=Exception)

SIZE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def made(folder, tmp_path):
    """Shards with names of classes: 5 to train on, 2 to test on."""
    return write_shards(folder, tmp_path / "shards")


def opened(data, **options) -> Dataset:
    return load(str(data), **{"image_size": SIZE} | options)


def by_name(images) -> dict:
    """Label, pixels and bytes of each picture, by "cat-01"."""
    names = [name.rpartition(".tar/")[2].replace("/", "-").removesuffix(".jpg") for name in images.files]
    pixels = images.batch(torch.arange(len(images)))
    return {
        name: (int(label), square.tolist(), images.read(row))
        for row, (name, label, square) in enumerate(zip(names, images.labels, pixels, strict=True))
    }


# ---- the same images as a folder


def test_shards_have_the_images_of_the_folder(folder, made):
    ours, theirs = opened(made), opened(folder)
    assert isinstance(ours.train, Shards)
    assert (ours.name, ours.classes, ours.image_shape) == ("shards", theirs.classes, (3, SIZE, SIZE))
    assert (len(ours.train), len(ours.test)) == (len(theirs.train), len(theirs.test)) == (31, 9)
    for split in ("train", "test"):
        assert by_name(getattr(ours, split)) == by_name(getattr(theirs, split))
    part = ours.train.subset(torch.tensor([20, 3]))
    assert torch.equal(part.batch(torch.arange(2)), ours.train.batch(torch.tensor([20, 3])))
    assert part.bytes().tolist() == [len(part.read(row)) for row in range(2)]
    assert fingerprint(part) != fingerprint(ours.train.subset(torch.tensor([3, 20])))
    assert len(opened(made, limit=5).train) == 5


def test_a_shard_is_open_while_it_is_read(made, monkeypatch):
    """Another thread may open it at the same time, or push it out of the cache."""
    monkeypatch.setattr(shards, "_opened", shards._opened.__wrapped__)
    images = opened(made).train
    assert [len(images.read(row)) for row in range(len(images))] == images.bytes().tolist()


def as_json(path) -> tuple[str, str]:
    return "json", json.dumps({"caption": "a picture", "label": list(helpers.CLASSES).index(path.parent.name)})


@pytest.mark.parametrize("label", [label_by_number, as_json])
def test_numbered_classes(folder, tmp_path, label):
    data, names = opened(write_shards(folder, tmp_path / "numbered", label)), opened(folder)
    assert data.classes == ("0", "1", "2")
    assert by_name(data.train) == by_name(names.train)
    alone = opened(tmp_path / "numbered", test_only=True)
    assert (len(alone.train), alone.all_classes) == (0, False)
    assert by_name(alone.test) == by_name(names.test)


def test_what_webdataset_writes_and_reads(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for split in ("train", "val"):
        with webdataset.ShardWriter(str(tmp_path / f"{split}-%06d.tar"), maxcount=8, verbose=0) as writer:
            for i, path in enumerate(sorted((folder / split).rglob("*.jpg"))):
                writer.write({"__key__": f"{path.parent.name}/{i:04}", "jpg": path.read_bytes(), "cls": int(i % 3)})
    train = opened(tmp_path).train
    names = sorted(map(str, tmp_path.glob("train-*.tar")))
    theirs = list(webdataset.WebDataset(names, shardshuffle=False))
    assert len(theirs) == len(train) == 31
    for row, sample in enumerate(theirs):
        assert train.files[row].endswith(f".tar/{sample['__key__']}.jpg")
        assert (train.read(row), int(train.labels[row])) == (sample["jpg"], int(sample["cls"]))


# ---- names


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("{}", {}),
        ("{}/train-{{000000..000004}}.tar,{}/val-{{000000..000001}}.tar", {}),
        ("{}/train-{{000000..000004}}.tar", {}),
        ("{}/train-*.tar,{}/val-00000*.tar", {}),
        ("{}/val-{{000000..000001}}.tar", {"test_only": True}),
        ("{}/train-{{000000..000004}}.tar,{}/val-*.tar", {"test_only": True}),
    ],
)
def test_names(made, data, options):
    found = opened(data.format(made, made), **options)
    assert (len(found.train), len(found.test)) == (0 if options else 31, 9)
    assert (found.name, found.classes) == ("shards", ("cat", "ship", "truck"))


def test_folders_of_shards(made):
    for split in ("train", "val"):
        (made / split).mkdir()
        for path in made.glob(f"{split}-*.tar"):
            path.rename(made / split / path.name)
    assert len(opened(made).train) == 31
    assert len(opened(f"{made}/train/train-{{000000..000004}}.tar,{made}/val/*.tar").train) == 31
    (made / "train").rename(made / "other")
    assert len(opened(made, test_only=True).test) == 9
    with pytest.raises(InputError, match=r"the folder has no train/\*.tar: give one that has"):
        opened(made)


def test_archives_beside_folders_of_classes_are_no_shards(pictures):
    for split in ("train", "val"):
        (pictures / split / "cat.tar").write_bytes(b"")
    assert opened(pictures).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}/train-{{000000..000009}}.tar", "train-000005.tar is not there, 5 of 10 shards are not: give the range of those"),
        ("{}/nothing-*.tar,{}/val-*.tar", r"there is no shard .*/nothing-\*.tar: give what is on a disk here"),
        ("{}/val-000000.tar", "these are shards to train or to test on: give both, as TRAIN,TEST"),
        ("{}/train-{{0..9999999999}}.tar", "these are 10000000000 shards: give at most 1000000"),
        ("a.tar,b.tar,c.tar", "these are 3 names of shards: give TRAIN,TEST"),
    ],
)
def test_names_that_do_not_fit(made, data, message):
    with pytest.raises(InputError, match=message):
        opened(data.format(made, made))


def test_classes_that_do_not_fit(folder, tmp_path):
    def made(name, label):
        return write_shards(folder, tmp_path / name, label)

    with pytest.raises(InputError, match="test samples are of class dog, no training sample is: give both the same"):
        opened(made("other", lambda path: ("cls", "dog" if path.parts[-3] == "val" else path.parent.name)))
    with pytest.raises(InputError, match="no training sample is of class 1: give shards with some, and number classes from 0"):
        opened(made("gap", lambda path: ("cls", str(2 * (path.parent.name == "cat")))))
    with pytest.raises(InputError, match="a label is -1: number classes from 0"):
        opened(made("minus", lambda path: ("cls", str((path.parent.name == "cat") - 1))))
    with pytest.raises(InputError, match="cat is all its classes"):
        opened(made("one", lambda path: ("cls", "cat")))
    with pytest.raises(InputError, match="a label is 1000000000: number classes from 0"):
        opened(made("huge", lambda path: ("cls", "1000000000")))
    with pytest.raises(InputError, match="a label is 9{40}: number classes from 0"):
        opened(made("more", lambda path: ("cls", "9" * 40)))
    with pytest.raises(InputError, match="--image-size is missing"):
        load(str(tmp_path / "gap"))


def test_test_labels_are_numbered_by_the_training_classes(folder, tmp_path):
    some = tmp_path / "some"
    shutil.copytree(folder, some)
    shutil.rmtree(some / "val" / "cat")
    made = write_shards(some, tmp_path / "shards")
    for data in (made, f"{made}/train-*.tar,{made}/val-*.tar"):
        found = opened(data, test_only=True)
        assert found.classes == ("cat", "ship", "truck")
        assert set(found.test.labels.tolist()) == {1, 2}


# ---- damage


def cut(where):
    def change(path):
        with tarfile.open(path) as tar:
            member = tar.getmembers()[6]  # the picture of the fourth sample
        os.truncate(path, {"picture": member.offset_data + 100, "header": member.offset + 100, "end": member.offset}[where])

    return change


def overwrite(path):
    with tarfile.open(path) as tar:
        place = tar.getmembers()[6].offset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\7" * 1000)


def header(**changes):
    """Another header for the picture of the fourth sample."""

    def change(path):
        with tarfile.open(path) as tar:
            member = tar.getmembers()[6]
        for name, value in changes.items():
            setattr(member, name, value)
        with open(path, "r+b") as file:
            file.seek(member.offset)
            file.write(member.tobuf(tarfile.GNU_FORMAT)[: tarfile.BLOCKSIZE])

    return change


def chained(path):
    """A thousand long names, each of the next, before the fourth sample."""
    with tarfile.open(path) as tar:
        place = tar.getmembers()[6].offset
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2
    content = path.read_bytes()
    path.write_bytes(content[:place] + (long.tobuf() + b"a".ljust(512, b"\0")) * 2000 + content[place:])


def between(path):
    """After the picture, before the label, of the fourth sample."""
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[7].offset)


@pytest.mark.parametrize(
    ("damage", "message", "left"),
    [
        (cut("picture"), "from the end of sample {2} on (it is cut short)", 3),
        (cut("header"), "from the end of sample {2} on (", 3),
        (cut("end"), "from the end of sample {2} on (it is cut short)", 3),
        (overwrite, "from the end of sample {2} on (no tar header follows)", 3),
        (between, "from sample {3} on (it is cut short)", 3),
        (header(size=-1536), "from the end of sample {2} on (", 3),
        (header(size=2**62), "from the end of sample {2} on (it is cut short)", 3),
        (header(type=tarfile.XHDTYPE, size=2**40), "from the end of sample {2} on (a header says that", 3),
        (header(type=tarfile.XHDTYPE, size=-512), "from the end of sample {2} on (", 3),
        (header(type=tarfile.GNUTYPE_SPARSE), "from the end of sample {2} on ('", 3),
        (chained, "from the end of sample {2} on (maximum recursion depth", 3),
        (lambda path: path.write_bytes(b""), "from its beginning on (empty file)", 0),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "from its beginning on (", 0),
    ],
)
def test_damaged_shards_are_named_and_cut(made, capsys, damage, message, left):
    path = made / "train-000001.tar"
    with tarfile.open(path) as tar:
        keys = [name.removesuffix(".jpg") for name in tar.getnames()[::2]]
    whole = by_name(opened(made).train)
    damage(path)
    message = message.format(*keys)
    with pytest.raises(InputError) as error:
        opened(made)
    assert str(error.value).startswith(f"--data: {path} is damaged {message}")
    assert str(error.value).endswith(": write it again, or add --skip-broken to leave out the rest of it")
    assert "\n" not in str(error.value)
    found = by_name(opened(made, skip_broken=True).train)
    assert found == {name: sample for name, sample in whole.items() if name not in keys[left:]}
    assert f"{path} is damaged {message}" in (said := capsys.readouterr().err)
    assert f": the {left} samples before are used, the rest is left out\n" in said


@pytest.mark.parametrize(
    ("put", "reason"), [(os.mkfifo, "it is no regular file"), (lambda path: path.symlink_to("no"), "No such")]
)
def test_shards_that_are_no_files(made, put, reason):
    put(made / "train-000005.tar")
    with pytest.raises(InputError, match=f"^--data: {made}/train-000005.tar cannot be read .{reason}.*: repair or remove it"):
        opened(made, skip_broken=True)


def test_samples_that_lack_something(made, capsys):
    with tarfile.open(made / "train-000005.tar", "w") as tar:
        for name in ("1.jpg", "2.cls", "3.json", "__skip__.jpg", "4.jpg", "4.mask.png", "4.cls"):
            add(tar, name, b"{}")
        records = ('{"label": null}', '{"label": [1, 2]}', '{"cls": 1.5}', "[" * 100_000, json.dumps({"cls": "a" * 2000}))
        for name, record in enumerate(records, 5):
            add(tar, f"{name}.jpg", b"")
            add(tar, f"{name}.json", record.encode())
        for name in range(100, 110):
            add(tar, f"{name}.jpg", b"")
    what = "1, 2, 3, 4, 5, 6, 7, 8, 9, 100 and 9 more"
    with pytest.raises(InputError, match=f"in .*train-000005.tar, {what} have no picture or several, .*add --skip-broken"):
        opened(made)
    assert len(opened(made, skip_broken=True).train) == 31
    said = f"in {made / 'train-000005.tar'}, these are left out, as they have no picture or several, or no label: {what}\n"
    assert said in capsys.readouterr().err


def test_names_that_are_no_utf_8(made):
    picture = opened(made).train.read(0)
    with tarfile.open(made / "train-000005.tar", "w") as tar:
        add(tar, "caf\udce9.jpg", picture)
        add(tar, "caf\udce9.cls", b"cat")
    train = opened(made).train
    assert train.files[31] == "train-000005.tar/caf\udce9.jpg"
    assert train.read(31) == picture
    fingerprint(train)


def test_broken_pictures(made, capsys):
    with tarfile.open(made / "train-000005.tar", "w") as tar:
        for name, content in (("a/1.jpg", b"\xff\xd8\xff no picture"), ("a/1.cls", b"cat")):
            add(tar, name, content)
    train = opened(made).train
    with pytest.raises(InputError, match=f"^--data: {made}/train-000005.tar/a/1.jpg cannot be decoded .*--skip-broken"):
        train.batch(torch.tensor([31]))
    assert len(opened(made, skip_broken=True).train) == 31
    assert f"1 of 32 pictures in {made} are left out: train-000005.tar/a/1.jpg (" in capsys.readouterr().err


def test_a_shard_cut_short_under_way(made):
    train = opened(made).train
    os.truncate(made / "train-000000.tar", 1000)
    with pytest.raises(InputError, match="train-000000.tar/.* cannot be decoded .its shard has become shorter.: repair"):
        train.batch(torch.arange(7))


# ---- the index


def test_the_index_is_kept_while_it_is_of_these_shards(made, monkeypatch, capsys):
    scans, scan = [], shards._scan
    monkeypatch.setattr(shards, "_scan", lambda path: scans.append(path.name) or scan(path))
    first, again = opened(made), opened(made)
    assert len(scans) == 7  # once
    assert by_name(first.train) == by_name(again.train)
    with tarfile.open(made / "train-000004.tar", "a") as tar:
        add(tar, "new.jpg", first.train.read(0))
        add(tar, "new.cls", b"cat")
    assert len(opened(made).train) == 32
    assert len(scans) == 12
    kept = made / "train-000000-train-000004.index.npz"
    kept.write_bytes(kept.read_bytes()[:1000])  # half an index
    assert len(opened(made).train) == 32
    kept.unlink()
    os.mkfifo(kept)
    assert len(opened(made).train) == 32
    kept.unlink()
    kept.mkdir()  # it cannot be written
    capsys.readouterr()
    assert len(opened(made).train) == 32
    assert "the 5 shards are scanned at every start" in capsys.readouterr().err


def test_the_index_of_another_shard_of_the_same_size_and_time(made):
    path = made / "train-000000.tar"
    assert opened(made).classes == ("cat", "ship", "truck")
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"cat\0", b"dog\0"))  # labels alone: names have more behind them
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert opened(made).classes == ("cat", "dog", "ship", "truck")


def test_two_processes_write_the_index_at_once(made, monkeypatch, capsys):
    write = shards.atomic_write.write

    def after_another(path, content):
        write(path, content)
        raise shards.atomic_write.SaveError("its temporary file is gone")

    monkeypatch.setattr(shards.atomic_write, "write", after_another)
    assert len(opened(made).train) == 31
    assert capsys.readouterr().err == ""


# ---- the order


def test_an_epoch_goes_through_a_few_shards_at_a_time(monkeypatch):
    monkeypatch.setattr("spat_train.data.loader.WINDOW", 4)
    rows = torch.arange(0, 1000, 2)
    order = Order(rows, 20, seed=3, shard=rows // 50)  # 20 shards of 25
    epochs = [[rows for rows, _ in order.epoch(number)] for number in (0, 1)]
    for batches in epochs:
        assert sorted(torch.cat(batches).tolist()) == rows.tolist()
        for window in range(5):
            parts = torch.cat(batches[5 * window : 5 * window + 5])  # 4 shards of 25
            assert len((parts // 50).unique()) == 4
        assert all(len((batch // 50).unique()) > 1 for batch in batches)
    assert [rows.tolist() for rows in epochs[0]] != [rows.tolist() for rows in epochs[1]]
    assert epochs[0][0].tolist() == [rows for rows, _ in order.epoch(0)][0].tolist()
    first, second = zip(*(batch.tensor_split(2) for batch in epochs[0][:5]), strict=True)
    assert len((torch.cat(first) // 50).unique()) <= 3  # a rank opens about its share of them


def test_batches_of_extra_images_go_through_shards_too():
    order = Order(torch.arange(100), 10, seed=0, extra=30, extra_fraction=0.5, shard=torch.arange(100) // 10)
    assert [(len(rows), len(extra)) for rows, extra in order.epoch(0)] == [(5, 5)] * 10


def test_shards_that_are_few_are_shuffled_as_a_whole(made):
    train = opened(made).train
    order = Order(torch.arange(31), 8, seed=0, shard=train.shard)
    y = torch.cat([y for _, y in Loader(train, order, workers=0).epoch(0)])
    assert sorted(y.tolist()) == sorted(train.labels.tolist())
    assert len(train.shard[order.epoch(0)[0][0]].unique()) > 2
