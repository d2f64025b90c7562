"""Evaluations by several processes: the files of one, whatever their number, stopped, killed and continued."""

import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from spat_train import cli
from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.evaluation import evaluate as module
from spat_train.evaluation.alarms import alarms
from spat_train.evaluation.records import EXAMPLES
from spat_train.runtime import logs
from spat_train.runtime.distributed import PATIENCE, Dealer, world
from spat_train.runtime.run_folder import RunFolder
from tests.evaluation.helpers import EPS, FEATURES, contents, digits, fitted, quiet, write_run
from tests.training.helpers import in_several, in_two, torchrun

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACKS = "fgsm,pgd-10x3,pgd-7-random,AutoAttack:steps=2:queries=10"
HOW = {"rows": torch.arange(130), "batch_size": 30, "save_images": True}  # 5 batches


def rank() -> int:
    return int(os.environ["RANK"])


def work(folder: Path | None, processes=None, **how):
    return quiet(fitted(), load("digits").test, **{"attacks": ATTACKS, "folder": folder, "world": processes} | HOW | how)


def work_together(folder: Path, results: Path | None = None) -> None:
    with world("cpu", PATIENCE) as processes:
        found = work(folder, processes)
        if results:
            again = work(None, processes, save_images=False)
            assert all(torch.equal(again.predicted[name], found.predicted[name]) for name in found.attacks)
    if results:
        state = found.predicted | {f"part of {name}": part for name, part in found.part.items()}
        torch.save([state, [e.image for examples in found.examples.values() for e in examples]], results / f"{rank()}.pt")


def stop_together(folder: Path, after: int, attacks: str = ATTACKS) -> None:
    """Each process stops when it has made that many records; the main one is the slower one."""
    add, made = module.Samples.add, []

    def counting(samples, record):
        add(samples, record)
        made.append(record)

    def on_progress():
        time.sleep(0.02 * (rank() == 0))
        if len(made) >= after:
            os._exit(3)

    with pytest.MonkeyPatch.context() as patched, world("cpu", PATIENCE) as processes:
        patched.setattr(module.Samples, "add", counting)
        work(folder, processes, on_progress=on_progress, attacks=attacks)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    work(folder)
    return folder


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_files_and_results_are_those_of_one_process(tmp_path, expected, size):
    assert in_several(size, work_together, tmp_path / "out", tmp_path) == [0] * size
    assert contents(tmp_path / "out") == contents(expected)
    found = work(None, save_images=False)
    assert 0 < found.worst_case() < found.accuracy("clean")
    pictures = [e.image for examples in found.examples.values() for e in examples]
    assert len(pictures) == 4 * EXAMPLES
    for each in range(size):
        state, images = torch.load(tmp_path / f"{each}.pt")
        for name, values in state.items():
            where, key = (found.part, name[8:]) if name.startswith("part of ") else (found.predicted, name)
            assert torch.equal(values, where[key]), name
        assert all(map(torch.equal, images, pictures))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 3), (3, 2, 1)))])
def test_stopped_by_some_and_continued_by_others(tmp_path, expected, sizes):
    """What was finished is kept, although it is not yet its turn in samples.jsonl, and not made again."""
    folder, whole = tmp_path / "out", contents(expected)["samples.jsonl"]
    for size in sizes[:-1]:
        if size == 1:
            with pytest.raises(StopIteration):
                work(folder, on_progress=iter([None] * 12).__next__)
        else:
            assert in_several(size, stop_together, folder, 4) == [3] * size
            early = b"".join(path.read_bytes() for path in folder.glob("samples-*.jsonl"))
            assert early.count(b"\n") >= 4 * (size - 1)
            (folder / "samples-1.jsonl").open("ab").write(b'{"attack": "fgsm", "batch": 4, "pred')  # as a kill leaves it
        assert whole.startswith((folder / "samples.jsonl").read_bytes())
    if sizes[-1] > 1:
        assert in_several(sizes[-1], work_together, folder) == [0] * sizes[-1]
    else:
        lines = [line for path in folder.glob("samples*.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
        kept = {(record["attack"], record["batch"]) for record in map(json.loads, lines)}
        made = []
        with pytest.MonkeyPatch.context() as patched:
            attack = module._Recorder.__call__
            patched.setattr(module._Recorder, "__call__", lambda self, task: made.append(task) or attack(self, task))
            work(folder)
        assert len(made) == 25 - len(kept)
    assert contents(folder) == contents(expected)


def work_on_fgsm(folder: Path) -> None:
    with world("cpu", PATIENCE) as processes:
        found = work(folder, processes, attacks="fgsm")
    assert list(found.attacks) == ["clean", "fgsm"]


@pytest.mark.parametrize("size", [1, 2])
def test_what_waits_for_an_attack_that_is_not_asked_for_is_kept(tmp_path, expected, size):
    """All of batch 3 was made early, and of the other attacks the other batches are missing."""
    folder, lines = tmp_path / "out", contents(expected)["samples.jsonl"].splitlines(keepends=True)
    folder.mkdir()
    (folder / "settings.json").write_bytes(contents(expected)["settings.json"])
    early = [line for line in lines if json.loads(line)["batch"] == 3]
    (folder / "samples-7.jsonl").write_bytes(b"".join(early))
    assert in_several(size, work_on_fgsm, folder) == [0] * size
    assert {p.name for p in folder.iterdir() if p.is_file()} == {"settings.json", "samples.jsonl", "samples-0.jsonl"}
    assert (folder / "samples-0.jsonl").read_bytes().splitlines() == [
        line.strip() for line in early if json.loads(line)["attack"] not in ("clean", "fgsm")
    ]
    work(folder)
    assert sorted((folder / "samples.jsonl").read_bytes().splitlines()) == sorted(map(bytes.strip, lines))
    assert not list(folder.glob("samples-*"))


def test_an_evaluation_that_finished_nothing_keeps_nobody_from_another(tmp_path, expected):
    (tmp_path / "settings.json").write_bytes(contents(expected)["settings.json"])
    (tmp_path / "samples.jsonl").touch()
    (tmp_path / "samples-1.jsonl").touch()
    work(tmp_path, seed=5)
    assert {p.name for p in tmp_path.iterdir()} == {"settings.json", "samples.jsonl", "images"}
    (tmp_path / "samples.jsonl").rename(tmp_path / "samples-1.jsonl")
    with pytest.raises(InputError, match="it holds another evaluation"):
        work(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"it holds samples-1.jsonl without settings.json"):
        work(tmp_path)


def all_checks(path: Path) -> None:
    with world("cpu", PATIENCE) as processes:
        found = alarms(
            fitted(), digits(100), source=fitted(1), eps=EPS, batch_size=20, bar=None, folder=path / "two", world=processes
        )
    (path / str(rank())).write_text(repr(found))


def test_alarms_and_black_boxes_are_those_of_one_process(tmp_path):
    assert in_two(all_checks, tmp_path) == [0, 0]
    found = alarms(fitted(), digits(100), source=fitted(1), eps=EPS, batch_size=20, bar=None, folder=tmp_path / "one")
    assert found[-1].name == "black box is weaker than white box"
    assert [(tmp_path / str(each)).read_text() for each in range(2)] == [repr(found)] * 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def count_bars(path: Path) -> None:
    bars, kind = [], logs.bar
    with pytest.MonkeyPatch.context() as patched, world("cpu", PATIENCE) as processes:
        patched.setattr(logs, "bar", lambda total, name, **how: bars.append(kind(total, name, **how)) or bars[-1])
        for _ in range(2):  # the second finds everything done
            work(path / "out", processes, bar="evaluate")
        dealer = Dealer(processes)
        numbers = list(dealer.deal(7))
        dealer.join(lambda: None)
        assert sorted(sum(processes.gather(numbers), [])) == [*range(7)]
    assert [(bar.n, bar.total) for bar in bars] == [(130 * (1 + 1 + 3 + 1 + 4) * (rank() == 0), 1300)] * 2  # of clean, fgsm, ...


def test_the_bar_of_the_main_process_counts_the_images_of_all(tmp_path):
    assert in_two(count_bars, tmp_path) == [0, 0]


def refused(path: Path, what: str) -> None:
    how, folder = {}, path / "out"
    if what == "models":
        how["seed"] = rank()
    if what == "disks":
        folder = path / f"out{rank()}"
        folder.mkdir()
    with world("cpu", PATIENCE) as processes, pytest.raises(InputError) as refusal:
        work(folder, processes, **how)
    (path / str(rank())).write_text(str(refusal.value))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("models", r"the processes differ \(--seed was [01], now [01]\): give all of them the same files"),
        ("disks", "--out .*out[01]: process [01] cannot write there: choose a folder that all share"),
        ("in use", "another run is at work there"),
    ],
)
def test_processes_that_do_not_fit(tmp_path, what, message):
    other = RunFolder(tmp_path / "out" if what == "in use" else None)
    other.claim()
    assert in_two(refused, tmp_path, what) == [0, 0]
    other.release()
    for each in range(2):
        assert re.search(message, (tmp_path / str(each)).read_text())
    assert not (tmp_path / "out").exists()


# ---- the command


@pytest.fixture
def a_run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


def arguments(run: Path, out: Path) -> list[str]:
    options = f"--model-name {FEATURES} --device cpu --batch-size 32 --limit 150 --attacks {ATTACKS} --no-alarms --save-images"
    return ["evaluate", str(run), *options.split(), "--out", str(out)]


def command(run: Path, out: Path, event: str = "") -> None:
    """The command; with an `event`, the second process has it in its second attack."""
    sys.argv = ["spat-train", *arguments(run, out)]
    attack, calls = module.broken_by, []

    def attacked(*args, **options):
        calls.append(1)
        if event and len(calls) == 2 and rank() == 1:
            while not list(out.glob("images/*/*")):
                time.sleep(0.01)
            if event == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            os.kill(os.getpid(), getattr(signal, event))
        return attack(*args, **options)

    module.broken_by = attacked
    os.dup2(os.open(out.with_name(f"stderr{os.environ.get('RANK', '')}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  (until the end of this process)
    cli.main()


def masked(folder: Path) -> dict[str, bytes]:
    """The files, without what was typed and when."""
    typed = rb"(?m)^.*(--out|\"digest\":|\d{4}-\d\d-\d\d \d\d:\d\d UTC).*$"
    return {name: re.sub(typed, b"", content) if "jsonl" not in name else content for name, content in contents(folder).items()}


@pytest.mark.parametrize(
    ("event", "codes", "message"),
    [
        ("SIGKILL", [1, -9], "spat-train: error: another process ended, and may say why (.*): the same command continues .*/two"),
        ("memory", [1, 2], "spat-train: error: --batch-size 32: out of memory on cpu: lower it, in another --out"),
        ("SIGTERM", [1, 143], "spat-train: stopped by signal 15: the same command continues .*/two"),
    ],
)
def test_a_process_that_ends_ends_the_others_and_the_same_command_continues(tmp_path, a_run, event, codes, message):
    begun = time.monotonic()
    assert in_two(command, a_run, tmp_path / "two", event) == codes
    assert time.monotonic() - begun < 60
    last = (tmp_path / f"stderr{int(event != 'SIGKILL')}").read_text().splitlines()[-1]
    assert re.fullmatch(message, last)
    assert "another process ended" in (tmp_path / "stderr0").read_text()
    assert in_two(command, a_run, tmp_path / "two") == [0, 0]
    assert in_several(1, command, a_run, tmp_path / "one") == [0]
    one, two = masked(tmp_path / "one"), masked(tmp_path / "two")
    assert len(one) == 5 + 4 * 5
    assert one == two


@pytest.mark.parametrize("wrong", [["--nonsense"], ["--data", "nowhere.npz"]])
def test_errors_are_said_once(a_run, tmp_path, wrong):
    done = torchrun("-m", "spat_train", *arguments(a_run, tmp_path / "out"), *wrong)
    assert done.returncode != 0
    assert done.stderr.count(wrong[-1]) == 1
    assert re.findall(r"exitcode +: (\d+)", done.stderr)[-1] == "2"
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_one_in_a_long_attack(a_run, tmp_path):
    def check(killed: int):
        script, out = tmp_path / f"killed{killed}.py", tmp_path / f"out{killed}"
        script.write_text(
            "import os, signal, sys, time\n"
            "from spat_train import cli\n"
            "from spat_train.evaluation import evaluate as module\n"
            "def attack(*arguments, **options):\n"
            f"    if os.environ['RANK'] == '{killed}': time.sleep(1), os.kill(os.getpid(), signal.SIGKILL)\n"
            "    for _ in range(6000): time.sleep(0.02)\n"
            "module.broken_by = attack\n"
            "cli.main()\n"
        )
        begun = time.monotonic()
        done = torchrun(script, *arguments(a_run, out))
        assert time.monotonic() - begun < 150  # torchrun waits for 30 s; the rest is the start
        assert done.returncode != 0
        assert "SIGKILL" in done.stderr
        assert done.stderr.count(f"the same command continues {out}") == 1

    with ThreadPoolExecutor() as together:  # they wait more than they work
        list(together.map(check, (0, 1)))
