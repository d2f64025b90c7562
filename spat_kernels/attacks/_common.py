"""What the attacks share: settings and batch checked, the model borrowed and ready to be differentiated."""

from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from .. import checks
from ..balls import as_values
from ..input_gradient.choose import check_path, check_precision, input_gradient
from ..model_state.borrow import borrowed
from ..ops._common import is_dense
from ..settings import BN_MODES, NORMS


def check_settings(attack) -> None:
    """Check the fields eps, norm, restarts, bounds, precision, input_gradient, bn_mode and generator of an attack: see `PGD`."""
    check_ball(attack)
    check_path(attack.precision, attack.input_gradient)
    checks.check_choice("bn_mode", attack.bn_mode, BN_MODES)
    checks.check_count("restarts", attack.restarts, 1)
    checks.check_generator(attack.generator)


def check_ball(attack) -> None:
    """Check norm, eps and bounds of an attack; keep the largest eps, so that no call waits for the device that eps is on."""
    attack.norm = checks.as_norm(attack.norm)
    checks.check_choice("norm", attack.norm, NORMS)
    attack.largest_eps = checks.check_length("eps", attack.eps)
    attack.bounds = checks.check_bounds(attack.bounds)
    if attack.norm == "linf":
        checks.check_reach("eps", attack.largest_eps, attack.bounds)


def check_radius(attack, x: Tensor) -> None:
    """That eps goes with the images `x`."""
    checks.check_per_sample("eps", attack.eps, x)
    if attack.norm == "l2" and x.numel():
        checks.check_reach("eps", attack.largest_eps, attack.bounds, x[0].numel())


def check_batch(attack, model, x, y) -> int:
    """Check what `attack(model, x, y)` is given; return the largest label, -1 without images. Waits for the device once."""
    checks.check_images(x)
    checks.check_model(model, x)
    check_precision(attack.precision, x)
    check_radius(attack, x)
    checks.check_labels(y, x)
    return checks.Values(x, y, None, attack.bounds).read()[0] if x.numel() else -1


Labels = TypeVar("Labels", Tensor, Tensor | None)


def as_dense(x: Tensor, y: Labels) -> tuple[Tensor, Labels]:
    """Checked images and labels as runs want them: dense, and not made in inference mode, which autograd refuses."""
    x = x.detach()
    x = x if is_dense(x) else x.contiguous()
    if y is not None:
        y = y.clone() if y.is_inference() else y.contiguous()
    return x.clone() if x.is_inference() else x, y


@contextmanager
def prepared_gradient(attack, model, x: Tensor, y: Tensor, highest_label: int):
    """Within, without gradients: (the input gradient of `model`, prepared; x; y), the model borrowed, x and y dense."""
    with torch.inference_mode(False), torch.no_grad(), borrowed(model, attack.bn_mode):
        x, y = as_dense(x, y)
        gradient = input_gradient(model, x, attack.input_gradient, attack.precision, highest_label)
        with gradient.arithmetic(x.device.type):
            gradient.prepare()
            yield gradient, x, y


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
