"""Every option of a training run, in one place: the command line, its help texts and the saved config are this dataclass."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from spat_kernels import losses

from .errors import InputError
from .models.registry import import_own

Method = Literal["standard", "madry", "trades", "mart", "rst", "fgsm"]
# What may differ when a run goes on: where things are (the images themselves are compared) and how they are shown, but nothing
# that changes the weights.
# (At most by rounding, where a batch is read or a graph replayed; and by validation's random starts, which --eval-batch-size
# deals out: an out-of-memory error asks for a smaller one.)
FREE_ON_RESUME = (
    "out", "resume", "data", "extra", "root", "download", "workers", "stream", "graph", "device", "eval_batch_size",
    "checkpoint_minutes", "log_every", "tensorboard", "test",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One training run. Lengths in the image (eps, step size) are in 1/255 of the pixel range: 8 means 8/255."""

    preset: str = ""
    """Start from these settings, such as table6.1/mart+spat; other options override them. `spat-train presets` lists all."""

    # ---- objective
    method: Method = "madry"
    """standard: clean images. madry: CE(x'). trades: CE(x) + beta KL(p(x) || p(x')). mart: BCE(x') + beta KL (1 - p_y(x)).
    rst: TRADES on labelled and pseudo-labelled images (--extra). fgsm: the mean of CE(x) and CE(x'), x' by one step of eps."""
    alpha: float = 0.0
    """Label smoothing of the training examples, in [0, 1]: above 0 they come from PGD-LS (SPAT)."""
    beta: float | None = None
    """Weight of the KL term. Default: 6 for trades and rst, 5 for mart."""
    label_smoothing: float = 0.0
    """Of the outer cross-entropy, spread over all classes as in PyTorch. Not the alpha of SPAT."""
    forwards: Literal["clean-adv", "adv-clean", "clean-adv-clean"] = "clean-adv"
    """Order of an update's forwards, by which the statistics of batch norm differ. MART's code: clean-adv; RST's: adv-clean;
    TRADES's: clean-adv-clean, whose third changes these statistics alone."""
    awp: float = 0.0
    """Adversarial weight perturbation (Wu et al., 2020): its relative size, such as 0.005; 0 is off."""
    awp_warmup: int = 0
    """Epochs before --awp begins."""

    # ---- training attack
    inner: str | None = None
    """What the attack maximises, a loss by name (spat-train attacks lists them). Default: lsce (ce with --alpha) where
    alpha > 0, else kl for trades and rst, ce for the others."""
    eps: float = 8.0
    """Radius of the L-infinity ball, in 1/255."""
    step_size: float | None = None
    """Length of a step, in 1/255. Default: eps / 4; for fgsm eps."""
    steps: int | None = None
    """Gradient steps. Default: 10; for fgsm 1."""
    start: Literal["uniform", "normal", "clean"] | None = None
    """uniform in the ball; normal: x + 0.001 randn, as the code of TRADES and MART; clean: x. Default: uniform, fgsm: clean."""
    bn_mode: Literal["eval", "train"] = "eval"
    """Mode of the model during the attack."""

    # ---- model and data
    model: str = "wrn-34-10"
    """wrn-DEPTH-WIDTH, preactresnet-18 (or /raw), resnet-18, resnet-50, mnist-cnn, mnist-b, mnist-trades, small-cnn, timm:NAME,
    or package.module:factory."""
    activation: Literal["relu", "silu", "gelu", "softplus"] = "relu"
    """What replaces every ReLU of the model."""
    mean: tuple[float, ...] | None = None
    """For (x - mean) / std in the model: a number for each channel, for images in [0, 1]. Default: none, or timm's."""
    std: tuple[float, ...] | None = None
    """See --mean."""
    init: Path | None = None
    """Start from the weights of this run or checkpoint, for fine-tuning. Default: at random."""
    data: str = "cifar10"
    """cifar10, cifar100, stl10, mnist, digits, an .npz of x_train, y_train, x_test, y_test, or a folder with train/ and test/."""
    root: Path = Path("data")
    """Where torchvision's data sets are, or go."""
    download: bool = False
    """Fetch torchvision's data sets."""
    image_size: int | None = None
    """Side of the images of a folder: short side resized, centre cropped."""
    skip_broken: bool = False
    """Leave out pictures of a folder that cannot be decoded: every process decodes all of them once before the first step."""
    limit: int | None = None
    """Maximum number of training and test images, drawn at random."""
    holdout: int | None = None
    """Training images that are held out to validate on. Default: a tenth of them, at most 1000; 0: no validation."""
    pad: int | None = None
    """Random crops after padding by so many pixels. Default: an eighth of the side (4 for 32) for colour images, 0 for grey."""
    flip: bool | None = None
    """Random horizontal flips. Default: for colour images."""
    extra: Path | None = None
    """More images with (pseudo-)labels: RST's pickle, or an .npz of image and label; memory-mapped."""
    extra_fraction: float = 0.5
    """Share of the extra images in each batch. An epoch has as many batches as without them."""
    stream: bool = False
    """Read images through workers though they fit on the GPU."""
    workers: int = 2
    """Processes that read images which do not fit on the GPU, or decode a folder's."""

    # ---- optimiser
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images in an update, over all processes."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    scale_lr: bool = False
    """Multiply lr by batch_size / 128."""
    momentum: float = 0.9
    """Of SGD; beta1 of Adam."""
    nesterov: bool = False
    weight_decay: float = 5e-4
    """As an L2 term, in Adam too."""
    decay_norm: bool = True
    """Decay biases and batch norm too; --no-decay-norm: convolutions and linear weights alone."""
    schedule: Literal["constant", "piecewise", "cosine", "one-cycle"] = "piecewise"
    """cosine changes lr from epoch to epoch, as the code of RST; one-cycle from update to update."""
    milestones: tuple[int, ...] | None = None
    """Epochs, counted from 1, from which on piecewise multiplies lr by gamma. Default: at 75 % and 90 % of the epochs."""
    gamma: float = 0.1
    warmup: float = 0.0
    """Epochs of linear warm-up; one-cycle has its own."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9995, which is then what is validated; 0 is off."""

    # ---- arithmetic
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of the update, and of attacks unless --attack-precision differs. Losses are fp32 always."""
    attack_precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """Of all attacks, those of validation and test too, where predictions are fp32. Default: --precision."""
    input_gradient: Literal["auto", "plan", "autograd"] = "auto"
    """How the attack differentiates the model (`spat_kernels.explain`)."""
    graph: Literal["auto", "never"] = "auto"
    """Whether CUDA graphs replay the attack."""
    channels_last: bool = True
    """Images and weights in that format; a model that fails on it gets contiguous ones."""
    compile: bool = False
    """torch.compile for the update."""
    sync_bn: bool = False
    """Batch statistics over all GPUs."""
    device: str | None = None
    """Default: cuda where there is one, else cpu."""

    # ---- running
    seed: int = 0
    """Source of all randomness."""
    val_every: int = 1
    """Epochs between validations: clean and PGD accuracy on held-out training images."""
    val_steps: int = 10
    """Steps of that PGD, on cross-entropy with --eval-eps and steps of a quarter of it."""
    eval_eps: float | None = None
    """Radius in validation and test, in 1/255. Default: eps."""
    eval_batch_size: int | None = None
    """Images attacked at once in validation and test. Default: 4 batches, at most 256."""
    patience: int | None = None
    """Stop after this many validations without improvement in PGD accuracy."""
    test: bool = True
    """At the end, test the best checkpoint: clean, FGSM, PGD-20 and C&W-inf-30. Nothing is ever selected by it."""
    out: Path | None = None
    """Folder of the run: config.json, log.jsonl, last.pt (and previous.pt, the checkpoint before it, should last.pt be damaged),
    result.json and, with validation, best.pt. Default: in runs/."""
    resume: bool = False
    """Go on with the run in --out where there is one; the same command again. More --epochs extend a constant schedule, and
    a piecewise one whose --milestones so far stay."""
    checkpoint_minutes: float = 10.0
    """Save so often within an epoch too; every epoch is saved."""
    log_every: int = 50
    """Steps between lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard files too, where it is installed."""

    def __post_init__(self):
        for name in ("root", "extra", "out", "init"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))

    # ---- what None stands for

    @property
    def inner_loss(self) -> str:
        if self.inner:
            return self.inner
        return "lsce" if self.alpha > 0 else "kl" if self.method in ("trades", "rst") else "ce"

    @property
    def maximised(self) -> losses.Loss:
        """The loss of that name."""
        return losses.lookup(self.inner_loss, **({"alpha": self.alpha} if self.inner_loss in losses.ALIASES else {}))

    @property
    def attack_settings(self) -> tuple[float, float, int, str]:
        """eps and step size for images in [0, 1], steps, start."""
        single = self.method == "fgsm"
        step_size = self.step_size if self.step_size is not None else self.eps if single else self.eps / 4
        steps = self.steps if self.steps is not None else 1 if single else 10
        return self.eps / 255, step_size / 255, steps, self.start or ("clean" if single else "uniform")

    @property
    def evaluation_eps(self) -> float:
        return self.eps if self.eval_eps is None else self.eval_eps

    @property
    def evaluation_batch(self) -> int:
        return self.eval_batch_size or min(4 * self.batch_size, 256)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def kl_weight(self) -> float:
        return self.beta if self.beta is not None else 5.0 if self.method == "mart" else 6.0

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 128 if self.scale_lr else self.lr

    @property
    def lr_drops(self) -> tuple[int, ...]:
        """The epochs, counted from 1, from which on piecewise multiplies lr by gamma; never the first."""
        if self.milestones is not None:
            return self.milestones
        return tuple(sorted({-(-self.epochs * percent // 100) for percent in (75, 90)} - {1}))

    @property
    def label(self) -> str:
        """The method in a word: mart, mart+spat0.3."""
        return self.method + (f"+spat{self.alpha:g}" if self.alpha else "")

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        if self.preset:
            return Path("runs") / f"{self.preset.replace('/', '-')}-seed{self.seed}"
        name = f"{Path(self.data).stem}-{self.model}-{self.label}-seed{self.seed}"
        return Path("runs") / "".join(c if c.isalnum() or c in "-+._" else "-" for c in name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)

    def to_dict(self) -> dict:
        """As JSON has it: paths are strings, tuples lists."""
        return json.loads(self.to_json())

    def differences(self, saved: dict) -> list[str]:
        """How a saved config differs in what changes the weights: one "name: saved -> now" each.

        More epochs do not, where the learning rates of those that there were stay.
        """
        now = self.to_dict()
        names = [name for name in {**now, **saved} if name not in FREE_ON_RESUME and saved.get(name) != now.get(name)]
        why = {}
        before = saved.get("epochs", 0)
        if self.epochs > before:
            drops = saved.get("milestones")
            old = dataclasses.replace(self, epochs=before, milestones=None if drops is None else tuple(drops))
            kept = {"constant": True, "piecewise": old.lr_drops == tuple(e for e in self.lr_drops if e <= before)}
            if kept.get(self.schedule):
                names = [name for name in names if name not in ("epochs", "milestones")]
            elif self.schedule == "piecewise":
                why["epochs"] = f", where lr dropped at {' '.join(map(str, old.lr_drops))}: let --milestones begin with these"
            else:
                why["epochs"] = f", which --schedule {self.schedule} cannot change"
        return [f"{n}: {saved.get(n)} -> {now.get(n)}{why.get(n, '')}" for n in names]


def _choices(kind: object) -> tuple:
    """What a Literal, or an optional one, allows."""
    parts = [kind] if get_origin(kind) is Literal else [part for part in get_args(kind) if get_origin(part) is Literal]
    return tuple(choice for part in parts for choice in get_args(part)) + (None,) * (type(None) in get_args(kind) and bool(parts))


CHOICES = {name: _choices(kind) for name, kind in get_type_hints(Config).items() if _choices(kind)}


def check(c: Config) -> None:
    """Raise InputError for an option that does not fit, or not with the others. One line: option, value, remedy."""

    def need(condition: bool, option: str, remedy: str) -> None:
        if not condition:
            value = getattr(c, option)
            raise InputError(f"--{option.replace('_', '-')} {value}: {remedy}")

    for option, choices in CHOICES.items():
        need(getattr(c, option) in choices, option, f"choose one of {', '.join(map(str, choices))}")
    for option in ("epochs", "batch_size", "val_every", "val_steps", "log_every"):
        need(getattr(c, option) >= 1, option, "give at least 1")
    for option in ("steps", "limit", "patience", "image_size", "eval_batch_size"):
        need(getattr(c, option) is None or getattr(c, option) >= 1, option, "give at least 1, or leave it out")
    for option in ("holdout", "pad"):
        need(getattr(c, option) is None or getattr(c, option) >= 0, option, "give at least 0, or leave it out")
    for option in ("workers", "awp_warmup"):
        need(getattr(c, option) >= 0, option, "give at least 0")
    for option in ("alpha", "extra_fraction", "label_smoothing", "momentum", "ema"):
        need(0 <= getattr(c, option) <= 1, option, "give a number in [0, 1]")
    for option in ("lr", "gamma", "checkpoint_minutes"):
        need(0 < getattr(c, option) < math.inf, option, "give a number above 0")
    for option in ("weight_decay", "warmup", "awp"):
        need(0 <= getattr(c, option) < math.inf, option, "give a number of at least 0")
    need(c.beta is None or 0 <= c.beta < math.inf, "beta", "give a number of at least 0")
    need(0 <= c.seed < 2**31, "seed", "give an integer from 0 to 2**31 - 1")

    for option, least in (("eps", 0.5), ("eval_eps", 0.5), ("step_size", 0.05)):
        fits = getattr(c, option) is None or least <= getattr(c, option) <= 255
        need(fits, option, f"it is in 1/255, from {least} to 255 (8 means 8/255, and 76.5 is 0.3)")
    try:
        import_own(c.model)  # it may register the loss
    except ValueError as error:
        raise InputError(f"--model {c.model}: {error}") from error
    smoothed = c.inner_loss in losses.ALIASES
    need(smoothed or c.alpha == 0, "inner", f"alpha = {c.alpha} needs lsce: leave out --inner, or --alpha")
    try:
        maximised = c.maximised
    except ValueError as error:
        raise InputError(f"--inner {c.inner}: {error}") from error
    need(c.method != "standard" or c.alpha == 0, "alpha", "standard training attacks nothing: choose another --method")
    start = c.attack_settings[3]
    vanishes = maximised.needs_random_start and start == "clean"
    need(not vanishes, "start", f"the gradient of {c.inner_loss} is 0 at x itself: choose uniform or normal")
    needs_extra = c.method == "rst" or c.preset.startswith("table6.3/")
    need(c.extra is not None or not needs_extra, "extra", "this needs pseudo-labelled images: give RST's pickle, or an .npz")
    need(c.extra is None or 0 < c.extra_fraction < 1, "extra_fraction", "give a number between 0 and 1, such as 0.5")
    labelled = round(c.batch_size * (1 - c.extra_fraction))
    need(c.extra is None or 0 < labelled < c.batch_size, "extra_fraction", f"of {c.batch_size} images it leaves one kind none")
    need(c.beta is None or c.method in ("trades", "rst", "mart"), "beta", f"{c.method} has no KL term: leave it out")
    single = c.method in ("standard", "madry")
    need(not single or c.forwards == "clean-adv", "forwards", f"{c.method} has one forward: give clean-adv")
    need(c.awp > 0 or not c.awp_warmup, "awp_warmup", "it needs --awp")
    need(c.momentum < 1, "momentum", "give a number below 1")
    need(not c.nesterov or (c.momentum > 0 and c.optimizer == "sgd"), "nesterov", "it is SGD's, with a momentum above 0")
    need(c.schedule != "one-cycle" or c.warmup == 0, "warmup", "one-cycle warms up by itself: leave it out")
    need(c.warmup < c.epochs, "warmup", f"it must be shorter than the {c.epochs} epochs")
    rising = list(c.lr_drops) == sorted(set(c.lr_drops)) and min(c.lr_drops, default=1) >= 1
    need(rising, "milestones", "give rising epochs, counted from 1, such as 75 90")
    late = c.schedule == "piecewise" and max(c.lr_drops, default=0) > c.epochs
    need(not late, "milestones", f"not all come by epoch {c.epochs}: give others, or --milestones None for 75 % and 90 % of them")
    need(c.patience is None or c.holdout != 0, "patience", "it needs held-out images: give --holdout")
    need(c.ema < 1, "ema", "give a decay below 1, such as 0.9995")

    check_device(c.device)
    cuda = c.device.startswith("cuda") if c.device else torch.cuda.is_available()
    for option in ("precision", "attack_precision"):
        need(cuda or getattr(c, option) != "tf32", option, "TF32 is for GPUs: use fp32 or bf16")
    need(cuda or not c.sync_bn, "sync_bn", "PyTorch has it for GPUs alone: leave it out")


def check_device(device: str | None) -> None:
    """Raise InputError where torch has no such device here. None is any."""
    if device is None:
        return
    try:
        here = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(torch.device(device).type, 0)
    except RuntimeError as error:
        raise InputError(f"--device {device}: give cpu, cuda or cuda:N") from error
    if (torch.device(device).index or 0) >= here:
        raise InputError(f"--device {device}: torch has no such device here: use cpu, cuda or cuda:N")
