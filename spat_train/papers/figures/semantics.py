"""How many PGD-LS examples change their label for another model, against alpha: a proxy for the meaning that they lose.

The thesis shows this in pictures (Figures 5.1 and 5.2), and leaves "accounting for the amount of semantics-change" to the future
(chapter 7). Here a second robust model, the judge, stands for a person. It can be wrong as the attacked model is wrong, the more
so the more the two have in common: it should be the stronger one, of another architecture or at least another seed. Noise of the
same radius says how many labels change without an attack.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from textwrap import fill

from matplotlib.figure import Figure
from torch import nn

from ...errors import InputError
from ...evaluation.result import Evaluation
from ...plotting import accuracy_curve, interval_marks, legend_below, line_styles, panel_row, x_ticks
from ..figure import Drawing, FigureContext, paper_figure
from ..loaded_run import LoadedRun, point
from ..pictures import large_eps
from ..runs import Run
from ..selection import ROBUST_RUNS

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # at 0 it is PGD-CE
SHARES = (0.5, 1.0, 2.0, 4.0)  # radii as multiples of eps, up to `large_eps`
CONTROLS = {"KL": "pgd-kl-20", "noise": "noise"}
LINE = 110  # characters of a title
BESIDE = (1.15, 1.32)  # where they are drawn
STRENGTH = ("clean", "pgd-20")  # a judge should be better in one of them
PANELS = {"changed": "the judge sees another class", "right": "the attacked model is still right"}


def attacked_and_judge(runs: list[Run]) -> list[Run]:
    """The attacked run and the judge among several robust ones. The judge is the best under PGD on held-out images.

    Only runs that are evaluated at the radius of the first are compared. The attacked one has another architecture or seed than
    the judge, and was trained on SPAT's examples, where there is such a run.
    """
    known = [run for run in runs if run.held_out is not None and run.config.evaluation_eps == runs[0].config.evaluation_eps]
    if len(known) < 2:
        return known
    judge = max(known, key=lambda run: run.held_out or 0.0)
    same = judge.config.model, judge.config.seed
    others = [run for run in known if run is not judge]
    return [min(others, key=lambda run: ((run.config.model, run.config.seed) == same, run.config.alpha == 0)), judge]


TWO_RUNS = replace(
    ROBUST_RUNS, words="two runs, the attacked one and then the judge", choose=attacked_and_judge,
    fits=lambda runs: len(runs) == len({run.folder.resolve() for run in runs}) == 2,
)  # fmt: skip


@paper_figure("semantics", "PGD-LS examples that another model sees as another class, against alpha", TWO_RUNS)
def make(context: FigureContext) -> Drawing:
    attacked, judge = context.loaded
    radii = radii_of(context.eps, context.images.dataset.image_shape[0])
    attacks = {eps: [f"pgd-ls-20:alpha={alpha:g}" for alpha in ALPHAS] + [*CONTROLS.values()] for eps in radii}
    specs = {eps: [f"{attack}:eps={eps:.6g}" for attack in attacks[eps]] for eps in radii}

    def evaluated(by: LoadedRun, source: nn.Module | None) -> Evaluation:
        """All images are attacked, those too that a model gets wrong, so that both models see the same examples."""
        every = [*chain(*specs.values())]
        return by.evaluate(context.images, every, context.options, eps=context.eps, source=source, attack_wrong=True)

    seen, own = evaluated(judge, attacked.model), evaluated(attacked, None)
    if not (count := int(seen.correct("clean").sum())):
        raise InputError(f"figure semantics: the judge {judge.run.folder} gets no image right: name another judge")
    lines = {f"ε = {255 * eps:.4g}/255": {"eps": eps} | compared(seen, own, specs[eps]) for eps in radii}
    strength = [dict(zip(STRENGTH, context.measure(each, STRENGTH), strict=True)) for each in (attacked, judge)]
    if note := weakness(*strength):
        print(f"figure semantics: {note}", file=sys.stderr)
    drawn = draw(lines)
    attacked_is, judge_is = (
        f"{each.name} ({found['clean']['accuracy']:.1f} % clean)" for each, found in zip(context.loaded, strength, strict=True)
    )
    about = f"examples made on {attacked_is}, judge: {judge_is}; {count} of {len(seen.labels)} images"
    drawn.suptitle("\n".join(fill(text, LINE) for text in (about, note) if text))
    roles = {
        role: {"name": each.name} | found
        for role, each, found in zip(("attacked", "judge"), context.loaded, strength, strict=True)
    }
    roles["attacked"]["right of them"] = point(own.correct("clean")[seen.correct("clean")])
    return {"": drawn}, roles | {"note": note, "judged images": count, "alphas": ALPHAS, "lines": lines}


def radii_of(eps: float, channels: int) -> list[float]:
    """`SHARES` of `eps`, up to `large_eps`."""
    return sorted({min(share * eps, large_eps(eps, channels)) for share in SHARES})


def compared(seen: Evaluation, own: Evaluation, specs: Sequence[str]) -> dict[str, dict]:
    """What attacks do to the images that the judge gets right without them, in percent of these, with 95 % intervals.

    Args:
        seen, own: the same examples as the judge and as the attacked model sees them.
        specs: PGD-LS by `ALPHAS`, then `CONTROLS`.

    Returns:
        pgd-ls: the `PANELS`, each a list by alpha: what the judge sees as another class, and what the attacked model gets right.
        The same by name for each of the controls.
    """
    known = seen.correct("clean")
    changed = [point(~seen.correct(spec)[known], "changed") for spec in specs]
    right = [point(own.correct(spec)[known], "right") for spec in specs]
    controls = zip(CONTROLS, changed[len(ALPHAS) :], right[len(ALPHAS) :], strict=True)
    return {
        "pgd-ls": {"changed": changed[: len(ALPHAS)], "right": right[: len(ALPHAS)]},
        **{name: {"changed": c, "right": r} for name, c, r in controls},
    }


def weakness(attacked: dict[str, dict], judge: dict[str, dict]) -> str | None:
    """What to say of a judge that is better than the attacked model neither on clean images nor under PGD-20."""
    pairs = {name: (judge[name]["accuracy"], attacked[name]["accuracy"]) for name in STRENGTH}
    if any(ours > theirs for ours, theirs in pairs.values()):
        return None
    found = "; ".join(f"{name} {ours:.1f} %, the attacked one {theirs:.1f} %" for name, (ours, theirs) in pairs.items())
    return f"the judge is no stronger than the attacked model ({found}): what it sees says little, name a better one"


def draw(lines: dict[str, dict]) -> Figure:
    """The two panels: a line for each radius, and its controls to the right of it."""
    figure, axes = panel_row(2, sharey=True)
    for ax, (kind, title) in zip(axes, PANELS.items(), strict=True):
        for number, (style, (radius, line)) in enumerate(zip(line_styles(), lines.items(), strict=False)):
            accuracy_curve(ax, ALPHAS, line["pgd-ls"][kind], kind, label=radius, **style)
            beside = [place + 0.03 * (number - (len(lines) - 1) / 2) for place in BESIDE]  # their bars would hide each other
            interval_marks(ax, beside, [line[name][kind] for name in CONTROLS], kind, **style | {"linestyle": "none"})
        ax.set(title=title, xlabel="label smoothing α of PGD-LS; PGD-KL; noise", ylim=(-3, 103))
        x_ticks(ax, [*ALPHAS, *BESIDE], [*(f"{alpha:g}" for alpha in ALPHAS), *CONTROLS])
    axes[0].set_ylabel("% of the images that\nthe judge gets right clean")
    legend_below(figure, axes[0], len(lines))
    return figure
