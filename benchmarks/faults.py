"""What is left after a fault: `python -m benchmarks.faults --out benchmarks/results/cpu/faults.json`.

Commands of spat-train are killed at random moments and at every call that changes a file, run on full and failing disks, lose one
of two processes, meet a NaN, and read files that are damaged. Then the same command runs without the fault. Each trial
(`tests/faults/trials.py`) ends as "resumed bit-identically", "refused clearly" or "lost". The same command on the same commit
continues what was cut.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import tyro

from benchmarks import measure
from benchmarks.tables import environment, markdown
from tests.faults.commands import Commands
from tests.faults.trials import LOST, OUTCOMES, Lab, Trial, plan

FAULTS = {
    "moment": "SIGKILL at random moments", "killed": "SIGKILL at each call", "torn": "SIGKILL within each write",
    "full": "disk full from each call on", "broken": "each call fails once (EIO)", "file size": "RLIMIT_FSIZE",
    "small disk": "tmpfs of 8 KiB and more", "one of two": "SIGKILL of one of two processes", "nan": "NaN in a step",
    "nan in file": "NaN in a file of weights", "flip": "one flipped bit in a file", "cut": "a file cut short",
    "zeros": "512 bytes lost to zeros",
}  # fmt: skip


@dataclass
class Options:
    """Faults in commands of spat-train."""

    out: Path
    """JSON file to write."""
    workers: int = 2
    """Trials at a time."""
    every: int = 1
    """Only one of this many trials of each kind."""


def chosen(trials: list[Trial], every: int) -> Iterator[Trial]:
    """The first of each kind, and then one of `every`."""
    seen = Counter[tuple[str, str, str]]()
    for trial in trials:
        kind = trial.command, trial.fault, trial.place
        if seen[kind] % every == 0:
            yield trial
        seen[kind] += 1


def table(results: dict) -> str:
    """The number of trials by fault and outcome."""
    rows = []
    for fault, title in FAULTS.items():
        trials = [trial for trial in results["trials"] if trial["fault"] == fault]
        commands = ", ".join(dict.fromkeys(trial["command"] for trial in trials))
        counts = Counter(trial["outcome"] for trial in trials)
        row = {"fault": title, "commands": commands, "trials": len(trials), "stopped": sum(t["stopped"] for t in trials)}
        rows += [row | {outcome: counts[outcome] for outcome in OUTCOMES}] if trials else []
    heads, cells = (" | ".join(text.format(name) for name in OUTCOMES) for text in ("{}", "{{{}}}"))
    return markdown(
        results,
        rows,
        f"fault | in || trials | stopped by it | {heads}",
        f"{{fault}} | {{commands}} || {{trials}} | {{stopped}} | {cells}",
        lambda r: f"{len(r['trials']):,} trials; lost: {sum(t['outcome'] == LOST for t in r['trials'])}.",
        environment,
    )


def main(options: Options) -> None:
    fresh = measure.begun("faults", "cpu", settings={"every": options.every}, trials=[])
    results = measure.continued(options.out, fresh)
    with ExitStack() as stack, ThreadPoolExecutor(options.workers) as pool:
        works = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(options.workers)]
        labs: SimpleQueue[Lab] = SimpleQueue()
        for lab in pool.map(lambda work: Lab(work / "lab", stack.enter_context(Commands(work))), works):
            labs.put(lab)

        def run(trial: Trial) -> dict:
            lab = labs.get()
            try:
                return lab.trial(trial)
            finally:
                labs.put(lab)

        trials = [*map(asdict, chosen(plan(lab), options.every))]
        for record in pool.map(lambda cell: run(Trial(**cell)), measure.missing(results["trials"], trials)):
            results["trials"].append(record)
            measure.write(options.out, results)
    print(table(results))
    if lost := [f"{trial}" for trial in results["trials"] if trial["outcome"] == LOST]:
        raise SystemExit("\n".join(lost))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
