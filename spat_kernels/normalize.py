"""The normalisation of images, inside the model, so that attacks work on pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel, to stand before a network: `nn.Sequential(OrderedDict(normalize=..., model=network))`.

    Both are in the state dict, since weights are right for one normalisation only.

    Args:
        mean, std: one number for each channel, std positive.

    Raises:
        ValueError: they are not.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean={mean}, std={std}: give each channel one number in both, positive in std")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, C, H, W]."""
        return (x - self.mean) / self.std
