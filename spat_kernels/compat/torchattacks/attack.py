"""The base class of the attacks here: the interface of `torchattacks.attack.Attack`, version 3.5.1."""

import contextlib
import importlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...normalize import Normalize
from ...settings import ModelSettings
from .._peer import check_extras
from .files import Files
from .pixels import Pixels
from .targets import Targets

Base: Any = object
with contextlib.suppress(ImportError):  # it need not be installed: all of its interface is here
    Base = importlib.import_module("torchattacks.attack").Attack


class Attack(Targets, Pixels, Files, Base):
    """A model with an attack on it: `attack(images, labels)` gives adversarial images on the model's device.

    Models, random states and labels are left as they were, where torchattacks seeds torch's generator and leaves all modules in
    one mode.

    Args:
        model: module or callable, images -> logits [B, K].
        settings: what `spat_kernels` takes beside the arguments of torchattacks, such as precision="bf16".
        attributes: the arguments of torchattacks, which may be changed later.
    """

    __setattr__ = object.__setattr__  # torchattacks looks for other attacks in every value

    extras: type = ModelSettings  # what `settings` may hold

    def __init__(self, model, settings: Mapping[str, Any], **attributes: Any):
        check_extras(type(self).__name__, settings, self.extras)
        self.attack = type(self).__name__
        self.settings = dict(settings)
        self._attacks: dict = {}  # torchattacks' MultiAttack reads it
        self.set_model(model)
        held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        self.device = held[0].device if held else None
        self.supported_mode = ["default"]
        self._training_modes: tuple[bool, bool] | None = None
        self.__dict__.update(attributes)

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
        inputs = inputs.to(self.device or inputs.device)
        normalized = self._normalization_applied and inputs.is_floating_point()
        with self._modes():
            adversarial = self.forward(self._as_pixels(inputs), None if labels is None else labels.to(inputs.device))
        if self.return_type == "int":
            return self.to_type(adversarial, "int")
        return self.normalize(adversarial) if normalized else adversarial

    # ---- the model

    def set_model(self, model) -> None:
        self.model, self.model_name = model, type(model).__name__
        self._on_pixels = None

    def set_device(self, device) -> None:
        self.device = torch.device(device)

    @property
    def model_of_pixels(self):
        """The model as a function of images in [0, 1]: the same object every time, since plans and graphs are kept by it."""
        if self.normalization_used is None:
            return self.model
        if self._on_pixels is None:
            mean, std = (self.normalization_used[name].flatten().tolist() for name in ("mean", "std"))
            first = Normalize(mean, std).to(self.device or "cpu")
            if isinstance(self.model, nn.Module):
                self._on_pixels = nn.Sequential(OrderedDict(normalize=first, model=self.model))
            else:
                self._on_pixels = lambda images, model=self.model: model(first(images))
        return self._on_pixels

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the model says of `inputs`, which are normalised if those of a call are."""
        return self.model(inputs) if self._normalization_applied else self.model_of_pixels(inputs)

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
        """The model in the mode to be attacked in, then every module as before. For eval mode the attacks see to that."""
        modules = list(self.model.modules()) if self._training_modes and isinstance(self.model, nn.Module) else []
        before = [(m, m.training) for m in modules]
        try:
            for m in modules:
                choices = zip(("BatchNorm", "Dropout"), self._training_modes or (), strict=False)
                m.training = all(trains for kind, trains in choices if kind in type(m).__name__)
            yield
        finally:
            for m, mode in before:
                m.training = mode

    def _change_model_mode(self, given_training: bool) -> None:
        """torchattacks' MultiAttack calls this of attacks in it, and `_recover_model_mode`. `_modes` does what is needed."""

    _recover_model_mode = _change_model_mode

    def __repr__(self) -> str:
        hidden = ("model", "attack", "attack_mode", "supported_mode", "settings", "normalization_used", "target_map_function")
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in hidden}
        shown |= self.settings | {"attack_mode": self.attack_mode, "normalization_used": self.normalization_used is not None}
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"
