"""What the attacks share: settings and batch checked, the model borrowed and ready to be differentiated."""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .. import checks
from ..balls import as_values
from ..input_gradient.choose import check_path, check_precision, input_gradient
from ..interrupts import deferred
from ..model_state.borrow import borrowed
from ..ops._common import is_dense
from ..rng import default_generator, rewound_on_error
from ..settings import BN_MODES, NORMS, BNMode, Fuse, GradientPath, Norm, Precision

Method = TypeVar("Method", bound=Callable)


def all_or_nothing(method: Method) -> Method:
    """A method (attack, model, x, ...) within which signals wait, and autograd records nothing.

    If it raises, random numbers are as they were before.
    """

    @functools.wraps(method)
    def call(self, model, x, *arguments, **options):
        drawn_from = self.generator, default_generator(x.device) if isinstance(x, Tensor) else None
        with deferred, torch.inference_mode(False), torch.no_grad(), rewound_on_error(*drawn_from):
            return method(self, model, x, *arguments, **options)

    return cast(Method, call)


class Result(NamedTuple):
    """What the `run` of an attack returns.

    Attributes:
        x_adv: adversarial images, as a call returns them.
        forwards, backwards: int64 [B], on x's device: the passes of the model that each sample was in until it was done, whether
            by autograd, in a plan or in a CUDA graph. A forward of which a plan computes only a part counts as one. What fills up
            a batch, and AutoAttack's search for masked gradients, are not counted.
    """

    x_adv: Tensor
    forwards: Tensor
    backwards: Tensor


@dataclass(eq=False)
class BallAttack:
    """The settings of every attack, and what is checked of them and of a batch. `PGD` says what they mean."""

    eps: float | Tensor
    _: KW_ONLY
    norm: Norm = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)
    precision: Precision | None = None
    input_gradient: GradientPath = "auto"
    fuse: Fuse = "auto"
    bn_mode: BNMode = "eval"
    budget: int | Tensor | None = None

    def __post_init__(self):
        self.norm = checks.as_norm(self.norm)
        checks.check_choice("norm", self.norm, NORMS)
        self.largest_eps = checks.check_length("eps", self.eps)  # kept, so that no call waits for the device that eps is on
        self.bounds = checks.check_bounds(self.bounds)
        if self.norm == "linf":
            checks.check_reach("eps", self.largest_eps, self.bounds)
        check_path(self.precision, self.input_gradient)
        checks.check_auto_or_flag("fuse", self.fuse)
        checks.check_choice("bn_mode", self.bn_mode, BN_MODES)
        checks.check_budget(self.budget)
        if isinstance(self.budget, Tensor) and self.budget.numel() > 1 and self.bn_mode == "train":
            raise ValueError("budget for each sample with bn_mode='train', where samples depend on the batch: give one number")

    def _check_radius(self, x: Tensor) -> None:
        """That eps goes with the images `x`."""
        checks.check_per_sample("eps", self.eps, x)
        checks.check_per_sample("budget", self.budget, x)
        if self.norm != "linf" and x.numel():
            checks.check_reach("eps", self.largest_eps, self.bounds, x[0].numel(), self.norm)

    def _check_batch(self, model, x, y) -> int:
        """Check what a call is given; return the largest label, -1 without images. Waits for the device once."""
        checks.check_images(x)
        checks.check_model(model, x)
        check_precision(self.precision, x)
        self._check_radius(x)
        checks.check_labels(y, x)
        return checks.Values(x, y, None, self.bounds).read()[0] if x.numel() else -1

    @contextmanager
    def _prepared_gradient(self, model, x: Tensor, y: Tensor | None, highest_label: int):
        """Within: (the input gradient of `model`, prepared; x; y), the model borrowed, x and y dense."""
        with borrowed(model, self.bn_mode):
            x, y = as_dense(x, y)
            gradient = input_gradient(model, x, self.input_gradient, self.precision, highest_label, self.fuse)
            with gradient.arithmetic(x.device.type):
                gradient.prepare()
                yield gradient, x, y


@dataclass(eq=False, kw_only=True)
class RestartedAttack(BallAttack):
    """The settings of an attack that runs from several starts."""

    restarts: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self):
        super().__post_init__()
        checks.check_count("restarts", self.restarts, 1)
        checks.check_generator(self.generator)


class Tally:
    """The passes of each sample of a batch so far.

    Attributes:
        forwards, backwards: int64 [B].
    """

    def __init__(self, x: Tensor, budget: int | Tensor | None = None):
        with torch.inference_mode(False):
            self.forwards, self.backwards = (torch.zeros(len(x), dtype=torch.int64, device=x.device) for _ in range(2))
            budget = min(budget, 2**62) if isinstance(budget, int) else budget  # an int64 holds no more
            self.limit = None if budget is None else self.forwards + torch.as_tensor(budget, device=x.device)

    def add(self, rows: Tensor | slice, forwards: int | Tensor, backwards: int | Tensor = 0) -> None:
        """To the samples `rows`."""
        for ours, more in ((self.forwards, forwards), (self.backwards, backwards)):
            ours[rows] += more.to(ours.device) if isinstance(more, Tensor) else more

    def spent(self, rows: Tensor, needed: int = 1) -> Tensor:
        """bool [n], which of the samples `rows` have fewer than `needed` passes left of the budget."""
        if self.limit is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        return self.left(rows) < needed

    def left(self, rows: Tensor) -> Tensor:
        """int64 [n], how much of their budget the samples `rows` have left."""
        assert self.limit is not None
        return self.limit[rows] - self.forwards[rows] - self.backwards[rows]

    def affordable(self, rows: Tensor, least: int, most: int) -> list[tuple[Tensor, int | None]]:
        """The samples `rows`, int64 [n], in groups with equally much left of the budget, and how much (None: `most` or more).

        Those with less than `least` left are in none of them.
        """
        if self.limit is None or not len(rows):
            return [(rows, None)] if len(rows) else []
        left = self.left(rows).clamp_max(most)
        return [(rows[left == n], n if n < most else None) for n in left.unique().tolist() if n >= least]

    def result(self, x_adv: Tensor) -> Result:
        return Result(x_adv, self.forwards, self.backwards)


Labels = TypeVar("Labels", Tensor, Tensor | None)


def as_dense(x: Tensor, y: Labels) -> tuple[Tensor, Labels]:
    """Checked images and labels as runs want them: dense, not lazily negated, and not made in inference mode, which autograd
    refuses."""
    x = x.detach().resolve_neg()
    x = x if is_dense(x) else x.contiguous()
    if y is not None:
        y = y.clone() if y.is_inference() else y.resolve_neg().contiguous()
    return x.clone() if x.is_inference() else x, y


def eps_per_sample(eps: float | Tensor, x: Tensor) -> Tensor:
    """`eps` as [B], in the dtype that arithmetic on x is done in."""
    return as_values(eps, x).expand(len(x))


def take_rows(eps: float | Tensor, rows: Tensor) -> float | Tensor:
    """`eps` of the samples `rows`, int64 [n], wherever it lives."""
    return eps.to(rows.device)[rows] if isinstance(eps, Tensor) and eps.numel() > 1 else eps


def warn_of_nan(samples_with_nan: int, samples: int) -> None:
    """Warn if the input gradients of some samples had elements that were NaN (or, in L2, infinite)."""
    if samples_with_nan:
        checks.warn(
            f"the input gradient was NaN for {samples_with_nan} of {samples} samples and counted as 0 there: they may look "
            "robust without being so. Look at the model's outputs, or attack in higher precision"
        )
