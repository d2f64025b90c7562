"""The base class of the attacks here: the interface of `torchattacks.attack.Attack`, version 3.5.1."""

import importlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...interrupts import check
from ...model_state.borrow import borrowed
from ...normalize import Normalize
from ...rng import default_generator, rewound_on_error
from ...settings import ModelSettings
from .._peer import check_extras
from .files import Files
from .pixels import Pixels
from .targets import Targets

try:
    Base: Any = importlib.import_module("torchattacks.attack").Attack
except ModuleNotFoundError as error:  # it need not be installed: all of its interface is here
    if error.name not in ("torchattacks", "torchattacks.attack"):
        raise
    Base = object

_running: ContextVar[Any] = ContextVar("attack whose `forward` runs in this thread", default=None)


class Attack(Targets, Pixels, Files, Base):
    """A model with an attack on it: `attack(images, labels)` gives adversarial images on the model's device.

    Models, random states and labels are left as they were, where torchattacks seeds torch's generator and leaves all modules in
    one mode.

    Args:
        name: in `repr`, and the attribute `attack`.
        model: module or callable, images -> logits [B, K].
        settings: what `spat_kernels` takes beside the arguments of torchattacks, such as precision="bf16".
        attributes: the arguments of torchattacks, which may be changed later.
    """

    __setattr__ = object.__setattr__  # torchattacks looks for other attacks in every value

    extras: type = ModelSettings  # what `settings` may hold

    def __init__(self, name: str, model, settings: Mapping[str, Any] = MappingProxyType({}), **attributes: Any):
        check_extras(name, settings, self.extras)
        self.attack = name
        self.settings = dict(settings)
        self._attacks: dict = {}  # torchattacks' MultiAttack reads it
        self.set_model(model)
        held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        self.device = held[0].device if held else None
        self.supported_mode = ["default"]
        self._training_modes: tuple[bool, bool] | None = None
        self.__dict__.update(attributes)
        mean, std = getattr(model, "mean", None), getattr(model, "std", None)
        if self.model_name == "RobModel" and mean is not None and std is not None:  # MAIR's, whose images are normalised
            self.set_normalization_used(mean, std)

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Adversarial images of `images`, in [0, 1] and like them on the device of the model."""
        raise NotImplementedError

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Attack images.

        Args:
            inputs: [B, C, H, W] in [0, 1]; or normalised, after `set_normalization_used`; or uint8.
            labels: int64 [B]; in mode targeted(label) the targets.

        Returns:
            Tensor: as `inputs`, where these are uint8 in [0, 1]; uint8 after `set_return_type("int")`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
        """
        normalized = self._normalization_applied and inputs.is_floating_point()
        _, adversarial = self.attack_pixels(inputs, labels)
        if self.return_type == "int":
            return self.to_type(adversarial, "int")
        return self.normalize(adversarial) if normalized else adversarial

    def attack_pixels(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """A call that returns the images and the adversarial images in [0, 1]."""
        inputs = inputs.to(self.device or inputs.device)
        images = self._as_pixels(inputs)
        drawn_from = self.settings.get("generator"), torch.default_generator, default_generator(images.device)
        with rewound_on_error(*drawn_from):
            return images, self.run(images, None if labels is None else labels.to(images.device))

    def run(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """`forward`, with the model in the mode to be attacked in."""
        outer = _running.set(self)
        try:
            with self._modes():
                return self.forward(images, labels)
        except ValueError as error:
            if "inside bounds" in str(error):
                raise ValueError(f"{error} Say that images are normalised by set_normalization_used(mean, std).") from error
            raise
        finally:
            _running.reset(outer)

    # ---- the model

    def set_model(self, model) -> None:
        self.model, self.model_name = model, type(model).__name__

    def set_device(self, device) -> None:
        self.device = torch.device(device)

    @property
    def model_of_pixels(self):
        """The model as a function of images in [0, 1]: the same object as long as nothing changes, since plans and graphs are
        kept by it."""
        if self.normalization_used is None:
            return self.model
        made_of = self.model, self.normalization_used, self.device
        if any(a is not b for a, b in zip(made_of, self._on_pixels[0], strict=True)):
            with torch.inference_mode(False):
                mean, std = (self.normalization_used[name].flatten().tolist() for name in ("mean", "std"))
                first = Normalize(mean, std).to(self.device or "cpu")
                network = self.model if isinstance(self.model, nn.Module) else _Callable(self.model)
                self._on_pixels = made_of, nn.Sequential(OrderedDict(normalize=first, model=network))
        return self._on_pixels[1]

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the model says of `inputs`: in `forward` of images in [0, 1], elsewhere of images as a call takes them."""
        check()
        as_they_are = self._normalization_applied and _running.get() is not self
        return self.model(inputs) if as_they_are else self.model_of_pixels(inputs)

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack in eval mode, the default, or in training mode, where batch norm and dropout have a choice of their own."""
        self._training_modes = (batchnorm_training, dropout_training) if model_training else None

    @property
    def bn_mode(self) -> str:
        return "keep" if self._training_modes else "eval"

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """The model in training mode, where it is to be attacked in that, and then as before. The attacks see to eval mode."""
        if self._training_modes is None or not isinstance(self.model, nn.Module):
            yield
            return
        choices = dict(zip(("BatchNorm", "Dropout"), self._training_modes, strict=True))
        with borrowed(self.model, "keep"):
            for m in self.model.modules():
                m.training = all(trains for kind, trains in choices.items() if kind in type(m).__name__)
            yield

    def _change_model_mode(self, given_training: bool) -> None:
        """torchattacks' MultiAttack calls this of attacks in it, and `_recover_model_mode`. `_modes` does what is needed."""

    _recover_model_mode = _change_model_mode

    def __repr__(self) -> str:
        hidden = (
            "model",
            "attack",
            "attack_mode",
            "targeted",
            "supported_mode",
            "settings",
            "normalization_used",
            "target_map_function",
        )
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in hidden}
        shown |= self.settings | {"attack_mode": self.attack_mode, "targeted": self.targeted}
        shown |= {"normalization_used": self.normalization_used is not None}
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"


class _Callable(nn.Module):
    """A plain function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
