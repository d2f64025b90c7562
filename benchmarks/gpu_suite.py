"""Everything that only a GPU can answer, in one command: `python -m benchmarks.gpu_suite --out DIR --minutes 25`.

Stages run in order of value, each in a process group of its own with a time limit of its own: its share of the minutes that are
left, so that what one does not use goes to those after it. A stage that fails, or takes too long, is recorded with the end of
its output, and the rest still run; what it had written by then is kept. DIR/<stage>.json holds its status, commands, output and
results; DIR/suite.json, rewritten after every stage, the summary.

Needs the package installed by `pip install -e .` (or built in place), tyro, pytest and pytest-benchmark; rivals that are not
installed are left out, and recorded. `--rehearse` runs the same stages on tiny sizes on the CPU; those that need a GPU are
recorded as skipped. `--stages` picks some, for a lease too short for all.
"""

import contextlib
import json
import os
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

TAIL = 6000  # characters of a stage's output that are kept
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
KERNEL_TESTS = [*PYTEST, "tests/ops", "-m", "gpu and not slow", "-k", "compiled"]


@dataclass(frozen=True)
class Stage:
    """Commands, run one after another. RESULT in an argument is a file whose JSON becomes the stage's `results`, a list of them
    where there are several commands; LIMIT the command's share of the stage's minutes, less a little."""

    name: str
    share: float  # of the suite's minutes, against those of the other stages
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    needs_gpu: bool = False
    needs: str | None = None  # a program


def stages(rehearse: bool) -> list[Stage]:
    device = "cpu" if rehearse else "cuda"
    python = [sys.executable]
    attack = [*python, "-m", "benchmarks.attack", "--device", device, "--out", "RESULT"]
    questions = [*python, "-m", "benchmarks.questions", "--device", device, "--out", "RESULT"]
    workmodel = [*python, "-m", "benchmarks.workmodel", "--device", device, "--out", "RESULT", "--precisions"]
    training = [*python, "-m", "benchmarks.training", "--device", device, "--out", "RESULT"]
    overhead = [*python, "-m", "benchmarks.overhead", "--device", device, "--out", "RESULT"]
    data = [*python, "-m", "benchmarks.data", "--device", device, "--out", "RESULT"]
    kernels = [*python, *PYTEST, "benchmarks", "--device", device, "--benchmark-json", "RESULT"]
    if rehearse:
        workmodel += ["fp32", "bf16", "--small", "--models", "wrn-10-1"]
        kernels += ["-k", "keep_best"]
        questions += ["--models", "wrn-10-1", "--batch", "2", "--seconds", "0.001", "--precision", "fp32"]
        tiny = ["--steps", "2", "--seconds", "0", "--small-ceilings", "--precisions", "fp32", "--models", "wrn-10-1"]
        matrix = memory = [*attack, *tiny, "--batches", "4", "--no-memory", "--providers", "spat eager", "loop", "torchattacks"]
        small = ["--model", "wrn-10-1", "--batch", "16", "--steps", "2", "--methods", "trades"]
        training += [*small, "--seconds", "0", "--precisions", "fp32", "--providers", "spat_train", "authors"]
        overhead += [*small, "--images", "400", "--updates", "2", "--warm-up", "1"]
        data += ["--images", "200", "--seconds", "0"]
    else:
        workmodel += ["fp32", "tf32", "bf16", "fp16"]
        networks = ["wrn-34-10", "resnet-18", "resnet-50", "wrn-28-10", "resnet-18@96"]
        batches = ["256", "128", "1024", "32", "512", "64", "16"]  # both ends of the curve before its middle
        precisions = ["--precisions", "bf16", "fp32", "tf32", "fp16"]
        matrix = [*attack, "--models", *networks, "--batches", *batches, *precisions, "--seconds", "1", "--minutes", "LIMIT"]
        large = ["--models", "wrn-34-10", "resnet-50", "--batches", "2048", "--seconds", "0"]
        memory = [*attack, *large, *precisions, "--minutes", "LIMIT"]
        table61 = ["--model", "wrn-34-10", "--batch", "128", "--minutes", "LIMIT"]
        training += [*table61, *precisions, "--seconds", "3"]
        overhead += [*table61, "--precisions", "bf16", "--updates", "100", "--warm-up", "10"]
    sanitizer = find("compute-sanitizer") or "compute-sanitizer"
    # Every allocation of its own, so that a write past a tensor's end does not land in its neighbour.
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitize(tool: str) -> list[str]:
        return [sanitizer, "--tool", tool, "--error-exitcode", "86", *python, *KERNEL_TESTS]

    return [
        Stage("tests", 4, [[*python, *PYTEST, "tests", "-m", "gpu"]], needs_gpu=True),
        Stage("sanitizer", 4, [sanitize("memcheck"), sanitize("racecheck")], separate, needs_gpu=True, needs="compute-sanitizer"),
        Stage("kernels", 3, [kernels]),
        Stage("training", 8, [overhead, training, data]),
        Stage("questions", 4, [workmodel, questions]),
        Stage("attack", 10, [matrix]),
        Stage("memory", 2, [memory]),
    ]


def find(program: str) -> str | None:
    """Its path: in CUDA_HOME, on the PATH, or in /usr/local/cuda."""
    places = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(program, path=os.pathsep.join(places))


def run(stage: Stage, out: Path, seconds: float) -> dict:
    """Run the commands of `stage` for at most `seconds` in all; its record, also written to `out`."""
    record = {"stage": stage.name, "status": "ok", "machine": measure.describe("cuda" if torch.cuda.is_available() else "cpu")}
    record |= {"limit_s": round(seconds, 1), "commands": []}
    start = time.monotonic()
    if stage.needs_gpu and not torch.cuda.is_available():
        record |= {"status": "skipped", "reason": "no GPU"}
    elif stage.needs and not find(stage.needs):
        record |= {"status": "skipped", "reason": f"no {stage.needs} in CUDA_HOME/bin, on the PATH or in /usr/local/cuda/bin"}
    elif seconds < 5:
        record |= {"status": "skipped", "reason": f"{seconds:.0f} s, its share of the minutes left, are too few"}
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = []
            for index, command in enumerate(stage.commands):
                result = Path(folder, f"{index}.json")
                limit = (seconds - (time.monotonic() - start)) / (len(stage.commands) - index)
                # Races stop themselves a little before they would be stopped, to lose nothing.
                words = {"RESULT": str(result), "LIMIT": f"{0.8 * limit / 60:.2f}"}
                done = execute([words.get(word, word) for word in command], stage.environment, limit)
                record["commands"].append(done)
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
    """Status ("ok", "failed", "timed out"), exit code and the end of the output of a command, killed with its children."""
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
        finally:
            with contextlib.suppress(ProcessLookupError):  # also whatever it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")
    return {"command": " ".join(command), "status": status, "exit": code, "tail": text[-TAIL:]}


@dataclass
class Options:
    """Run the GPU suite."""

    out: Path
    """Folder for the results, at most eight files."""
    minutes: float = 25.0
    """For all stages together."""
    rehearse: bool = False
    """Tiny sizes on the CPU."""
    stages: list[str] = field(default_factory=list)
    """Names of the stages to run, all by default."""


def main(options: Options) -> None:
    every = stages(options.rehearse)
    if unknown := set(options.stages) - {stage.name for stage in every}:
        raise SystemExit(f"--stages {' '.join(unknown)}: choose from {', '.join(stage.name for stage in every)}")
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: rehearse with --rehearse")
    chosen = [stage for stage in every if not options.stages or stage.name in options.stages]
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, summary = time.monotonic() + 60 * options.minutes, []
    for index, stage in enumerate(chosen):
        share = stage.share / sum(later.share for later in chosen[index:])
        record = run(stage, options.out, share * (deadline - time.monotonic()))
        summary.append({key: record[key] for key in ("stage", "status", "reason", "seconds") if key in record})
        report = {"machine": record["machine"], "minutes": options.minutes, "stages": summary}
        (options.out / "suite.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{stage.name:<10} {record['status']:<10} {record['seconds']:>7.1f} s  {record.get('reason', '')}", flush=True)
        if record["status"] in ("failed", "timed out"):
            print(record["commands"][-1]["tail"][-1000:], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
