"""What attacks other than PGD begin with: settings and batch checked, the model borrowed and ready to be differentiated."""

from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from .. import checks
from ..balls import fill_
from ..cuda_graphs.run import drawing
from ..input_gradient.choose import check_path, check_precision, input_gradient
from ..model_state.borrow import borrowed
from ..ops._common import acc_dtype, is_dense
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
    """Check what `attack(model, x, y)` is given; return the largest label. Waits for the device once."""
    checks.check_images(x)
    checks.check_model(model, x)
    check_precision(attack.precision, x)
    check_radius(attack, x)
    checks.check_labels(y, x)
    return checks.Values(x, y, None, attack.bounds).read()[0] if x.numel() else -1


Labels = TypeVar("Labels", Tensor, Tensor | None)


def usable(x: Tensor, y: Labels) -> tuple[Tensor, Labels]:
    """Checked images and labels as runs want them: dense, and not made in inference mode, which autograd refuses."""
    x = x.detach()
    x = x if is_dense(x) else x.contiguous()
    if y is not None:
        y = y.clone() if y.is_inference() else y.contiguous()
    return x.clone() if x.is_inference() else x, y


def warn_of_nan(unusable: int, samples: int) -> None:
    """If elements of some samples' gradients were not usable."""
    if unusable:
        checks.warn(
            f"the input gradient was NaN for {unusable} of {samples} samples and counted as 0 there: they may look "
            "robust without being so. Look at the model's outputs, or attack in higher precision"
        )


@contextmanager
def attacked(attack, model, x: Tensor, y: Tensor, highest_label: int):
    """Within, without gradients: (the way to differentiate `model`, prepared; x; y), the model borrowed, x dense."""
    with torch.inference_mode(False), torch.no_grad(), borrowed(model, attack.bn_mode):
        x, y = usable(x, y)
        gradient = input_gradient(model, x, attack.input_gradient, attack.precision, highest_label)
        with gradient.arithmetic(x.device.type):
            gradient.prepare()
            yield gradient, x, y


def per_sample(eps: float | Tensor, x: Tensor) -> Tensor:
    """`eps` as [B], in the dtype that arithmetic on x is done in."""
    values = torch.empty(eps.numel() if isinstance(eps, Tensor) else 1, dtype=acc_dtype(x.dtype), device=x.device)
    return fill_(values, eps).expand(len(x))


def of_rows(eps: float | Tensor, rows: Tensor) -> float | Tensor:
    """`eps` for the samples `rows`, int64 [n], wherever it lives."""
    return eps.to(rows.device)[rows] if isinstance(eps, Tensor) and eps.numel() > 1 else eps


def draw(method: str, *size: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers [*size] by the in-place `method`, from `generator` wherever it lives, for arithmetic on `like`."""
    device = like.device if generator is None else generator.device
    empty = torch.empty(size, dtype=acc_dtype(like.dtype), device=device)
    with drawing:
        return getattr(empty, method)(generator=generator).to(like.device)


def default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextmanager
def drawing_undone(*generators: torch.Generator | None):
    """Within: what raises leaves the states of `generators` as they were."""
    with drawing:
        states = [(g, g.get_state()) for g in generators if g is not None]
    try:
        yield
    except BaseException:
        with drawing:
            for generator, state in states:
                generator.set_state(state)
        raise
