"""The report of a sweep: the best setting, all runs, what each option changes, hypotheses, and a picture."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
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
UNFINISHED = {"waiting", "running", "stopped"}
PAIRS, NEXT = 10, 3  # how many effects a factor has, and how many others the report names after the best setting
WIDE = 20  # a greater quotient of positive numbers has a log axis
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
        figure = draw(sweep.spec, found["runs"])
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
    best = suiting(spec, complete, kind)
    return {
        "sweep": spec.name, "about": spec.about, "folder": str(sweep.out), "maximise": kind, "runs": rows,
        "best": [each | {"command": command(sweep.cells[each["run"]].config)} for each in best],
        "effects": [
            {"factor": factor} | effect(complete, kind, factor, *levels)
            for factor in spec.factors for levels in level_pairs(complete, kind, factor, [*spec.factors[factor]])
        ],
        "hypotheses": [judged(complete, kind, hypothesis) for hypothesis in spec.hypotheses],
    }  # fmt: skip


# ---- effects


def level_pairs(rows: Sequence[Row], kind: str, factor: str, levels: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pairs of levels, each with the better one first: the best with all others, then the next, up to PAIRS."""
    found = {level: [r[kind]["accuracy"] for r in rows if r["params"][factor] == level] for level in levels}
    ranked = sorted(levels, key=lambda level: statistics.fmean(found[level] or [-1]), reverse=True)
    return [*combinations(ranked, 2)][:PAIRS]


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
    """The best setting by its mean over the seeds: one for each value of `for_each`, whose settings are of the other factors.

    Only settings with the most seeds can be the best: the mean of fewer is more a matter of luck. `run`: that of its first seed.
    `leads`: over all others that have complete runs, the next best first, in Bonferroni's intervals. `alike`: those of them that
    are not worse by these.
    """
    others = [factor for factor in spec.factors if factor not in spec.for_each]
    groups: dict[tuple, dict[tuple, dict[int, float]]] = {}
    runs: dict[tuple, str] = {}
    for r in rows:
        group, setting = (tuple(r["params"][factor] for factor in names) for names in (spec.for_each, others))
        groups.setdefault(group, {}).setdefault(setting, {})[r["params"]["seed"]] = r[kind]["accuracy"]
        runs.setdefault((group, setting), r["run"])
    found = []
    for group, settings in groups.items():
        ranked = sorted(settings.items(), key=lambda item: (len(item[1]), statistics.fmean(item[1].values())), reverse=True)
        (best, values), *rest = ranked
        confidence = 1 - 0.05 / max(1, len(rest))
        leads = [
            {"over": dict(zip(others, setting, strict=True))} | mean_difference(values, theirs, confidence)
            for setting, theirs in rest
        ]
        found.append({
            "for": dict(zip(spec.for_each, group, strict=True)), "setting": dict(zip(others, best, strict=True)),
            "accuracy": statistics.fmean(values.values()), "seeds": len(values), "run": runs[group, best], "leads": leads,
            "alike": [lead["over"] for lead in leads if lead["low"] is None or lead["low"] <= 0],
        })  # fmt: skip
    return found


def _accuracy(percents: Sequence[float], images: int) -> dict[str, float]:
    """The mean of accuracies in percent, with Wilson's 95 % interval of one: more runs on the same images do not narrow it."""
    mean = statistics.fmean(percents)
    low, high = interval(torch.arange(images) < round(mean / 100 * images))
    return {"accuracy": mean, "low": low, "high": high}


# ---- as text


NOTE = """Accuracies are of the best epoch, in percent on held-out images, with 95 % intervals. They chose that epoch and the
best setting, which flatters both. Test accuracies chose nothing."""
BEST = """By the mean {} accuracy over the seeds, of settings with the most complete seeds. Leads are in points, with Student's
intervals over the seeds: 95 % for all others together."""
EFFECTS = """Mean differences of held-out {} accuracy, in points, over pairs of complete runs that are else alike. The 95 %
intervals are Student's, of the spread between these pairs, not of the choice of held-out images. Each is of one comparison."""
PRUNED = """Pruned: halving ended the run early, as others were better after as many epochs. It decides at once: the first runs to
come to a decision always go on, and a later one that is pruned may be better. The rest compares complete runs alone."""


def markdown(spec: Spec, found: Mapping[str, Any]) -> str:
    kind, states = KINDS[found["maximise"]], [r["state"] for r in found["runs"]]
    none = "no pair yet" if UNFINISHED & {*states} else f"no pair: {'pruned' if 'pruned' in states else 'failed'}"
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    parts = [f"# {found['sweep']}", found["about"] or "A sweep", f"Runs: {counts}, in {found['folder']}."]
    if found["best"]:
        title = "## Best setting" + f" for each {', '.join(spec.for_each)}" * bool(spec.for_each)
        parts += [title, BEST.format(kind), *(part for each in found["best"] for part in _best_lines(spec, each, none))]
    parts += ["## Runs", _runs_table(spec, found["runs"]), NOTE, *[PRUNED] * ("pruned" in states)]
    if found["hypotheses"]:
        parts += ["## Hypotheses", "\n".join(_hypothesis_line(each, none) for each in found["hypotheses"])]
    effects = [[e["factor"], str(e["level"]), str(e["than"]), _points(e, none)] for e in found["effects"]]
    parts += ["## Effects", EFFECTS.format(kind), markdown_table(["factor", "value", "against", "points"], effects)]
    return "\n\n".join(parts) + "\n"


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


def _points(e: Mapping[str, Any], none: str) -> str:
    """A mean difference as text; `none` is that of one without pairs."""
    if e["mean"] is None:
        return none
    known = f"{e['low']:+.2f} to {e['high']:+.2f}, " if e["low"] is not None else "no interval, "
    return f"{e['mean']:+.2f} ({known}{e['pairs']} pair{'s' * (e['pairs'] != 1)})"


def _best_lines(spec: Spec, each: Mapping[str, Any], none: str) -> list[str]:
    """The best setting with its leads over the next and over the first of the grid, those like it, and the command of a run."""
    first = {factor: next(iter(spec.factors[factor])) for factor in each["setting"]}
    leads = [lead for place, lead in enumerate(each["leads"]) if place < NEXT or lead["over"] == first]
    seeds = f"mean of {each['seeds']} seeds" if each["seeds"] > 1 else "one seed"
    head = f"**{_words(each['for'] | each['setting'])}**: {each['accuracy']:.2f} % ({seeds})"
    named, count = [_words(setting) for setting in each["alike"][:NEXT]], len(each["alike"])
    alike = "; ".join(named + [f"{count - NEXT} more"] * (count > NEXT)) or f"none of {len(each['leads'])}"
    alike = f"Cannot be told apart from it: {alike}" if leads else "No other has a complete run"
    lines = [head, *(f"Over {_words(lead['over'])}: {_points(lead, none)}" for lead in leads), alike]
    return ["\n".join(f"{'  ' * bool(number)}- {line}" for number, line in enumerate(lines)), f"{' ' * 8}{each['command']}"]


def _words(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())


def _hypothesis_line(each: Mapping[str, Any], none: str) -> str:
    if not each["effects"]:
        return f"- {each['says']}: not swept, as {each['factor']} is not in the grid"
    measured = "; ".join(f"{e['level']} against {e['than']}: {_points(e, none)}" for e in each["effects"])
    return f"- {each['says']}: **{each['verdict']}** ({measured})"


# ---- as a picture


def draw(spec: Spec, rows: list[Row]) -> Figure:
    """Held-out accuracies of complete runs.

    One or two factors: against the first, a line for each value of the second. More: against each, the mean over the others.
    """
    first, *more = spec.factors
    total, pruned = len(rows), any(r["state"] == "pruned" for r in rows)
    rows = [r for r in rows if r["state"] == "complete"]
    drawn = f"{len(rows)} complete of {total} runs{', without pruned ones' * pruned}"
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
    figure.suptitle(f"Bands: 95 % (Wilson) of one run's held-out images. Seeds: {spec.seeds}. Drawn: {drawn}.")
    if more:
        legend_below(figure, axes[0], 4)
    return figure


def _panel(ax: Axes, levels: Sequence[Any], factor: str, lines: Mapping[str, tuple[str, list[Row]]]) -> None:
    """Accuracy against the levels of a factor, the mean of the runs that have it; words are at equal distances."""
    plain = all(isinstance(level, (int, float)) and not isinstance(level, bool) for level in levels)
    levels = sorted(levels) if plain else levels
    positive = [level for level in levels if plain and level > 0]
    wide = bool(positive) and max(positive) > WIDE * min(positive)  # on a linear axis the small ones would hide each other
    even = not plain or (wide and len(positive) < len(levels))
    at = dict(zip(levels, range(len(levels)) if even else levels, strict=True))
    ax.set_xscale("log" if wide and not even else "linear")
    for kind_of_line, (label, (kind, rows)) in zip(line_styles(), lines.items(), strict=False):
        points: dict[float, dict] = {}
        for level in levels:
            if here := [r for r in rows if r["params"][factor] == level]:
                points[at[level]] = _accuracy([r[kind]["accuracy"] for r in here], min(r["images"] for r in here))
        accuracy_curve(ax, list(points), list(points.values()), label=label, clip_on=False, **kind_of_line)
    names = [f"{level:g}" if plain else str(level) for level in levels]
    x_ticks(ax, list(at.values()), names)
    if sum(map(len, names)) > 20:
        ax.tick_params(axis="x", rotation=90)
