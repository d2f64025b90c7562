"""What only a GPU can answer, in one command: `python -m benchmarks.gpu_suite --out DIR --minutes 20 --data cifar10.npz`.

Stages run in order of value, each in a process group of its own with a time limit of its own: its share of the minutes that are
left, so that what one does not use goes to those after it. A stage that fails, or takes too long, is recorded with the end of
its output, and the rest still run; what it had written by then is kept. DIR/<stage>.json holds its status, commands, output and
results; DIR/suite.json, rewritten after every stage, the summary, to which a later command with other stages adds.

Needs the package installed by `pip install -e .` (or built in place), tyro, pytest and pytest-benchmark; rivals that are not
installed are left out, and recorded. `--rehearse` runs the same stages on tiny sizes on the CPU; those that need a GPU are
recorded as skipped. `--stages` picks some, for a machine that is not ours for long. Training is `benchmarks.table61`.
"""

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from benchmarks import measure

TAIL = 40_000  # characters of a stage's output that are kept
GRACE = 10.0  # seconds for pytest to tell what it found, and to write what it timed, once it is interrupted
PYTEST = "PYTHON -m pytest -q --tb=short -p no:cacheprovider"
# What launches our own kernels, each of them in all its variants.
KERNEL_TESTS = f"{PYTEST} tests/ops -m 'gpu and not slow' -k 'compiled and not wrong_arguments and not in_one_graph'"
SANITIZE = f"SANITIZER --error-exitcode 86 --tool {{}} {KERNEL_TESTS}"

# In order of value. The attack's first two cells have every provider, those after them tell how batch and precision matter.
SUITE = {
    "agreement": ["precision --data DATA"],
    "attack": [
        "attack --models wrn-34-10 resnet-18 resnet-50 wrn-28-10 resnet-18@96 --batches 256 64 16 128 1024 512 32 "
        "--precisions fp32 tf32 bf16 fp16 --minutes LIMIT --seconds 0.5 "
        "--full 2 --some 'spat plan+graph' loop torchattacks 'autocast loop'"
    ],
    "breakdown": ["breakdown"],
    "training": [  # what takes longest last: it has what the others leave
        "data --npz DATA --images 20000 --workers 8 --seconds 3",
        "overhead --model resnet-18 --batch 128 --precisions bf16 --updates 60 --warm-up 10",
        "overhead --model wrn-34-10 --batch 128 --precisions bf16 --updates 60 --warm-up 10 --minutes LIMIT",
        "training --model wrn-34-10 --batch 128 --precisions fp32 tf32 bf16 --methods trades mart --seconds 1 "
        "--providers spat_train authors autocast --minutes LIMIT",
        "training --model wrn-34-10 --batch 128 --precisions fp32 tf32 bf16 fp16 --methods madry --seconds 1",
    ],
    "questions": [
        "workmodel --precisions fp32 tf32 bf16 fp16",
        "questions --models wrn-34-10 resnet-18 --limits 10 --seconds 0.02",
        "questions --models wrn-34-10 --precision fp32 --limits 10 --seconds 0.02",
        "questions --models wrn-34-10 --limits 0 --seconds 0.02",
    ],
    "memory": [
        "attack --models wrn-34-10 resnet-50 --batches 2048 --precisions bf16 fp32 --seconds 0 --minutes LIMIT "
        "--providers 'spat plan+graph' loop torchattacks 'autocast loop'"
    ],
}
TINY = "--models wrn-10-1 --precisions fp32 --steps 2 --seconds 0 --no-memory --small-ceilings"
SMALL = "--model wrn-10-1 --batch 16 --steps 2 --methods trades"
REHEARSAL = {
    "agreement": ["precision --data DATA --model small-cnn --train-images 20 --test-images 10 --epochs 1"],
    "attack": [f"attack {TINY} --batches 4 8 --full 1 --some loop"],
    "breakdown": ["breakdown --models wrn-10-1 --batches 4 --steps 2 --precision fp32 --seconds 0"],
    "training": [
        f"overhead {SMALL} --images 400 --updates 2 --warm-up 1",
        f"training {SMALL} --seconds 0 --precisions fp32 --providers spat_train authors",
        "data --images 200 --seconds 0",
    ],
    "questions": [
        "workmodel --precisions fp32 bf16 --small --models wrn-10-1",
        "questions --models wrn-10-1 --batch 2 --seconds 0.001 --precision fp32",
    ],
    "memory": [f"attack {TINY} --batches 4 --providers 'spat eager' loop"],
}


@dataclass(frozen=True)
class Stage:
    """Commands, run one after another.

    In a command, RESULT is a file whose JSON becomes the stage's `results`, a list of them where there are several commands;
    LIMIT the minutes that the command has, less a little; DATA the data set's file.
    """

    name: str
    share: float  # of the suite's minutes, against those of the other stages
    commands: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs_gpu: bool = False
    needs: str | None = None  # a program

    @property
    def needs_data(self) -> bool:
        return any("DATA" in shlex.split(command) for command in self.commands)


def stages(rehearse: bool) -> list[Stage]:
    device = "cpu" if rehearse else "cuda"
    modules = {
        name: [f"PYTHON -m benchmarks.{command} --device {device} --out RESULT" for command in commands]
        for name, commands in (REHEARSAL if rehearse else SUITE).items()
    }
    kernels = f"{PYTEST} benchmarks --device {device} --benchmark-json RESULT" + " -k keep_best" * rehearse
    parallel = f" -n {min(14, os.cpu_count())}" if importlib.util.find_spec("xdist") else ""
    # Every allocation of its own, so that a write past a tensor's end does not land in its neighbour.
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [f"{PYTEST} tests -m gpu -k '{which}'{parallel}" for which in ("not triton", "triton")]  # which compiles for minutes
    sanitizer = [SANITIZE.format(tool) for tool in ("memcheck", "racecheck")]
    return [
        Stage("tests", 4, tests, needs_gpu=True),
        Stage("sanitizer", 3, sanitizer, separate, needs_gpu=True, needs="compute-sanitizer"),
        Stage("agreement", 3, modules["agreement"]),
        Stage("attack", 12, modules["attack"]),
        Stage("breakdown", 2, modules["breakdown"]),
        Stage("training", 12, modules["training"]),
        Stage("kernels", 2, [kernels]),
        Stage("questions", 4, modules["questions"]),
        Stage("memory", 1, modules["memory"]),
    ]


def find(program: str) -> str | None:
    """Its path: in CUDA_HOME, on the PATH, or in /usr/local/cuda."""
    places = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(program, path=os.pathsep.join(places))


def run(stage: Stage, out: Path, seconds: float, data: Path | None = None) -> dict:
    """Run the commands of `stage` for at most `seconds` in all; its record, also written to `out`."""
    record = {"stage": stage.name, "status": "ok", "machine": measure.describe("cuda" if torch.cuda.is_available() else "cpu")}
    record |= {"limit_s": round(seconds, 1), "commands": []}
    start = time.monotonic()
    if stage.needs_gpu and not torch.cuda.is_available():
        record |= {"status": "skipped", "reason": "no GPU"}
    elif stage.needs and not find(stage.needs):
        record |= {"status": "skipped", "reason": f"no {stage.needs} in CUDA_HOME/bin, on the PATH or in /usr/local/cuda/bin"}
    elif stage.needs_data and data is None:
        record |= {"status": "skipped", "reason": "no --data"}
    elif seconds < 5:
        record |= {"status": "skipped", "reason": f"{seconds:.0f} s, its share of the minutes left, are too few"}
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = []
            for index, command in enumerate(stage.commands):
                result = Path(folder, f"{index}.json")
                limit = (seconds - (time.monotonic() - start)) / (len(stage.commands) - index)
                # Races stop themselves a little before they would be stopped, to lose nothing.
                words = {"RESULT": str(result), "LIMIT": f"{0.8 * limit / 60:.2f}", "DATA": str(data and data.absolute())}
                words |= {"PYTHON": sys.executable, "SANITIZER": find("compute-sanitizer")}
                done = execute([words.get(word, word) for word in shlex.split(command)], stage.environment, limit)
                told = command.replace("PYTHON", "python").replace("SANITIZER", "compute-sanitizer")
                record["commands"].append({"command": told} | done)
                if done["status"] != "ok":
                    record["status"] = done["status"]
                with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # killed before, or while, it wrote
                    results.append(json.loads(result.read_text()))
            if results:
                record["results"] = results if len(stage.commands) > 1 else results[0]
    record["seconds"] = round(time.monotonic() - start, 1)
    (out / f"{stage.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def execute(command: list[str], environment: dict[str, str], seconds: float) -> dict:
    """Status ("ok", "failed" or "timed out"), exit code and the end of the output of a command, killed with its children."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=measure.ROOT,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds, 1))
            status = "failed" if code else "ok"
        except subprocess.TimeoutExpired:
            code, status = None, "timed out"
            if "pytest" in command:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # also whatever it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")
    return {"status": status, "exit": code, "tail": text[-TAIL:]}


@dataclass
class Options:
    """Run the GPU suite."""

    out: Path
    """Folder for the results."""
    minutes: float = 25.0
    """For all stages together."""
    data: Path | None = None
    """CIFAR-10 as an .npz file, for the stages `agreement` and `training`."""
    rehearse: bool = False
    """Tiny sizes on the CPU."""
    stages: list[str] = field(default_factory=list)
    """Names of the stages to run, all by default."""


def main(options: Options) -> None:
    every = stages(options.rehearse)
    if unknown := set(options.stages) - {stage.name for stage in every}:
        raise SystemExit(f"--stages {' '.join(unknown)}: choose from {', '.join(stage.name for stage in every)}")
    if options.data and not options.data.is_file():
        raise SystemExit(f"--data {options.data}: there is no such file")
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: rehearse with --rehearse")
    chosen = [stage for stage in every if not options.stages or stage.name in options.stages]
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, path = time.monotonic() + 60 * options.minutes, options.out / "suite.json"
    summary = {record["stage"]: record for record in (json.loads(path.read_text())["stages"] if path.exists() else [])}
    for index, stage in enumerate(chosen):
        share = stage.share / sum(later.share for later in chosen[index:])
        record = run(stage, options.out, share * (deadline - time.monotonic()), options.data)
        summary[stage.name] = {key: record[key] for key in ("stage", "status", "reason", "seconds") if key in record}
        path.write_text(json.dumps({"machine": record["machine"], "stages": list(summary.values())}, indent=1) + "\n")
        print(f"{stage.name:<10} {record['status']:<10} {record['seconds']:>7.1f} s  {record.get('reason', '')}", flush=True)
        if record["status"] in ("failed", "timed out"):
            print(record["commands"][-1]["tail"][-1000:], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
