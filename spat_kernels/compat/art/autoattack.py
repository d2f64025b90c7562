"""ART's AutoAttack by ours."""

from typing import Any

import numpy as np
import torch

from ...attacks.autoattack import AutoAttack as OurAutoAttack
from .._peer import import_peer
from .classifier import NORMS, PACKAGE, OnOurGradient, bounds_of, model_of

evasion: Any = import_peer("art.attacks.evasion", PACKAGE)
utils: Any = import_peer("art.utils", PACKAGE)


class AutoAttack(evasion.AutoAttack):
    """AutoAttack, with ART's arguments.

    `best_attacks` holds the index in `attacks` of what broke an image; -1: nothing did; -2: it was misclassified without.

    Raises:
        ValueError: without `attacks` there is nothing that eps_step, parallel_pool_size or a mask could do; or the classifier has
            no clip_values, or changes its outputs afterwards.
    """

    def __init__(
        self, estimator, norm=np.inf, eps=0.3, eps_step=0.1, attacks=None, batch_size=32, estimator_orig=None, targeted=False,
        parallel_pool_size=0, **settings: Any,
    ):  # fmt: skip
        super().__init__(
            estimator, norm, eps, eps_step, attacks or ["ours"], batch_size, estimator_orig, targeted, parallel_pool_size
        )
        self.settings = settings
        if not attacks:
            self.attacks = list(self._ours().attacks)
        elif settings:
            raise ValueError(f"{next(iter(settings))} goes to the attacks themselves: make them with it")

    def generate(self, x, y=None, **kwargs):
        if not isinstance(self.attacks[0], str):
            return super().generate(x, y, **kwargs)
        if kwargs.get("mask") is not None:
            raise ValueError("mask: AutoAttack takes none: use ProjectedGradientDescent")
        attack, images = self._ours(), x.astype(np.float32)
        classifier, original = OnOurGradient(self.estimator, {}), OnOurGradient(self.estimator_orig, {})
        if y is None:
            y = classifier.predict(images, batch_size=self.batch_size).argmax(1)
        labels = utils.check_and_transform_label_format(y, nb_classes=classifier.nb_classes).argmax(1)
        rows = np.flatnonzero(original.predict(images).argmax(1) == labels)
        batch = (torch.as_tensor(values[rows], device=classifier.device) for values in (images, labels))
        result = attack.run(model_of(self.estimator), *batch)
        images[rows], broken_by = result.x_adv.cpu().numpy(), result.broken_by.cpu().numpy()
        self.attacks = list(attack.attacks)  # `targeted` may have been changed
        self.best_attacks = np.full(len(images), self.SAMPLE_MISCLASSIFIED)
        by_result = np.array([self.SAMPLE_MISCLASSIFIED, *range(len(self.attacks)), self.SAMPLE_DEFAULT])  # -1 is the last
        self.best_attacks[rows] = by_result[broken_by]
        return images

    def _ours(self) -> OurAutoAttack:
        model_of(self.estimator)
        clip_values, defences = self.estimator.clip_values, self.estimator.postprocessing_defences
        bounds = None if clip_values is None else bounds_of(self.estimator)
        if bounds is None or defences:
            raise ValueError(
                f"estimator has {clip_values=} and postprocessing_{defences=}: give it clip_values=(lo, hi), and no such defences"
            )
        if self.eps_step != 0.1:
            raise ValueError(f"eps_step={self.eps_step}: APGD chooses its steps itself, from 2 eps on: leave it out")
        if self.parallel_pool_size:
            raise ValueError(f"parallel_pool_size={self.parallel_pool_size}: all runs in one process here: leave it out")
        settings = {"version": "plus" if self.targeted else "standard", **self.settings}
        return OurAutoAttack(self.eps, norm=NORMS[self.norm], bounds=bounds, batch_size=self.batch_size, **settings)
