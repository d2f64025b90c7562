"""What the attacks are made of: a module, a loss and labels from ART's `PyTorchClassifier`, and our gradient for ART's
code."""

from collections.abc import Mapping
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ... import ops
from ...attacks.early_stop import EarlyStop
from ...attacks.pgd import PGD
from ...attacks.pgd_run import PGDRun
from ...balls import L2Ball
from ...cuda_graphs.run import Batch
from ...interrupts import deferred
from ...losses import LabelSmoothedCE, LossLike
from ...model_state.borrow import borrowed
from ...normalize import Normalize
from ...settings import Norm
from .._peer import import_peer

PACKAGE = "adversarial-robustness-toolbox"
NORMS: dict[object, Norm] = {np.inf: "linf", "inf": "linf", 2: "l2", 1: "l1"}
EVERYWHERE = (-float("inf"), float("inf"))
PyTorchClassifier: Any = import_peer("art.estimators.classification", PACKAGE).PyTorchClassifier
PreprocessorPyTorch: Any = import_peer("art.defences.preprocessor.preprocessor", PACKAGE).PreprocessorPyTorch
standardisation: Any = import_peer("art.preprocessing.standardisation_mean_std", PACKAGE)
_models: WeakKeyDictionary = WeakKeyDictionary()  # by classifier: the parts that lead to its outputs, and the module made of them


def model_of(classifier) -> nn.Module:
    """From raw images to the outputs of a classifier. The same module each time, since plans and captures belong to a module: the
    user's own, or one around it if there is preprocessing.

    Raises:
        TypeError, ValueError: the classifier does not compute its gradient through PyTorch alone.
    """
    kind = type(classifier)
    if not isinstance(classifier, PyTorchClassifier) or kind.loss_gradient is not PyTorchClassifier.loss_gradient:
        raise TypeError(f"estimator is a {kind.__name__}: give a PyTorchClassifier, or use the attack in art.attacks.evasion")
    if classifier.use_amp:
        raise ValueError("estimator has use_amp=True: leave it out, and give the attack precision='bf16' or 'fp16'")
    for operation in classifier.preprocessing_operations:
        if not isinstance(operation, PreprocessorPyTorch) and not _is_standardisation(operation):
            raise ValueError(
                f"estimator has the preprocessing {type(operation).__name__}, which is NumPy code: use its PyTorch form, or the "
                "attack in art.attacks.evasion"
            )
    wrapped = kind._make_model_wrapper is not PyTorchClassifier._make_model_wrapper  # as models of Hugging Face are
    parts = [p for p in classifier.preprocessing_operations if p.apply_predict and not _is_identity(p)]
    parts.append(classifier._model if wrapped else classifier.model)
    known, module = _models.get(classifier, ((), None))
    if list(map(id, known)) != list(map(id, parts)):
        modules = [_as_module(p, classifier).to(classifier.device) for p in parts[:-1]]
        modules.append(_Output(parts[-1], -1) if wrapped else parts[-1])
        module = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        _models[classifier] = parts, module
    return module


def _is_standardisation(operation) -> bool:
    return isinstance(operation, (standardisation.StandardisationMeanStd, standardisation.StandardisationMeanStdPyTorch))


def _is_identity(operation) -> bool:
    return _is_standardisation(operation) and not operation.mean.any() and bool((operation.std == 1).all())


def _as_module(operation, classifier) -> nn.Module:
    if not _is_standardisation(operation):
        return _Output(operation, 0)
    mean, std = operation.mean, operation.std
    if len(classifier.input_shape) == 3:
        channels, _, width = classifier.input_shape  # ART takes [C] numbers for those of columns, where these are as many
        if mean.size == 1 or mean.shape == (channels, 1, 1) or mean.shape == (channels,) != (width,):
            return Normalize(*(np.broadcast_to(v.ravel(), channels).tolist() for v in (mean, std)))
    return _Output(standardisation.StandardisationMeanStdPyTorch(mean, std, device_type=classifier.device_type), 0)


class _Output(nn.Module):
    """One of the outputs of a preprocessing operation (images, labels), or of ART's wrapper of a model (those of all layers)."""

    def __init__(self, part, index: int):
        super().__init__()
        self.part, self.index = part, index

    def forward(self, x: Tensor) -> Tensor:
        return self.part.forward(x)[self.index]


def loss_of(classifier) -> LossLike:
    """The loss of a classifier, for each sample."""
    loss = classifier.loss
    if type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.ignore_index < 0:
        return LabelSmoothedCE(loss.label_smoothing * (1 - 1 / classifier.nb_classes))
    if type(loss) not in (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss):
        raise ValueError(
            f"estimator has loss={loss}, whose value for each sample is not known: give CrossEntropyLoss, NLLLoss or "
            "MultiMarginLoss, or use the attack in art.attacks.evasion"
        )

    def each(logits: Tensor, y: Tensor) -> Tensor:
        unreduced = copy(loss)
        unreduced.reduction = "none"
        return unreduced(logits, y)

    return each


def labels_of(classifier, y) -> Tensor:
    """int64 [B] on the device of a classifier, from one-hot labels [B, K], an array or a tensor."""
    labels = torch.as_tensor(classifier.reduce_labels(y), device=classifier.device)
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"y, {list(y.shape)}, is not one-hot: give class indices [B], or one-hot labels [B, K]")
    return labels


def bounds_of(classifier) -> tuple[float, float] | None:
    """The range of all features, or None where they have different ones."""
    clip_values = EVERYWHERE if classifier.clip_values is None else classifier.clip_values
    (lo, *low), (hi, *high) = (np.unique(v).tolist() for v in clip_values)
    return None if low or high else (lo, hi)


def per_sample(value, x: Tensor) -> float | Tensor | None:
    """eps or eps_step as a number, or as fp64 [B]; None where it differs within an image."""
    if not isinstance(value, np.ndarray):
        return float(value)
    values = np.broadcast_to(value, x.shape).reshape(len(x), -1)
    return torch.tensor(values[:, 0], dtype=torch.float64) if (values == values[:, :1]).all() else None


class OnOurGradient:
    """Stands in for a classifier in ART's code: the same, but its gradients are ours, each up to a positive factor."""

    def __init__(self, classifier, settings: Mapping[str, Any]):
        self.classifier = classifier
        self.settings = {name: value for name, value in settings.items() if name not in ("graph", "stop")}

    @property  # type: ignore[misc]
    def __class__(self):  # ART looks whether it is a classifier
        return type(self.classifier)

    def __getattr__(self, name):
        return getattr(self.classifier, name)

    def predict(self, x, **options):
        with borrowed(self.classifier.model, "eval"):  # ART leaves it in that mode
            return self.classifier.predict(x, **options)

    @deferred
    @torch.inference_mode(False)
    @torch.no_grad()
    def loss_gradient(self, x, y):
        """Like x, an array or a tensor [B, ...]; y one-hot [B, K]."""
        images = torch.as_tensor(x, dtype=torch.float32, device=self.classifier.device)
        labels, model = labels_of(self.classifier, y), model_of(self.classifier)
        attack = PGD(0.0, loss=loss_of(self.classifier), bounds=EVERYWHERE, **self.settings)
        batch = Batch(images, labels, 0.0, 0.0)
        run = EarlyStop(attack, model, batch, attack._check_batch(model, images, labels))
        grad = run.gradient(batch, images, torch.arange(len(images), device=images.device)).float()
        return grad if isinstance(x, Tensor) else grad.cpu().numpy()


class _BoxBeforeBall(L2Ball):
    """Steps that are projected onto the box first and then onto the ball, by two launches of a kernel with the other order."""

    def _move_(self, x_adv, grad, step_size):
        ops.l2_step_(x_adv, self.x, grad, torch.full_like(self.eps, torch.inf), step_size, *self.bounds, self.nan_seen)
        ops.l2_step_(x_adv, self.x, grad, self.eps, torch.zeros_like(self.eps), *EVERYWHERE)


class _BoxBeforeBallRun(PGDRun):
    def __init__(self, settings, batch):
        super().__init__(settings, batch)
        self.ball = _BoxBeforeBall(batch.x, batch.eps, batch.step_size, self.ball.bounds)


class BoxBeforeBallPGD(PGD):
    """PGD in L2 in ART's order of projections."""

    run_class = _BoxBeforeBallRun
