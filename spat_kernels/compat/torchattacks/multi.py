"""Several attacks in turn: MultiAttack and AutoAttack."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...checks import check_choice
from ...predictions import model_logits, predictions
from ...settings import ModelSettings
from .attack import Attack
from .seeded import APGD, APGDT, FAB, Square


def _on_all(name: str):
    """The method of that name of an attack and of all attacks in it."""

    def method(self, *args, **kwargs):
        for attack in (super(MultiAttack, self), *self.attacks):
            getattr(attack, name)(*args, **kwargs)

    return method


class MultiAttack(Attack):
    """Attacks on one model in turn, each on the images that are still classified as labelled."""

    def __init__(self, attacks: Sequence[Any], verbose=False):
        if len(attacks) < 2 or any(attack.model is not attacks[0].model for attack in attacks):
            raise ValueError(f"attacks: {len(attacks)} given: give at least two, on the same model")
        self.attacks, self.verbose = attacks, verbose
        self._counts: list[list[int]] | None = None  # in a `save`: how many images each call had, and had left after each attack
        super().__init__(type(self).__name__, attacks[0].model)

    set_model, set_device, set_model_training_mode = map(_on_all, ("set_model", "set_device", "set_model_training_mode"))
    set_normalization_used, _set_normalization_applied = map(_on_all, ("set_normalization_used", "_set_normalization_applied"))

    def forward(self, images, labels):
        if labels is None:
            raise ValueError("labels=None: several attacks need labels, to go on with what is still right")
        model, counts = self.model_of_pixels, [len(images)]
        found, left = images.clone(), torch.arange(len(images), device=images.device)
        for attack in self.attacks:
            if len(left):
                adversarial = self._attacked(attack, images[left], labels[left])
                broken = predictions(model_logits(model, adversarial)) != labels[left]
                found[left[broken]] = adversarial[broken]
                left = left[~broken]
            counts.append(len(left))
        if self._counts is not None:
            self._counts.append(counts)
        if self.verbose:
            print("Attack success rate: " + " | ".join(f"{rate:.2f} %" for rate in _success_rates([counts])))
        return found

    def _attacked(self, attack, images: Tensor, labels: Tensor) -> Tensor:
        """What an attack makes of `images`, both as `forward` has them."""
        if self.normalization_used is None:
            return self.to_type(attack(images, labels), "float")
        if isinstance(attack, Attack):  # all on one module
            attack.normalization_used, attack._on_pixels = self.normalization_used, self._on_pixels
            return attack.run(images, labels)
        attack._set_normalization_applied(False)
        try:
            return attack(images, labels)
        finally:
            attack._set_normalization_applied(self._normalization_applied)

    def save(
        self, data_loader, save_path=None, verbose=True, return_verbose=False, save_predictions=False, save_clean_inputs=False,
        save_type="float", *, save_clean_images=False,
    ):  # fmt: skip
        """As that of other attacks; with `return_verbose` the second value is the success rates in percent after each attack."""
        self._counts = []
        try:
            accuracy, distance, seconds = super().save(
                data_loader, save_path, verbose, True, save_predictions, save_clean_images or save_clean_inputs, save_type
            )
            return (accuracy, _success_rates(self._counts), distance, seconds) if return_verbose else None
        finally:
            self._counts = None


def _success_rates(counts: Sequence[Sequence[int]]) -> list[float]:
    images, *left = map(sum, zip(*counts, strict=True))
    return [100 - 100 * count / max(images, 1) for count in left]


class AutoAttack(MultiAttack):
    """With 10 steps, as in torchattacks: `steps=100` is AutoAttack as published, as are `spat_kernels.AutoAttack` and
    `compat.autoattack`. seed=None takes one from the clock. norm, eps, seed and n_classes can be changed, the version cannot."""

    def __init__(
        self, model, norm="Linf", eps=8 / 255, version="standard", n_classes=10, seed=None, verbose=False, *, steps=10,
        **settings: Unpack[ModelSettings],
    ):  # fmt: skip
        self.norm, self.eps, self.version, self.n_classes = norm, eps, version, n_classes
        self.seed = time.time_ns() % 2**31 if seed is None else seed
        common = {"norm": norm, "eps": eps, "seed": self.seed, **settings}
        many = {"steps": steps, **common}
        targeted = {"n_classes": n_classes, **many}
        ce, dlr = partial(APGD, model, loss="ce", **many), partial(APGD, model, loss="dlr", **many)
        apgdt, fabt = partial(APGDT, model, **targeted), partial(FAB, model, multi_targeted=True, **targeted)
        fab, square = partial(FAB, model, n_restarts=5, **targeted), partial(Square, model, **common)
        attacks = {
            "standard": (ce, apgdt, fabt, square),
            "plus": (partial(ce, n_restarts=5), partial(dlr, n_restarts=5), fab, square, apgdt, fabt),
            "rand": (partial(ce, eot_iter=20), partial(dlr, eot_iter=20)),
        }
        check_choice("version", version, attacks)
        super().__init__([attack() for attack in attacks[version]], verbose)

    def forward(self, images, labels):
        for attack in self.attacks:
            attack.norm, attack.eps, attack.seed = self.norm, self.eps, self.seed
            attack.n_target_classes = self.n_classes - 1
        return super().forward(images, labels)
