"""Attacks of foolbox 3 on PyTorch models: `from spat_kernels.compat.foolbox import LinfPGD` instead of `from foolbox.attacks`.

Each class is a subclass of foolbox's own, with its arguments and defaults. Criteria, lists of epsilons, `repeat` and what a call
returns are foolbox's; the gradient steps are those of `spat_kernels.PGD`. From one seed both give the same images, except that
foolbox's gradient vanishes where a model is so certain that cross-entropy underflows. Ours does not.

Further keyword arguments are those of `PGD`: precision, input_gradient, fuse, graph, stop, bn_mode ("keep" unless given, as
foolbox attacks a model in the mode that it is in; statistics never change) and generator, with which random starts are ours.
L1 is left out, where foolbox steps along the whole gradient and we along its largest elements. So are Adam and momentum.
"""

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..attacks import pgd
from ..rng import default_generator, rewound_on_error
from ..settings import Norm, PGDExtras
from ._peer import import_peer, within_reach

foolbox: Any = import_peer("foolbox", "foolbox")
ep: Any = import_peer("eagerpy", "eagerpy")
descent: Any = foolbox.attacks.gradient_descent_base


class Arguments(PGDExtras, total=False):
    """Those of the attacks. The first four are foolbox's, of which FGSM and FGM have `random_start` alone."""

    rel_stepsize: float
    abs_stepsize: float | None
    steps: int
    random_start: bool


OURS = PGDExtras.__annotations__.keys()
LOOP = ("get_loss_fn", "get_optimizer", "value_and_grad", "normalize", "project")  # which foolbox's loop calls and ours does not


class _Fused(descent.BaseGradientDescent):
    """What is not foolbox's. Errors are those of `PGD`, and a TypeError for tensors that are not torch's or a changed loop."""

    settings: dict[str, Any] = {}  # on the object only where there are some: `repr` shows what it holds

    def __init__(self, **arguments: Unpack[Arguments]):
        given: dict[str, Any] = dict(arguments)
        settings = {name: given.pop(name) for name in OURS & given.keys()}
        super().__init__(**given)
        if settings:
            self.settings = settings
        self._attack(0.0, 0.0, (0.0, 1.0), targeted=False)  # so that wrong settings are errors here

    def run(self, model, inputs, criterion, *, epsilon: float, **kwargs):
        """Perturbed inputs, like `inputs`."""
        descent.raise_if_kwargs(kwargs)
        x, restore_type = ep.astensor_(inputs)
        y, targeted = self._classes(descent.get_criterion(criterion))
        if not isinstance(x, ep.PyTorchTensor):
            raise TypeError(f"model={type(model).__name__}: this attack is for PyTorch: use the one in foolbox.attacks")
        if own := [part for part in LOOP if getattr(type(self), part) is not getattr(super(_Fused, type(self)), part)]:
            raise TypeError(f"{type(self).__name__} has a {own[0]}, which is never called: derive it from foolbox.attacks")
        descent.verify_input_bounds(x, model)
        eps = within_reach(epsilon, self._norm, model.bounds, x.raw)  # the steps are as long as foolbox's
        attack, start = self._attack(eps, epsilon, model.bounds, targeted), None
        with rewound_on_error(default_generator(x.raw.device)):
            if self.random_start and "generator" not in self.settings:
                start = self.get_random_start(x, epsilon).clip(*model.bounds).raw
            return restore_type(ep.astensor(attack(as_module(model), x.raw, y.raw, start=start)))

    @property
    def _norm(self) -> Norm:
        return "l2" if self.distance is foolbox.distances.l2 else "linf"

    def _attack(self, eps: float | Tensor, epsilon: float, bounds: tuple[float, float], targeted: bool) -> pgd.PGD:
        step_size = self.rel_stepsize * epsilon if self.abs_stepsize is None else self.abs_stepsize
        loop = {"steps": self.steps, "step_size": step_size, "random_start": self.random_start}
        return pgd.PGD(eps, norm=self._norm, bounds=bounds, targeted=targeted, **loop, **{"bn_mode": "keep", **self.settings})

    def _classes(self, criterion) -> tuple[Any, bool]:
        """The classes to leave, or to go to; and whether it is the latter."""
        if isinstance(criterion, foolbox.Misclassification):
            return criterion.labels, False
        if hasattr(criterion, "target_classes") and not isinstance(self, (FGSM, FGM)):
            return criterion.target_classes, True
        raise ValueError(f"unsupported criterion {criterion!r}: use Misclassification, or TargetedMisclassification with PGD")


class LinfProjectedGradientDescentAttack(_Fused, foolbox.attacks.LinfProjectedGradientDescentAttack):
    """PGD in the L-infinity ball, 40 steps of epsilon / 30 from a random start (Madry et al., arXiv 1706.06083)."""


class LinfBasicIterativeAttack(_Fused, foolbox.attacks.LinfBasicIterativeAttack):
    """The same, 10 steps of epsilon / 5 from the image (Kurakin et al., arXiv 1607.02533)."""


class LinfFastGradientAttack(_Fused, foolbox.attacks.LinfFastGradientAttack):
    """The same, one step of epsilon from the image (Goodfellow et al., arXiv 1412.6572). Without targets."""


class L2ProjectedGradientDescentAttack(_Fused, foolbox.attacks.L2ProjectedGradientDescentAttack):
    """PGD in the L2 ball, 50 steps of epsilon / 40 from a random start."""


class L2BasicIterativeAttack(_Fused, foolbox.attacks.L2BasicIterativeAttack):
    """The same, 10 steps of epsilon / 5 from the image."""


class L2FastGradientAttack(_Fused, foolbox.attacks.L2FastGradientAttack):
    """The same, one step of epsilon from the image. Without targets."""


FGSM, FGM = LinfFastGradientAttack, L2FastGradientAttack
LinfPGD = PGD = LinfProjectedGradientDescentAttack
L2PGD = L2ProjectedGradientDescentAttack


class _Preprocessed(nn.Module):
    """A network behind foolbox's preprocessing."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, network: nn.Module, mean, std, flip_axis: int | None):
        super().__init__()
        self.network, self.flip_axis, self.training = network, flip_axis, False  # the network's mode is what counts
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if value is None else value.raw)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.flip_axis is None else torch.flip(x, (self.flip_axis,))
        x = x if self.mean is None else x - self.mean
        return self.network(x if self.std is None else x / self.std)


_modules: WeakKeyDictionary[Any, tuple[tuple, nn.Module]] = WeakKeyDictionary()  # kept, since plans belong to a module


def as_module(model):
    """A `foolbox.PyTorchModel` as an nn.Module, the same at each call; other models of foolbox as they are: as callables."""
    if type(model) is not foolbox.PyTorchModel:
        return model
    network, preprocessing = inspect.getclosurevars(model._model).nonlocals["model"], model._preprocess_args
    if all(part is None for part in preprocessing):
        return network
    if model not in _modules or _modules[model][0] is not preprocessing:  # `transform_bounds` may replace it
        _modules[model] = preprocessing, _Preprocessed(network, *preprocessing)
    return _modules[model][1]
