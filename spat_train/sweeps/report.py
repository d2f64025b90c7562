"""The report of a sweep: all runs, the best one, what each option changes, hypotheses, and a picture. In points of accuracy."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial

from ..evaluation.report import markdown_table
from ..evaluation.result import interval
from ..plotting import accuracy_curve, legend_below, line_styles, panel_row, save, style, x_ticks
from ..runtime import atomic_write
from .spec import Spec, Sweep, command

KINDS = {"clean": "clean", "pgd": "PGD"}  # held-out accuracies, and their names in the report
Row = dict[str, Any]


def write(sweep: Sweep, trials: Mapping[str, FrozenTrial]) -> list[Path]:
    """Write sweep.md and sweep.json, and where a run is complete sweep.png and sweep.pdf, into the sweep's folder.

    Args:
        trials: by run.
    """
    found = numbers(sweep, [row(name, cell.params, trials.get(name)) for name, cell in sweep.cells.items()])
    paths = [sweep.out / f"sweep.{kind}" for kind in ("md", "json", "png", "pdf")]
    atomic_write.make_folder(sweep.out)
    for path, text in zip(paths, (markdown(sweep.spec, found), json.dumps(found, indent=1) + "\n"), strict=False):
        atomic_write.write(path, text.encode())
    if not found["best"]:
        return paths[:2]
    with style():
        figure = draw(sweep.spec, [r for r in found["runs"] if r["state"] == "complete"])
    save(figure, *paths[2:])
    return paths


def row(name: str, params: Mapping[str, Any], trial: FrozenTrial | None) -> Row:
    """What is known of a run. Accuracies, in percent, are those of its best checkpoint, with their 95 % intervals."""
    known = trial.user_attrs if trial else {}
    best, state = known.get("best"), trial.state.name.lower() if trial else "waiting"
    if state == "fail":
        state = "failed" if "error" in known else "stopped"
    found = {"run": name, "params": dict(params), "state": state, "error": known.get("error"), "test": known.get("test")}
    found |= {key: best and best[key] for key in ("epoch", "images")}
    return found | {kind: best and _accuracy([best[kind]], best["images"]) for kind in KINDS}


def numbers(sweep: Sweep, rows: list[Row]) -> dict[str, Any]:
    """All that the report has. Effects are of complete runs alone."""
    spec, kind = sweep.spec, sweep.maximise
    complete = [r for r in rows if r["state"] == "complete"]
    best = max(complete, key=lambda r: r[kind]["accuracy"], default=None)
    return {
        "sweep": spec.name, "about": spec.about, "folder": str(sweep.out), "maximise": kind, "runs": rows,
        "best": best and best | {"command": command(sweep.cells[best["run"]].config)},
        "effects": [
            {"factor": factor} | effect(complete, kind, factor, level, first)
            for factor, (first, *others) in ((factor, list(levels)) for factor, levels in spec.factors.items())
            for level in others
        ],
        "for_each": suiting(spec, complete, kind) if spec.for_each else [],
        "hypotheses": [judged(complete, kind, hypothesis) for hypothesis in spec.hypotheses],
    }  # fmt: skip


# ---- effects


def effect(rows: Iterable[Row], kind: str, factor: str, level: Any, than: Any, confidence: float = 0.95) -> dict[str, Any]:
    """`mean_difference` of held-out accuracy between two levels of a factor, over the pairs of runs that are else alike."""
    values: dict[Any, dict[tuple, float]] = {level: {}, than: {}}
    for r in rows:
        if r["params"][factor] in values:
            others = tuple(value for name, value in r["params"].items() if name != factor)
            values[r["params"][factor]][others] = r[kind]["accuracy"]
    return {"level": level, "than": than} | mean_difference(values[level], values[than], confidence)


def mean_difference(values: Mapping[Any, float], others: Mapping[Any, float], confidence: float = 0.95) -> dict[str, Any]:
    """The mean of paired differences, with Student's interval, over the keys that both have.

    low and high are None of fewer than two pairs, and where all differences are the same, whose spread says nothing.
    """
    from scipy.stats import ttest_1samp  # its import takes a second

    differences = [value - others[key] for key, value in values.items() if key in others]
    mean = statistics.fmean(differences) if differences else None
    found: dict[str, Any] = {"pairs": len(differences), "mean": mean, "low": None, "high": None}
    if differences and max(differences) - min(differences) > 1e-9:
        low, high = ttest_1samp(differences, 0).confidence_interval(confidence)
        found |= {"low": float(low), "high": float(high)}
    return found


def judged(rows: Sequence[Row], kind: str, hypothesis: Mapping[str, Any]) -> dict[str, Any]:
    """A hypothesis with its measured effects and a verdict: supported where the interval is on the side that it expects.

    Of several levels, one suffices. Their intervals are Bonferroni's: 95 % for all together.
    """
    levels, than = hypothesis["levels"], hypothesis["than"]
    confidence = 1 - 0.05 / max(1, len(levels))
    effects = [effect(rows, kind, hypothesis["factor"], level, than, confidence) for level in levels]
    signs = {math.copysign(1, e["mean"]) for e in effects if e["low"] is not None and e["low"] * e["high"] > 0}
    expected = {"higher": {1.0}, "lower": {-1.0}, "differs": {1.0, -1.0}}[hypothesis["expects"]]
    verdict = "not swept" if not levels else "supported" if signs & expected else "against" if signs else "undecided"
    return {**hypothesis, "effects": effects, "verdict": verdict}


def suiting(spec: Spec, rows: Iterable[Row], kind: str) -> list[dict[str, Any]]:
    """For each value of `for_each`, the best setting of the other factors over the seeds, and how far it is from the others.

    Only settings with the most seeds can be the best: the mean of fewer is more a matter of luck. `gain`: over the first value of
    each, None where that has no complete run. `compared`: how many others have complete runs. `alike`: those of them that are not
    worse by Bonferroni's intervals.
    """
    others = [factor for factor in spec.factors if factor not in spec.for_each]
    first = tuple(next(iter(spec.factors[factor])) for factor in others)
    groups: dict[tuple, dict[tuple, dict[int, float]]] = {}
    for r in rows:
        group, setting = (tuple(r["params"][factor] for factor in names) for names in (spec.for_each, others))
        groups.setdefault(group, {}).setdefault(setting, {})[r["params"]["seed"]] = r[kind]["accuracy"]
    found = []
    for group, settings in groups.items():
        best, values = max(settings.items(), key=lambda item: (len(item[1]), statistics.fmean(item[1].values())))
        confidence = 1 - 0.05 / max(1, len(settings) - 1)
        leads = {setting: mean_difference(values, theirs, confidence) for setting, theirs in settings.items() if setting != best}
        found.append({
            "for": dict(zip(spec.for_each, group, strict=True)), "best": dict(zip(others, best, strict=True)),
            "accuracy": statistics.fmean(values.values()), "seeds": len(values), "than": dict(zip(others, first, strict=True)),
            "gain": mean_difference(values, settings[first]) if first in settings else None,
            "compared": len(leads),
            "alike": [dict(zip(others, s, strict=True)) for s, lead in leads.items() if lead["low"] is None or lead["low"] <= 0],
        })  # fmt: skip
    return found


def _accuracy(percents: Sequence[float], images: int) -> dict[str, float]:
    """The mean of accuracies in percent, with Wilson's 95 % interval of one: more runs on the same images do not narrow it."""
    mean = statistics.fmean(percents)
    low, high = interval(torch.arange(images) < round(mean / 100 * images))
    return {"accuracy": mean, "low": low, "high": high}


# ---- as text


NOTE = """Accuracies are of the best epoch, in percent on held-out images, with 95 % intervals. They chose that epoch and the best
run, which flatters both. Test accuracies chose nothing."""
EFFECTS = """Mean differences of held-out {} accuracy, over pairs of complete runs that are else alike. The 95 % intervals are
Student's, of the spread between these pairs, not of the choice of held-out images."""
ENDED = "Halving ended the worse runs, so that these are differences between the better ones."


def markdown(spec: Spec, found: Mapping[str, Any]) -> str:
    kind, best = KINDS[found["maximise"]], found["best"]
    states = [r["state"] for r in found["runs"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    parts = [f"# {found['sweep']}", found["about"] or "A sweep", f"Runs: {counts}, in {found['folder']}."]
    if best:
        accuracy = _percent(best[found["maximise"]])
        parts += [f"Best: {best['run']}, {accuracy} {kind} on held-out images, by", f"    {best['command']}"]
    parts += [_runs_table(spec, found["runs"]), NOTE]
    if found["for_each"]:
        parts += [f"## Best for each {', '.join(spec.for_each)}", "\n".join(map(_suiting_line, found["for_each"]))]
    if found["hypotheses"]:
        parts += ["## Hypotheses", "\n".join(map(_hypothesis_line, found["hypotheses"]))]
    effects = [[e["factor"], str(e["level"]), str(e["than"]), _points(e)] for e in found["effects"]]
    parts += ["## Effects", EFFECTS.format(kind), *[ENDED] * ("pruned" in states)]
    return "\n\n".join([*parts, markdown_table(["factor", "value", "against", "points"], effects)]) + "\n"


def _runs_table(spec: Spec, rows: Sequence[Row]) -> str:
    tests = list(dict.fromkeys(name for r in rows for name in r["test"] or {}))
    factors = [*spec.factors, "seed"]
    head = ["run", *factors, "state", "epoch", *KINDS.values(), *(f"test {name}" for name in tests)]
    lines = [
        [r["run"], *(str(r["params"][factor]) for factor in factors), r["state"] + (f": {r['error']}" if r["error"] else "")]
        + [str(r["epoch"] or ""), *(_percent(r[kind]) for kind in KINDS)]
        + [f"{r['test'][name]:.2f}" if r["test"] else "" for name in tests]
        for r in rows
    ]
    return markdown_table(head, lines)


def _percent(accuracy: Mapping[str, float] | None) -> str:
    return f"{accuracy['accuracy']:.2f} ({accuracy['low']:.2f} to {accuracy['high']:.2f})" if accuracy else ""


def _points(e: Mapping[str, Any]) -> str:
    """A mean difference as text."""
    if e["mean"] is None:
        return "no pair yet"
    known = f"{e['low']:+.2f} to {e['high']:+.2f}, " if e["low"] is not None else "no interval, "
    return f"{e['mean']:+.2f} ({known}{e['pairs']} pair{'s' * (e['pairs'] != 1)})"


def _suiting_line(each: Mapping[str, Any]) -> str:
    group, best, than = (_words(each[key]) for key in ("for", "best", "than"))
    gain = f"{_points(each['gain'])} over {than}" if each["gain"] else f"{than} has no complete run"
    alike = f"all {each['compared']} others are worse" if each["compared"] else "no other has a complete run"
    if each["alike"]:
        alike = f"not clearly worse: {'; '.join(map(_words, each['alike']))}"
    seeds = f"mean of {each['seeds']} seeds" if each["seeds"] > 1 else "one seed"
    return f"- {group}: {best}, {each['accuracy']:.2f} % ({seeds})" + ("" if best == than else f", {gain}") + f"; {alike}"


def _words(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())


def _hypothesis_line(each: Mapping[str, Any]) -> str:
    if not each["effects"]:
        return f"- {each['says']}: not swept, as {each['factor']} is not in the grid"
    measured = "; ".join(f"{e['level']} against {e['than']}: {_points(e)}" for e in each["effects"])
    return f"- {each['says']}: **{each['verdict']}** ({measured})"


# ---- as a picture


def draw(spec: Spec, rows: list[Row]) -> Figure:
    """Held-out accuracies of complete runs.

    One or two factors: against the first, a line for each value of the second. More: against each, the mean over the others.
    """
    first, *more = spec.factors
    panels: list[tuple[str, str, dict[str, tuple[str, list[Row]]]]]  # title, what x is, and lines: accuracy and runs by name
    if len(more) > 1:
        panels = [(factor, factor, {name: (kind, rows) for kind, name in KINDS.items()}) for factor in spec.factors]
    else:
        parts = {_words({f: level}): [r for r in rows if r["params"][f] == level] for f in more for level in spec.factors[f]}
        panels = [(name, first, {n: (kind, p) for n, p in (parts or {name: rows}).items()}) for kind, name in KINDS.items()]
    figure, axes = panel_row(len(panels), sharey=len(more) > 1)
    for ax, (title, factor, lines) in zip(axes, panels, strict=True):
        _panel(ax, list(spec.factors[factor]), factor, lines)
        ax.set_title(title, parse_math=False)
        ax.set_xlabel(factor, parse_math=False)
    axes[0].set_ylabel("held-out accuracy, %")
    if more:
        legend_below(figure, axes[0], 4)
    return figure


def _panel(ax: Axes, levels: Sequence[Any], factor: str, lines: Mapping[str, tuple[str, list[Row]]]) -> None:
    """Accuracy against the levels of a factor, the mean of the runs that have it; words are at equal distances."""
    plain = all(isinstance(level, (int, float)) and not isinstance(level, bool) for level in levels)
    at = dict(zip(levels, levels if plain else range(len(levels)), strict=True))
    for kind_of_line, (label, (kind, rows)) in zip(line_styles(), lines.items(), strict=False):
        points: dict[float, dict] = {}
        for level in sorted(levels, key=lambda level: at[level]):
            if here := [r for r in rows if r["params"][factor] == level]:
                points[at[level]] = _accuracy([r[kind]["accuracy"] for r in here], min(r["images"] for r in here))
        accuracy_curve(ax, list(points), list(points.values()), label=label, **kind_of_line)
    names = [f"{level:g}" if plain else str(level) for level in levels]
    x_ticks(ax, list(at.values()), names)
    if sum(map(len, names)) > 20:
        ax.tick_params(axis="x", rotation=90)
