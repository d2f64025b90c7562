"""Figure 6.1 on any data: which label smoothing suits which radius? Madry training on PGD-LS examples, by alpha, eps and seed.

    python -m benchmarks.figure61 --out benchmarks/results/cpu/figure61.json --eps 4 8 16 --alphas 0 .2 .4 .6 .8 1 -- \\
        --preset figure6.1/eps8-alpha0 --model wrn-10-2 --data cifar10.npz --epochs 3 --schedule one-cycle --precision bf16

What follows the -- are options of `spat-train train`, the same for each training. Beside its accuracies at the test images each
is validated on held-out images, by which alpha is chosen, and, with --judge, its own training attack is asked how much of an
image's meaning it keeps: how many of the images that it makes the judge, another robust model, still gets right.

The same command continues where it was stopped, and may be started once for each core (`study`).
"""

import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from benchmarks import study
from benchmarks.study import Attacks, Study, changed, compare, device, folder_name, grouped, mean, over_seeds, run_and_print
from benchmarks.tables import environment, markdown
from spat_train import plotting
from spat_train.cli import training_config
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import Dataset, floats
from spat_train.errors import InputError, check_count
from spat_train.evaluation.record_log import weights_hash
from spat_train.evaluation.result import percent
from spat_train.models.checkpoints import load_model
from spat_train.papers.figures import figure_6_1
from spat_train.papers.loaded_run import CHUNK, alignment, logits_of
from spat_train.papers.runs import data_name
from spat_train.presets import PRESETS
from spat_train.training.check import check
from spat_train.training.step import training_attack

COLUMNS = {"natural": "clean", "PGD-20": "pgd-20"}


@dataclass(kw_only=True)
class Arguments(study.Arguments):
    """Accuracy against the alpha and the eps of the training."""

    eps: list[float]
    """Radii of the training attacks, in 1/255."""
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """Label smoothings of the training examples."""
    judge: Path | None = None
    """Folder of a robust run on the same data, which judges what the training attacks leave of the images."""
    traits_images: int = 1000
    """Number of test images on which the alignment of gradients and the judge's accuracy are measured."""


SET_HERE = "method", "alpha", "eps", "seed", "out", "resume", "test", "track"


def settings(args: Arguments, base: Config, eps: float, alpha: float, seed: int) -> Config:
    preset = f"{base.preset.partition('/')[0]}/eps{eps:g}-alpha{alpha:g}"  # by which `spat-train figure 6.1` finds its runs
    config = replace(
        base, method="madry", eps=eps, alpha=alpha, seed=seed, preset=preset if preset in PRESETS else "", resume=True,
        test=False, track="none",
    )  # fmt: skip
    return replace(config, out=args.runs / folder_name(config))


def prepared(args: Arguments, base: Config) -> Study:
    """The trainings, seed by seed, and how they are tested.

    Raises:
        InputError: an option, the judge or the data do not fit.
    """
    default = PRESETS[base.preset] if base.preset else Config()
    for name in SET_HERE:
        if getattr(base, name) != getattr(default, name):
            raise InputError(f"--{name.replace('_', '-')} {getattr(base, name)}: this study sets it: leave it out after the --")
    if default.method != "madry" or base.patience is not None:
        raise InputError("after the --: this study trains by --method madry to the end: give no other preset, and no --patience")
    if not (args.eps and args.alphas):
        raise InputError("--eps, --alphas: give at least one of each")
    check_count("--traits-images", args.traits_images)
    trainings = [settings(args, base, eps, alpha, seed) for seed in args.seeds for eps in args.eps for alpha in args.alphas]
    for config in trainings:
        check(config)
    data = load(base.data, root=base.root, download=base.download, image_size=base.image_size, skip_broken=base.skip_broken)
    count = args.test_count(data)
    images = min(count, args.traits_images)
    judge = load_model(args.judge, data)[0].to(device()) if args.judge else None
    return Study(
        "figure61", args, trainings, data, [Attacks(COLUMNS, count)],
        about={"judge": args.judge and args.judge.name, "training": changed(base, *SET_HERE)},
        traits=lambda model, config: traits(model, config, judge, data, images),
        traits_of={"images": images, "judge": judge and weights_hash(judge)},
    )  # fmt: skip


def traits(model: nn.Module, config: Config, judge: nn.Module | None, data: Dataset, count: int) -> dict:
    """What the accuracies do not say, on the first `count` test images.

    alignment: of gradients and images, `spat_train.papers.loaded_run.alignment`.
    own, plain: accuracy in percent under the training's own attack, and under the same by cross-entropy. The first is higher
        where PGD-LS attacks less: it pulls towards the true class where the model gives that more than 1 - alpha.
    kept: in percent of the images that the judge gets right, how many it still gets right once this training's attack has changed
        them on this model.
    """
    x, y = floats(data.test, torch.arange(count), device(), torch.contiguous_format)

    def attacked(alpha: float) -> Tensor:
        attack, generator = training_attack(replace(config, alpha=alpha)), torch.Generator(device()).manual_seed(config.seed)
        return torch.cat([attack(model, *images, generator)[0] for images in zip(x.split(CHUNK), y.split(CHUNK), strict=True)])

    def right(network: nn.Module, images: Tensor) -> Tensor:
        return logits_of(network, images).argmax(1) == y.cpu()

    own = attacked(config.alpha)
    found = {
        "alignment": float(alignment(model, x, y).mean()), "own": percent(right(model, own)),
        "plain": percent(right(model, attacked(0.0))),
    }  # fmt: skip
    if judge and len(seen := right(judge, own)[right(judge, x)]):
        found["kept"] = percent(seen)
    return found


# --- as Markdown ---


def table(results: dict) -> str:
    """By eps and alpha: accuracies, what they gain over alpha = 0 on the same images, and traits; then the best."""
    groups = grouped((row for row in results["rows"] if row["evaluation"]), "eps", "alpha")
    held = {key: {r["config"]["seed"]: _held(r) for r in rows if r["validations"]} for key, rows in groups.items()}
    return markdown(
        results, [_line(groups, held, *key) for key in sorted(groups)],
        "ε | α || seeds | natural | PGD-20 | against α = 0 | p | held out, PGD | own attack | by CE | alignment | meaning kept",
        "{eps} | {alpha} || {seeds} | {natural} | {robust} | {gain} | {p} | {held} | {own} | {plain} | {alignment} | {kept}",
        lambda _: _best(groups, held), _about, environment,
    )  # fmt: skip


def _held(row: dict) -> float:
    """PGD accuracy on held-out images, of the weights that are tested: the best that there were."""
    return max(validation["pgd"] for validation in row["validations"])


def _line(groups: dict, held: dict, eps: float, alpha: float) -> dict:
    rows = groups[eps, alpha]

    def trait(name: str, form: str) -> str:
        values = [row["traits"][name] for row in rows if name in row.get("traits", {})]
        return format(statistics.mean(values), form) if values else ""

    gain = compare(rows, groups.get((eps, 0.0), []), "PGD-20") if alpha else None
    natural, robust = (mean([row["evaluation"][column]["accuracy"] for row in rows]) for column in COLUMNS)
    return {
        "eps": f"{eps:g}/255", "alpha": f"**{alpha:g}**" if _chosen(held, eps) == alpha else f"{alpha:g}", "seeds": len(rows),
        "natural": natural, "robust": robust, "gain": str(gain or ""), "p": f"{gain.p:.2g}" if gain else "",
        "held": mean(list(held[eps, alpha].values())), "own": trait("own", ".1f"), "plain": trait("plain", ".1f"),
        "alignment": trait("alignment", ".3f"), "kept": trait("kept", ".1f"),
    }  # fmt: skip


def _chosen(held: dict, eps: float) -> float | None:
    """The alpha with the best PGD accuracy on held-out images, of equals the least, over the seeds that all have; else None."""
    by_alpha = {alpha: by_seed for (radius, alpha), by_seed in held.items() if radius == eps}
    if not (seeds := set.intersection(*map(set, by_alpha.values()))):
        return None
    return min(by_alpha, key=lambda alpha: (-statistics.mean(by_alpha[alpha][seed] for seed in seeds), alpha))


def _best(groups: dict, held: dict) -> str:
    words = {1: "better than 0", 0: "not decidedly better than 0", -1: "worse than 0"}
    found = []
    for eps in sorted({eps for eps, _ in groups}):
        if (alpha := _chosen(held, eps)) is not None:
            gain = compare(groups[eps, alpha], groups.get((eps, 0.0), []), "PGD-20") if alpha else None
            found.append(f"{alpha:g} at {eps:g}/255" + (f", {words[gain.verdict]}" if gain else ""))
    return f"Best α on held-out images (bold): {'; '.join(found)}." if found else ""


def _about(results: dict) -> str:
    rows = [row for row in results["rows"] if row["evaluation"]]
    config, test = rows[0]["config"], rows[0]["evaluation"]["PGD-20"]
    images = "all images" if config["limit"] is None else f"{config['limit']:,} images"
    judge = f"Meaning kept: in %, as {results['judge']} sees it. " if results["judge"] else ""
    return (
        f"{_subject(config)}, {images} (held-out ones among them), {config['epochs']} epochs, "
        f"PGD-{config['steps'] or 10}, {config['precision']}. Attacks on {test['images']:,} test images in {test['precision']}, "
        f"at {_radius(config)}. Own attack: accuracy in % under the attack of the training, at its ε, and beside it under the "
        f"same by cross-entropy. {judge}Differences in points, over the same seeds and images; p of the two-sided sign test on "
        "images."
    )


def _subject(config: dict) -> str:
    return f"{config['model']} on {data_name(config['data'])}"


def _radius(config: dict) -> str:
    return "the ε of the training" if config["eval_eps"] is None else f"ε = {config['eval_eps']:g}/255"


def draw(path: Path) -> None:
    """Write the picture of the results in the file `path` beside it, as .png.

    Of several seeds the mean, and their range; of one its 95 % interval.
    """
    rows = [row for row in json.loads(path.read_text())["rows"] if row["evaluation"]]
    lines: dict[str, dict[str, list]] = {}
    for (eps, alpha), found in sorted(grouped(rows, "eps", "alpha").items()):
        line = lines.setdefault(f"trained with ε = {eps:g}/255", {"alphas": [], "clean": [], "robust": []})
        line["alphas"].append(alpha)
        for name, column in (("clean", "natural"), ("robust", "PGD-20")):
            line[name].append(over_seeds([row["evaluation"][column] for row in found]))
    config = rows[0]["config"]
    with plotting.style():
        figure = figure_6_1.draw(lines)
        figure.suptitle(f"{_subject(config)}, attacked at {_radius(config)}", parse_math=False)
    plotting.save(figure, path.with_suffix(".png"))


def main(arguments: list[str]) -> None:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = tyro.cli(Arguments, args=arguments[:cut], description=__doc__)
    run_and_print(lambda: prepared(args, training_config(arguments[cut + 1 :])), table)
    draw(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
