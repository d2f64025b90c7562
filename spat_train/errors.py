"""Errors that a user can mend, and the checks that several commands share."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeVar

import torch

T = TypeVar("T")
MOST = 4000  # characters of a message


class InputError(ValueError):
    """An argument does not fit. The message is one line: argument, value, remedy."""


class InUseError(InputError):
    """Another process is at work in the folder."""


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Within, a ValueError becomes an InputError about `what`."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """`text`, perhaps the name of a file or class, in one line; what files cannot hold or terminals obey as "\\x1b"."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A message as it is printed: names in files of others may hold line breaks, or codes that terminals obey."""
    return printable(text)[:MOST]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch's allocators, the driver, or a library that reports it as a status ran out of memory."""
    texts = "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question: "did you mean fgsm or fgsm-rs? ", or "" where none is near."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}? " if near else ""


def lookup(kind: str, name: str, known: Mapping[str, T], remedy: str = "") -> T:
    """`known[name]`; `kind` says what it is called in the message: "table", "--preset".

    Raises:
        InputError: there is none of that name; the message has the nearest, and the `remedy`. Default: all names.
    """
    if name not in known:
        raise InputError(f"{kind} {name}: there is none: {did_you_mean(name, known)}{remedy or 'there are ' + ', '.join(known)}")
    return known[name]


def check_eps(option: str, value: float | None, least: float = 0.5) -> None:
    """Raise InputError unless `value`, a length in 1/255, is in [least, 255] or None."""
    if value is not None and not least <= value <= 255:
        raise InputError(f"{option} {value:g}: it is in 1/255, from {least:g} to 255 (8 means 8/255, and 76.5 is 0.3)")


def check_seed(value: int, option: str = "--seed") -> None:
    if not 0 <= value < 2**31:
        raise InputError(f"{option} {value}: give an integer from 0 to 2**31 - 1")


def check_count(option: str, value: int | None, least: int = 1) -> None:
    """Raise InputError unless `value` is at least `least`, or None."""
    if value is not None and value < least:
        raise InputError(f"{option} {value}: give at least {least}")
