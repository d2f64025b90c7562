"""Attacks of the Adversarial Robustness Toolbox (package adversarial-robustness-toolbox) on a `PyTorchClassifier`.

    from spat_kernels.compat.art import ProjectedGradientDescent  # instead of: from art.attacks.evasion import ...
    x_adv = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=10, precision="bf16").generate(x, y)

Arguments, their checks, `set_params`, random numbers (from NumPy's global generator) and the float32 arrays that come back are
ART's. The passes of the model are those of `spat_kernels`, and so are the steps where it has them:

PGD, BIM        `spat_kernels.PGD` for norm inf and 2, in CUDA graphs too. A mask, decay, another norm, and eps or clip_values that
                differ within an image take ART's own steps on our gradient.
FGM             ART's own step on our gradient.
AutoAttack      `spat_kernels.AutoAttack`: APGD-CE, APGD-T, FAB-T, Square; with targeted=True its version="plus". (ART runs APGD-CE,
                APGD-DLR, DeepFool, Square.) If `attacks` are given, these run as in ART.

The classifier's loss must be cross-entropy (smoothed or weighted, too), NLLLoss or MultiMarginLoss, and its defences PyTorch code.
Other than in ART, the mode and the gradients of the model stay as they were. Each class takes further settings as keywords, as
listed in `Settings`, `PGDSettings` and `AutoAttackSettings`; `spat_kernels.PGD` and `AutoAttack` say what they mean.
"""

from copy import copy
from typing import Any, TypedDict

import numpy as np
import torch
from tqdm.auto import tqdm
from typing_extensions import Unpack

from ..attacks.autoattack import AutoAttack as OurAutoAttack
from ..attacks.pgd import PGD
from ..settings import BNMode, Fuse, GradientPath, Graph, Norm, Precision, Stop, Version
from ._art import PACKAGE, BoxBeforeBallPGD, OnOurGradient, bounds_of, labels_of, loss_of, model_of, per_sample
from ._peer import import_peer

evasion: Any = import_peer("art.attacks.evasion", PACKAGE)
utils: Any = import_peer("art.utils", PACKAGE)
NORMS: dict[object, Norm] = {np.inf: "linf", "inf": "linf", 2: "l2", 1: "l1"}


class Settings(TypedDict, total=False):
    precision: Precision | None
    input_gradient: GradientPath
    fuse: Fuse
    bn_mode: BNMode


class PGDSettings(Settings, total=False):
    graph: Graph  # True is an error where the steps are ART's
    stop: Stop | None  # with norm inf alone


class AutoAttackSettings(Settings, total=False):
    graph: Graph
    version: Version | tuple[str, ...]
    exhaustive: bool
    steps: int
    queries: int
    seed: int


class FastGradientMethod(evasion.FastGradientMethod):
    """FGM, with ART's arguments and results: `minimal`, masks and all norms too."""

    def __init__(
        self, estimator, norm=np.inf, eps=0.3, eps_step=0.1, targeted=False, num_random_init=0, batch_size=32, minimal=False,
        summary_writer=False, **settings: Unpack[Settings],
    ):  # fmt: skip
        super().__init__(estimator, norm, eps, eps_step, targeted, num_random_init, batch_size, minimal)
        self.settings = _checked(self, settings, Settings, summary_writer)

    def generate(self, x, y=None, **kwargs):
        return super(FastGradientMethod, _on_our_gradient(self)).generate(x, y, **kwargs)


class ProjectedGradientDescent(evasion.ProjectedGradientDescentPyTorch):
    """PGD, with ART's arguments and results: of `num_random_init` starts the last successful one counts, else the first."""

    attack_params = evasion.ProjectedGradientDescent.attack_params
    _estimator_requirements = evasion.ProjectedGradientDescent._estimator_requirements

    def __init__(
        self, estimator, norm=np.inf, eps=0.3, eps_step=0.1, decay=None, max_iter=100, targeted=False, num_random_init=0,
        batch_size=32, random_eps=False, summary_writer=False, verbose=True, **settings: Unpack[PGDSettings],
    ):  # fmt: skip
        # The next class but one: the next one uses the estimator before that has been checked.
        super(evasion.ProjectedGradientDescentPyTorch, self).__init__(
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
        # What must be left behind for a restart to count as successful, as ART has it: the class predicted without an attack.
        left = None if self.targeted or self.num_random_init < 2 else attack._classes(images)
        adv = images.copy()
        for first in tqdm(range(0, len(x), self.batch_size), desc="PGD - Batches", leave=False, disable=not self.verbose):
            rows = slice(first, first + self.batch_size)
            eps, eps_step = (
                v[rows] if isinstance(v, np.ndarray) and v.ndim == x.ndim and len(v) == len(x) else v
                for v in (self.eps, self.eps_step)
            )
            batch = [None if v is None else torch.from_numpy(v[rows]) for v in (images, targets, mask)]
            adv[rows] = attack._generate_batch(*batch, eps, eps_step)
            for _ in range(1, self.num_random_init):
                found = attack._generate_batch(*batch, eps, eps_step)
                classes = attack._classes(found)
                won = classes == targets[rows].argmax(1) if left is None else classes != left[rows]
                adv[rows][won] = found[won]
        return adv

    def _classes(self, x):
        return self.estimator.predict(x, batch_size=self.batch_size).argmax(1)

    def _generate_batch(self, x, targets, mask, eps, eps_step):
        """One run on a batch, on a copy of the attack `_on_our_gradient`. Tensors, and float32 [B, ...] as an array."""
        norm, bounds, settings = NORMS.get(self.norm), bounds_of(self.estimator), self.settings
        radius, step_size = per_sample(eps, x), per_sample(eps_step, x)
        steps_of_art = norm not in ("linf", "l2") or self.decay is not None or mask is not None
        steps_of_art = steps_of_art or any(v is None for v in (bounds, radius, step_size))
        if settings.get("stop") and (steps_of_art or norm == "l2"):
            raise ValueError(
                f"stop={settings['stop']!r} is for norm=np.inf, without mask, decay or arrays that vary within an image"
            )
        if steps_of_art and settings.get("graph") is True:
            raise ValueError(
                "graph=True: with a mask, decay, norm 1, or arrays that vary within an image there is none: use 'auto'"
            )
        if steps_of_art:
            return super()._generate_batch(x, targets, mask, eps, eps_step)
        attack = (PGD if norm == "linf" else BoxBeforeBallPGD)(
            radius, loss=loss_of(self.estimator), steps=self.max_iter, step_size=step_size, random_start=False,
            targeted=self.targeted, norm=norm, bounds=bounds, **settings,
        )  # fmt: skip
        start = None
        if self.num_random_init and self.max_iter:
            size, values = len(x), x[0].numel()
            eps = np.broadcast_to(eps, x.shape).reshape(size, values) if isinstance(eps, np.ndarray) else eps
            noise = utils.random_sphere(size, values, eps, self.norm).reshape(x.shape).astype(np.float32)
            start = (x + torch.from_numpy(noise)).clamp_(*bounds).to(self.estimator.device)
        x, labels = x.to(self.estimator.device), labels_of(self.estimator, targets)
        return attack(model_of(self.estimator.classifier), x, labels, start=start).cpu().numpy()


ProjectedGradientDescentPyTorch = ProjectedGradientDescent


class BasicIterativeMethod(ProjectedGradientDescent):
    """PGD in norm inf without a random start."""

    def __init__(
        self, estimator, eps=0.3, eps_step=0.1, max_iter=100, targeted=False, batch_size=32, verbose=True,
        **settings: Unpack[PGDSettings],
    ):  # fmt: skip
        super().__init__(
            estimator, np.inf, eps, eps_step, None, max_iter, targeted, 0, batch_size, False, False, verbose, **settings
        )


class AutoAttack(evasion.AutoAttack):
    """AutoAttack, with ART's arguments. `best_attacks` holds the index in `attacks` of what broke an image; -1: nothing did; -2: it
    was misclassified before.

    Raises:
        ValueError: there are no `attacks`, and eps_step is not its default, since APGD chooses its steps; parallel_pool_size is
            not 0; or the classifier has no clip_values, or changes its outputs afterwards.
    """

    def __init__(
        self, estimator, norm=np.inf, eps=0.3, eps_step=0.1, attacks=None, batch_size=32, estimator_orig=None, targeted=False,
        parallel_pool_size=0, **settings: Unpack[AutoAttackSettings],
    ):  # fmt: skip
        super().__init__(
            estimator, norm, eps, eps_step, attacks or ["ours"], batch_size, estimator_orig, targeted, parallel_pool_size
        )
        self.settings = _checked_names(self, settings, AutoAttackSettings)
        if not attacks:
            self.attacks = list(self._ours().attacks)
        elif settings:
            raise ValueError(f"{next(iter(settings))} is no setting of the attacks that are given: make them with it")

    def generate(self, x, y=None, **kwargs):
        if not isinstance(self.attacks[0], str):
            return super().generate(x, y, **kwargs)
        if kwargs.get("mask") is not None:
            raise ValueError("mask: AutoAttack takes none: use ProjectedGradientDescent")
        attack, images = self._ours(), x.astype(np.float32)
        classifier, original = OnOurGradient(self.estimator), OnOurGradient(self.estimator_orig)
        if y is None:
            y = classifier.predict(images, batch_size=self.batch_size).argmax(1)
        labels = utils.check_and_transform_label_format(y, nb_classes=classifier.nb_classes).argmax(1)
        rows = (original.predict(images).argmax(1) == labels).nonzero()[0]
        batch = (torch.as_tensor(values[rows], device=classifier.device) for values in (images, labels))
        result = attack.run(model_of(self.estimator), *batch)
        images[rows], broken_by = result.x_adv.cpu().numpy(), result.broken_by.cpu().numpy()
        self.best_attacks = np.full(len(images), self.SAMPLE_MISCLASSIFIED)
        self.best_attacks[rows] = np.select(
            [broken_by > 0, broken_by < 0], [broken_by - 1, self.SAMPLE_DEFAULT], self.SAMPLE_MISCLASSIFIED
        )
        return images

    def _ours(self) -> OurAutoAttack:
        model_of(self.estimator)
        bounds = None if self.estimator.clip_values is None else bounds_of(self.estimator)
        if bounds is None or self.estimator.postprocessing_defences:
            raise ValueError(
                f"estimator has clip_values={self.estimator.clip_values} and postprocessing_defences="
                f"{self.estimator.postprocessing_defences}: AutoAttack needs clip_values=(lo, hi), two numbers, and none of these"
            )
        if self.eps_step != 0.1:
            raise ValueError(f"eps_step={self.eps_step}: APGD chooses its steps itself, beginning with 2 eps: leave it out")
        if self.parallel_pool_size:
            raise ValueError(f"parallel_pool_size={self.parallel_pool_size}: there are no processes here: leave it out")
        settings = {"version": "plus" if self.targeted else "standard", **self.settings}
        return OurAutoAttack(self.eps, norm=NORMS[self.norm], bounds=bounds, batch_size=self.batch_size, **settings)


def _checked(attack, settings, names, summary_writer):
    """The `settings` of an attack, after what it cannot do has raised an error."""
    _checked_names(attack, settings, names)
    if summary_writer:
        raise ValueError(f"summary_writer={summary_writer!r}: the gradients of each step are not recorded here: leave it out")
    model_of(attack.estimator), loss_of(attack.estimator)
    PGD(0.0, **settings)
    return settings


def _checked_names(attack, settings, names):
    for name in settings.keys() - names.__optional_keys__:
        raise TypeError(
            f"{name} is no argument of {type(attack).__name__}: it has ART's, and {', '.join(sorted(names.__optional_keys__))}"
        )
    return settings


def _on_our_gradient(attack):
    """A copy of an attack, for one call of its `generate`."""
    attack = copy(attack)
    attack._estimator = OnOurGradient(attack.estimator, attack.settings)
    return attack
