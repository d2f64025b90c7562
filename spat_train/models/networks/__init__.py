"""The networks by name: each file here holds one family and registers its names.

A network takes images [B, C, H, W] in [0, 1] to logits [B, K].
"""

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import nn

ImageShape = tuple[int, int, int]  # (C, H, W)
Variant = str | Callable[[ImageShape], str] | None
Make = TypeVar("Make", bound=Callable[..., nn.Module])


class Family(NamedTuple):
    """Networks whose names fit one pattern; `register` explains the fields."""

    usage: str
    pattern: re.Pattern
    make: Callable[..., nn.Module]
    names: tuple[str, ...]
    variant: Variant


FAMILIES: list[Family] = []


def register(usage: str, pattern: str | None = None, *, names: tuple[str, ...] = (), variant: Variant = None):
    """Decorate `make(num_classes, image_shape, ...) -> nn.Module`, a function or a class, with a name or a pattern of names.

    Args:
        usage: what error messages say about the names; where there is no `pattern`, the only name.
        pattern: a regular expression for whole names. Its named groups that match are further arguments of `make`, integers where
            they are digits.
        names: the usual names that fit `pattern`, for tests and for "did you mean".
        variant: what follows "/" where a name leaves it out, as text or as a function of the shape (C, H, W) of the images.
    """

    def add(make: Make) -> Make:
        FAMILIES.append(Family(usage, re.compile(pattern or re.escape(usage)), make, names or (usage,), variant))
        return make

    return add


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
