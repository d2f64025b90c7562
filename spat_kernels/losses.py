"""What an attack maximises: the value of a loss per sample, and its gradient at the logits.

Each loss here is one fused kernel, but for MMC, whose gradient is a mask. To bring your own, pass `pgd` a callable
`loss(logits, y) -> [B]`; its gradient then comes from autograd. To give it a name, subclass `AutogradLoss` and `register` it:
attacks, `spat-train evaluate` and `spat-train train --inner` know it from then on. To bring a kernel, subclass `Loss`.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from numbers import Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from . import ops


class Loss:
    """Interface. An attack calls `reference` once a batch and `gradient` in every step."""

    name: ClassVar[str] = ""  # in `pgd(loss=name)` and the like, if it is registered
    title: ClassVar[str] = ""  # in reports; its name, if empty
    needs_clean_logits: ClassVar[bool] = False  # True: `reference` is given f(x) at the clean images
    needs_random_start: ClassVar[bool] = False  # True: the gradient vanishes at the clean images
    uses_labels: ClassVar[bool] = True  # False: y may be None
    has_targeted_form: ClassVar[bool] = True

    @classmethod
    def fewest_classes(cls, targeted: bool) -> int:
        """The least number of classes K that it is defined for."""
        return 2

    def reference(self, y: Tensor, clean_logits: Tensor | None, targeted: bool) -> Any:
        """What the logits are held against in every step: the labels, unless a subclass says otherwise.

        Args:
            y: int64 [B], the true labels, or the targets where `targeted`.
            clean_logits: [B, K] if `needs_clean_logits`, else None.
        """
        return y

    def gradient(
        self, logits: Tensor, reference: Any, dlogits: Tensor, value: Tensor | None, *, targeted: bool, scale: float
    ) -> None:
        """Write scale * d(sum of values)/d(logits) into `dlogits` [B, K], and the values into `value` [B] unless it is None.

        A positive factor of a sample's own may be left out of its gradient: only the direction counts.
        What is written is to be *maximised*: where `targeted`, the loss towards the targets comes with its sign changed.
        `value` is fp32, and fp64 for fp64 logits.
        """
        raise NotImplementedError

    def unnormalized(self) -> "Loss":
        """The same loss with gradients of their true length, which counts where they are averaged, or mixed by batch statistics.
        One that leaves out factors of a sample's own says here how it does not."""
        return self

    def check_targeted(self, targeted: bool) -> None:
        if targeted and not self.has_targeted_form:
            raise ValueError(f"loss {self._called} has no targeted form: use loss='ce', or leave out targets")

    def check_classes(self, classes: int, targeted: bool) -> None:
        needed = self.fewest_classes(targeted)
        if classes < needed:
            raise ValueError(
                f"loss {self._called} needs at least {needed} classes here, the model has {classes}: use loss='margin'"
            )

    def describe(self) -> str:
        """Its title, with its settings."""
        given = ", ".join(f"{name} {getattr(self, name):g}" for name in settings_of(type(self)))
        return f"{self.title or self.name}{f' ({given})' if given else ''}"

    @property
    def _called(self) -> str:
        return repr(self.name) if self.name else type(self).__name__


LOSSES: dict[str, type[Loss]] = {}  # by name: see `register`
# Other names of a loss, with which all its settings must be given. Label-smoothed cross-entropy is "lsce", as its op is. "ce" is
# the same without smoothing, and "ls" is the short form that runs and recipes have stored since version 0.1.0.
ALIASES = {"ls": "ce", "lsce": "ce"}
Kind = TypeVar("Kind", bound=type[Loss])


def register(kind: Kind) -> Kind:
    """Make a loss known by its `name`, as a decorator of its class. A class that is defined again replaces the old one."""
    old = LOSSES.get(kind.name, kind)
    if not kind.name or kind.name in ALIASES or (old.__module__, old.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"{kind.__name__}.name={kind.name!r}: give a name that no other loss has")
    LOSSES[kind.name] = kind
    return kind


@register
@dataclass(frozen=True)
class LabelSmoothedCE(Loss):
    """Cross-entropy against 1 - alpha on the label and alpha / (K - 1) on every other class (thesis, Eq. 4.1-4.2).

    `F.cross_entropy(label_smoothing=s)` is the same at s = alpha * K / (K - 1). alpha is in [0, 1]; 0 is cross-entropy.
    `normalize` leaves the factor 1 - p_y out of the gradient of cross-entropy, which for confident samples would underflow.
    """

    name, title = "ce", "cross-entropy"

    alpha: float = 0.0
    normalize: bool = field(default=True, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.alpha, Real):
            raise TypeError(f"alpha must be a number in [0, 1], got {type(self.alpha).__name__}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]: it is the label smoothing, not the step size (step_size)")

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        normalize = self.normalize and self.alpha == 0
        ops.lsce_grad(logits, reference, dlogits, value, alpha=self.alpha, targeted=targeted, scale=scale, normalize=normalize)

    def unnormalized(self):
        return replace(self, normalize=False)

    def describe(self):
        return self.title if self.alpha == 0 else f"label-smoothed {super().describe()}"


def CrossEntropy() -> LabelSmoothedCE:
    """-log p_y: label-smoothed cross-entropy at alpha = 0."""
    return LabelSmoothedCE(0.0)


@register
@dataclass(frozen=True)
class KLDivergence(Loss):
    """KL(softmax(f(x)) || softmax(f(x_adv))): the inner loss of TRADES (arXiv 1901.08573). The labels are not used.

    Its gradient is zero at x itself, so it needs a random start; it has no targeted form.
    """

    name, title = "kl", "KL"
    needs_clean_logits = True
    needs_random_start = True
    uses_labels = False
    has_targeted_form = False

    def reference(self, y, clean_logits, targeted):
        return clean_logits.to(value_dtype(clean_logits)).softmax(1)

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        ops.kl_grad(logits, reference, dlogits, value, scale=scale)


@register
@dataclass(frozen=True)
class Margin(Loss):
    """min(max_{k != y} z_k - z_y, kappa), "C&W-infinity"; targeted: min(z_t - max_{k != t} z_k, kappa).

    kappa = 0 stops at the first misclassification, kappa = 50 is CW+ (arXiv 1706.06083, section 5). kappa must be >= 0.
    """

    name, title = "margin", "the margin"

    kappa: float = 0.0

    def __post_init__(self):
        if not isinstance(self.kappa, Real):
            raise TypeError(f"kappa must be a number >= 0, got {type(self.kappa).__name__}")
        if not self.kappa >= 0:
            raise ValueError(f"kappa={self.kappa} must be >= 0: it is the margin by which to be misclassified")

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        ops.margin_grad(logits, reference, dlogits, value, kappa=self.kappa, targeted=targeted, scale=scale)


@register
@dataclass(frozen=True)
class DLR(Loss):
    """Difference of logits ratio (AutoAttack, arXiv 2003.01690, Eq. 6; K >= 3). Targeted: Eq. 7 (K >= 4).

    The targeted form moves from a class to the target; the class is the likeliest other one for the clean image.
    """

    name, title = "dlr", "DLR"
    needs_clean_logits = True

    @classmethod
    def fewest_classes(cls, targeted):
        return 4 if targeted else 3

    def reference(self, y, clean_logits, targeted):
        if not targeted:
            return y, None
        return clean_logits.scatter(1, y[:, None], -torch.inf).argmax(1), y

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        labels, targets = reference
        ops.dlr_grad(logits, labels, dlogits, value, targets=targets, scale=scale)


@register
@dataclass(frozen=True)
class PMA(Loss):
    """max_{k != y} p_k - p_y, p = softmax(z): the probability margin attack (arXiv 2411.15210); targeted: p_t - max_{k != t} p_k.

    `normalize` divides the gradient of each sample by its largest element, which for confident samples would underflow. In fp32
    the value is -1 where z_y is ahead by more than 17, so APGD cannot tell such iterates apart: use "dlr" there.
    """

    name, title = "pma", "the probability margin"

    normalize: bool = field(default=True, kw_only=True)

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        ops.pma_grad(logits, reference, dlogits, value, targeted=targeted, scale=scale, normalize=self.normalize)

    def unnormalized(self):
        return replace(self, normalize=False)


@register
@dataclass(frozen=True)
class MMC(Loss):
    """-z_y; targeted: z_t. On models with Max-Mahalanobis centres this is their own loss (arXiv 1905.10626):
    z_k = -||f - mu_k||^2 there, so -z_y is the squared distance of the features from the label's centre. To judge such a model,
    attack it with this loss and with "ce": neither is always the stronger (in our small runs "ce" was).
    """

    name, title = "mmc", "the label's logit"

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        sign = 1.0 if targeted else -1.0
        label = torch.arange(logits.shape[1], device=logits.device) == reference[:, None]
        wrong = ~label.any(1)  # labels that are no classes: NaN, as of the kernels
        dlogits.zero_().masked_fill_(label, sign * scale).masked_fill_(wrong[:, None], torch.nan)
        if value is not None:
            value.copy_(logits.where(label, 0).sum(1) * sign).masked_fill_(wrong, torch.nan)


class AutogradLoss(Loss):
    """A loss without a kernel: a subclass writes `value`, which autograd differentiates. A targeted attack minimises it."""

    def value(self, logits: Tensor, reference: Any) -> Tensor:
        """The loss per sample, [B], of logits [B, K] against `reference`, which is y [B] unless a subclass says otherwise."""
        raise NotImplementedError

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()  # a copy: the loss may write on it
            loss = self.value(leaf, reference)
            if not isinstance(loss, Tensor) or loss.shape != logits.shape[:1]:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(
                    f"loss: {self} must return one value per sample, [{len(logits)}], got {got}; "
                    "do not average over the batch (reduction='none')"
                )
            grad = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0] if loss.requires_grad else None
            if grad is None:
                raise ValueError(f"loss: {self} does not depend on the logits by differentiable operations")
        sign = -1.0 if targeted else 1.0
        dlogits.copy_(grad * (sign * scale))
        if value is not None:
            value.copy_(sign * loss.detach())


@dataclass(frozen=True)
class Custom(AutogradLoss):
    """A callable `function(logits [B, K], y [B]) -> [B]`."""

    function: Callable[[Tensor, Tensor], Tensor]

    def value(self, logits, reference):
        return self.function(logits, reference)


OURS = (LabelSmoothedCE, KLDivergence, Margin, DLR, PMA, MMC)  # frozen, and of each sample by itself


def names() -> tuple[str, ...]:
    return *LOSSES, *ALIASES


_settings: dict[type[Loss], dict[str, bool]] = {}  # what `settings_of` has found: every call of `pgd` asks for it


def settings_of(kind: type[Loss]) -> dict[str, bool]:
    """The names of its settings, the numbers among its dataclass fields, each with whether it must be given."""
    if kind not in _settings:
        found: tuple[Field, ...] = fields(kind) if is_dataclass(kind) else ()
        _settings[kind] = {f.name: f.default is MISSING for f in found if f.type in (float, "float")}
    return _settings[kind]


def lookup(name: str, **settings: float) -> Loss:
    """The registered loss of that name, or alias, with these settings.

    Raises:
        ValueError: there is none, or the settings are not its own.
    """
    kind = LOSSES.get(ALIASES.get(name, name))
    if kind is None:
        raise ValueError(f"loss={name!r}: give one of {', '.join(map(repr, names()))}")
    known = settings_of(kind)
    for setting in settings.keys() - known.keys():
        owners = " and ".join(f"loss={other}" for other in LOSSES if setting in settings_of(LOSSES[other])) or "no loss"
        raise ValueError(f"{setting} is a setting of {owners}, not of {name}")
    for setting, required in known.items():
        if setting not in settings and (required or name in ALIASES):
            in_python = f"in Python losses.{kind.__name__}({setting}=0.2)"
            raise ValueError(f"loss={name!r}: {setting} must be given, as {setting}=0.2; {in_python}")
    return kind(**settings)


named = lookup  # its name in version 0.1.0

LossLike = str | Loss | Callable[[Tensor, Tensor], Tensor]


def as_loss(loss: LossLike) -> Loss:
    """The `Loss` behind a name, an object or a callable."""
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        return lookup(loss)
    if callable(loss) and not isinstance(loss, type):
        return Custom(loss)
    given = " ".join(repr(loss).split())[:60]
    raise ValueError(
        f"loss={given}: give one of {', '.join(map(repr, LOSSES))}, an object such as losses.LabelSmoothedCE(0.1), "
        "or a callable (logits, y) -> [B]"
    )


def value_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of per-sample values: fp32, and fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
