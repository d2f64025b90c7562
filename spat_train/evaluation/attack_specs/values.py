"""How the settings of an attack are read: functions text -> value, which raise a ValueError that says what to give."""

import math
from collections.abc import Callable
from dataclasses import field
from fractions import Fraction
from typing import Any

from spat_kernels import losses


def number(text: str) -> float:
    """0.1 or 1/10, finite and at least 0."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("give a number of at least 0, such as 0.1 or 1/10")
    return value


def share_of_eps(text: str) -> float:
    if text.endswith("/255"):
        raise ValueError("it is in units of eps, not in 1/255: give 1/4 for a quarter of eps")
    return number(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("give a whole number")
    return int(text)


def positive(text: str) -> int:
    if count(text) < 1:
        raise ValueError("give at least 1")
    return int(text)


def choice(*choices: str) -> Callable[[str], str]:
    """Reads one of `choices`, in capitals or not, unless choices differ by that alone."""

    def read(text: str) -> str:
        found = [text] if text in choices else [each for each in choices if each.lower() == text.lower()]
        if len(found) != 1:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return found[0]

    return read


def loss_name(text: str) -> str:
    return choice(*losses.names())(text)


def read_setting(key: str, read: Callable[[str], Any], text: str) -> Any:
    """`read(text)`, whose errors name the setting."""
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{key}={text}: {error}") from error


def setting(default: object, read: Callable[[str], object]) -> Any:
    """A dataclass field that the grammar reads by `read`."""
    return field(default=default, metadata={"read": read})
