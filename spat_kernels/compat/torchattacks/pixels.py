"""Images as calls take and return them: in [0, 1], normalised, or uint8."""

from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice

ROUNDING = 1e-4  # by which images that were normalised may leave [0, 1] in fp32


def to_type(inputs: Tensor, type: str) -> Tensor:
    """Images in [0, 1] as uint8 ("int"), rounded to the nearest; uint8 in [0, 1] ("float")."""
    check_choice("type", type, ("float", "int"))
    if type == "int":
        return (inputs * 255).round().to(torch.uint8) if inputs.is_floating_point() else inputs
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


class Pixels:
    """The part of `Attack` that normalises."""

    to_type = staticmethod(to_type)
    normalization_used: dict[str, Tensor] | None = None
    return_type: str = "float"
    _normalization_applied: bool | None = None
    _on_pixels: tuple[tuple, Any] = (None, None, None), None  # what the model of pixels is made of, and it

    def set_normalization_used(self, mean, std) -> None:
        """Say that images are normalised, and by what: a number for each channel. They are attacked in [0, 1]."""
        numbers = (("mean", mean), ("std", std))
        self.normalization_used = {n: torch.as_tensor(v).detach().clone().view(1, -1, 1, 1) for n, v in numbers}
        self._set_normalization_applied(True)

    def _set_normalization_applied(self, flag: bool) -> None:
        self._normalization_applied = flag

    def _numbers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalization_used is None:
            raise ValueError("there is no normalisation: call set_normalization_used(mean, std) first")
        return tuple(self.normalization_used[name].to(images) for name in ("mean", "std"))  # type: ignore[return-value]

    def normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._numbers(inputs)
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._numbers(inputs)
        return inputs * std + mean

    def set_return_type(self, type: str) -> None:
        """Return images in [0, 1] ("float") or as uint8 ("int"), as in torchattacks before 3.5."""
        check_choice("type", type, ("float", "int"))
        self.return_type = type

    def _as_pixels(self, inputs: Tensor) -> Tensor:
        """Images in [0, 1] of those that a call takes."""
        if not inputs.is_floating_point():
            return self.to_type(inputs, "float")
        images = self.inverse_normalize(inputs) if self._normalization_applied else inputs
        inside = images.clamp(0, 1)
        return torch.where((images - inside).abs() < max(ROUNDING, torch.finfo(images.dtype).eps), inside, images)
