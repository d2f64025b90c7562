"""What the attacks share: settings and batch checked, the model borrowed and ready to be differentiated."""

from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .. import checks
from ..balls import as_values
from ..input_gradient.choose import check_path, check_precision, input_gradient
from ..model_state.borrow import borrowed
from ..ops._common import is_dense
from ..settings import BN_MODES, NORMS, BNMode, GradientPath, Norm, Precision


@dataclass(eq=False)
class BallAttack:
    """The settings of every attack, and what is checked of them and of a batch. `PGD` says what they mean."""

    eps: float | Tensor
    _: KW_ONLY
    norm: Norm = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)
    precision: Precision | None = None
    input_gradient: GradientPath = "auto"
    bn_mode: BNMode = "eval"

    def __post_init__(self):
        self.norm = checks.as_norm(self.norm)
        checks.check_choice("norm", self.norm, NORMS)
        self.largest_eps = checks.check_length("eps", self.eps)  # kept, so that no call waits for the device that eps is on
        self.bounds = checks.check_bounds(self.bounds)
        if self.norm == "linf":
            checks.check_reach("eps", self.largest_eps, self.bounds)
        check_path(self.precision, self.input_gradient)
        checks.check_choice("bn_mode", self.bn_mode, BN_MODES)

    def _check_radius(self, x: Tensor) -> None:
        """That eps goes with the images `x`."""
        checks.check_per_sample("eps", self.eps, x)
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
    def _prepared_gradient(self, model, x: Tensor, y: Tensor, highest_label: int):
        """Within, without gradients: (the input gradient of `model`, prepared; x; y), the model borrowed, x and y dense."""
        with torch.inference_mode(False), torch.no_grad(), borrowed(model, self.bn_mode):
            x, y = as_dense(x, y)
            gradient = input_gradient(model, x, self.input_gradient, self.precision, highest_label)
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


Labels = TypeVar("Labels", Tensor, Tensor | None)


def as_dense(x: Tensor, y: Labels) -> tuple[Tensor, Labels]:
    """Checked images and labels as runs want them: dense, and not made in inference mode, which autograd refuses."""
    x = x.detach()
    x = x if is_dense(x) else x.contiguous()
    if y is not None:
        y = y.clone() if y.is_inference() else y.contiguous()
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
