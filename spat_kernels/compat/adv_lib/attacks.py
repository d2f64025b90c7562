"""PGD, APGD and the fast gradient sign method, with adv_lib's arguments."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from ... import checks
from ...attacks import functional
from ...attacks._common import take_rows
from ...attacks.apgd import APGD
from ...attacks.pgd import PGD
from ...losses import LossLike, Margin
from ...rng import default_generator, rewound_on_error
from ...settings import AdapterSettings, Norm
from .._peer import attack_what_is_right, check_extras
from .last_success import LastSuccess, TargetedDLR, model_logits, wrong_or_clean

NORMS: dict[float, Norm] = {1: "l1", 2: "l2", math.inf: "linf"}


def pgd_linf(
    model, inputs: Tensor, labels: Tensor, ε: float | Tensor, targeted: bool = False, steps: int = 40, random_init: bool = True,
    restarts: int = 1, loss_function: str = "ce", relative_step_size: float = 0.01 / 0.3,
    absolute_step_size: float | None = None, callback=None, *, stop: Literal["success"] | None = None,
    **settings: Unpack[AdapterSettings],
) -> Tensor:  # fmt: skip
    """PGD in the L-infinity ball. Each restart is for what none before has broken. One seed gives adv_lib's images.

    Args:
        model: module or callable, x -> logits [B, K].
        inputs: [B, ...] in [0, 1].
        labels: int64 [B], the true classes, or with `targeted` those to go to.
        ε: radius, a number or [B].
        steps: how many iterates are looked at, the start among them.
        loss_function: "ce", "dl" (difference of logits) or "dlr" (difference of logits ratio).
        relative_step_size, absolute_step_size: a step in units of ε, or, if given, of x.
        callback: its `line("success", restart, share)` is called after each restart.
        stop: "success" takes the first iterate that is wrong instead of the last, and ends the attack on that image.

    Returns:
        Tensor: like `inputs`, the last iterate that is misclassified (or at its target); the image itself where there is none.

    Raises:
        TypeError, ValueError: an argument does not fit; the message calls ε eps.
    """
    losses: dict[str, LossLike] = {"ce": "ce", "dl": Margin(math.inf), "dlr": TargetedDLR() if targeted else "dlr"}
    checks.check_choice("loss_function", loss_function.lower(), losses)
    checks.check_choice("stop", stop, (None, "success"))
    checks.check_images(inputs)
    checks.check_labels(labels, inputs)
    checks.check_per_sample("ε", ε, inputs)
    kept = _checked("pgd_linf", settings) | {"targeted": targeted, "loss": losses[loss_function.lower()]}
    kept["random_start"] = random_init and steps > 0  # without a look at the start there is none
    adv_inputs, found = inputs.detach().clone(), torch.zeros_like(labels, dtype=torch.bool)
    with rewound_on_error(settings.get("generator"), default_generator(inputs.device)):
        for restart in range(restarts):
            rows = (~found).nonzero()[:, 0]
            x, y, radius, start = inputs.detach()[rows], labels[rows], take_rows(ε, rows), None
            kept["step_size"] = radius * relative_step_size if absolute_step_size is None else absolute_step_size
            attack: PGD
            if stop:
                attack = PGD(radius, steps=max(steps - 1, 0), stop=stop, **kept)
            else:
                attack = LastSuccess(radius, steps=steps, **kept)
                start = attack.draw_start(x) if random_init else None
            adv_inputs[rows], found[rows] = wrong_or_clean(
                attack(model, x, y, start=start), model, x, y, kept["bn_mode"], targeted
            )
            if callback:
                callback.line("success", restart + 1, found.float().mean())
            if found.all():
                break
    return adv_inputs


def apgd(
    model, inputs: Tensor, labels: Tensor, eps: float | Tensor, norm: float, targeted: bool = False, n_iter: int = 100,
    n_restarts: int = 1, loss_function: str = "dlr", eot_iter: int = 1, rho: float = 0.75, use_large_reps: bool = False,
    use_rs: bool = True, best_loss: bool = False, **settings: Unpack[AdapterSettings],
) -> Tensor:  # fmt: skip
    """Auto-PGD by `APGD`. norm: 1, 2 or inf. Of the iterates that are wrong one of high loss comes back, not the last. With
    `targeted`, labels are the classes to go to, and "dlr" compares them with the likeliest other class of the clean image.

    Raises:
        TypeError, ValueError: an argument does not fit, or asks for what `APGD` does not do.
    """
    _refuse(best_loss=best_loss)
    loop = {"targeted": targeted, "steps": n_iter, "restarts": n_restarts, "loss": loss_function, "eot": eot_iter, "rho": rho}
    return _apgd(model, inputs, labels, eps, norm, use_large_reps, use_rs, loop | _checked("apgd", settings))


def apgd_targeted(
    model, inputs: Tensor, labels: Tensor, eps: float | Tensor, norm: float, targeted: bool = False, n_iter: int = 100,
    n_restarts: int = 1, loss_function: str = "dlr", eot_iter: int = 1, rho: float = 0.75, use_large_reps: bool = False,
    use_rs: bool = True, num_targets: int | None = None, **settings: Unpack[AdapterSettings],
) -> Tensor:  # fmt: skip
    """`apgd` towards the `num_targets` likeliest wrong classes in turn, all by default. "dlr" compares them with the label."""
    _refuse(targeted=targeted)
    kept = _checked("apgd_targeted", settings)
    targets = model_logits(model, inputs[:1], kept["bn_mode"]).shape[1] - 1 if num_targets is None else num_targets
    loop = {"steps": n_iter, "restarts": n_restarts, "loss": loss_function, "eot": eot_iter, "rho": rho, "targets": targets}
    return _apgd(model, inputs, labels, eps, norm, use_large_reps, use_rs, loop | kept)


def fgsm(
    model, inputs: Tensor, labels: Tensor, ε: float | Tensor, targeted: bool = False, **settings: Unpack[AdapterSettings]
) -> Tensor:
    """One step of length ε from the image (arXiv 1412.6572), wrong or not. Not in adv_lib: `spat_kernels.fgsm` in its style."""
    return functional.fgsm(model, inputs, labels, ε, targeted=targeted, **_checked("fgsm", settings))


def _checked(function: str, settings: Any) -> dict[str, Any]:
    """`settings` and the default that is not that of `PGD`; those that mean nothing here are an error."""
    check_extras(function, settings, AdapterSettings)
    return {"bn_mode": "keep", **settings}


def _refuse(**flags: bool) -> None:
    for name, flag in flags.items():
        if flag:
            raise ValueError(f"{name}=True: APGD here has no such form: use adv_lib.attacks for it")


def _apgd(model, inputs: Tensor, labels: Tensor, eps, norm: Any, use_large_reps: bool, use_rs: bool, settings: Any) -> Tensor:
    if use_large_reps and not use_rs:
        raise ValueError("use_rs=False with use_large_reps=True: APGD starts at random: leave out use_rs")
    settings["loss"] = settings["loss"].lower()
    attack = APGD(eps, norm=NORMS.get(norm, norm), multi_eps=use_large_reps, **settings)
    x_adv = attack_what_is_right(attack, model, inputs, labels)
    return wrong_or_clean(x_adv, model, inputs, labels, attack.bn_mode, attack.targeted)[0]
