"""Finished runs: which of them a table or a figure asks for, where they differ from the source's, and training what is missing.

A run is what its config.json says, whatever its folder is called.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from ..config import Config, check_device
from ..errors import InputError
from ..models.checkpoints import chosen_name, run_config
from ..runtime import logs
from ..training.trainer import train

T = TypeVar("T")
CHECKPOINTS = ("best.pt", "last.pt")
SAME = 0.02  # eps 0.031 is 8/255 to them
METHODS = {"standard": "standard", "madry": "Madry", "trades": "TRADES", "mart": "MART", "rst": "RST", "fgsm": "FGSM"}


# ---- what is asked for


@dataclass(frozen=True)
class Scale:
    """How what is missing gets trained; what is not given is as in the source."""

    limit: int | None = None
    """--train: at most so many training images, drawn at random."""
    epochs: int | None = None
    """--train: epochs; piecewise schedules shrink with them."""
    model: str | None = None
    """--train: the network. Also asks for runs of this one."""
    batch_size: int | None = None
    """--train: images in an update."""
    optimizer: Literal["sgd", "adam"] | None = None
    """--train: sgd or adam."""
    lr: float | None = None
    """--train: its learning rate."""
    schedule: Literal["constant", "piecewise", "cosine", "one-cycle"] | None = None
    """--train: of the learning rate."""
    steps: int | None = None
    """--train: gradient steps of the attack in training."""
    extra: Path | None = None
    """--train: pseudo-labelled images, for Table 6.3."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """--train: of the updates and attacks."""


@dataclass(frozen=True)
class Options:
    """Which runs, which images, and what becomes of what is missing. Radii are in 1/255."""

    runs: Path | None = None
    """Folder of finished runs, each with its config.json; of several that fit, the closest to the source is taken."""
    data: str | None = None
    """Data set, as in `spat-train train`. Default: the source's, in tables; what the runs were trained on, in figures."""
    root: Path | None = None
    """Where torchvision's data sets are. Default: where the runs had them."""
    download: bool = False
    """Fetch torchvision's data sets."""
    test_images: int | None = None
    """Use at most so many test images, drawn at random by --seed. Default: all."""
    eps: float | None = None
    """Radius of the attacks, in 1/255. Default: the source's, or on other data that of the runs."""
    seed: int = 0
    """Of the images drawn, of the attacks, and of what is trained."""
    eval_batch_size: int = 256
    """Images that are attacked at once."""
    device: str | None = None
    """Default: cuda where there is one, else cpu."""
    train: bool = False
    """Train what is missing, into --runs, where it goes on after any interruption."""
    scale: Scale = field(default_factory=Scale)

    @property
    def home(self) -> Path:
        """Where runs are trained."""
        if self.runs is None:
            raise InputError("--train: give the folder that what is missing gets trained into, by --runs")
        return self.runs

    @property
    def data_name(self) -> str:
        """ "" without --data."""
        return data_name(self.data) if self.data else ""


def named(kind: str, name: str, known: dict[str, T]) -> T:
    """`known[name]`, a table or a figure.

    Raises:
        InputError: there is none; the message has the nearest and all of them.
    """
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"{kind} {name}: there is none: {hint}there are {', '.join(known)}")
    return known[name]


def check(options: Options, out: Path) -> None:
    """Raise InputError for an option that does not fit, or where the folder `out` is not and cannot be made."""
    check_device(options.device)
    for option, value in (("runs", options.runs), ("root", options.root)):
        if value is not None and not value.is_dir() and not (option == "runs" and options.train):
            raise InputError(f"--{option} {value}: there is no such folder")
    if options.train:
        _ = options.home
    for option in ("test_images", "eval_batch_size"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: give at least 1")
    if options.eps is not None and not 0.5 <= options.eps <= 255:
        raise InputError(f"--eps {options.eps:g}: it is in 1/255, from 0.5 to 255 (8 means 8/255, and 76.5 is 0.3)")
    if not 0 <= options.seed < 2**31:
        raise InputError(f"--seed {options.seed}: give an integer from 0 to 2**31 - 1")
    given = [f.name for f in dataclasses.fields(Scale) if f.name != "model" and getattr(options.scale, f.name) is not None]
    if given and not options.train:
        raise InputError(
            f"--{given[0].replace('_', '-')}: it says how to train what is missing: add --train, or leave it out "
            "(--test-images says how many are tested)"
        )
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    reason = "it is not writable" if there.is_dir() else "it is no folder"
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"--out {out}: cannot be written to ({there}: {reason}): give another folder")


# ---- runs


@dataclass(frozen=True)
class Run:
    folder: Path
    config: Config

    @property
    def standard(self) -> bool:
        return self.config.method == "standard"

    @cached_property
    def epochs(self) -> float:
        """Trained so far, by the log; without one it counts as finished."""
        if not (self.folder / "log.jsonl").is_file():
            return float(self.config.epochs)
        starts, events = logs.read(self.folder, "start"), logs.read(self.folder, "train")
        return events[-1]["step"] / starts[-1]["steps_per_epoch"] if starts and events else 0.0


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        InputError: there is none, or it has no checkpoint yet.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json there: give the folder of a run")
    if not _has_checkpoint(folder):
        raise InputError(f"{folder}: neither {' nor '.join(CHECKPOINTS)} there: give the folder of a run that has trained")
    if (config := run_config(folder)) is None:
        raise InputError(f"{folder / 'config.json'}: it is no run's: give the folder of a run")
    return Run(folder, config)


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CHECKPOINTS)


def find_runs(folder: Path | None) -> list[Run]:
    """All runs in `folder` that have a checkpoint, by name. One that cannot be read is left out, and said on stderr."""
    if folder is None or not folder.is_dir():
        return []
    runs = []
    for path in sorted(folder.glob("*/config.json")):
        if _has_checkpoint(path.parent):
            try:
                runs.append(read_run(path.parent))
            except InputError as error:
                print(f"spat-train: left out {path.parent}: {error}", file=sys.stderr)
    return runs


def data_name(data: str) -> str:
    """cifar10 of cifar10 and of /somewhere/cifar10.npz."""
    return Path(data).stem


def family(model: str) -> str:
    """wrn of wrn-34-10, mnist-cnn of mnist-cnn/8."""
    return model if ":" in model else re.sub(r"(-\d+)*(/\w+)?$", "", model)


def width(model: str) -> int | None:
    """W of wrn-D-W and of mnist-cnn/W, whose default is 16."""
    found = re.fullmatch(r"wrn-\d+-(\d+)|mnist-cnn/(\d+)", model if model != "mnist-cnn" else "mnist-cnn/16")
    return int(found[1] or found[2]) if found else None


def told(eps: float) -> str:
    """A radius, given in 1/255: 8/255, or 0.3."""
    return f"{eps:g}/255" if eps == round(eps, 1) and eps < 64 else f"{eps / 255:.3g}"


def title(config: Config) -> str:
    """As the thesis writes it: MART+SPAT(.3)."""
    return METHODS[config.method] + (f"+SPAT({config.alpha:g})".replace("(0.", "(.") if config.alpha else "")


# ---- where a run differs from what the source trained


def _attack(tell):
    return lambda c: "none" if c.method == "standard" else tell(c)


def _option(name):
    """A number or a switch; "default" where it follows from the data."""
    words = {None: "default", True: "on", False: "off"}
    return lambda c: words[value] if (value := getattr(c, name)) is None or isinstance(value, bool) else f"{value:g}"


def _drops(c: Config) -> str:
    """In percent of the epochs."""
    return ", ".join(f"{100 * epoch / c.epochs:.0f} %" for epoch in c.lr_drops) if c.schedule == "piecewise" else "none"


READINGS = {  # how the settings that change the weights are told
    "method": lambda c: METHODS[c.method],
    "data": lambda c: data_name(c.data),
    "model": lambda c: "mnist-cnn" if c.model == "mnist-cnn/16" else c.model,
    "training images": lambda c: "all" if c.limit is None else f"{c.limit:,}",
    "held-out images": _option("holdout"),
    "padding before crops": _option("pad"),
    "flips": _option("flip"),
    "pseudo-labelled images": lambda c: "none" if c.extra is None else "some",
    "epochs": lambda c: f"{c.epochs}",
    "alpha": lambda c: f"{c.alpha:g}",
    "eps": _attack(lambda c: told(c.eps)),
    "attack steps": _attack(lambda c: f"{c.attack_settings[2]}"),
    "step size": _attack(lambda c: told(255 * c.attack_settings[1])),
    "start": _attack(lambda c: c.attack_settings[3]),
    "inner loss": _attack(lambda c: c.inner_loss),
    "mode in attacks": _attack(lambda c: c.bn_mode),
    "forwards": lambda c: c.forwards,
    "beta": lambda c: f"{c.kl_weight:g}" if c.method in ("trades", "rst", "mart") else "none",
    "optimiser": lambda c: c.optimizer,
    "lr": lambda c: f"{c.peak_lr:g}",
    "schedule": lambda c: c.schedule,
    "lr drops": _drops,
    "momentum": _option("momentum"),
    "Nesterov": _option("nesterov"),
    "batch size": lambda c: f"{c.batch_size}",
    "weight decay": _option("weight_decay"),
    "decay of biases and norms": _option("decay_norm"),
    "weight averaging": _option("ema"),
    "AWP": _option("awp"),
    "label smoothing": _option("label_smoothing"),
    "activation": lambda c: c.activation,
    "normalisation": lambda c: "none" if c.mean is None else f"{c.mean}, {c.std}",
    "first weights": lambda c: "random" if c.init is None else f"{c.init}",
    "precision": lambda c: c.precision,
}


def differences(run: Run, source: Config) -> list[str]:
    """What was trained otherwise than by `source`, the source's setting in brackets; and how far, where it is not finished."""
    told = [(name, tell(run.config), tell(source)) for name, tell in READINGS.items()]
    found = [f"{name} {ours} ({theirs})" for name, ours, theirs in told if ours != theirs]
    if run.epochs < run.config.epochs:
        found.append(f"stopped after {run.epochs:.3g} of its {run.config.epochs} epochs")
    return found


# ---- matching


@dataclass(frozen=True)
class Wanted:
    """A run that a table or a figure needs.

    Args:
        config: what the source trained.
        copy_of: the key of the run that this must be a copy of, from another seed: what Madry et al. call A'.
        fixed: whether the model is the point, so that neither --model nor other data change it.
        any_method: whether a run that was trained by another method does too.
    """

    config: Config
    copy_of: str = ""
    fixed: bool = False
    any_method: bool = False

    def data(self, options: Options) -> str:
        return data_name(options.data or self.config.data)

    def own(self, options: Options) -> bool:
        """Whether the data are the source's."""
        return self.data(options) == data_name(self.config.data)

    def model(self, options: Options) -> str | None:
        """The one asked for; None is any."""
        if self.fixed:
            return self.config.model
        return options.scale.model or (self.config.model if self.own(options) else None)

    def eps(self, options: Options) -> float | None:
        """In 1/255; None is any."""
        return None if self.config.method == "standard" else options.eps or (self.config.eps if self.own(options) else None)

    def words(self, options: Options) -> str:
        """What is looked for."""
        if self.copy_of:
            return f"a copy of {self.copy_of} from another seed"
        model, eps = self.model(options), self.eps(options)
        words = ["any run" if self.any_method else title(self.config), "on", self.data(options)]
        words += [family(model)] if model else []
        words += [f"at eps {told(eps)}"] if eps else []
        return " ".join(words + ["with pseudo-labels"] * (self.config.extra is not None))


def fits(run: Run, wanted: Wanted, options: Options) -> bool:
    """Whether `run` is what is wanted but for its scale: method, alpha, data, pseudo-labels, family of the model, eps (2 %)."""
    c, w, model, eps = run.config, wanted.config, wanted.model(options), wanted.eps(options)
    return (
        (data_name(c.data), c.extra is None) == (wanted.data(options), w.extra is None)
        and (wanted.any_method or c.method == w.method)
        and (run.standard or math.isclose(c.alpha, w.alpha, abs_tol=1e-9))
        and (model is None or family(c.model) == family(model))
        and (eps is None or math.isclose(c.eps, eps, rel_tol=SAME))
    )


def distance(run: Run, source: Config, model: str) -> tuple:
    """For sorting: the model, whether its training is finished, images, epochs, the rest."""
    c = run.config
    rest = len(differences(run, source)), c.seed != source.seed, c.seed, run.folder.name
    return _apart(c.model, model), -run.epochs / c.epochs, -(c.limit or math.inf), _ratio(c.epochs, source.epochs), *rest


def closest(runs: Iterable[Run], wanted: Wanted, options: Options) -> Run | None:
    model = wanted.model(options) or wanted.config.model
    fitting = (run for run in runs if fits(run, wanted, options))
    return min(fitting, key=lambda run: distance(run, wanted.config, model), default=None)


def copy_of(original: Run, runs: Iterable[Run]) -> Run | None:
    """The same network, trained the same way from another seed."""
    c = original.config

    def alike(other: Run) -> bool:
        return other.config.seed != c.seed and all(tell(c) == tell(other.config) for tell in READINGS.values())

    return min((run for run in runs if alike(run)), key=lambda run: (-run.epochs, run.config.seed), default=None)


def _ratio(a: float, b: float) -> float:
    return abs(math.log(a / b))


def _apart(a: str, b: str) -> float:
    """How much models of one family differ, by the numbers in their names; infinite for others."""
    if family(a) != family(b):
        return math.inf
    sizes = [[int(n) for n in re.findall(r"\d+", name.removeprefix(family(name)))] or [16] for name in (a, b)]
    return sum(map(_ratio, *sizes)) if len(sizes[0]) == len(sizes[1]) else math.inf


def choose(wanted: dict[str, Wanted], options: Options, given: dict[str, Path], runs: list[Run]) -> dict[str, Run | None]:
    """For each key the run in `given`, else the closest of `runs`, else (with --train) one that is trained now, else None."""
    chosen: dict[str, Run | None] = {}
    for key, want in wanted.items():
        if key in given:
            chosen[key] = read_run(given[key])
            continue
        original = chosen[want.copy_of] if want.copy_of else None
        run = closest(runs, want, options) if not want.copy_of else original and copy_of(original, runs)
        if options.train and (original or not want.copy_of):
            run = completed(run, want, original, options)
        chosen[key] = run
    return chosen


# ---- training what is missing


def completed(run: Run | None, wanted: Wanted, original: Run | None, options: Options) -> Run:
    """`run`, or where it is missing, or is this training and was interrupted: trained now."""
    if original:
        c = original.config
        chosen_name(original.folder, c, options.scale.model if options.scale.model == c.model else None, "--model")
        out = options.home / f"{original.folder.name}-seed{c.seed + 1}"
        config = replace(c, seed=c.seed + 1, device=options.device, test=False, resume=True, out=out)
    else:
        config = scaled(wanted, options)
    if run and (run.epochs >= run.config.epochs or run.folder != config.folder):
        return run
    print(f"training {wanted.words(options)} into {config.folder}")
    train(config)
    return read_run(config.folder)


def scaled(wanted: Wanted, options: Options) -> Config:
    """What trains `wanted` at the scale of the options, into their folder of runs."""
    source = wanted.config
    scale = {name: value for name, value in dataclasses.asdict(options.scale).items() if value is not None}
    if wanted.fixed:
        scale.pop("model", None)
    c = replace(source, test=False, resume=True, seed=options.seed, download=options.download, device=options.device, **scale)
    c = replace(c, data=options.data or c.data, root=options.root or c.root)
    if c.holdout and (c.limit or not wanted.own(options)):  # the source's number is for all of its images
        c = replace(c, holdout=None)
    if not wanted.own(options):
        c = replace(c, pad=None)
    if options.eps:
        c = replace(c, eps=options.eps, eval_eps=None, step_size=c.step_size and c.step_size * options.eps / source.eps)
    if c.epochs != source.epochs:
        shrunk = {max(2, round(epoch * c.epochs / source.epochs)) for epoch in source.lr_drops}
        c = replace(c, milestones=tuple(sorted(epoch for epoch in shrunk if epoch <= c.epochs)))
    parts = [source.preset or title(source)]
    parts += [data_name(c.data)] * (not wanted.own(options)) + [c.model] * (c.model != source.model or wanted.fixed)
    name = "-".join([*parts, f"seed{c.seed}"])
    return replace(c, out=options.home / "".join(s if s.isalnum() or s in "-+._" else "-" for s in name))
