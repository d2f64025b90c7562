"""Targeted attacks: where the targets come from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...predictions import model_logits, predictions

TargetFunction = Callable[[Tensor, Tensor | None], Tensor | None]  # (images in [0, 1], labels) -> classes int64 [B]


def _as_labelled(images: Tensor, labels: Tensor | None) -> Tensor | None:
    return labels


class Targets:
    """The part of `Attack` that chooses targets."""

    attack: str
    model_of_pixels: Any
    supported_mode: list[str]
    attack_mode: str = "default"
    targeted: bool = False
    target_map_function: TargetFunction | None = None

    def get_mode(self) -> str:
        return self.attack_mode

    def set_mode_default(self) -> None:
        self.attack_mode, self.targeted, self.target_map_function = "default", False, None
        print("Attack mode is changed to 'default.'")

    def set_mode_targeted_by_function(self, target_map_function=None, quiet: bool = False) -> None:
        """Go to the classes target_map_function(images, labels), int64 [B]; without a function to `labels`."""
        self._set_targeted("custom", target_map_function or _as_labelled, quiet)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Go to the classes that calls are given as labels."""
        self._set_targeted("label", _as_labelled, quiet)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Go to classes drawn at random (by torch's generator) from all but the labels, or without labels the predictions."""
        self._set_targeted("random", self.get_random_target_label, quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Go to the class of the kth_min-smallest logit among the others."""
        if kth_min < 1:
            raise ValueError(f"kth_min={kth_min}: give at least 1, which is the least likely class")
        self._kth_min = kth_min
        self._set_targeted("least-likely", self.get_least_likely_label, quiet)

    def _set_targeted(self, kind: str, function, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError(f"Targeted mode is not supported. {self.attack} has none: use PGD")
        self.attack_mode, self.targeted, self.target_map_function = f"targeted({kind})", True, function
        if not quiet:
            print(f"Attack mode is changed to '{self.attack_mode}'.")

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor | None:
        if self.target_map_function is None:
            raise ValueError("the attack has no targets: call a set_mode_targeted method first")
        return self.target_map_function(inputs, labels)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = model_logits(self.model_of_pixels, inputs)
        labels = predictions(logits) if labels is None else labels
        drawn = (torch.rand(len(labels)) * (logits.shape[1] - 1)).long().to(labels.device)
        return drawn + (drawn >= labels)

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = model_logits(self.model_of_pixels, inputs)
        labels = predictions(logits) if labels is None else labels
        if self._kth_min >= logits.shape[1]:
            raise ValueError(f"kth_min={self._kth_min}: the model has {logits.shape[1]} classes: give at most one less")
        return logits.scatter(1, labels[:, None], torch.inf).argsort(1)[:, self._kth_min - 1]
