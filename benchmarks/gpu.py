"""All that some minutes on a GPU can tell: `python -m benchmarks.gpu --out DIR --minutes 9.5 --data cifar10.npz`.

Steps run in order of value, each with a cap in seconds. Each writes its file into DIR/<card>/ while it works, so that what it has
measured stays, whatever ends this command: its own clock, SIGINT, SIGTERM or SIGKILL. gpu.json, rewritten before and after every
step, has the machine and the status of each step: "ok", "failed", "cut" or "skipped".

What an earlier command on the same card and commit finished is not run again: what --out has, or --have where --out is new. A
step that was cut continues from its file, later or in the minutes that are left. A step that failed runs again only if --only
names it. Results of another card or commit are refused. `--rehearse` runs the steps on tiny sizes on the CPU.

Needs the package built in place or installed with `pip install -e '.[test]'`. Rivals that are missing are left out, and recorded.
"""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from benchmarks import measure
from benchmarks.tables import environment, markdown
from spat_train.runtime.signals import GracefulStop

GRACE = 10.0  # seconds that a step has to save, once it is interrupted
LEAST = 10.0  # seconds without which no step begins
TAIL = 20_000  # characters of a step's output that are kept


@dataclass(frozen=True)
class Step:
    """A command. In it {out} is the step's file, and {runs} a folder for checkpoints, which does not come back."""

    name: str
    cap: float  # seconds
    command: str
    tiny: str = ""  # the command of a rehearsal; "": it needs a GPU
    beside: "Step | None" = None  # runs at the same time
    needs: str = "json"  # a module
    default: bool = True  # False: runs only if --only names it


def bench(name: str, options: str) -> str:
    return f"{{python}} -m benchmarks.{name} --device {{device}} --out {{out}} {options}"


def pytest(options: str) -> str:
    return f"{{python}} -m pytest -q --tb=short -p no:cacheprovider {options}"


ROBUST = "tests/assets/wrn-10-2-madry.pt --network wrn-10-2 --data {data}"
TABLE61 = "{python} -m benchmarks.table61 --data {data} --out {out} --runs {runs} --rows mart+spat"
FIVE = f"{TABLE61} mart trades+spat trades madry --epochs 8 --test-precision tf32"
RACE = "--models wrn-34-10 resnet-18 --batches 128 256 --precisions bf16"
LOOPS = "'spat plan+graph' 'spat plan+graph, fuse=False' loop torchattacks 'autocast loop'"
KERNELS = pytest("tests/ops -m 'gpu and not slow' -k 'compiled and not refused and not in_one_graph'")
QUICK = "--seconds 0 --no-memory --small-ceilings"
TINY = f"--models wrn-10-1 --precisions fp32 --steps 2 {QUICK} --batches"
SMALL = "--model wrn-10-1 --batch 16 --steps 2"
STEPS = [
    Step("smoke", 90, bench("attack", "--models wrn-34-10 --batches 128 --precisions bf16 --seconds 0.1 --small-ceilings "
                            "--providers 'spat plan+graph' 'autocast loop'"),
         bench("attack", f"{TINY} 4 --providers 'spat plan' loop")),
    Step("tests", 150, pytest("tests -m gpu -k 'not triton' -n {processes}"), pytest("tests/ops/test_linf.py -k denormals -n 0"),
         beside=  # for torch.compile's cache on the disk: models and shapes of the race, fewer steps
         Step("warm-up", 0, f"{{python}} -m benchmarks.attack {RACE} --providers 'compiled autocast loop' --steps 2 {QUICK}",
              f"{{python}} -m benchmarks.attack {TINY} 4 --providers loop")),
    Step("convolutions", 40, bench("convolutions", "--models wrn-34-10 resnet-18 --batches 128 256")),
    Step("table61", 340, f"sh -c \"trap : INT; {FIVE} & {FIVE} & {FIVE}; code=$?; wait; exit $code\"",
         f"{TABLE61} --model small-cnn --epochs 1 --precision fp32 --limit 20 --test-images 20"),
    Step("training", 60, bench("training", "--model resnet-18 --batch 128 --precisions fp32 bf16 "
                               "--providers spat_train authors autocast --seconds 0.3"),
         bench("training", f"{SMALL} --methods mart madry --precisions fp32 --providers spat_train authors --seconds 0")),
    Step("attack", 120, bench("attack", f"{RACE} fp32 tf32 fp16 --providers {LOOPS} 'compiled autocast loop' --seconds 0.3"),
         bench("attack", f"{TINY} 4 8 16 --providers 'spat eager' 'spat plan' loop torchattacks")),
    Step("early_stop", 40, bench("early_stop", f"{ROBUST} --images 1000 --batch-size 1000 --precision bf16"),
         bench("early_stop", f"{ROBUST} --images 4 --steps 6 --batch-size 4")),
    Step("triton", 90, pytest("tests/ops -m gpu -k triton -n {processes}")),
    Step("breakdown", 45, bench("breakdown", "--models wrn-34-10 resnet-18 --batches 256 128"),
         bench("breakdown", "--models wrn-10-1 --batches 4 --steps 2 --precision fp32 --seconds 0")),
    Step("microbench", 45, bench("microbench", "--models wrn-34-10 resnet-18 --precisions bf16 fp32 --limits 10 0 "
                                 "--seconds 0.02"),
         bench("microbench", "--models wrn-10-1 --precisions bf16 fp32 --batch 2 --seconds 0.001")),
    Step("networks", 240, bench("networks", "--size 224 --batch 64 --steps 5 --precisions bf16 --seconds 0.2"),
         bench("networks", "--networks resnet18 --size 32 --batch 2 --steps 1 --precisions fp32 --seconds 0"), needs="timm",
         default=False),
    Step("fused", 70, "{python} -m benchmarks.fused both --out {out}", needs="cudnn", default=False),
    Step("sanitizer", 200, 'env PYTORCH_NO_CUDA_MEMORY_CACHING=1 '  # each tensor is an allocation
         f'sh -c "for tool in memcheck racecheck; do {{sanitizer}} --error-exitcode 86 --tool $tool {KERNELS} || exit; done"',
         default=False),
    Step("kernels", 120, pytest("benchmarks --device {device} --benchmark-json {out}"),
         pytest("benchmarks --device {device} --benchmark-json {out} -k keep_best"), default=False),
    Step("memory", 120, bench("attack", f"--models wrn-34-10 resnet-50 --batches 1024 --precisions fp32 bf16 --providers {LOOPS} "
                              "--seconds 0"),
         bench("attack", f"{TINY} 4 --providers 'spat eager' loop"), default=False),
    Step("precision", 200, bench("precision", "--data {data}"),
         bench("precision", "--data {data} --model small-cnn --train-images 20 --test-images 10 --epochs 1"),
         default=False),
    Step("overhead", 120, bench("overhead", "--model wrn-34-10 --batch 128 --precisions bf16 --updates 60 --warm-up 10"),
         bench("overhead", f"{SMALL} --methods mart --images 400 --updates 2 --warm-up 1"), default=False),
]  # fmt: skip


@dataclass
class Options:
    """Run the steps for some minutes."""

    out: Path
    """Folder for the results; a folder named after the card is made in it."""
    minutes: float
    data: Path | None = None
    """CIFAR-10 as an .npz file."""
    only: list[str] = field(default_factory=list)
    """Names of steps, by default all but networks, fused, sanitizer, kernels, memory, precision and overhead."""
    have: Path | None = None
    """The --out of an earlier command, or a copy of it."""
    rehearse: bool = False
    """Tiny sizes on the CPU, with ten times as long for each step."""


class Child:
    """A command in a process group of its own. The whole group is killed in `end`, or when this process dies."""

    def __init__(self, words: list[str]):
        self.began, self.log = time.monotonic(), tempfile.TemporaryFile()  # noqa: SIM115  for as long as this object
        environment = os.environ | {"TEARDOWN_CUPTI": "0"}  # CUPTI has crashed when it started a second time after CUDA graphs
        # The guard's input ends with this process, also by SIGKILL. It is started first, so that no command is ever without it.
        words_of_guard = ["sh", "-c", 'read group && { read _; kill -s KILL -- "-$group"; }']
        self.guard = subprocess.Popen(
            words_of_guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=os.setpgrp, text=True, bufsize=1
        )
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, cwd=measure.ROOT, env=environment,
            preexec_fn=os.setpgrp,
        )  # fmt: skip
        assert self.guard.stdin
        self.guard.stdin.write(f"{self.process.pid}\n")

    def end(self, deadline: float, wish: GracefulStop) -> dict:
        """Wait for it until `deadline` or a signal, then interrupt it. Returns what there is to record."""
        why, end = "", float("inf")
        while (code := self.process.poll()) is None and time.monotonic() < end:
            if not why and (wish.number or time.monotonic() > deadline):
                why = signal.Signals(wish.number).name if wish.number else f"after {time.monotonic() - self.began:.0f} s"
                end = min(time.monotonic(), deadline) + GRACE
                os.killpg(self.process.pid, signal.SIGINT)  # pytest tells what it found, trainings save
            time.sleep(0.05)
        self.guard.communicate()
        self.process.wait()
        self.log.seek(0)
        tail = self.log.read().decode(errors="replace").replace(f"{measure.ROOT}/", "")[-TAIL:]
        seconds = round(time.monotonic() - self.began, 1)
        if code == 0 and not why:
            return {"status": "ok", "seconds": seconds, "tail": tail}
        return {"status": "cut" if why else "failed", "reason": why or f"exit code {code}", "seconds": seconds, "tail": tail}


def card(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100, NVIDIA GeForce RTX 4090 -> rtx-4090."""
    known = re.search(r"RTX A?\d+|\b[A-Z]{1,2}\d+[A-Z]?\b", device)
    return re.sub(r"[^a-z0-9]+", "-", (known[0] if known else device).lower())


def obstacle(step: Step, words: dict) -> str:
    """Why it cannot run here; "" if it can."""
    if missing := [word for word, value in words.items() if value is None and f"{{{word}}}" in step.command]:
        return {"data": "no --data", "sanitizer": "no compute-sanitizer on the PATH or in /usr/local/cuda/bin"}[missing[0]]
    try:
        importlib.import_module(step.needs)
    except Exception as error:  # cudnn raises others where it finds no library
        return measure.one_line(error)
    return "" if step.command else "it needs a GPU"


def taken_over(folder: Path, have: Path | None, machine: dict) -> dict:
    """Name to result of the steps in `folder`, or else of those in `have`, with the files of those that were cut."""
    source = have if have and not (folder / "gpu.json").exists() else folder
    steps = measure.continued(source / "gpu.json", {"machine": machine, "steps": {}})["steps"]
    folder.mkdir(parents=True, exist_ok=True)
    if source is have:
        found = [f"{name:<10} {step['status']:<8} in --have" for name, step in steps.items()]
        print("\n".join(found) or f"--have: there is no {have / 'gpu.json'}", flush=True)
        for name in [name for name, step in steps.items() if step["status"] != "ok" and (have / f"{name}.json").exists()]:
            shutil.copy(have / f"{name}.json", folder)
    measure.write(folder / "gpu.json", {"machine": machine, "steps": steps})
    return steps


def table(results: dict) -> str:
    """How each step ended; of tests and of what failed, the last line."""

    def last(r: dict) -> str:
        lines = r["tail"].strip().splitlines() if "pytest" in r["command"] or r["status"] != "ok" else []
        return lines[-1][:200]

    rows = [r | {"name": name, "reason": f": {r['reason']}" if "reason" in r else ""} for name, r in results["steps"].items()]
    heads, cells = "step | status | last line || s", "{name} | {status}{reason} | {last} || {seconds:.0f}"
    return markdown(results, rows, heads, cells, environment, last=last)


@dataclass
class Session:
    """The steps of one command. gpu.json in `folder` tells how each ended."""

    folder: Path
    machine: dict
    results: dict[str, dict]  # by the name of a step
    words: dict[str, object]  # what stands for {out}, {data} and the like in the commands
    deadline: float
    wish: GracefulStop

    def status(self, step: Step) -> str:
        return self.results.get(step.name, {}).get("status", "")

    def record(self, step: Step, result: dict) -> None:
        shown = {key: Path(str(word)).name for key, word in self.words.items()} | {"out": f"{step.name}.json"}
        self.results[step.name] = {"seconds": 0.0, "tail": ""} | result | {"command": step.command.format(**shown)}
        measure.write(self.folder / "gpu.json", {"machine": self.machine, "steps": self.results})

    def start(self, step: Step) -> Child:
        before = {"tail": "", "seconds": 0.0} | self.results.get(step.name, {})
        kept = {key: before[key] for key in ("tail", "seconds")}
        self.record(step, kept | {"status": "cut", "reason": "this command was killed"})
        return Child([word.format(**self.words, out=self.folder / f"{step.name}.json") for word in shlex.split(step.command)])

    def attempt(self, step: Step) -> None:
        """Run the step, and what goes beside it, for as long as there is; print how they ended."""
        end = min(self.deadline, time.monotonic() + step.cap)
        why = obstacle(step, self.words) or "no time was left" * (end - time.monotonic() < LEAST)
        if why and self.status(step) in ("cut", "failed"):  # it stays that
            return
        pair = [step]
        if why:
            self.record(step, {"status": "skipped", "reason": why})
        else:
            pair += [step.beside] * bool(step.beside and self.status(step.beside) != "ok")
            for each, child in [(each, self.start(each)) for each in pair]:
                result, before = child.end(end, self.wish), self.results[each.name]["seconds"]
                self.record(each, result | {"seconds": round(before + result["seconds"], 1)})
        for each in pair:
            result = self.results[each.name]
            print(f"{each.name:<10} {result['status']:<8} {result['seconds']:>6.1f} s  {result.get('reason', '')}")
            print(*result["tail"].splitlines()[-12:], sep="\n", flush=True)
        for leftover in self.folder.glob("*.tmp"):  # left by a write that was killed
            leftover.unlink()


def check(options: Options, names: list[str]) -> None:
    """Raise SystemExit if an option does not fit, or this machine."""
    if unknown := set(options.only) - set(names):
        raise SystemExit(f"--only {' '.join(unknown)}: choose from {', '.join(names)}")
    if options.data and not options.data.is_file():
        raise SystemExit(f"--data {options.data}: there is no such file")
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: rehearse with --rehearse")
    if not measure.commit():
        raise SystemExit("there is no .git here: name the commit in SPAT_COMMIT")


def tiny(step: Step) -> Step:
    """The step as it is rehearsed."""
    return replace(step, cap=10 * step.cap, command=step.tiny, beside=step.beside and tiny(step.beside))


def main(options: Options, every: list[Step] = STEPS) -> None:
    deadline = time.monotonic() + 60 * options.minutes - GRACE - 2  # to save in, and to write in
    check(options, [step.name for step in every])
    device = "cpu" if options.rehearse else "cuda"
    machine = measure.describe(device)
    name = "rehearsal" if options.rehearse else card(machine["device"])
    folder = options.out.absolute() / name
    words = {
        "python": sys.executable, "device": device, "processes": max(1, (os.cpu_count() or 1) - 6),
        "data": options.data and options.data.absolute(), "runs": Path(tempfile.gettempdir(), f"runs-{name}-{machine['commit']}"),
        "sanitizer": shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"),
    }  # fmt: skip
    results = taken_over(folder, options.have and options.have / name, machine)
    session = Session(folder, machine, results, words, deadline, GracefulStop("stopping: what was measured is saved"))
    steps = [tiny(step) for step in every] if options.rehearse else every
    todo = [step for step in steps if (step.name in options.only if options.only else step.default)]
    todo = [step for step in todo if session.status(step) not in (["ok"] if options.only else ["ok", "failed"])]
    with session.wish.heard() as wish:
        for step, again in [(step, False) for step in todo] + [(step, True) for step in todo]:
            if not wish.number and (not again or session.status(step) == "cut"):  # what was cut has the minutes that are left
                session.attempt(step)
    if wish.number:
        raise SystemExit(128 + wish.number)
    if failed := [step.name for step in todo if session.status(step) == "failed"]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
