"""Trials: a command with a fault, then the same command without it. Each ends in one of `OUTCOMES`."""

import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.faults import subjects
from tests.faults.commands import Commands, Ended
from tests.faults.subjects import COMMANDS, READINGS, Reading, differences, essence

OUTCOMES = ("resumed bit-identically", "refused clearly", "lost")
RESUMED, REFUSED, LOST = OUTCOMES
PAGE = 4096  # bytes: what the smallest file takes on a file system
NAMES = {"train": "run", "evaluate": "evaluation", "export": "export"}  # of their folders
TAKE_ROOM = ("open", "open64", "write", "fsync", "mkdir", "rename")  # calls that a full disk fails


@dataclass(frozen=True)
class Trial:
    """A fault in a command. `number`: which call, kill or bit; `place`: of damage, a file."""

    command: str
    fault: str
    number: float
    place: str = ""


class Found(NamedTuple):
    """What a trial came to. `stopped`: the fault ended the command, or the damage was refused; `note`: what was wrong."""

    outcome: str
    note: str = ""
    stopped: bool = False


class Lab:
    """Folders without faults, in `pristine`; what commands write without faults; and how long they take. A trial at a time."""

    def __init__(self, work: Path, commands: Commands):
        self.commands, self.pristine, self.folder = commands, work / "pristine", work / "trial"
        self.folder.mkdir(parents=True)
        self.calls: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, str]] = {}
        for command, name in NAMES.items():
            ended = self.write(command, self.pristine / name)
            self.calls[command] = ended.calls
        for command, name, share in (("train", "unfinished", 0.8), ("evaluate", "partial", 0.5)):
            out, number = self.pristine / name, int(share * len(self.calls[command]))
            assert not self.run(COMMANDS[command](self.pristine, out), folder=out, fault=("killed", number)).done

    def write(self, command: str, out: Path, processes: int = 1) -> Ended:
        """Write a folder without a fault, and note what is in it."""
        ended = self.run(COMMANDS[command](self.pristine, out), folder=out, processes=processes)
        assert ended.done, ended
        self.expected[f"{command}{processes}"], self.seconds[f"{command}{processes}"] = essence(out), ended.seconds
        return ended

    def run(self, arguments: list[str], **fault: Any) -> Ended:
        return self.commands.run(*arguments, **fault)

    # ---- how trials end

    def interrupted(self, command: str, faults: Iterable[dict], processes: int = 1) -> Found:
        """What comes of a command with each of the faults in turn, then without."""
        out, stopped = self.folder / "out", False
        arguments = COMMANDS[command](self.pristine, out)
        for fault in faults:
            ended = self.run(arguments, processes=processes, **fault)
            stopped |= not ended.done
            if not (ended.done or ended.killed or ended.refused):
                return Found(LOST, f"at the fault: {ended}", stopped)
            if ended.refused and list(out.rglob("*.tmp")):
                return Found(LOST, f"half a file stays: {ended}", stopped)
        again = self.run(arguments, processes=processes)
        return judge(again, out, self.expected[f"{command}{processes}"])._replace(stopped=stopped)

    def read(self, reading: Reading, harm: Callable[[Path], None]) -> Ended:
        """How the command ends that reads a harmed file."""
        shutil.rmtree(self.folder)
        for name in reading.folders:
            subjects.copy(name, self.pristine, self.folder)
        harm(self.folder / reading.file)
        return self.run(reading.command(self.folder, self.folder / "out"))

    def trial(self, trial: Trial) -> dict:
        """The trial, its outcome, and a note on it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        found = KINDS[trial.fault](self, trial)
        return asdict(trial) | found._asdict() | {"note": found.note.replace(str(self.folder.parent), "")}


def judge(ended: Ended, out: Path, expected: dict[str, str]) -> Found:
    """How a command without a fault ended that wrote `out`, or was to go on there."""
    if ended.refused:
        return Found(REFUSED, str(ended), True)
    if not ended.done:
        return Found(LOST, f"afterwards: {ended}", True)
    try:
        different = differences(essence(out), expected)
    except Exception as error:
        return Found(LOST, f"cannot be read: {type(error).__name__}: {error}")
    return Found(LOST, f"other content: {different}") if different else Found(RESUMED)


# ---- kinds of faults


def moment(lab: Lab, trial: Trial) -> Found:
    """Killed by SIGKILL at one to three random moments."""
    draw = random.Random(trial.number)
    kills = [{"seconds": draw.uniform(0, lab.seconds[f"{trial.command}1"])} for _ in range(1 + int(trial.number) % 3)]
    return lab.interrupted(trial.command, kills)


def at_call(lab: Lab, trial: Trial) -> Found:
    """Killed, or failed by the disk, at a call that changes files."""
    return lab.interrupted(trial.command, [{"folder": lab.folder / "out", "fault": (trial.fault, int(trial.number))}])


def file_size(lab: Lab, trial: Trial) -> Found:
    """No file may be larger."""
    return lab.interrupted(trial.command, [{"file_size": int(trial.number)}])


def small_disk(lab: Lab, trial: Trial) -> Found:
    """A file system of that many bytes, which is made larger afterwards."""
    with file_system(lab.folder / "disk", int(trial.number)) as disk:
        out, arguments = disk / "out", COMMANDS[trial.command](lab.pristine, disk / "out")
        ended = lab.run(arguments)
        if not ended.done and not ended.refused:
            return Found(LOST, f"at the fault: {ended}", True)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        return judge(lab.run(arguments), out, lab.expected[f"{trial.command}1"])._replace(stopped=not ended.done)


@contextmanager
def file_system(folder: Path, size: int) -> Iterator[Path]:
    """A new one at `folder`, in memory. Raises CalledProcessError without the right to mount it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def may_mount(folder: Path) -> bool:
    with suppress(subprocess.CalledProcessError, FileNotFoundError), file_system(folder, PAGE):
        return True
    return False


def rank(lab: Lab, trial: Trial) -> Found:
    """One of two processes is killed at a random moment."""
    if (two := f"{trial.command}2") not in lab.expected:
        lab.write(trial.command, lab.pristine / two, processes=2)
    draw = random.Random(trial.number)
    fault = {"victim": int(trial.number) % 2, "seconds": draw.uniform(0, lab.seconds[two])}
    return lab.interrupted(trial.command, [fault], processes=2)


def nan(lab: Lab, trial: Trial) -> Found:
    """A NaN in an image, a weight or a gradient of a step."""
    return lab.interrupted(trial.command, [{"prepare": ("tests.faults.server:inject_nan", trial.place, int(trial.number))}])


def nan_in_file(lab: Lab, trial: Trial) -> Found:
    """A NaN in the weights of a checkpoint that is whole otherwise."""

    def poison(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        next(iter(state["model"].values())).view(-1)[0] = torch.nan
        torch.save(state, path)

    return read_damaged(lab, trial, poison)


def damaged(lab: Lab, trial: Trial) -> Found:
    """A file is cut, or has a flipped bit or a block of zeros."""
    return read_damaged(lab, trial, lambda path: subjects.damage(path, trial.fault, trial.number))


def read_damaged(lab: Lab, trial: Trial, harm: Callable[[Path], None]) -> Found:
    reading = READINGS[trial.place]
    result = lab.folder / reading.result
    if trial.place not in lab.expected:
        ended = lab.read(reading, lambda path: None)
        assert ended.done, ended
        lab.expected[trial.place] = essence(result)
    return judge(lab.read(reading, harm), result, lab.expected[trial.place])


KINDS: dict[str, Callable[[Lab, Trial], Found]] = {
    "moment": moment, "killed": at_call, "torn": at_call, "full": at_call, "broken": at_call, "file size": file_size,
    "small disk": small_disk, "one of two": rank, "nan": nan, "nan in file": nan_in_file,
    "flip": damaged, "cut": damaged, "zeros": damaged,
}  # fmt: skip


def plan(lab: Lab) -> list[Trial]:
    """All trials, those of a kind together; "small disk" only where it may be mounted."""
    disks = may_mount(lab.pristine / "disk")
    trials = [
        Trial(command, "moment", i) for command, count in (("train", 50), ("evaluate", 50), ("export", 10)) for i in range(count)
    ]
    for command, calls in lab.calls.items():
        names = [call.split()[0] for call in calls]
        struck = {"killed": names, "torn": ("write",), "full": TAKE_ROOM, "broken": names}
        trials += [Trial(command, fault, i) for fault, only in struck.items() for i, name in enumerate(names, 1) if name in only]
        out = lab.pristine / NAMES[command]
        sizes = sorted({path.stat().st_size for path in out.rglob("*") if path.is_file()})
        trials += [Trial(command, "file size", size) for full in sizes for size in (full // 2, full - 1)]
        whole = sum(-(-size // PAGE) * PAGE for size in sizes)
        trials += [Trial(command, "small disk", size) for size in range(2 * PAGE, whole + 4 * PAGE, 2 * PAGE) if disks]
    trials += [Trial(command, "one of two", i) for command in ("train", "evaluate") for i in range(12)]
    trials += [Trial("train", "nan", step, place) for place in ("image", "weight", "gradient") for step in range(1, 11)]
    for label, reading in READINGS.items():
        command, places = reading.command(lab.folder, lab.folder)[0], random.Random(label)
        faults = {"flip": 20, "cut": 4, "zeros": 4, "nan in file": int(label in subjects.OF_WEIGHTS)}
        trials += [Trial(command, fault, places.random(), label) for fault, count in faults.items() for _ in range(count)]
    return trials
