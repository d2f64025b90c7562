"""Sizes of the training images that change from epoch to epoch, as "128@1,192@21,224@41" says."""

import re

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .pictures import MIN_SIZE

Sizes = tuple[tuple[int, int], ...]  # (side, the epoch, counted from 1, from which on it holds), by rising epochs from 1 on


def parse_sizes(text: str | None) -> Sizes:
    """The sizes that `text` names; () for None.

    Raises:
        InputError: it is not of that form, does not begin with epoch 1, or a side is less than 8.
    """
    if text is None:
        return ()
    found = [re.fullmatch(r"(\d{1,6})@(\d{1,6})", part.strip()) for part in text.split(",")]
    sizes = tuple((int(part[1]), int(part[2])) for part in found if part)
    epochs = [epoch for _, epoch in sizes]
    if len(sizes) < len(found) or epochs[0] != 1 or epochs != sorted(set(epochs)) or min(sizes)[0] < MIN_SIZE:
        remedy = f"give sides of at least {MIN_SIZE}, each with the epoch from which on it holds, rising from 1: 128@1,224@41"
        raise InputError(f"--train-sizes {text[:80]}: {remedy}")
    return sizes


def side_in(sizes: Sizes, epoch: int) -> int | None:
    """The side in `epoch`, counted from 0; None without sizes."""
    return next((side for side, first in reversed(sizes) if first <= epoch + 1), None)


def resized(x: Tensor, side: int | None) -> Tensor:
    """Square images [B, C, H, W] in [0, 1] as [B, C, side, side], bilinear and antialiased, in their memory format; x itself
    where that is its size."""
    if side is None or x.shape[2:] == (side, side) or not len(x):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True).clamp_(0, 1)  # sums of weights round
