"""Every option of a training run, in one place: the command line, its help texts and the saved config are this dataclass."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from typing_extensions import Doc

from spat_kernels import losses
from spat_kernels.settings import Precision

from .errors import InputError
from .objectives import METHODS, ClassifierName, Method, MethodName

# What may differ when a run is resumed: where things are (the images themselves are compared) and how they are shown, but nothing
# that changes the weights. Two exceptions: how batches are read, and what is replayed, computed again or sharded, may change
# their rounding, and --eval-batch-size changes the random starts of validation, since an out-of-memory error asks for a smaller
# one.
FREE_ON_RESUME = (
    "out", "resume", "data", "extra", "root", "download", "workers", "stream", "graph", "device", "eval_batch_size",
    "checkpoint_activations", "fsdp", "checkpoint_minutes", "log_every", "track", "test",
    "tensorboard",  # of older runs
)  # fmt: skip


class LInfAttack(NamedTuple):
    """The training attack. `_in_x`: for images in [0, 1], so 8/255 where Config has 8."""

    eps_in_x: float
    step_in_x: float
    steps: int
    start: str


@dataclass(frozen=True)
class Config:
    """One training run. Lengths (eps, step_size, eval_eps, evaluation_eps) are in 1/255 of the pixel range: 8 means 8/255.

    Properties that end in `_in_x` are the same for images in [0, 1].
    """

    preset: str = ""
    """Start from these settings, such as table6.1/mart+spat; other options override them. `spat-train presets` lists all."""

    # ---- objective
    method: Annotated[MethodName, Doc(" ".join(f"{name}: {method.summary}." for name, method in METHODS.items()))] = "madry"
    alpha: float = 0.0
    """Label smoothing of the training examples, in [0, 1]: above 0 they come from PGD-LS (SPAT)."""
    beta: float | None = None
    """Weight of the KL term. Default: that of the method's paper."""
    label_smoothing: float = 0.0
    """Label smoothing of the loss itself (and of free's examples), over all classes as in PyTorch. Not the alpha of SPAT."""
    forwards: Literal["clean-adv", "adv-clean", "clean-adv-clean", "adv-clean-clean"] = "clean-adv"
    """Order of an update's forwards, by which the statistics of batch norm differ. MART's code: clean-adv; RST's: adv-clean;
    TRADES's: clean-adv-clean, whose third changes these statistics alone; TRADES-AWP's: adv-clean-clean."""
    awp: float = 0.0
    """Adversarial weight perturbation (Wu et al., 2020): its relative size, such as 0.005; 0 is off."""
    awp_warmup: int = 0
    """Epochs before --awp begins."""
    replays: int | None = None
    """Updates of --method free with each batch; an epoch is still one pass over the data. Default: 8."""

    # ---- training attack
    attack: Literal["pgd", "apgd"] = "pgd"
    """apgd: Auto-PGD, which chooses its step sizes, from x (--start clean) or a random point of the ball's surface (uniform). It
    takes the iterate of the highest loss, as Singh et al. (2023) with two steps from x."""
    inner: str | None = None
    """What the attack maximises, a loss by name (spat-train attacks lists them). Default: lsce (ce with --alpha) where
    alpha > 0, else that of the method: the KL term of TRADES and RST, mmc for mmc, or ce."""
    eps: float = 8.0
    """Radius of the L-infinity ball, in 1/255."""
    step_size: float | None = None
    """Length of a step, in 1/255. Default: eps / 4; fgsm, n-fgsm and free: eps; fast: 1.25 eps. adt and apgd have none."""
    steps: int | None = None
    """Gradient steps. Default: 10; adt: 7; fgsm, fast and n-fgsm: 1, and no more. free has none."""
    start: Literal["uniform", "normal", "clean", "wide"] | None = None
    """uniform in the ball; normal: x + 0.001 randn, as the code of TRADES and MART; clean: x; wide: uniform in the ball of 2 eps,
    from where no step is projected onto a ball, as N-FGSM. Default: uniform; fgsm: clean; n-fgsm: wide; adt, free: none."""
    bn_mode: Literal["eval", "train"] = "eval"
    """Mode of the model during the attack."""
    inner_lr: float | None = None
    """For adt: the longest step of its parameters. Default: 0.3."""
    entropy: float | None = None
    """For adt: the weight of the entropy. Default: 0.01."""
    inner_samples: int | None = None
    """For adt: the number of gradients that a step averages, each of a forward and a backward. Default: 1."""

    # ---- model and data
    model: str = "wrn-34-10"
    """A network such as wrn-34-10, resnet-18, convnext-t-convstem or small-cnn, the quick one on a CPU (an unknown name lists
    all), timm:NAME, torchvision:NAME, robustbench:NAME (an entry's network and normalisation), or
    package.module:factory."""
    activation: Literal["relu", "silu", "gelu", "softplus"] = "relu"
    """What replaces every ReLU of the model."""
    classifier: ClassifierName | None = None
    """centres: the last layer of the model becomes one to 256 features, whose squared distances to fixed Max-Mahalanobis centres
    are the negative logits (Pang et al., 2020). linear: it stays. Default: that of the method."""
    mean: tuple[float, ...] | None = None
    """For (x - mean) / std in the model: a number for each channel, for images in [0, 1]. Default: none, or that of timm,
    torchvision or RobustBench."""
    std: tuple[float, ...] | None = None
    """See --mean."""
    init: Path | None = None
    """Start from the weights of this run or checkpoint, for fine-tuning. Default: at random."""
    data: str = "cifar10"
    """A data set such as cifar10, mnist or digits (an unknown name lists all), an .npz of x_train, y_train, x_test, y_test, a
    folder with train/ and test/ or, without that, val/, or WebDataset shards: a folder with train/*.tar and val/*.tar, or
    'train-{000..099}.tar,val-{000..009}.tar' in quotes."""
    root: Path = Path("data")
    """Where torchvision's data sets are, or go."""
    download: bool = False
    """Fetch torchvision's data sets."""
    image_size: int | None = None
    """Side of the images of a folder or of shards: short side resized, centre cropped (and see --crop)."""
    skip_broken: bool = False
    """Leave out pictures of a folder or of shards that cannot be decoded, and what follows the first damaged sample of a shard:
    every process decodes all of them once before the first step."""
    limit: int | None = None
    """Maximum number of training and test images, drawn at random."""
    holdout: int | None = None
    """Training images that are held out to validate on. Default: a tenth of them, at most 1000; 0: no validation."""
    crop: Literal["padded", "resized"] | None = None
    """Random crops of training images. padded: of the old size, after --pad. resized: 8 to 100 % of the area, sides 3:4 to 4:3,
    resized to the old size, by torchvision. Default: padded."""
    rand_augment: tuple[int, int] | None = None
    """RandAugment of training images by torchvision: number of operations and their magnitude, 0 to 30, such as 2 9."""
    pad: int | None = None
    """Pixels of padding before random crops. Default: an eighth of the side (4 for 32) for colour images, 0 for grey and for
    --crop resized."""
    flip: bool | None = None
    """Random horizontal flips. Default: for colour images."""
    extra: Path | None = None
    """More images with (pseudo-)labels: RST's pickle, or an .npz of image and label; memory-mapped."""
    extra_fraction: float = 0.5
    """Share of the extra images in each batch. An epoch has as many batches as without them."""
    stream: bool = False
    """Read images through workers though they fit on the GPU."""
    workers: int = 2
    """Processes that read images which do not fit on the GPU, or decode and augment pictures."""

    # ---- optimiser
    epochs: int = 100
    """Passes over the training images."""
    train_sizes: str | None = None
    """Sides of the training images, each with the epoch, counted from 1, from which on it holds: 128@1,192@21,224@41 trains 20
    epochs at 128x128, 20 at 192x192 and the rest at 224x224. They are resized on the device. Validation and test are not."""
    batch_size: int = 128
    """Images in an update, over all processes."""
    accumulate: int = 1
    """Parts in which every process attacks and differentiates its share of a batch, one after the other, which needs less memory.
    Losses and gradients are those of the whole batch; statistics of batch norm and random starts are those of the parts."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """adamw: Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""
    lr: float = 0.1
    scale_lr: bool = False
    """Multiply lr by batch_size / 128."""
    momentum: float = 0.9
    """Momentum of SGD, or beta1 of Adam and AdamW."""
    beta2: float = 0.999
    """Of Adam and AdamW."""
    nesterov: bool = False
    weight_decay: float = 5e-4
    """As an L2 term, in Adam too. AdamW multiplies weights by 1 - lr * this."""
    decay_norm: bool = True
    """Decay biases and norms too; --no-decay-norm: convolutions and linear weights alone."""
    layer_decay: float | None = None
    """Layer-wise rates, for timm's networks: lr times this for each layer between a weight and the logits, such as 0.8."""
    schedule: Literal["constant", "piecewise", "cosine", "warmup-cosine", "one-cycle", "cyclic"] = "piecewise"
    """cosine changes lr from epoch to epoch, as the code of RST; warmup-cosine (linearly up to lr in --warmup epochs, then along
    half a cosine to 0), one-cycle and cyclic (from 0 straight up to lr in the middle, then down to 0) from update to update."""
    milestones: tuple[int, ...] | None = None
    """Epochs, counted from 1, from which on piecewise multiplies lr by gamma. Default: at 75 % and 90 % of the epochs."""
    gamma: float = 0.1
    warmup: float = 0.0
    """Epochs of linear warm-up; one-cycle and cyclic have their own."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9995, which is then what is validated; 0 is off."""

    # ---- arithmetic
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the update, and of attacks unless --attack-precision differs. Losses are always fp32."""
    attack_precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """Precision of all attacks, also in validation and test, where predictions are fp32. Default: --precision."""
    input_gradient: Literal["auto", "plan", "compile", "autograd"] = "auto"
    """How the attack differentiates the model (`spat_kernels.explain`)."""
    graph: Literal["auto", "never"] = "auto"
    """Whether CUDA graphs replay the attack, and of --method free the update."""
    channels_last: bool = True
    """Images and weights in that format; a model that fails on it gets contiguous ones."""
    compile: bool = False
    """torch.compile for the update."""
    checkpoint_activations: bool = False
    """Keep only the inputs of a network's blocks for the backward of an update, and compute the rest again: less memory, a
    third more time for the update. Attacks are as without it."""
    fsdp: bool = False
    """Share weights, gradients, averages and optimiser out over the processes (FSDP2), for models whose training does not fit on
    one GPU. Attacks on them go by autograd."""
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
    """Stop after this many validations without improvement in PGD accuracy (of standard and mmc-clean, in clean accuracy)."""
    catastrophic_overfitting: Literal["warn", "stop", "rollback", "off"] | None = None
    """What to do where PGD accuracy has collapsed since the best validation, beyond chance, and FGSM accuracy is above the one it
    had then; or where PGD accuracy is not beyond chance and FGSM accuracy far is (spat_train/training/overfitting.py). stop: end
    the training. rollback: go back to the best weights, and on with the next epoch; where no epoch has withstood PGD yet, there
    is nothing to go back to: warn, and go on. Default: warn where the training attack has one step and images are held out, else
    off."""
    test: bool = True
    """At the end, test the best checkpoint: clean, FGSM, PGD-20 and C&W-inf-30. Nothing is ever selected by it."""
    out: Path | None = None
    """Folder of the run: config.json, log.jsonl, last.pt (and previous.pt, the checkpoint before it, should last.pt be damaged),
    result.json and, with validation, best.pt. Default: in runs/."""
    resume: bool = False
    """Continue the run in --out where there is one; the same command again. More --epochs extend a constant schedule, and
    a piecewise one whose --milestones so far stay."""
    checkpoint_minutes: float = 10.0
    """Minutes between saves within an epoch. The end of every epoch is saved too."""
    log_every: int = 50
    """Steps between lines of the log."""
    track: str = "auto"
    """What draws the run, names split at commas: tensorboard,wandb,mlflow. One that does not work is an error before the first
    step, later a warning. auto: TensorBoard where it works; none: log.jsonl alone."""

    def __post_init__(self):
        for name in ("root", "extra", "out", "init"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))

    # ---- what None stands for

    @property
    def objective(self) -> Method:
        return METHODS[self.method]

    @property
    def last_layer(self) -> ClassifierName:
        return self.classifier or self.objective.classifier

    @property
    def inner_loss(self) -> str:
        """What the training attack maximises, by name."""
        return self.inner or ("lsce" if self.alpha > 0 else self.objective.inner)

    @property
    def maximised(self) -> losses.Loss:
        """The loss of that name."""
        return losses.lookup(self.inner_loss, **({"alpha": self.alpha} if self.inner_loss in losses.ALIASES else {}))

    @property
    def attack_settings(self) -> LInfAttack:
        method = self.objective
        step_size = self.eps * method.step_in_eps if self.step_size is None else self.step_size
        steps = method.steps if self.steps is None else self.steps
        if self.attack == "apgd":
            step_size = 2 * self.eps  # its first
        return LInfAttack(self.eps / 255, step_size / 255, steps, self.start or method.start)

    @property
    def updates_per_batch(self) -> int:
        return self.replays or self.objective.replays or 1

    @property
    def overfitting_alarm(self) -> str:
        """What --catastrophic-overfitting stands for: warn, stop, rollback or off."""
        single_step = self.objective.attacks and self.attack_settings.steps == 1 and self.holdout != 0
        return self.catastrophic_overfitting or ("warn" if single_step else "off")

    @property
    def adt_settings(self) -> dict[str, Any]:
        """Those of `ADT` that are given."""
        given = {"lr": self.inner_lr, "entropy": self.entropy, "samples": self.inner_samples}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def precision_of_attacks(self) -> Precision:
        return self.attack_precision or self.precision

    @property
    def evaluation_eps(self) -> float:
        return self.eps if self.eval_eps is None else self.eval_eps

    @property
    def evaluation_eps_in_x(self) -> float:
        return self.evaluation_eps / 255

    @property
    def evaluation_batch(self) -> int:
        return self.eval_batch_size or min(4 * self.batch_size, 256)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def kl_weight(self) -> float | None:
        return self.objective.beta if self.beta is None else self.beta

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

    def to_dict(self) -> dict:
        """As in JSON: paths are strings, tuples are lists."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def differences(self, saved: dict) -> list[str]:
        """The options that change the weights and differ from those of a saved config, each as "name: saved -> now".

        More epochs are no difference where the learning rates of the earlier epochs stay.
        """
        now, why = self.to_dict(), ""
        saved = Config().to_dict() | saved  # older runs have fewer options
        free = {*FREE_ON_RESUME, *self.objective.idle}  # older versions took the latter
        names = [name for name in now | saved if name not in free and saved.get(name) != now.get(name)]
        before, milestones = saved.get("epochs", 0), saved.get("milestones")
        if self.epochs > before and self.schedule != "constant":
            old = dataclasses.replace(self, epochs=before, milestones=None if milestones is None else tuple(milestones))
            if self.schedule != "piecewise":
                why = f", which --schedule {self.schedule} cannot change"
            elif old.lr_drops != tuple(epoch for epoch in self.lr_drops if epoch <= before):
                why = f", where lr dropped at {' '.join(map(str, old.lr_drops))}: let --milestones begin with these"
        if self.epochs > before and not why:
            names = [name for name in names if name not in ("epochs", "milestones")]
        return [f"{n}: {saved.get(n)} -> {now.get(n)}{why if n == 'epochs' else ''}" for n in names]


def check_device(device: str | None) -> None:
    """Raise InputError unless torch has this device here. None is any."""
    if device is None:
        return
    try:
        here = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(torch.device(device).type, 0)
    except RuntimeError as error:
        raise InputError(f"--device {device}: give cpu, cuda or cuda:N") from error
    if (torch.device(device).index or 0) >= here:
        raise InputError(f"--device {device}: torch has no such device here: use cpu, cuda or cuda:N")
