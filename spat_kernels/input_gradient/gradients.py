"""Gradients on their way back through a plan: what each value's readers contribute to it."""

import torch
from torch import Tensor

from .steps import Step

Grads = list[list[tuple[Tensor, bool]]]  # for each value: what its readers contribute, and whether that memory may be written to


def rows(t: Tensor) -> Tensor:
    """Images [B, C, H, W] with their channels innermost in memory; other values contiguous."""
    if t.ndim != 4:
        return t.contiguous()
    t = t.contiguous(memory_format=torch.channels_last)
    if len(t) == 1 and t.stride(0) != t.numel():  # any stride does for one image, but ATen takes others for another layout
        t = t.permute(0, 2, 3, 1).view(1, *t.shape[2:], -1).permute(0, 3, 1, 2)
    return t


def flat(t: Tensor, channels: int) -> Tensor:
    """`t` as contiguous [rows, C], where dimension `channels` of a sample is C. It is a copy only where that is not innermost."""
    moved = t.movedim(channels + 1, -1)
    return moved.reshape(-1, moved.shape[-1]).contiguous()


def unflat(r: Tensor, shape: tuple[int, ...], channels: int) -> Tensor:
    """[rows, C] as samples of `shape`."""
    rest = (*shape[:channels], *shape[channels + 1 :])
    return r.view(-1, *rest, shape[channels]).movedim(-1, channels + 1)


def take(grads: Grads, value: int) -> tuple[Tensor, bool]:
    """The gradient of `value`, summed over its readers, and whether its memory may be written to. It is dropped from `grads`."""
    contributions, grads[value] = grads[value], []
    return sum_(contributions)


def sum_(contributions: list[tuple[Tensor, bool]]) -> tuple[Tensor, bool]:
    if len(contributions) == 1:
        return contributions[0]
    total = contributions[0][0] + contributions[1][0]
    for grad, _ in contributions[2:]:
        total += grad
    return total, True


def give(step: Step, dx: Tensor, fresh: bool, grads: Grads) -> None:
    """The gradient of the sum, before scale and shift, is that of each of its inputs."""
    for j in step.inputs:
        grads[j].append((dx, fresh and len(step.inputs) == 1))
