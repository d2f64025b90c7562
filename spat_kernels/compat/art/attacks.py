"""PGD, BIM and FGM. The docstring of the package says whose steps they take."""

from copy import copy
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from typing_extensions import Unpack

from ...attacks.pgd import PGD
from ...settings import Graph, ModelSettings, Stop
from .._peer import check_extras, import_peer, within_reach
from .classifier import NORMS, PACKAGE, BoxBeforeBallPGD, OnOurGradient, bounds_of, labels_of, loss_of, model_of, per_sample

evasion: Any = import_peer("art.attacks.evasion", PACKAGE)
utils: Any = import_peer("art.utils", PACKAGE)
PGDOfART: Any = evasion.ProjectedGradientDescentPyTorch


class PGDSettings(ModelSettings, total=False):
    """Keyword arguments of PGD and BIM that are not ART's."""

    graph: Graph  # not True where the steps are ART's
    stop: Stop | None  # where the steps are ours, in norm inf


class FastGradientMethod(evasion.FastGradientMethod):
    """FGM, with ART's arguments and results."""

    def __init__(
        self, estimator, norm=np.inf, eps=0.3, eps_step=0.1, targeted=False, num_random_init=0, batch_size=32, minimal=False,
        summary_writer=False, **settings: Unpack[ModelSettings],
    ):  # fmt: skip
        super().__init__(estimator, norm, eps, eps_step, targeted, num_random_init, batch_size, minimal)
        self.settings = _checked(self, settings, ModelSettings, summary_writer)

    def generate(self, x, y=None, **kwargs):
        return super(FastGradientMethod, _on_our_gradient(self)).generate(x, y, **kwargs)


class ProjectedGradientDescent(PGDOfART):
    """PGD, with ART's arguments and results.

    Of `num_random_init` starts the last successful one counts, or else the first. `mask` says by 0 which elements are kept; what
    else it holds, scales random starts alone.
    """

    attack_params = evasion.ProjectedGradientDescent.attack_params
    _estimator_requirements = evasion.ProjectedGradientDescent._estimator_requirements

    def __init__(
        self, estimator, norm=np.inf, eps=0.3, eps_step=0.1, decay=None, max_iter=100, targeted=False, num_random_init=0,
        batch_size=32, random_eps=False, summary_writer=False, verbose=True, **settings: Unpack[PGDSettings],
    ):  # fmt: skip
        # The class above it would use the estimator before it is checked.
        super(PGDOfART, self).__init__(
            estimator, norm, eps, eps_step, decay, max_iter, targeted, num_random_init, batch_size, random_eps, verbose=verbose
        )
        self.settings = _checked(self, settings, PGDSettings, summary_writer)

    def generate(self, x, y=None, **kwargs):
        mask = self._get_mask(x, **kwargs)
        self._check_compatibility_input_and_eps(x)
        self._random_eps()
        attack, images = _on_our_gradient(self), x.astype(np.float32)
        targets = attack._set_targets(images, y).astype(np.float32)
        mask = None if mask is None else np.broadcast_to(mask, x.shape).astype(np.float32)
        # ART counts a start as successful where the class is no more that of the clean image, whatever the label.
        clean = attack._classes(images) if self.num_random_init > 1 and not self.targeted else None
        adv = images.copy()
        for first in tqdm(range(0, len(x), self.batch_size), desc="PGD - Batches", leave=False, disable=not self.verbose):
            rows = slice(first, first + self.batch_size)
            lengths = [v[rows] if np.ndim(v) == x.ndim and len(v) == len(x) else v for v in (self.eps, self.eps_step)]
            batch = [None if v is None else torch.from_numpy(v[rows]) for v in (images, targets, mask)]
            adv[rows] = attack._generate_batch(*batch, *lengths)
            for _ in range(1, self.num_random_init):
                found = attack._generate_batch(*batch, *lengths)
                classes = attack._classes(found)
                won = classes == targets[rows].argmax(1) if clean is None else classes != clean[rows]
                adv[rows][won] = found[won]
        return adv

    def _classes(self, x):
        return self.estimator.predict(x, batch_size=self.batch_size).argmax(1)

    def _generate_batch(self, x, targets, mask, eps, eps_step):
        """One run on a batch of tensors on the CPU, by an attack `_on_our_gradient`. float32 [B, ...], an array."""
        ball = self._ball(x, mask, eps, eps_step)
        if ball is None:
            return super()._generate_batch(x, targets, mask, eps, eps_step)
        classifier = self.estimator.classifier
        start = None
        if self.num_random_init and self.max_iter:
            radius = np.broadcast_to(eps, x.shape).reshape(len(x), -1) if isinstance(eps, np.ndarray) else eps
            noise = utils.random_sphere(len(x), x[0].numel(), radius, self.norm).reshape(x.shape)
            start = (x + torch.as_tensor(noise, dtype=x.dtype)).clamp_(*ball["bounds"]).to(classifier.device)
        attack = (PGD if ball["norm"] == "linf" else BoxBeforeBallPGD)(
            **ball, loss=loss_of(classifier), steps=self.max_iter, random_start=False, targeted=self.targeted, **self.settings
        )
        labels = labels_of(classifier, targets)
        return attack(model_of(classifier), x.to(classifier.device), labels, start=start).cpu().numpy()

    def _ball(self, x, mask, eps, eps_step) -> dict[str, Any] | None:
        """Arguments of `PGD`; None where the steps must be ART's."""
        ball: dict[str, Any] = {
            "eps": per_sample(eps, x),
            "step_size": per_sample(eps_step, x),
            "bounds": bounds_of(self.estimator),
        }
        ours = all(value is not None for value in ball.values()) and mask is None and self.decay is None
        norm = NORMS.get(self.norm) if ours else None
        fits = {"graph": norm in ("linf", "l2") or self.settings.get("graph") is not True, "stop": norm == "linf"}
        for name, value in self.settings.items():
            if value and not fits.get(name, True):
                raise ValueError(f"{name}={value!r} is not for norm={self.norm}, a mask, decay or values by pixel: leave it out")
        if norm not in ("linf", "l2"):
            return None
        return {**ball, "norm": norm, "eps": within_reach(ball["eps"], norm, ball["bounds"], x)}


ProjectedGradientDescentPyTorch = ProjectedGradientDescent


class BasicIterativeMethod(ProjectedGradientDescent):
    """PGD in norm inf without a random start."""

    def __init__(
        self, estimator, eps=0.3, eps_step=0.1, max_iter=100, targeted=False, batch_size=32, verbose=True,
        **settings: Unpack[PGDSettings],
    ):  # fmt: skip
        super().__init__(estimator, np.inf, eps, eps_step, None, max_iter, targeted, 0, batch_size, verbose=verbose, **settings)


def _checked(attack, settings, known: type, summary_writer):
    """The `settings` of an attack, after what it cannot do has raised an error."""
    check_extras(type(attack).__name__, settings, known)
    if summary_writer:
        raise ValueError(f"summary_writer={summary_writer!r}: gradients are not recorded here: leave it out")
    model_of(attack.estimator), loss_of(attack.estimator)
    PGD(0.0, **settings)
    return settings


def _on_our_gradient(attack):
    """A copy of an attack, for one call of its `generate`."""
    attack = copy(attack)
    attack._estimator = OnOurGradient(attack.estimator, attack.settings)
    return attack
