"""Pictures of the attack results: throughput against batch, and the roofline, in the colours of Okabe and Ito.

`python -m benchmarks.plots benchmarks/results/h*00/attack.json` draws both beside each file.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.attack import races
from benchmarks.tables import fastest
from spat_train.plotting import log_y, new_figure

OURS, RIVALS = ["#D55E00", "#E69F00", "#CC79A7"], ["#0072B2", "#009E73", "#56B4E9", "#000000", "#7F3C8D", "#8C564B"]
PRECISIONS = {"fp32": "#0072B2", "tf32": "#009E73", "bf16": "#D55E00", "fp16": "#CC79A7"}
MARKERS = "osD^vP*X"
LIMIT = {"color": "#999999", "linestyle": ":", "linewidth": 2, "marker": "_", "markersize": 9}


def throughput(results: dict, path: Path) -> None:
    """Write a PNG: images/s against batch, models down, precisions across, ours solid, rivals dashed, the limit grey."""
    timed = [r for r in results["cells"] if r["status"] == "timed"]
    models = list(dict.fromkeys(r["model"] for r in timed))
    precisions = [p for p in PRECISIONS if any(r["precision"] == p for r in timed)]
    styles = _styles(timed)
    figure = new_figure(4 * len(precisions) + 0.5, 3 * len(models) + 1.4)
    axes = figure.subplots(len(models), len(precisions), squeeze=False, sharex=True, sharey="row")
    for ax, model, precision in ((axes[i, j], m, p) for i, m in enumerate(models) for j, p in enumerate(precisions)):
        here = [r for r in timed if (r["model"], r["precision"]) == (model, precision)]
        for provider, style in styles.items():
            _line(ax, {r["batch"]: r["batch"] / r["median"] for r in here if r["provider"] == provider}, **style)
        limits = {r["batch"]: r["batch"] / (results["settings"]["steps"] * r["limit"]["conv"]) for r in here}
        _line(ax, limits, **LIMIT)
        ax.set_xscale("log", base=2)
        batches = sorted({r["batch"] for r in timed})
        ax.set_xticks(batches, [str(batch) for batch in batches])
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.set_title(f"{model}, {precision}", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("batch")
    for ax in axes[:, 0]:
        log_y(ax)  # all panels in a row have this y axis
        ax.set_ylabel("images/s")
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    handles.append(Line2D([], [], **LIMIT, label="convolutions alone, at the measured ceiling"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * len(precisions)), fontsize=9)
    figure.suptitle(f"PGD-{results['settings']['steps']} on {results['machine']['device']}", fontsize=11)
    figure.savefig(path, dpi=130)


def roofline(results: dict, path: Path) -> None:
    """Write a PNG: TFLOP/s against operations a byte at each model's largest batch: ours filled, the fastest rival hollow."""
    ceilings, steps = results["ceilings"], results["settings"]["steps"]
    figure = new_figure(7.5, 5.2)
    ax = figure.subplots()
    largest = {model: (batch, records) for (model, batch), records in sorted(races(results).items(), key=lambda item: item[0][1])}
    points = []
    for marker, (_, records) in zip(MARKERS, largest.values(), strict=False):
        for precision in ceilings["tflops"]:
            for ours in (True, False):
                if best := fastest(records, ours, precision):
                    x, y = best["flops"] / best["bytes"], 1e-12 * steps * best["flops"] / best["median"]
                    points.append((x, y))
                    face = PRECISIONS[precision] if ours else "none"
                    ax.plot(x, y, marker, markersize=9, markeredgecolor=PRECISIONS[precision], markerfacecolor=face)
    low, high = min(x for x, _ in points) / 4, max(x for x, _ in points) * 4
    for place, (precision, ceiling) in enumerate(ceilings["tflops"].items()):
        knee = 1e3 * ceiling / ceilings["copy_gbps"]
        x = np.geomspace(min(low, knee / 2), max(high, knee * 2), 200)
        ax.plot(x, np.minimum(ceiling, 1e-3 * ceilings["copy_gbps"] * x), color=PRECISIONS[precision], linewidth=1.5)
        corner = (x[-1 - 25 * place], ceiling)  # side by side, since bf16 and fp16 often are alike
        ax.annotate(f"{precision} {ceiling:.3g}", corner, ha="right", va="bottom", color=PRECISIONS[precision], fontsize=9)
    ax.set_xscale("log")
    log_y(ax)
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.set_xlabel("operations a byte (convolutions and fused pointwise kernels, benchmarks/workmodel.py)")
    ax.set_ylabel("TFLOP/s")
    labels = zip(MARKERS, (f"{model}, batch {batch}" for model, (batch, _) in largest.items()), strict=False)
    named = [Line2D([], [], color="black", linestyle="", marker=marker, label=label) for marker, label in labels]
    figure.legend(handles=named, fontsize=9, loc="outside lower center", ncols=3)
    title = f"PGD-{steps} on {results['machine']['device']}, copy {ceilings['copy_gbps']:.0f} GB/s"
    ax.set_title(f"{title}\nfilled: spat_kernels; hollow: the fastest rival in that precision", fontsize=10)
    figure.savefig(path, dpi=130)


def links(folder: Path) -> str:
    """What shows both pictures of `folder` on benchmarks/NOTES.md."""
    return "\n".join(f"![{name}](results/{folder.name}/{name}.png)" for name in ("throughput", "roofline"))


def _styles(timed: list[dict]) -> dict[str, dict]:
    styles: dict[str, dict] = {}
    for mine, colors, line in ((True, OURS, {"linewidth": 2}), (False, RIVALS, {"linewidth": 1.2, "linestyle": "--"})):
        names = dict.fromkeys(r["provider"] for r in timed if r["ours"] == mine)
        styles |= {name: {"color": color} | line for name, color in zip(names, colors, strict=False)}
    return {name: style | {"marker": m, "markersize": 5} for (name, style), m in zip(styles.items(), 2 * MARKERS, strict=False)}


def _line(ax: Axes, points: dict[int, float], **style) -> None:
    if points:
        ax.plot(*zip(*sorted(points.items()), strict=True), **style)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", type=Path, help="files of benchmarks.attack")
    for file in parser.parse_args().json:
        data = json.loads(file.read_text())
        if not any("median" in cell for cell in data["cells"]):
            raise SystemExit(f"{file}: nothing was timed")
        throughput(data, file.with_name("throughput.png"))
        roofline(data, file.with_name("roofline.png"))
