"""The alpha of SPAT that suits an eps: `python -m benchmarks.alpha_search --data mnist.npz --out alpha_search.json`.

Runs `spat-train sweep alpha-search-mnist`, and keeps its report and picture. The command may be started once for each core. It
goes on where it was stopped.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

from benchmarks import measure
from benchmarks.study import mean, signed
from benchmarks.tables import environment, markdown
from spat_train.papers.runs import format_eps
from spat_train.sweeps.command import run
from spat_train.sweeps.spec import plan, read


@dataclass
class Options:
    """The alpha of SPAT that suits an eps."""

    data: Path
    """An .npz file of MNIST."""
    runs: Path = Path("runs/alpha-search")
    """Where the folders of the runs go."""
    out: Path | None = None
    """Write the results here, and the picture beside them."""


def settings_of(results: dict) -> list[dict]:
    """A record for each eps and alpha: its accuracies on held-out images by seed, and those with alpha = 0 at that eps."""
    grouped: dict[tuple[float, float], dict[int, dict]] = {}
    for r in results["runs"]:
        if r["state"] == "complete":
            params = r["params"]
            grouped.setdefault((params["eps"], params["alpha"]), {})[params["seed"]] = r
    return [
        {"eps": eps, "alpha": alpha, "runs": runs, "plain": grouped.get((eps, 0.0), {})}
        for (eps, alpha), runs in sorted(grouped.items())
    ]


def table(results: dict) -> str:
    """By eps and alpha: held-out accuracies, mean and deviation over the seeds, and what alpha gains under PGD."""
    records = settings_of(results)
    for r in records:
        gains = [
            run["pgd"]["accuracy"] - r["plain"][seed]["pgd"]["accuracy"] for seed, run in r["runs"].items() if seed in r["plain"]
        ]
        r["gain"] = signed(mean(gains)) if r["alpha"] and gains else ""
    return markdown(
        results, records,
        "ε | α || seeds | clean | PGD-10 | against α = 0", "{radius} | {alpha:g} || {count} | {clean} | {pgd} | {gain}",
        _best, "Held-out images of MNIST: {images:,}. ± between seeds.", environment,
        radius=lambda r: format_eps(r["eps"]), count=lambda r: len(r["runs"]),
        clean=lambda r: _over_seeds(r, "clean"), pgd=lambda r: _over_seeds(r, "pgd"),
    )  # fmt: skip


def _over_seeds(record: dict, kind: str) -> str:
    return mean([run[kind]["accuracy"] for run in record["runs"].values()])


def _best(results: dict) -> str:
    """By eps, the alpha with the best mean under PGD."""
    found: dict[float, dict] = {}
    for r in settings_of(results):
        r["pgd"] = fmean(run["pgd"]["accuracy"] for run in r["runs"].values())
        found[r["eps"]] = max(found.get(r["eps"], r), r, key=lambda each: each["pgd"])
    best = "; ".join(f"{r['alpha']:g} at {format_eps(eps)}" for eps, r in found.items())
    return f"Best α: {best}."


def main(options: Options) -> None:
    results = measure.begun("alpha_search", "cpu")
    run(plan(read("alpha-search-mnist"), {"data": str(options.data), "out": options.runs}))
    report = json.loads((options.runs / "sweep.json").read_text())
    results |= report | {"images": report["runs"][0]["images"]}
    measure.write(options.out, results)
    if options.out:
        shutil.copy(options.runs / "sweep.png", options.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
