"""What the sources report: the thesis's Tables 5.1, 5.2 and 6.1-6.4 and what its text says of Figure 6.1; Madry et al.'s Tables 1
and 2 (arXiv 1706.06083).

Accuracies in percent, on whole test sets. A table names the runs behind its numbers by a key, and the attacks as
`spat_train.evaluation.attack_specs` does.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ..presets import PRESETS
from .runs import Wanted, title


@dataclass(frozen=True)
class Cell:
    """One number.

    Args:
        row, column: where it stands.
        accuracy: in percent.
        attack: a name of `spat_train.evaluation.attack_specs`.
        target: key of the run whose accuracy it is.
        source: key of the run that the attack was made on, for black boxes; "" is `target`.
    """

    row: str
    column: str
    accuracy: float
    attack: str
    target: str
    source: str = ""


@dataclass(frozen=True)
class Table:
    """`runs`: by key, those that are copies after their originals; `eps` in 1/255."""

    title: str
    corner: str
    eps: float
    runs: dict[str, Wanted]
    cells: tuple[Cell, ...]


# ---- thesis, chapter 5: one model under PGD-KL and under PGD-LS of many alphas

# Which network it is, the thesis does not say: it is taken to be that of Table 6.1.
_ROBUST = PRESETS["table6.1/madry"]
STANDARD = {"cifar10": replace(_ROBUST, method="standard", preset=""), "mnist": PRESETS["madry-mnist/natural"]}
ROBUST = {
    "cifar10": _ROBUST,
    "cifar100": PRESETS["table6.2/madry"],
    "stl10": replace(PRESETS["table6.4/mart"], method="madry", preset=""),
    "mnist": PRESETS["madry-mnist/madry"],
}


def _smoothed(number: str, key: str, kl: float, accuracies: dict[str, float]) -> Table:
    cells = [Cell("PGD-KL", "accuracy", kl, "pgd-kl-20", key)]
    cells += [Cell(f"PGD-LS({a})", "accuracy", value, f"pgd-ls-20:alpha={a}", key) for a, value in accuracies.items()]
    runs = {key: Wanted({"standard": STANDARD, "robust": ROBUST}[key]["cifar10"])}
    return Table(f"Thesis, Table {number}: a {key} model under PGD-20", "attack", 8.0, runs, tuple(cells))


# ---- thesis, chapter 6: a row a training


def _trainings(number: str, about: str, eps: float, columns: dict[str, str], rows: dict[str, tuple[float, ...]]) -> Table:
    runs, cells = {}, []
    for key, accuracies in rows.items():
        config = PRESETS[f"table{number}/{key}"]
        if number == "6.3":
            config = replace(config, extra=Path("ti_500K_pseudo_labeled.pickle"))  # RST's
        runs[key] = Wanted(config)
        for (column, attack), accuracy in zip(columns.items(), accuracies, strict=True):
            cells.append(Cell(title(config), column, accuracy, attack, key))
    return Table(f"Thesis, Table {number}: {about}", "defence", eps, runs, tuple(cells))


_FOUR = {"natural": "clean", "FGSM": "fgsm", "PGD-20": "pgd-20", "C&W-inf": "cw-30"}
_TWO = {"natural": "clean", "PGD-20": "pgd-20"}
_RST = {"natural": "clean", "PGD-20": "pgd-20-rst"}  # "settings in [39]": as RST's code looks at models while it trains them
FIGURE_61 = {"alphas": [1.0], "clean": [32.44], "robust": [0.0]}  # what the text says, trained with 8/255


def _broken(about: str) -> Table:
    """The one point of Figure 6.1 that has numbers."""
    config = PRESETS["figure6.1/eps8-alpha1"]
    cells = (
        Cell(title(config), "natural", FIGURE_61["clean"][0], "clean", "alpha1"),
        Cell(title(config), "PGD-20", FIGURE_61["robust"][0], "pgd-20", "alpha1"),
    )
    return Table(about, "defence", 8.0, {"alpha1": Wanted(config)}, cells)


# ---- Madry et al.: a row an attack, on one robust model

_MNIST, _CIFAR = PRESETS["madry-mnist/madry"], PRESETS["madry-cifar10/madry"]
# How B was trained, they do not say.
_B = Wanted(replace(PRESETS["madry-mnist/natural"], model="mnist-b", preset=""), fixed=True, any_method=True)


def _attacks(number: int, data: str, eps: float, runs: dict[str, Wanted], rows: list[tuple]) -> Table:
    """rows: what it is called, the attack's name, key of the run that it is made on, accuracy."""
    cells = []
    for row, attack, source, accuracy in rows:
        name = row if attack == "clean" else f"{row}, {source}"
        cells.append(Cell(name, "accuracy", accuracy, attack, "A", "" if source == "A" else source))
    about = f"Madry et al., Table {number}: a robust model on {data}, attacked on itself (A) and on other networks"
    return Table(about, "attack, made on", eps, runs, tuple(cells))


TABLES = {
    "5.1": _smoothed("5.1", "standard", 47.51, {"1e-2": 80.04, "1e-3": 69.23, "1e-4": 51.28, "5e-5": 44.16, "1e-5": 25.3}),
    "5.2": _smoothed("5.2", "robust", 71.58, {"0.1": 57.7, "0.2": 62.93, "0.3": 67.7, "0.4": 72.14, "0.5": 75.57}),
    "6.1": _trainings("6.1", "WRN-34-10 on CIFAR-10", 8.0, _FOUR, {
        "madry": (84.39, 59.93, 56.37, 54.14),
        "trades": (85.97, 62.29, 57.32, 54.38),
        "mart": (83.7, 61.93, 58.46, 53.28),
        "trades+spat": (84.6, 61.46, 58.22, 54.97),
        "mart+spat": (81.93, 61.87, 59.59, 51.57),
    }),
    "6.2": _trainings("6.2", "WRN-34-10 on CIFAR-100", 8.0, _FOUR, {
        "madry": (61.77, 34.42, 31.51, 30.1),
        "trades": (57.13, 32.9, 31.02, 28.07),
        "mart": (58.56, 36.46, 34.12, 30.16),
        "trades+spat": (55.54, 33.35, 31.20, 28.14),
        "mart+spat": (60.28, 36.91, 34.66, 30.93),
    }),
    "6.3": _trainings("6.3", "WRN-28-10 on CIFAR-10 and 500,000 pseudo-labelled images", 0.031 * 255, _RST, {
        "rst": (89.65, 63.00),
        "mart": (89.81, 63.06),
        "rst+spat": (89.52, 63.47),
        "mart+spat": (89.44, 63.37),
    }),
    "6.4": _trainings("6.4", "ResNet-18 on STL-10", 8.0, _TWO, {
        "trades": (70.15, 42.16),
        "mart": (67.89, 44.24),
        "trades+spat": (69.24, 43.33),
        "mart+spat": (67.85, 45.19),
    }),
    "figure-6.1": _broken("Thesis, section 6.2: ResNet-50 on CIFAR-10, trained at α = 1"),
    "madry-mnist": _attacks(
        1, "MNIST", 76.5,
        {"A": Wanted(_MNIST), "A'": Wanted(_MNIST, copy_of="A"), "B": _B},
        [
            ("natural", "clean", "A", 98.8), ("FGSM", "fgsm", "A", 95.6), ("PGD-40", "pgd-40", "A", 93.2),
            ("PGD-100", "pgd-100", "A", 91.8), ("PGD-40, 20 restarts", "pgd-40x20", "A", 90.4),
            ("PGD-100, 20 restarts", "pgd-100x20", "A", 89.3),
            ("targeted PGD-40", "pgd-40-random", "A", 92.7),  # towards which class, they do not say
            ("CW-40", "cw-40", "A", 94.0), ("CW+-40", "cw+-40", "A", 93.9),
            ("FGSM", "fgsm", "A'", 96.8), ("PGD-40", "pgd-40", "A'", 96.0), ("PGD-100, 20 restarts", "pgd-100x20", "A'", 95.7),
            ("CW-40", "cw-40", "A'", 97.0), ("CW+-40", "cw+-40", "A'", 96.4),
            ("FGSM", "fgsm", "B", 95.4), ("PGD-40", "pgd-40", "B", 96.4), ("CW+-40", "cw+-40", "B", 95.7),
        ],
    ),
    "madry-cifar10": _attacks(
        2, "CIFAR-10", 8.0,
        {"A": Wanted(_CIFAR), "A'": Wanted(_CIFAR, copy_of="A"), "A_nat": Wanted(PRESETS["madry-cifar10/natural"])},
        [
            ("natural", "clean", "A", 87.3), ("FGSM", "fgsm", "A", 56.1), ("PGD-7", "pgd-7", "A", 50.0),
            ("PGD-20", "pgd-20:step=1/4", "A", 45.8), ("CW-30", "cw-30", "A", 46.8),
            ("FGSM", "fgsm", "A'", 67.0), ("PGD-7", "pgd-7", "A'", 64.2), ("CW-30", "cw-30", "A'", 78.7),
            ("FGSM", "fgsm", "A_nat", 85.6), ("PGD-7", "pgd-7", "A_nat", 86.0),
        ],
    ),
}  # fmt: skip
