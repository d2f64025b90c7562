"""Logits, losses and input gradients of a model in eval mode and in full precision. The model is left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spat_kernels.model_state.borrow import borrowed
from spat_kernels.precision import tf32_switches
from spat_kernels.predictions import model_logits

CHUNK = 512  # images in one forward


@contextmanager
def _exact(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within: eval mode, no parameter gradients, and matrix products in full precision."""
    with borrowed(model, "eval"), tf32_switches("fp32", x.device.type):
        yield


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [B, K] on the CPU, of images [B, C, H, W]."""
    with _exact(model, x):
        return torch.cat([model_logits(model, images).cpu() for images in x.split(CHUNK)])


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """The loss of each image [B], from logits [B, K] and classes y, int64 [B]."""
    return F.cross_entropy(logits, y.to(logits.device), reduction="none")


def input_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy with respect to its pixels, like x [B, C, H, W]."""
    with torch.enable_grad(), _exact(model, x):
        found = []
        for images, labels in zip(x.detach().split(CHUNK), y.split(CHUNK), strict=True):
            images = images.clone().requires_grad_()
            found.append(torch.autograd.grad(F.cross_entropy(model(images), labels, reduction="sum"), images)[0])
    return torch.cat(found)
