"""What the adapters share: optional packages, settings that the other library does not have, and attacks in half precision."""

import importlib
import math
from collections.abc import Iterable
from copy import copy
from types import ModuleType

from torch import Tensor

from ..attacks._common import take_rows
from ..attacks.apgd import APGD
from ..attacks.fab import FAB
from ..attacks.square import Square
from ..predictions import predictions
from ..settings import Norm


def import_peer(module: str, package: str) -> ModuleType:
    """The `module` of a library that an adapter builds on; `package` is its name for pip.

    Raises:
        ImportError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").split(".")[0] == module.split(".")[0]:
            what = f"it adapts attacks to {package}, which is not installed: pip install {package}"
        else:
            what = f"{package} cannot be imported ({error}): mend its installation"
        raise ImportError(f"spat_kernels.compat.{module.split('.')[0]}: {what}", name=error.name) from error


def check_extras(name: str, settings: Iterable[str], known: type) -> None:
    """Raise TypeError unless the names in `settings` are among those of `known`, a TypedDict."""
    ours = known.__annotations__
    for setting in settings:
        if setting not in ours:
            raise TypeError(f"{name}() got an unexpected keyword argument {setting!r}: ours beside its own are {', '.join(ours)}")


def within_reach(eps: float | Tensor, norm: Norm, bounds: tuple[float, float], x: Tensor) -> float | Tensor:
    """`eps`, which the other library does not limit, or the radius of the ball that holds the whole box, if that is less."""
    width = bounds[1] - bounds[0]
    reach = {"linf": width, "l2": width * math.sqrt(x[0].numel()), "l1": width * x[0].numel()}[norm]
    return eps.clamp(max=reach) if isinstance(eps, Tensor) else min(eps, reach)


def attack_what_is_right(attack: APGD | FAB | Square, model, x: Tensor, y: Tensor) -> Tensor:
    """The images of `attack`, which leaves alone what is misclassified as it is: what is so in the attack's `precision` alone, it
    attacks without."""
    found = attack(model, x, y)
    rows = (found == x).flatten(1).all(1).nonzero()[:, 0]
    if attack.precision is None or not len(rows):
        return found
    with attack._prepared_gradient(model, x[rows], y[rows], -1) as (gradient, images, labels):
        towards_y = isinstance(attack, APGD) and attack.targeted
        rows = rows[(predictions(gradient.logits(images)) == labels) == towards_y]
    if len(rows):
        whole = copy(attack)
        whole.precision, whole.eps = None, take_rows(attack.eps, rows)
        found[rows] = whole(model, x[rows], y[rows])
    return found
