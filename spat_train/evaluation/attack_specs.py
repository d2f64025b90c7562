"""Every attack by name: the published ones with their settings, others by a small grammar, NAME[xN][:key=value]*.

    pgd-20                             as published: a name of the list
    pgd-40x20                          with 20 restarts
    pgd-40-least-likely                targeted: -least-likely, -random or -all after any PGD
    pgd-20:alpha=0.2:steps=50          with other settings
    pgd:steps=50:step=1/20:loss=margin:restarts=5:eps=16/255

Names may be in capitals (AutoAttack, PGD-20, AA), and so may the values that are names (norm=L2).
Lengths of steps are in units of eps. eps itself is the evaluation's, or given here, in the units of images in [0, 1]. Losses are
those of `spat_kernels.losses`, each with its settings (alpha, kappa).
"""

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

import spat_kernels
from spat_kernels import losses, pgd
from spat_kernels.attacks.autoattack import VERSIONS, fewest_classes
from spat_kernels.checks import as_norm
from spat_kernels.precision import tf32_switches
from spat_kernels.predictions import model_logits, other_classes, predictions
from spat_kernels.settings import NORMS, Norm, Version

from ..errors import InputError

TARGETS = ("least-likely", "random", "all")
NAMED = {  # name: (what it is in the grammar, source)
    "clean": ("clean", "the images as they are"),
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
    "pgd-100": ("pgd:steps=100:step=1/30", "Madry et al., 2018, MNIST"),
    "pgd-kl-20": ("pgd:loss=kl:steps=20:step=1/10", "thesis, Tables 5.1 and 5.2; the inner attack of TRADES"),
    "pgd-ls-20": ("pgd:loss=ls:steps=20:step=1/10", "thesis, Eq. 4.1 to 4.3; alpha must be given: pgd-ls-20:alpha=0.2"),
    "cw-30": ("pgd:loss=margin:kappa=50:steps=30:step=1/10", "thesis, Tables 6.1 and 6.2; Madry et al., 2018, CIFAR-10"),
    "cw-40": ("pgd:loss=margin:kappa=0:steps=40:step=1/30", "Madry et al., 2018, MNIST"),
    "cw+-40": ("pgd:loss=margin:kappa=50:steps=40:step=1/30", "Madry et al., 2018, MNIST"),
    "pgd-l2-10": ("pgd:norm=l2:steps=10", "Madry et al., 2018, section 5: L2; steps of 2.5 eps / steps"),
    "pgd-l2-20": ("pgd:norm=l2:steps=20", "the same, 20 steps"),
    "pgd-l2-40": ("pgd:norm=l2:steps=40", "the same, 40 steps"),
    "pgd-l2-100": ("pgd:norm=l2:steps=100", "the same, 100 steps"),
    "apgd-ce": ("apgd", "Croce and Hein, 2020"),
    "apgd-dlr": ("apgd:loss=dlr", "Croce and Hein, 2020"),
    "apgd-t": ("apgd:loss=dlr:targets=9", "Croce and Hein, 2020: the nine likeliest wrong classes"),
    "fab-t": ("fab:targets=9", "Croce and Hein, 2020, arXiv 1907.02044"),
    "square": ("square", "Andriushchenko et al., 2020: no gradients"),
    "autoattack": ("autoattack", "Croce and Hein, 2020: APGD-CE, APGD-T, FAB-T, Square"),
    "autoattack-plus": ("autoattack:version=plus", "the same with restarts and the untargeted forms"),
    "autoattack-rand": ("autoattack:version=rand", "the same for randomised models"),
}
ALIASES = {"aa": "autoattack", "aa-plus": "autoattack-plus", "aa-rand": "autoattack-rand"}


# ---- values of the grammar


def number(text: str) -> float:
    """0.1 or 1/10, finite and at least 0."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("give a number of at least 0, such as 0.1 or 1/10")
    return value


def share_of_eps(text: str) -> float:
    if text.endswith("/255"):
        raise ValueError("it is in units of eps, not in 1/255: give 1/4 for a quarter of eps")
    return number(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("give a whole number")
    return int(text)


def positive(text: str) -> int:
    if count(text) < 1:
        raise ValueError("give at least 1")
    return int(text)


def choice(*choices: str) -> Callable[[str], str]:
    """In capitals or not, but where choices differ by that alone."""

    def read(text: str) -> str:
        found = [text] if text in choices else [each for each in choices if each.lower() == text.lower()]
        if len(found) != 1:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return found[0]

    return read


def loss_name(text: str) -> str:
    return choice(*losses.names())(text)


def _read(key: str, read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{key}={text}: {error}") from error


def _setting(default, read: Callable[[str], object]) -> Any:
    return field(default=default, metadata={"read": read})


# ---- the families


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """One attack with all its settings: `parse` makes them, and `attack(model, x, y, eps, generator)` is one run of it.

    Settings are read as in the grammar, so that norm="L2" is "l2".

    Args:
        name: what it is called in reports; its random numbers depend on it. Default: its spec.
        norm: "linf" or "l2".
        eps: radius for images in [0, 1]; None is the evaluation's for this norm.
        restarts: how often an evaluation runs it on what is not broken yet.
    """

    family: ClassVar[str]

    name: str = ""
    norm: Norm = _setting("linf", lambda text: choice(*NORMS)(as_norm(text)))
    eps: float | None = _setting(None, number)
    restarts: int = _setting(1, positive)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if "read" in f.metadata and value is not f.default:
                object.__setattr__(self, f.name, _read(f.name, f.metadata["read"], str(value)))
        if not self.name:
            object.__setattr__(self, "name", self.spec)
        if self.restarts > 1 and not self.random:
            raise ValueError("restarts would repeat one run: nothing in it is random")
        if self.eps is not None and self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps={self.eps:g} is in the units of images in [0, 1]: write eps={self.eps:g}/255")

    def runs(self, classes: int) -> int:
        """How many runs it is made of, for a model of so many classes."""
        return self.restarts

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what a run consists of: AutoAttack's attacks. Others are one part without a name."""
        return ("",)

    @property
    def random(self) -> bool:
        """Whether restarts differ."""
        return True

    @property
    def follows_gradients(self) -> bool:
        """Whether it differentiates the model."""
        return True

    @property
    def least_classes(self) -> int:
        """How many classes a model must have for it."""
        return 2

    def radius(self, eps: float, eps_l2: float) -> float:
        """Its own eps, else the one of its norm."""
        return self.eps if self.eps is not None else eps_l2 if self.norm == "l2" else eps

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        eps: float,
        generator: torch.Generator,
        *,
        run: int = 0,
        only: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """Adversarial images of one run: the last of its `stages`."""
        *_, x_adv = self.stages(model, x, y, eps, generator, run=run, only=only, **how)
        return x_adv

    def stages(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        eps: float,
        generator: torch.Generator,
        *,
        run: int = 0,
        only: Tensor | None = None,
        **how: Any,
    ) -> Iterator[Tensor]:
        """Adversarial images of one run, after each of its parts.

        Args:
            model: images [B, C, H, W] in [0, 1] -> logits [B, K].
            x: images [B, C, H, W] in [0, 1]. y: int64 [B], the true labels.
            eps: the radius.
            generator: of everything random. What PGD draws for an image does not depend on `only`; APGD, Square and AutoAttack
                draw for the images that they attack.
            run: which of `runs` it is: targets go by it.
            only: bool [B], which images to attack; None is all.
            how: `precision`, `input_gradient`, `graph` as in `spat_kernels.PGD`.

        Yields:
            Tensor: like x; images that are not attacked are as they were.
        """
        draws = self._draw(x, y, eps, generator)
        if only is None or bool(only.all()):
            yield from self._stages(model, x, y, eps, draws, run, how)
        elif bool(only.any()):
            chosen = [t[only] if isinstance(t, Tensor) else t for t in draws]
            for found in self._stages(model, x[only], y[only], eps, chosen, run, how):
                x_adv = x.clone()
                x_adv[only] = found
                yield x_adv
        else:
            yield x.clone()

    def _draw(self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> list:
        """What is random about a run on a whole batch: tensors with one entry per image, or others for all of them."""
        return []

    def _stages(self, model, x: Tensor, y: Tensor, eps: float, draws: list, run: int, how: dict) -> Iterator[Tensor]:
        yield self._attack(model, x, y, eps, draws, run, how)

    def _attack(self, model, x: Tensor, y: Tensor, eps: float, draws: list, run: int, how: dict) -> Tensor:
        """What attacks of one part define; others `_stages`."""
        raise NotImplementedError

    @property
    def spec(self) -> str:
        """All its settings in the grammar, but for those that are at their defaults."""
        parts: list[tuple[str, object]] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "name" and value != f.default:
                parts += value if f.name == "settings" else [(f.name, value)]
        return ":".join([self.family, *(f"{key}={value}" for key, value in parts)])

    @classmethod
    def readers(cls) -> dict[str, Callable[[str], Any]]:
        """How to read each of its settings."""
        return {f.name: f.metadata["read"] for f in fields(cls) if "read" in f.metadata}

    def describe(self) -> str:
        """Its settings in one line."""
        what = ", ".join(self._describe())
        repeated = f", {self.restarts} restarts" if self.restarts > 1 else ""
        radius = "" if self.eps is None else f", eps {self.eps:.4g}"
        return f"{what}{repeated}{radius}, {'L2' if self.norm == 'l2' else 'L-infinity'}"

    @abstractmethod
    def _describe(self) -> list[str]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Clean(Attack):
    family, random, follows_gradients = "clean", False, False

    def _attack(self, model, x, y, eps, draws, run, how):
        return x.clone()

    @classmethod
    def readers(cls):
        return {}

    def describe(self):
        return "no attack"

    def _describe(self):
        return []


@dataclass(frozen=True, kw_only=True)
class _Ascent(Attack):
    """An attack on a loss of `spat_kernels.losses`, by its name there, with the `settings` of it that are given."""

    loss: str = _setting("ce", loss_name)
    settings: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        self.maximised.check_targeted(self.targeted)

    @property
    def maximised(self) -> losses.Loss:
        return losses.lookup(self.loss, **dict(self.settings))

    @property
    @abstractmethod
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
    """Projected gradient ascent, and with one step FGSM, with none noise.

    Args:
        loss: what is maximised; ls is ce with an `alpha` (PGD-LS).
        steps: 0 is a random point of the ball.
        step: length of a step in units of eps; None is 1/4, for L2 2.5 / steps.
        start: uniform in the ball, or clean.
        target: none, or towards the least likely class of the clean image, a random wrong one, or all wrong ones in turn.
        right_at: the iterates at which a prediction must be right, the last or every one. At every one, the first wrong one is
            what comes out.
    """

    family = "pgd"

    steps: int = _setting(10, count)
    step: float | None = _setting(None, share_of_eps)
    start: str = _setting("uniform", choice("uniform", "clean"))
    target: str = _setting("none", choice("none", *TARGETS))
    right_at: str = _setting("last", choice("last", "every"))

    def __post_init__(self):
        super().__post_init__()
        if self.steps == 0 and (self.start == "clean" or self.target != "none" or self.right_at == "every"):
            raise ValueError("of no steps there is noise alone: leave out start, target and right_at, or steps=0")
        if self.maximised.needs_random_start and self.start == "clean":
            raise ValueError(f"the gradient of {self.loss} is 0 at a clean start: leave out start")

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
        start = x
        if self.start == "uniform":  # of no steps: nothing is asked of the model
            start = pgd(lambda x: x, x, y, eps, steps=0, norm=self.norm, generator=generator)
        which = None
        if self.target == "random":
            which = torch.rand(len(x), generator=generator, device=generator.device).to(x.device)
        return [start, which]

    def _attack(self, model, x, y, eps, draws, run, how):
        start, which = draws
        if self.steps == 0:
            return start.clone()
        labels = self._targets(model, x, y, which, run) if self.targeted else y
        how = {"loss": self.maximised, "norm": self.norm, "targeted": self.targeted} | how
        if self.right_at == "last":
            step_size = None if self.step is None else self.step * eps
            where = {"random_start": False} if self.start == "clean" else {"start": start}
            return pgd(model, x, labels, eps, steps=self.steps, step_size=step_size, **where, **how)
        point = found = start
        right = torch.ones_like(y, dtype=torch.bool)
        for _ in range(self.steps):
            point = pgd(model, x, labels, eps, steps=1, step_size=self.length * eps, start=point, **how)
            found = torch.where(right.view(-1, *[1] * (x.ndim - 1)), point, found)
            right = right & (predictions(model_logits(model, point)) == y)
        return found

    @property
    def length(self) -> float:
        """Length of a step in units of eps."""
        return self.step if self.step is not None else 1 / 4 if self.norm == "linf" else 2.5 / self.steps

    def _targets(self, model, x: Tensor, y: Tensor, which: Tensor, run: int) -> Tensor:
        """int64 [B], of the wrong classes: the least likely for the clean images, by `which` in [0, 1), or one for each `run`."""
        wrong, possible = other_classes(model_logits(model, x), y)
        count = possible.sum(1).clamp_min(1)  # these come first
        place = (which * count).long() if self.target == "random" else count - 1 if self.target == "least-likely" else run % count
        return wrong.gather(1, place[:, None])[:, 0]

    def _describe(self):
        if self.steps == 0:
            return ["uniform noise"]
        where = {"uniform": "a uniform random start", "clean": "the image"}[self.start]
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''} of {_length(self.length)} from {where}"
        target = {"all": "towards all wrong classes in turn", "none": None}.get(self.target, f"towards the {self.target} class")
        if self.target == "random":
            target = "towards a random wrong class"
        every = ["right only if right at every iterate"] if self.right_at == "every" else []
        return [f"PGD on {self.maximised.describe()}", steps, *([target] if target else []), *every]


class _Engine(Attack):
    """An attack of `spat_kernels` with bookkeeping of its own."""

    def _draw(self, x, y, eps, generator):
        return [int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))]


@dataclass(frozen=True, kw_only=True)
class APGD(_Ascent, _Engine):
    """AutoAttack's PGD, which chooses its steps itself; with `targets` n, towards the n likeliest wrong classes in turn."""

    family = "apgd"

    steps: int = _setting(100, positive)
    targets: int | None = _setting(None, positive)

    @property
    def targeted(self) -> bool:
        return self.targets is not None

    @property
    def least_classes(self) -> int:
        return max(super().least_classes, (self.targets or 0) + 1)

    def _attack(self, model, x, y, eps, draws, run, how):
        attack = spat_kernels.APGD(
            eps, loss=self.maximised, steps=self.steps, norm=self.norm, targets=self.targets, generator=_generator(draws), **how
        )
        return attack(model, x, y)

    def _describe(self):
        return [f"APGD on {self.maximised.describe()}", f"{self.steps} steps", *_towards(self.targets)]


@dataclass(frozen=True, kw_only=True)
class FAB(_Engine):
    """The fast adaptive boundary attack; with `targets` n, FAB-T towards the n likeliest wrong classes in turn."""

    family, random = "fab", False  # it begins at the image

    steps: int = _setting(100, positive)
    targets: int | None = _setting(None, positive)

    @property
    def least_classes(self) -> int:
        return (self.targets or 1) + 1

    def _attack(self, model, x, y, eps, draws, run, how):
        attack = spat_kernels.FAB(
            eps, norm=self.norm, steps=self.steps, targets=self.targets, generator=_generator(draws), **_ungraphed(how)
        )
        return attack(model, x, y)

    def _describe(self):
        return ["FAB", f"{self.steps} steps", *_towards(self.targets)]


@dataclass(frozen=True, kw_only=True)
class Square(_Engine):
    """Random search by squares, without gradients."""

    family, follows_gradients = "square", False

    queries: int = _setting(5000, positive)

    def _attack(self, model, x, y, eps, draws, run, how):
        attack = spat_kernels.Square(eps, norm=self.norm, queries=self.queries, generator=_generator(draws), **_ungraphed(how))
        return attack(model, x, y)

    def _describe(self):
        return ["Square Attack", f"{self.queries} queries"]


@dataclass(frozen=True, kw_only=True)
class AutoAttack(_Engine):
    """The ensemble: `steps` of APGD and FAB, `queries` of Square."""

    family = "autoattack"

    version: Version = _setting("standard", choice(*VERSIONS))
    steps: int = _setting(100, positive)
    queries: int = _setting(5000, positive)

    @property
    def least_classes(self) -> int:
        return max(map(fewest_classes, VERSIONS[self.version]))

    @property
    def parts(self) -> tuple[str, ...]:
        return VERSIONS[self.version]

    def _stages(self, model, x, y, eps, draws, run, how):
        attack = spat_kernels.AutoAttack(
            eps, norm=self.norm, version=self.version, steps=self.steps, queries=self.queries, seed=draws[0], **how
        )
        stages = attack.stages(model, x, y)

        def following() -> Tensor:
            with tf32_switches("fp32", x.device.type):  # it asks what is misclassified as `evaluate` does, not by the user's TF32
                return next(stages).x_adv

        following()  # without an attack
        for _ in self.parts:
            yield following()

    def _describe(self):
        queries = [] if self.version == "rand" else [f"{self.queries} queries"]
        return [f"AutoAttack, version {self.version}", f"{self.steps} steps", *queries]


def _length(step: float) -> str:
    """In units of eps."""
    parts = 1 / step if step else 0
    return (
        "eps" if step == 1 else f"eps / {round(parts)}" if parts > 1 and abs(parts - round(parts)) < 1e-6 else f"{step:.4g} eps"
    )


def _generator(draws: list) -> torch.Generator:
    return torch.Generator().manual_seed(draws[0])


def _ungraphed(how: dict) -> dict:
    """Without what is CUDA graphs', for attacks that know none."""
    return {name: value for name, value in how.items() if name != "graph"}


def _towards(targets: int | None) -> list[str]:
    return [] if targets is None else [f"towards the {targets} likeliest wrong classes in turn"]


FAMILIES = {kind.family: kind for kind in (Clean, PGD, APGD, FAB, Square, AutoAttack)}


# ---- the grammar


def parse(spec: "str | Attack") -> Attack:
    """The attack that `spec` names, as the top of this module describes.

    Raises:
        InputError: there is no such attack, setting or value; the message tells the nearest.
    """
    if isinstance(spec, Attack):
        return spec
    name, *settings = spec.strip().split(":")
    name = re.sub(r"^.+?(?=(x[1-9]\d*)?$)", lambda base: ALIASES.get(base[0], base[0]), name.lower())
    kind, values = _named(name)
    given = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"attack {spec}: {setting!r} is no setting: write key=value, such as steps=50")
        if key in given:
            raise InputError(f"attack {spec}: {key} is given twice")
        given[key] = value
    values |= given
    known = kind.readers()
    if unknown := next((key for key in values if key not in known), None):
        raise InputError(
            f"attack {spec}: {kind.family} has no setting {unknown}{_near(unknown, known)}: it has {', '.join(known) or 'none'}"
        )
    own: dict[str, Any] = {key: value for key, value in values.items() if key in kind.__dataclass_fields__}
    try:
        of_loss = tuple((key, _read(key, known[key], values[key])) for key in known if key in values and key not in own)
        own |= {"settings": of_loss} if of_loss else {}
        return kind(name=":".join([name, *settings]), **own)
    except ValueError as error:
        raise InputError(f"attack {spec}: {error}") from error


def published(name: str) -> tuple[str, dict[str, str]]:
    """The name in `NAMED` (or a family's) that NAME[-TARGET][xN] begins with, and the settings that the rest stands for."""
    base, values = name, {}
    if base not in NAMED and (repeated := re.fullmatch(r"(.+?)x([1-9]\d*)", base)):
        base, values["restarts"] = repeated.groups()
    if base not in NAMED:
        for target in TARGETS:
            bare = base.removesuffix(f"-{target}")
            if bare != base and NAMED.get(bare, ("",))[0].startswith("pgd:"):
                base, values["target"] = bare, target
    return base, values


def _named(name: str) -> tuple[type[Attack], dict[str, str]]:
    """The family and the settings behind a name."""
    base, values = published(name)
    family, *settings = NAMED[base][0].split(":") if base in NAMED else [base]
    if family not in FAMILIES:
        raise InputError(
            f"attack {name}: there is none{_near(name, {*NAMED, *ALIASES, *FAMILIES})}: see spat-train attacks, or write "
            "pgd:steps=50:step=1/20 and the like"
        )
    return FAMILIES[family], dict(setting.split("=") for setting in settings) | values


def _near(name: str, names) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def parse_all(specs: "Sequence[str | Attack] | str") -> dict[str, Attack]:
    """By name: "clean" first, then `specs` in their order.

    Raises:
        InputError: as `parse`, or two have the same name or are the same.
    """
    attacks, written = {"clean": parse("clean")}, dict[str, str]()
    for spec in specs.split(",") if isinstance(specs, str) else specs:
        attack = parse(spec)
        twin = written.get(attack.spec) if isinstance(spec, str) else None
        if attack.name in attacks and attack.name != "clean":
            raise InputError(f"attack {attack.name}: it is named twice: leave one out")
        if twin:
            raise InputError(f"attack {attack.name}: it is the same as {twin}: leave one out")
        attacks[attack.name] = attack
        if isinstance(spec, str) and attack.name != "clean":
            written[attack.spec] = attack.name
    return attacks
