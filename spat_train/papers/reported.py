"""What the sources report: the thesis's Tables 5.1, 5.2 and 6.1-6.4 and what its text says of Figure 6.1; Madry et al.'s Tables 1
and 2 (arXiv 1706.06083); Wu et al.'s table of WRN-34-10 with AWP (arXiv 2004.05884); rows of the FastAT benchmark (arXiv
2604.22853).

Accuracies in percent, on whole test sets. A table names the runs behind its numbers by a key, and the attacks as
`spat_train.evaluation.attack_specs` does.
"""

from dataclasses import dataclass

from .runs import title
from .selection import RunSpec


@dataclass(frozen=True)
class Cell:
    """One number."""

    row: str
    column: str
    accuracy: float  # in percent
    attack: str  # a name of `spat_train.evaluation.attack_specs`
    target: str  # key of the run whose accuracy it is
    source: str = ""  # key of the run that the attack was made on, for black boxes; "" is `target`


@dataclass(frozen=True)
class Table:
    """A table of a source."""

    title: str
    corner: str  # the heading of the column of rows
    eps: float  # of its attacks, in 1/255
    runs: dict[str, RunSpec]  # by key; copies come after their originals
    cells: tuple[Cell, ...]


# ---- thesis, chapter 5: one model under PGD-KL and under PGD-LS of many alphas


def _smoothed(number: str, key: str, spec: RunSpec, kl: float, accuracies: dict[str, float]) -> Table:
    cells = [Cell("PGD-KL", "accuracy", kl, "pgd-kl-20", key)]
    cells += [Cell(f"PGD-LS({a})", "accuracy", value, f"pgd-ls-20:alpha={a}", key) for a, value in accuracies.items()]
    return Table(f"Thesis, Table {number}: a {key} model under PGD-20", "attack", 8.0, {key: spec}, tuple(cells))


# ---- thesis, chapter 6: one training in each row

_FOUR = {"natural": "clean", "FGSM": "fgsm", "PGD-20": "pgd-20", "C&W-inf": "cw-30"}
_TWO = {"natural": "clean", "PGD-20": "pgd-20"}
_AUTO = {"natural": "clean", "AutoAttack": "autoattack"}
_FASTAT = {"natural": "clean", "PGD-50": "pgd-50", "AutoAttack": "autoattack"}
_RST = {"natural": "clean", "PGD-20": "pgd-20-rst"}  # "settings in [39]": as RST's code validates
FIGURE_61 = {"alphas": [1.0], "clean": [32.44], "robust": [0.0]}  # what the text says, trained with 8/255


def _trainings(
    about: str, presets: str, columns: dict[str, str], rows: dict[str, tuple[float, ...]],
    *, eps: float = 8.0, source: str = "Thesis, ", titles: dict[str, str] | None = None,
) -> Table:  # fmt: skip
    """`presets`: what the names of the rows' presets begin with. `columns`: by title, the attack."""
    runs = {key: RunSpec(presets + key) for key in rows}
    cells = [
        Cell((titles or {}).get(key) or title(runs[key].config), column, accuracy, attack, key)
        for key, accuracies in rows.items()
        for (column, attack), accuracy in zip(columns.items(), accuracies, strict=True)
    ]
    return Table(source + about, "defence", eps, runs, tuple(cells))


# ---- Madry et al.: an attack in each row, on one robust model


def _attacks(number: int, data: str, eps: float, runs: dict[str, RunSpec], rows: list[tuple]) -> Table:
    """`rows`: title, name of the attack, key of the run that it is made on, accuracy."""
    cells = []
    for row, attack, source, accuracy in rows:
        name = row if attack == "clean" else f"{row}, {source}"
        cells.append(Cell(name, "accuracy", accuracy, attack, "A", "" if source == "A" else source))
    about = f"Madry et al., Table {number}: a robust model on {data}, attacked on itself (A) and on other networks"
    return Table(about, "attack, made on", eps, runs, tuple(cells))


TABLES = {
    # The thesis does not say which network it is in chapter 5: it is taken to be that of Table 6.1.
    "5.1": _smoothed("5.1", "standard", RunSpec("table6.1/madry", method="standard"), 47.51, {
        "1e-2": 80.04, "1e-3": 69.23, "1e-4": 51.28, "5e-5": 44.16, "1e-5": 25.3,
    }),
    "5.2": _smoothed("5.2", "robust", RunSpec("table6.1/madry"), 71.58, {
        "0.1": 57.7, "0.2": 62.93, "0.3": 67.7, "0.4": 72.14, "0.5": 75.57,
    }),
    "6.1": _trainings("Table 6.1: WRN-34-10 on CIFAR-10", "table6.1/", _FOUR, {
        "madry": (84.39, 59.93, 56.37, 54.14),
        "trades": (85.97, 62.29, 57.32, 54.38),
        "mart": (83.7, 61.93, 58.46, 53.28),
        "trades+spat": (84.6, 61.46, 58.22, 54.97),
        "mart+spat": (81.93, 61.87, 59.59, 51.57),
    }),
    "6.2": _trainings("Table 6.2: WRN-34-10 on CIFAR-100", "table6.2/", _FOUR, {
        "madry": (61.77, 34.42, 31.51, 30.1),
        "trades": (57.13, 32.9, 31.02, 28.07),
        "mart": (58.56, 36.46, 34.12, 30.16),
        "trades+spat": (55.54, 33.35, 31.20, 28.14),
        "mart+spat": (60.28, 36.91, 34.66, 30.93),
    }),
    "6.3": _trainings("Table 6.3: WRN-28-10 on CIFAR-10 and 500,000 pseudo-labelled images", "table6.3/", _RST, {
        "rst": (89.65, 63.00),
        "mart": (89.81, 63.06),
        "rst+spat": (89.52, 63.47),
        "mart+spat": (89.44, 63.37),
    }, eps=0.031 * 255),
    "6.4": _trainings("Table 6.4: ResNet-18 on STL-10", "table6.4/", _TWO, {
        "trades": (70.15, 42.16),
        "mart": (67.89, 44.24),
        "trades+spat": (69.24, 43.33),
        "mart+spat": (67.85, 45.19),
    }),
    "figure-6.1": _trainings("section 6.2: ResNet-50 on CIFAR-10, trained at α = 1", "figure6.1/eps8-", _TWO, {
        "alpha1": (FIGURE_61["clean"][0], FIGURE_61["robust"][0]),
    }),
    "awp": _trainings("WRN-34-10 on CIFAR-10, all with AWP", "awp/", _AUTO, {
        "trades": (85.36, 56.17),
        "mart": (84.43, 54.23),
    }, source="Wu et al., "),
    "madry-mnist": _attacks(
        1, "MNIST", 76.5,
        {
            "A": RunSpec("madry-mnist/madry"), "A'": RunSpec("madry-mnist/madry", copy_of="A"),
            "B": RunSpec("madry-mnist/natural", model="mnist-b"),  # how B was trained, they do not say
        },
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
        {
            "A": RunSpec("madry-cifar10/madry"), "A'": RunSpec("madry-cifar10/madry", copy_of="A"),
            "A_nat": RunSpec("madry-cifar10/natural"),
        },
        [
            ("natural", "clean", "A", 87.3), ("FGSM", "fgsm", "A", 56.1), ("PGD-7", "pgd-7", "A", 50.0),
            ("PGD-20", "pgd-20:step=1/4", "A", 45.8), ("CW-30", "cw-30", "A", 46.8),
            ("FGSM", "fgsm", "A'", 67.0), ("PGD-7", "pgd-7", "A'", 64.2), ("CW-30", "cw-30", "A'", 78.7),
            ("FGSM", "fgsm", "A_nat", 85.6), ("PGD-7", "pgd-7", "A_nat", 86.0),
        ],
    ),
    # Means of three seeds. Seconds of training there, in this order: 1902, 1941, 1979, 6954, 7027.
    "fastat": _trainings(
        "FastAT benchmark (arXiv 2604.22853): ResNet-18 on CIFAR-10", "fastat/", _FASTAT, {
            "fgsm-rs": (77.66, 48.27, 43.09),
            "n-fgsm": (78.59, 53.07, 47.77),
            "free": (75.20, 48.83, 44.34),
            "pgd-at": (85.35, 46.31, 44.33),
            "pgd-at-wa": (82.36, 54.17, 50.49),
        },
        source="",
        titles={"fgsm-rs": "FGSM-RS", "free": "Free-AT", "pgd-at": "PGD-AT", "pgd-at-wa": "PGD-AT-WA", "n-fgsm": "N-FGSM"},
    ),
}  # fmt: skip
