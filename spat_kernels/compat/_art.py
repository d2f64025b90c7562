"""What the attacks in art.py are made of: a module, a loss and labels from ART's `PyTorchClassifier`, our gradient for ART's code, and
ART's order of projections in L2."""

from collections.abc import Mapping
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..attacks.early_stop import EarlyStop
from ..attacks.pgd import PGD
from ..attacks.pgd_run import PGDRun
from ..balls import L2Ball
from ..cuda_graphs.run import Batch
from ..losses import LabelSmoothedCE, LossLike
from ..model_state.borrow import borrowed
from ..normalize import Normalize
from ._peer import import_peer

PACKAGE = "adversarial-robustness-toolbox"
PyTorchClassifier: Any = import_peer("art.estimators.classification", PACKAGE).PyTorchClassifier
Standardisation: Any = import_peer("art.preprocessing.standardisation_mean_std.pytorch", PACKAGE).StandardisationMeanStdPyTorch

EVERYWHERE = (-float("inf"), float("inf"))
_models: WeakKeyDictionary = WeakKeyDictionary()  # by classifier: what comes before its logits, and the module made of that


def model_of(classifier) -> nn.Module:
    """From raw images to the outputs of a classifier. The same module each time, since plans and captures belong to a module: the
    user's own, or, if there is preprocessing, one around it.

    Raises:
        TypeError, ValueError: the classifier computes its gradient in another way than through PyTorch.
    """
    kind = type(classifier)
    if not isinstance(classifier, PyTorchClassifier) or kind.loss_gradient is not PyTorchClassifier.loss_gradient:
        raise TypeError(f"estimator is a {kind.__name__}: give a PyTorchClassifier, or use the attack in art.attacks.evasion")
    if classifier.use_amp:
        raise ValueError("estimator has use_amp=True: leave it out, and give the attack precision='bf16' or 'fp16'")
    if not classifier.all_framework_preprocessing:
        raise ValueError(
            f"estimator has preprocessing_defences={classifier.preprocessing_defences} with NumPy code among them: use their "
            "PyTorch forms, or the attack in art.attacks.evasion"
        )
    own_wrapper = kind._make_model_wrapper is not PyTorchClassifier._make_model_wrapper  # as for models of Hugging Face
    parts = [p for p in classifier.preprocessing_operations if p.apply_predict and not _is_identity(p)]
    parts.append(classifier._model if own_wrapper else classifier.model)
    known, module = _models.get(classifier, ((), None))
    if list(map(id, known)) != list(map(id, parts)):
        *before, last = parts
        modules = [_as_module(p, classifier.input_shape).to(classifier.device) for p in before]
        modules.append(_LastOutput(last) if own_wrapper else last)
        module = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        _models[classifier] = parts, module
    return module


def _is_identity(operation) -> bool:
    return isinstance(operation, Standardisation) and not operation.mean.any() and bool((operation.std == 1).all())


def _as_module(operation, input_shape: tuple[int, ...]) -> nn.Module:
    if isinstance(operation, Standardisation) and len(input_shape) == 3:
        channels, width = input_shape[0], input_shape[-1]  # ART takes one number for each column where there are as many
        mean, std = (
            v.reshape(-1) if v.size == 1 or v.shape == (channels, 1, 1) or (v.shape == (channels,) != (width,)) else None
            for v in (operation.mean, operation.std)
        )
        if mean is not None and std is not None:
            return Normalize(*(np.broadcast_to(v, channels).tolist() for v in (mean, std)))
    return _Operation(operation)


class _Operation(nn.Module):
    """A preprocessing operation of ART, in PyTorch."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation.forward(x)[0]


class _LastOutput(nn.Module):
    """Of ART's wrapper of a model, which returns a list."""

    def __init__(self, wrapper: nn.Module):
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapper(x)[-1]


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
    """int64 [B] on the device of a classifier, of one-hot labels [B, K] as an array or a tensor."""
    labels = classifier.reduce_labels(y)
    if labels.ndim != 1 or labels.dtype not in (np.int64, torch.int64):
        raise ValueError(f"y has shape {list(y.shape)}, but is not one-hot: give class indices, [B], or one-hot labels, [B, K]")
    return torch.as_tensor(labels, device=classifier.device)


class OnOurGradient:
    """Stands in for a classifier in ART's code: the same, but its gradients are ours, each up to a positive factor."""

    def __init__(self, classifier, settings: Mapping = {}):
        self.classifier = classifier
        self.settings = {name: value for name, value in settings.items() if name not in ("graph", "stop")}

    def __getattr__(self, name):
        return getattr(self.classifier, name)

    def predict(self, x, **options):
        with borrowed(self.classifier.model, "eval"):  # since ART leaves it in that mode
            return self.classifier.predict(x, **options)

    @torch.inference_mode(False)
    @torch.no_grad()
    def loss_gradient(self, x, y):
        """Like x, an array or a tensor [B, ...]; y one-hot [B, K]."""
        model, loss = model_of(self.classifier), loss_of(self.classifier)
        images = torch.as_tensor(x, dtype=torch.float32, device=self.classifier.device)
        labels = labels_of(self.classifier, y)
        attack = PGD(0.0, loss=loss, bounds=EVERYWHERE, **self.settings)
        batch = Batch(images, labels, 0.0, 0.0)
        grad = EarlyStop(attack, model, batch, attack._check_batch(model, images, labels)).gradient(batch, images, slice(None))
        return grad.float() if isinstance(x, Tensor) else grad.float().cpu().numpy()


def bounds_of(classifier) -> tuple[float, float] | None:
    """The one range of all features, or None."""
    clip_values = EVERYWHERE if classifier.clip_values is None else classifier.clip_values
    (lo, *low), (hi, *high) = (np.unique(v).tolist() for v in clip_values)
    return None if low or high else (lo, hi)


def per_sample(value, x: Tensor) -> float | Tensor | None:
    """eps or eps_step as a number, or as fp64 [B]; None where it differs within an image."""
    if not isinstance(value, np.ndarray):
        return float(value)
    values = np.broadcast_to(value, x.shape).reshape(len(x), -1)
    return torch.tensor(values[:, 0], dtype=torch.float64) if (values == values[:, :1]).all() else None


class BoxBeforeBall(L2Ball):
    """Steps that end in the box first, then in the ball, as ART's do: two launches of the kernel, which has the other order."""

    def _move_(self, x_adv, grad, step_size):
        ops.l2_step_(x_adv, self.x, grad, torch.full_like(self.eps, torch.inf), step_size, *self.bounds, self.nan_seen)
        ops.l2_step_(x_adv, self.x, grad, self.eps, torch.zeros_like(self.eps), *EVERYWHERE)


class BoxBeforeBallRun(PGDRun):
    def __init__(self, settings, batch):
        super().__init__(settings, batch)
        self.ball = BoxBeforeBall(batch.x, batch.eps, batch.step_size, self.ball.bounds)


class BoxBeforeBallPGD(PGD):
    run_class = BoxBeforeBallRun
