"""Accuracy against one thing at a time: alpha, radius, steps, width; and the loss during training. Numbers alone."""

import math
from collections.abc import Sequence

from ..errors import InputError
from ..runtime import logs
from .measure import Subject, TestImages, measured, open_model
from .runs import Options, Run, told, width

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
STEPS = (0, 1, 2, 5, 10, 20, 50, 100)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of the radius
L2_CORNER = 0.5  # radius in L2 that stands for eps in L-infinity, by the norm of a corner of that ball
ADVERSARIAL = ("adv_ce", "bce")  # terms of the loss on adversarial images, as the log calls them


def against_alpha(subject: Subject, images: TestImages, options: Options, eps: float) -> dict:
    """Thesis, Figure 5.3: under PGD-LS of each alpha, PGD-KL, and clean."""
    specs = [f"pgd-ls-20:alpha={alpha:g}" for alpha in ALPHAS]
    # Every image is attacked: alpha = 1 brings wrong ones back.
    found = measured(subject, images, ["clean", "pgd-kl-20", *specs], options, eps=eps, attack_wrong=True)
    return {"alphas": ALPHAS, "pgd-ls": [found[spec] for spec in specs], "pgd-kl": found["pgd-kl-20"], "clean": found["clean"]}


def trained_with_alpha(runs: Sequence[Run], images: TestImages, options: Options, eps: float) -> dict[str, dict]:
    """Thesis, Figures 6.1 and 6.2: by radius of training, clean and PGD-20 accuracy at `eps` against alpha of training."""
    lines: dict[str, dict] = {}
    for run in sorted(runs, key=lambda run: (run.config.eps, run.config.alpha)):
        line = lines.setdefault(f"trained with ε = {told(run.config.eps)}", {"alphas": [], "clean": [], "robust": []})
        subject = open_model(run, images, options)
        found = measured(subject, images, ["clean", "pgd-20"], options, eps=eps)
        line["alphas"].append(run.config.alpha)
        line["clean"].append(found["clean"])
        line["robust"].append(found["pgd-20"])
    return lines


def against_budget(subjects: Sequence[Subject], images: TestImages, options: Options, eps: float) -> dict[str, dict]:
    """Madry et al., Figure 6: PGD-20 in L-infinity and in L2 against the radius, up to 1.5 `eps` and what stands for it in L2."""
    pixels = math.prod(images.dataset.image_shape)
    coarse = eps > 0.1  # told in [0, 1], not in 1/255
    radii = [share * eps for share in SHARES]
    quarter = float(f"{eps * math.sqrt(pixels) * L2_CORNER / 4:.1g}")  # a round number
    l2 = [round(4 * share * quarter, 9) for share in SHARES]
    trained = any(not s.run.standard for s in subjects)
    panels: dict[str, dict] = {
        "L∞": {"attack": "PGD-20", "spec": "pgd-20", "radii": radii, "trained": eps if trained else None},
        "L2": {"attack": "PGD-20", "spec": "pgd-l2-20", "radii": l2, "trained": None},
    }
    panels["L∞"] |= {"label": "ε" if coarse else "ε, in 1/255", "names": [f"{r if coarse else 255 * r:.3g}" for r in radii]}
    panels["L2"] |= {"label": "ε", "names": [f"{r:g}" for r in l2]}
    for panel in panels.values():
        specs = ["clean", *(f"{panel['spec']}:eps={r:.6g}" for r in panel["radii"][1:])]
        panel["models"] = {}
        for subject in subjects:
            found = measured(subject, images, specs, options, eps=eps)
            panel["models"][subject.name] = [found[spec] for spec in specs]
    return panels


def against_steps(subjects: Sequence[Subject], images: TestImages, options: Options, eps: float) -> dict:
    """After so many steps of eps / 10 of the same PGD."""
    specs = ["clean" if n == 0 else f"pgd-20:steps={n}" for n in STEPS]
    found = {s.name: measured(s, images, specs, options, eps=eps) for s in subjects}
    return {"steps": STEPS, "models": {name: [points[spec] for spec in specs] for name, points in found.items()}}


def against_width(runs: Sequence[Run], images: TestImages, options: Options, eps: float) -> dict[str, dict]:
    """Madry et al., Figure 4: accuracy and the loss at the end of training against the width, by kind of training."""
    specs = {"clean": "clean", "FGSM": "fgsm", "PGD-20": "pgd-20"}
    panels: dict[str, dict] = {}
    for run in sorted(runs, key=lambda run: (not run.standard, width(run.config.model))):
        kind = "standard training" if run.standard else "adversarial training"
        panel = panels.setdefault(kind, {"widths": [], "attacks": {name: [] for name in specs}, "loss": []})
        subject = open_model(run, images, options)
        found = measured(subject, images, list(specs.values()), options, eps=eps)
        panel["widths"].append(width(run.config.model))
        panel["loss"].append(training_loss(run)["losses"][-1])
        for name, spec in specs.items():
            panel["attacks"][name].append(found[spec])
    return panels


def training_loss(run: Run) -> dict:
    """Madry et al., Figure 2: the mean loss of each epoch on adversarial images; of standard training on the images themselves.

    Raises:
        InputError: the run has no log.
    """
    if not (run.folder / "log.jsonl").is_file():
        raise InputError(f"{run.folder}: no log.jsonl there: give the folder of a run that has its log")
    epochs: dict[int, list[tuple[int, float]]] = {}
    before = 0
    for event in logs.read(run.folder, "train"):
        term = next((name for name in ADVERSARIAL if name in event), "loss")
        epochs.setdefault(event["epoch"], []).append((event["step"] - before, event[term]))
        before = event["step"]
    if not epochs:
        raise InputError(f"{run.folder}: its log has no losses yet: give a run that has trained")
    means = [sum(n * loss for n, loss in parts) / sum(n for n, _ in parts) for parts in epochs.values()]
    return {"epochs": list(epochs), "losses": means, "term": term}
