"""The attacks by family: settings, published names with their sources, and the attack of `spat_kernels` that each runs.

A new attack is a class here, in `FAMILIES`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import spat_kernels
from spat_kernels import losses, pgd
from spat_kernels.attacks._common import Result, Tally
from spat_kernels.attacks.autoattack import VERSIONS, fewest_classes
from spat_kernels.attacks.targeting import malt_passes, nearest_classes_of
from spat_kernels.precision import tf32_switches
from spat_kernels.predictions import model_logits, other_classes, predictions
from spat_kernels.settings import STOPS, TARGETINGS, GradientPath, Stop, Targeting, Version

from ...errors import InputError
from .attack import Attack, choice, count, loss_name, number, positive, setting, share_of_eps, unchanged, yes_or_no

STOP_BY_NAME: dict[str, Stop | None] = {"auto": None, "none": None, **{name: name for name in STOPS}}
STOP_IN_WORDS = {"success": "until {}", "cycle": "until in a cycle", "exact": "until {} or in a cycle"}
CYCLES_FROM = 50  # steps; iterates of robust networks return to an earlier one after tens of steps
TARGETS = {  # of PGD, in words
    "least-likely": "the least-likely class", "random": "a random wrong class", "all": "all wrong classes in turn",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Clean(Attack):
    family, random, follows_gradients = "clean", False, False
    named = {"clean": ("clean", "the images as they are")}

    def _attack(self, model, x, y, eps, draws, run, attack_options):
        return unchanged(x)

    @classmethod
    def readers(cls):
        return {}

    def describe(self):
        return "no attack"


@dataclass(frozen=True, kw_only=True)
class _Ascent(Attack):
    """An attack on a loss of `spat_kernels.losses`: its name there, and those of its `settings` that are given."""

    loss: str = setting("ce", loss_name)
    settings: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        self.maximised.check_targeted(self.targeted)

    @property
    def maximised(self) -> losses.Loss:
        return losses.lookup(self.loss, **dict(self.settings))

    @property
    def targeted(self) -> bool:
        raise NotImplementedError

    @property
    def least_classes(self) -> int:
        return self.maximised.fewest_classes(self.targeted)

    @classmethod
    def readers(cls):
        of_losses = {name: number for kind in losses.LOSSES.values() for name in losses.settings_of(kind)}
        own = super().readers()
        if clash := next(iter(of_losses.keys() & own.keys()), None):
            raise InputError(f"attack {cls.family}: {clash} is a setting of its own and of a loss: rename that of the loss")
        return of_losses | own


@dataclass(frozen=True, kw_only=True)
class PGD(_Ascent):
    """Projected gradient ascent. With one step it is FGSM, with no steps noise.

    Args:
        loss: what is maximised; ls is ce with an `alpha` (PGD-LS).
        steps: 0 is a random point of the ball.
        step: length of a step in units of eps; None is 1/4, for L2 and L1 2.5 / steps.
        start: uniform in the ball, or clean.
        target: none, or towards the least likely class of the clean image, a random wrong one, or all wrong ones in turn.
        targeting: the order of all wrong ones: confidence, or malt, the nearest boundary first, for K - 1 more backwards a run.
        right_at: the iterates at which a prediction must be right, the last or every one. At every one, the first wrong one is
            what comes out.
        stop: as in `spat_kernels.PGD`: none, success, cycle or exact. auto looks for cycles where that changes no bit: on CPUs,
            in models that take the plan, in L-infinity, on the losses of `spat_kernels`, in attacks of many steps.
    """

    family = "pgd"
    named = {
        "noise": ("pgd:steps=0", "uniform in the ball, a weak control (Goodfellow et al., 2015)"),
        "fgsm": ("pgd:steps=1:step=1:start=clean", "Goodfellow et al., 2015; thesis, Tables 6.1 and 6.2"),
        "fgsm-rs": ("pgd:steps=1:step=1.25", "Wong et al., 2020"),
        "pgd-7": ("pgd:steps=7:step=1/4", "Madry et al., 2018, CIFAR-10"),
        "pgd-10": ("pgd:steps=10:step=1/4", "thesis, chapter 6: the attack in training"),
        "pgd-20": ("pgd:steps=20:step=1/10", "thesis, Tables 6.1, 6.2 and 6.4; TRADES; MART"),
        "pgd-20-rst": (
            "pgd:steps=20:step=7/31:start=clean:right_at=every",
            "Carmon et al., 2019 (RST): steps of 0.007 at eps 0.031, right only if right at every iterate; thesis, Table 6.3",
        ),
        "pgd-40": ("pgd:steps=40:step=1/30", "Madry et al., 2018, MNIST: steps of 0.01 at eps 0.3"),
        "pgd-50": ("pgd:steps=50:step=1/4", "the FastAT benchmark; Wong et al., 2020 (with 10 restarts: pgd-50x10)"),
        "pgd-100": ("pgd:steps=100:step=1/30", "Madry et al., 2018, MNIST"),
        "pgd-1000": ("pgd:steps=1000:step=1/4:stop=cycle", "Doldo et al., 2025: ends at the cycle that an iterate is in"),
        "pgd-kl-20": ("pgd:loss=kl:steps=20:step=1/10", "thesis, Tables 5.1 and 5.2; the inner attack of TRADES"),
        "pgd-ls-20": ("pgd:loss=ls:steps=20:step=1/10", "thesis, Eq. 4.1 to 4.3; alpha must be given: pgd-ls-20:alpha=0.2"),
        "cw-30": ("pgd:loss=margin:kappa=50:steps=30:step=1/10", "thesis, Tables 6.1 and 6.2; Madry et al., 2018, CIFAR-10"),
        "cw-40": ("pgd:loss=margin:kappa=0:steps=40:step=1/30", "Madry et al., 2018, MNIST"),
        "cw+-40": ("pgd:loss=margin:kappa=50:steps=40:step=1/30", "Madry et al., 2018, MNIST"),
        "pgd-l2-10": ("pgd:norm=l2:steps=10", "Madry et al., 2018, section 5: L2; steps of 2.5 eps / steps"),
        "pgd-l2-20": ("pgd:norm=l2:steps=20", "the same, 20 steps"),
        "pgd-l2-40": ("pgd:norm=l2:steps=40", "the same, 40 steps"),
        "pgd-l2-100": ("pgd:norm=l2:steps=100", "the same, 100 steps"),
        "pgd-l1-20": ("pgd:norm=l1:steps=20", "Tramèr and Boneh, 2019: L1; sparse steps of 2.5 eps / steps"),
        "pgd-l1-100": ("pgd:norm=l1:steps=100", "the same, 100 steps"),
    }

    steps: int = setting(10, count)
    step: float | None = setting(None, share_of_eps)
    start: str = setting("uniform", choice("uniform", "clean"))
    target: str = setting("none", choice("none", *TARGETS))
    targeting: Targeting = setting("confidence", choice(*TARGETINGS))
    right_at: str = setting("last", choice("last", "every"))
    stop: str = setting("auto", choice(*STOP_BY_NAME))

    def __post_init__(self):
        super().__post_init__()
        stops = self.stop not in ("auto", "none")
        if self.steps == 0 and (self.start == "clean" or self.target != "none" or self.right_at == "every" or stops):
            raise ValueError("of no steps there is noise alone: leave out start, target, right_at and stop, or steps=0")
        if self.targeting == "malt" and self.target != "all":
            raise ValueError("targeting=malt is an order of targets: give target=all")
        if self.maximised.needs_random_start and self.start == "clean":
            raise ValueError(f"the gradient of {self.loss} is 0 at a clean start: leave out start")
        if stops:
            if self.right_at == "every":
                raise ValueError("right_at=every stops at the first wrong iterate by itself: leave out stop")
            self._engine(1.0, stop=STOP_BY_NAME[self.stop])  # it checks what goes with stop

    @property
    def random(self) -> bool:
        return self.start == "uniform" or self.target == "random"

    @property
    def follows_gradients(self) -> bool:
        return self.steps > 0

    def runs(self, classes: int) -> int:
        return self.restarts * (classes - 1 if self.target == "all" else 1)

    @property
    def targeted(self) -> bool:
        return self.target != "none"

    def _draw(self, x, y, eps, generator):
        start, which = x, None
        if self.start == "uniform":  # of no steps: nothing is asked of the model
            start = pgd(lambda x: x, x, y, eps, steps=0, norm=self.norm, generator=generator)
        if self.target == "random":
            which = torch.rand(len(x), generator=generator, device=generator.device).to(x.device)
        return [start, which]

    def _attack(self, model, x, y, eps, draws, run, attack_options):
        start, which = draws
        if self.steps == 0:
            return unchanged(start)
        stop, tally, labels = self._stop(model, x, attack_options), Tally(x, attack_options.pop("budget", None)), y
        if self.targeted:
            labels = self._targets(model, x, y, which, run, attack_options.get("input_gradient", "auto"), tally)
        if self.right_at == "every":
            return self._first_wrong(model, x, y, labels, eps, start, attack_options, tally)
        rows = (~tally.spent(torch.arange(len(x), device=x.device))).nonzero()[:, 0]
        if not len(rows):
            return tally.result(x.clone())
        budget = None if tally.limit is None else tally.left(rows)
        attack = self._engine(eps, stop=stop, budget=budget, **attack_options)
        try:
            found = attack.run(model, x[rows], labels[rows], start=None if self.start == "clean" else start[rows])
        except ValueError as error:
            if not str(error).startswith("stop="):
                raise
            raise InputError(f"attack {self.name}: {error}, by {self.name}:stop=none") from error
        x_adv = x.clone()
        x_adv[rows] = found.x_adv
        tally.add(rows, found.forwards, found.backwards)
        return tally.result(x_adv)

    def _engine(self, eps, **options) -> spat_kernels.PGD:
        return spat_kernels.PGD(
            eps, loss=self.maximised, steps=self.steps, step_size=None if self.step is None else self.step * eps, norm=self.norm,
            targeted=self.targeted, random_start=self.start != "clean", **options,
        )  # fmt: skip

    def _stop(self, model, x: Tensor, attack_options: dict) -> Stop | None:
        if self.stop != "auto":
            return STOP_BY_NAME[self.stop]
        pays = self.steps >= CYCLES_FROM and self.norm == "linf" and type(self.maximised) in losses.OURS
        if not pays or x.is_cuda or "budget" in attack_options:
            return None
        how = {name: attack_options[name] for name in ("precision", "input_gradient") if name in attack_options}
        return "cycle" if spat_kernels.explain(model, x[:1], **how).path == "plan" else None

    def _first_wrong(self, model, x, y, labels, eps: float, start: Tensor, options: dict, tally: Tally) -> Result:
        """The first misclassified iterate of each image, else its last one."""
        point = found = start
        right, everyone = torch.ones_like(y, dtype=torch.bool), torch.arange(len(x), device=x.device)
        step = replace(self, steps=1, step=self.length, right_at="last")._engine(eps, **options)
        for _ in range(self.steps):
            goes_on = ~tally.spent(everyone, 3)
            point, forwards, backwards = step.run(model, x, labels, start=point)
            found = torch.where((right & goes_on).view(-1, *[1] * (x.ndim - 1)), point, found)
            right = right & (predictions(model_logits(model, point)) == y)
            tally.add(goes_on, forwards[goes_on] + 1, backwards[goes_on])
        return tally.result(found)

    def least_passes(self, classes):
        asks = malt_passes(classes) if self.targeting == "malt" else int(self.targeted)
        return 0 if self.steps == 0 else asks + (3 if self.right_at == "every" else 2) + self.maximised.needs_clean_logits

    @property
    def length(self) -> float:
        """Length of a step in units of eps."""
        return self.step if self.step is not None else 1 / 4 if self.norm == "linf" else 2.5 / self.steps

    def _targets(self, model, x: Tensor, y: Tensor, which: Tensor, run: int, path: GradientPath, tally: Tally) -> Tensor:
        """int64 [B], of the wrong classes: the least likely for the clean images, by `which` in [0, 1), or one for each `run`."""
        if self.targeting == "malt":
            wrong, possible = nearest_classes_of(model, x, y, self.norm, path)
            tally.add(slice(None), 1, malt_passes(wrong.shape[1] + 1) - 1)
        else:
            wrong, possible = other_classes(model_logits(model, x), y)
            tally.add(slice(None), 1)
        count = possible.sum(1).clamp_min(1)  # these come first
        place = (which * count).long() if self.target == "random" else count - 1 if self.target == "least-likely" else run % count
        return wrong.gather(1, place[:, None])[:, 0]

    def _describe(self):
        if self.steps == 0:
            return ["uniform noise"]
        where = {"uniform": "a uniform random start", "clean": "the image"}[self.start]
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''} of {_length(self.length)} from {where}"
        nearest = ", the nearest first" if self.targeting == "malt" else ""
        target = [f"towards {TARGETS[self.target]}{nearest}"] if self.targeted else []
        every = ["right only if right at every iterate"] if self.right_at == "every" else []
        success = "at the target" if self.targeted else "misclassified"
        stop = [STOP_IN_WORDS[self.stop].format(success)] if self.stop in STOP_IN_WORDS else []
        return [f"PGD on {self.maximised.describe()}", steps, *target, *every, *stop]


class _Engine(Attack):
    """An attack of `spat_kernels` that is an object with its own seed and bookkeeping."""

    def least_passes(self, classes):
        return 2  # the clean image, and a query

    def _draw(self, x, y, eps, generator):
        return [int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))]

    def _attack(self, model, x, y, eps, draws, run, attack_options):
        generator = torch.Generator().manual_seed(draws[0])
        return self._engine(eps, norm=self.norm, generator=generator, **attack_options).run(model, x, y)

    def _engine(self, eps: float, **options: Any) -> spat_kernels.APGD | spat_kernels.FAB | spat_kernels.Square:
        """The attack of `spat_kernels`. FAB and Square know no CUDA graphs, and drop `graph`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class APGD(_Ascent, _Engine):
    """AutoAttack's PGD, which chooses its steps itself; with `targets` n, towards the n likeliest wrong classes in turn, or by
    `targeting` malt the n whose boundaries are nearest. In L1 it searches in larger balls first, as AutoAttack's does (Croce and
    Hein, 2021)."""

    family = "apgd"
    named = {
        "apgd-ce": ("apgd", "Croce and Hein, 2020"),
        "apgd-dlr": ("apgd:loss=dlr", "Croce and Hein, 2020"),
        "apgd-pma": ("apgd:loss=pma", "Xie et al., 2025, arXiv 2411.15210: the probability margin"),
        "apgd-t": ("apgd:loss=dlr:targets=9", "Croce and Hein, 2020: the nine likeliest wrong classes"),
        "apgd-t-malt": (
            "apgd:loss=dlr:targets=9:targeting=malt",
            "Melamed et al., 2024, arXiv 2407.02240: the nine nearest ones",
        ),
    }

    steps: int = setting(100, positive)
    targets: int | None = setting(None, positive)
    targeting: Targeting = setting("confidence", choice(*TARGETINGS))

    def __post_init__(self):
        super().__post_init__()
        if self.targeting == "malt" and not self.targeted:
            raise ValueError("targeting=malt is an order of targets: give targets=9")

    @property
    def targeted(self) -> bool:
        return self.targets is not None

    @property
    def least_classes(self) -> int:
        return max(super().least_classes, (self.targets or 0) + 1)

    def least_passes(self, classes):
        return (malt_passes(classes) + 1 if self.targeting == "malt" else 1) + 3  # a start, a step, and what it leads to

    def _engine(self, eps, **options):
        return spat_kernels.APGD(
            eps, loss=self.maximised, steps=self.steps, targets=self.targets, targeting=self.targeting, **options
        )  # fmt: skip

    def _describe(self):
        return [f"APGD on {self.maximised.describe()}", f"{self.steps} steps", *_towards(self.targets, self.targeting)]


@dataclass(frozen=True, kw_only=True)
class FAB(_Engine):
    """The fast adaptive boundary attack; with `targets` n, FAB-T towards the n likeliest wrong classes in turn."""

    family, random = "fab", False  # it begins at the image
    named = {"fab-t": ("fab:targets=9", "Croce and Hein, 2020, arXiv 1907.02044")}

    steps: int = setting(100, positive)
    targets: int | None = setting(None, positive)

    @property
    def least_classes(self) -> int:
        return (self.targets or 1) + 1

    def least_passes(self, classes):
        return 1 + 2 + (classes - 1 if self.targets is None else 1)

    def _engine(self, eps, graph="auto", **options):
        return spat_kernels.FAB(eps, steps=self.steps, targets=self.targets, **options)

    def _describe(self):
        return ["FAB", f"{self.steps} steps", *_towards(self.targets)]


@dataclass(frozen=True, kw_only=True)
class Square(_Engine):
    """Random search by squares, without gradients."""

    family, follows_gradients = "square", False
    named = {"square": ("square", "Andriushchenko et al., 2020: no gradients")}

    queries: int = setting(5000, positive)

    def _engine(self, eps, graph="auto", **options):
        return spat_kernels.Square(eps, queries=self.queries, **options)

    def _describe(self):
        return ["Square Attack", f"{self.queries} queries"]


@dataclass(frozen=True, kw_only=True)
class AutoAttack(_Engine):
    """The ensemble: `steps` of APGD and FAB, `queries` of Square. `exhaustive`: in fast, standard follows on all that is left."""

    family = "autoattack"
    named = {
        "autoattack": ("autoattack", "Croce and Hein, 2020: APGD-CE, APGD-T, FAB-T, Square"),
        "autoattack-plus": ("autoattack:version=plus", "the same with restarts and the untargeted forms"),
        "autoattack-rand": ("autoattack:version=rand", "the same for randomised models"),
        "autoattack-fast": (
            "autoattack:version=fast",
            "PMA (Xie et al., 2025), MALT (Melamed et al., 2024), then the rest on close calls",
        ),
    }

    version: Version = setting("standard", choice(*VERSIONS))
    exhaustive: bool = setting(False, yes_or_no)
    steps: int = setting(100, positive)
    queries: int = setting(5000, positive)

    def __post_init__(self):
        super().__post_init__()
        if self.exhaustive and self.version != "fast":
            raise ValueError(f"exhaustive=yes goes with version=fast, not {self.version}: leave it out")
        if "square" not in self.parts and self.queries != 5000:
            raise ValueError(f"queries={self.queries} are of Square, which version={self.version} has not: leave it out")

    @property
    def least_classes(self) -> int:
        return max(map(fewest_classes, self.parts))

    @property
    def parts(self) -> tuple[str, ...]:
        return VERSIONS[self.version]

    def least_passes(self, classes):
        return 2 + 4 + 1  # the clean image, also in half precision; a step of APGD, and a look at what it leads to

    def _stages(self, model, x, y, eps, draws, run, attack_options):
        attack = spat_kernels.AutoAttack(
            eps, norm=self.norm, version=self.version, exhaustive=self.exhaustive, steps=self.steps, queries=self.queries,
            seed=draws[0], **attack_options,
        )  # fmt: skip
        stages = attack.stages(model, x, y)

        def following() -> Result:
            with tf32_switches("fp32", x.device.type):  # it asks what is misclassified as `evaluate` does, not by the user's TF32
                found = next(stages)
            return Result(found.x_adv, found.forwards, found.backwards)

        following()  # without an attack
        for _ in self.parts:
            yield following()

    def _describe(self):
        queries = [f"{self.queries} queries"] if "square" in self.parts else []
        then = f", then standard on {'all that is left' if self.exhaustive else 'close calls'}" if self.version == "fast" else ""
        return [f"AutoAttack, version {self.version}{then}", f"{self.steps} steps", *queries]


def _length(step: float) -> str:
    """The length of a step in words, for `step` in units of eps."""
    parts = 1 / step if step else 0
    if step == 1:
        return "eps"
    return f"eps / {round(parts)}" if parts > 1 and abs(parts - round(parts)) < 1e-6 else f"{step:.4g} eps"


def _towards(targets: int | None, targeting: Targeting = "confidence") -> list[str]:
    first = {"confidence": "likeliest", "malt": "nearest"}[targeting]
    return [] if targets is None else [f"towards the {targets} {first} wrong classes in turn"]


FAMILIES: dict[str, type[Attack]] = {kind.family: kind for kind in (Clean, PGD, APGD, FAB, Square, AutoAttack)}
NAMED = {name: entry for kind in FAMILIES.values() for name, entry in kind.named.items()}
