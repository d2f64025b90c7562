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
        numbers = [torch.as_tensor(values, dtype=torch.float32).detach().clone().view(-1, 1, 1) for values in (mean, std)]
        same = numbers[0].shape == numbers[1].shape and numbers[0].numel() > 0
        known = same and not numbers[0].is_meta  # on meta there are no values to check
        if not same or (known and (not torch.stack(numbers).isfinite().all() or (numbers[1] <= 0).any())):
            raise ValueError(f"mean={mean}, std={std}: give each channel one number in both, positive in std")
        self.register_buffer("mean", numbers[0])
        self.register_buffer("std", numbers[1])

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, C, H, W]."""
        return (x - self.mean) / self.std
