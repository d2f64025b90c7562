"""Generated inputs for everything that takes input: `python -m benchmarks.fuzz --out benchmarks/results/cpu/fuzz.json`.

Tries the targets of tests/fuzz in batches, each in a process of its own, and counts how inputs ended: held (every property does),
refused (by a documented error), or a find. The ops are compared with their references, attacks are looked at for ball, box and
traces, readers for errors that are not theirs; any may end its interpreter, need more than some GB, or hang. Cut, it goes on.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import measure
from benchmarks.tables import environment, markdown
from tests.fuzz import campaign
from tests.fuzz.targets import TARGETS

INPUTS = {  # in a full run, by target
    "ops": 40_000, "attacks": 9_000, "attack names": 25_000, "commands": 500, "options": 15_000, "sizes": 5_000, "files": 15_000,
}  # fmt: skip
ABOUT = {
    "ops": "ops called directly, against their references", "attacks": "attacks and their functions",
    "attack names": "the grammar of attacks", "commands": "command lines", "options": "options of a training, as values",
    "sizes": "`--train-sizes`", "files": "files that are read, damaged",
}  # fmt: skip
BATCH = 500


@dataclass
class Options:
    """Try generated inputs, and count how they end."""

    share: float = 1.0
    """The part of a full run's inputs that is tried."""
    out: Path | None = None
    """Put the results here; a run that was cut goes on."""


def counted(cell: dict) -> dict:
    """A batch of inputs of a target: how many ended how, and what was found."""
    begun = time.perf_counter()
    batch = campaign.run(TARGETS[cell["target"]], cell["inputs"], cell["seed"])
    for error, value in batch.finds.items():
        print(f"{cell['target']}, seed {cell['seed']}: {error}\n    {value}", flush=True)
    return {"outcomes": batch.outcomes, "finds": batch.finds, "seconds": round(time.perf_counter() - begun, 1)}


def cells(share: float) -> list[dict]:
    """The batches of all targets, in turn, so that a run that is cut has some of each."""
    batches = [
        {"target": target, "inputs": min(BATCH, inputs - first), "seed": first // BATCH}
        for target, inputs in INPUTS.items()
        for first in range(0, inputs, BATCH)
        if first < inputs * share
    ]
    return sorted(batches, key=lambda cell: cell["seed"])


def table(results: dict) -> str:
    """How the inputs of each target ended."""
    rows = []
    for target in INPUTS:
        batches = [batch for batch in results["batches"] if batch["target"] == target]
        ends = sum((Counter(batch["outcomes"]) for batch in batches), Counter())
        kinds = {error for batch in batches for error in batch["finds"]}
        rows.append({"about": ABOUT[target], "inputs": sum(ends.values()), "held": ends["held"], "refused": ends["refused"],
                     "none": ends["no input"], "found": ends["found"] + ends["killed"], "kinds": len(kinds)})  # fmt: skip
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "about"}
    return markdown(results, [*rows, {"about": "all"} | total],
                    "what || inputs | held | refused | not to be made | found | kinds of error",
                    "{about} || {inputs:,} | {held:,} | {refused:,} | {none:,} | {found:,} | {kinds}", environment)  # fmt: skip


def main(options: Options) -> None:
    results = measure.continued(options.out, measure.begun("fuzz", "cpu", batches=[]))
    measure.complete(options.out, results, "batches", cells(options.share), counted)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
