"""The class `AutoAttack`, and how it evaluates a model."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ...attacks.autoattack import AutoAttack as OurAutoAttack
from ...attacks.autoattack import fewest_classes
from ...checks import Values, check_choice, check_count, check_images, check_labels
from ...input_gradient.autograd import InputGradient
from ...interrupts import deferred
from ...model_state.borrow import borrowed
from ...predictions import predictions
from ...settings import ModelSettings
from .._peer import attack_what_is_right, check_extras
from .parameters import NAMES, Parameters
from .state import State, digest


class AutoAttack(Parameters):
    """`adversary = AutoAttack(model, norm="Linf", eps=8/255)`, then `adversary.run_standard_evaluation(x, y, bs=250)`.

    Args:
        model: module or callable, images [B, C, H, W] in [0, 1] -> logits [B, K], in the mode in which it is to be attacked.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball, in the units of x.
        seed: that every attack begins a batch with; None takes one from the clock.
        verbose: whether to print what is found.
        attacks_to_run: names of attacks, with version="custom".
        version: "standard", "plus", "rand" or "custom".
        device: where batches are attacked. None is the device of the model; of a function that is no module, that of the images.
        log_path: a file to which what is printed is appended.
        settings: those of `spat_kernels.AutoAttack` that say how the model is run, such as precision="bf16".

    Attributes:
        attacks_to_run: names of attacks, in their order, of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square".
        apgd, apgd_targeted, fab, square: their parameters, such as `apgd.n_restarts`, which may be changed.
    """

    def __init__(
        self, model, norm: str = "Linf", eps: float = 0.3, seed: int | None = None, verbose: bool = True, attacks_to_run=(),
        version: str = "standard", is_tf_model: bool = False, device=None, log_path=None, **settings: Unpack[ModelSettings],
    ):  # fmt: skip
        if is_tf_model:
            raise ValueError("is_tf_model=True: models must be PyTorch's here: use the reference package")
        check_choice("norm", norm, ("Linf", "L2", "L1"))
        check_choice("version", version, ("standard", "plus", "rand", "custom"))
        if len(attacks_to_run) and version != "custom":
            raise ValueError(f"attacks_to_run={attacks_to_run} with version={version!r}: it goes with version='custom'")
        check_extras("AutoAttack", settings, ModelSettings)
        super().__init__()
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.version, self.log_path, self.device = version, log_path, device
        self.settings = {"bn_mode": "keep", **settings}
        self.attacks_to_run = list(attacks_to_run)
        if version != "custom":
            self.set_version(version)

    @deferred
    @torch.inference_mode(False)
    @torch.no_grad()
    def run_standard_evaluation(self, x_orig: Tensor, y_orig: Tensor, bs=250, return_labels=False, state_path=None):
        """The attacks in turn, each on the images that those before have not broken.

        Args:
            x_orig: images [B, C, H, W] in [0, 1], on any device; batches of `bs` go to that of the model.
            y_orig: int64 [B], the labels.
            state_path: a file that notes what is broken after each batch. Where it exists the evaluation goes on from there, and
                only images that are broken from then on come back changed.

        Returns:
            Tensor: like `x_orig`, misclassified images where any were found; with `return_labels` a tuple, whose second is what
            the model says of each, int64 [B].

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.

        Warns:
            RuntimeWarning: a sign that gradients are masked, as for `spat_kernels.AutoAttack`.
        """
        self._check(x_orig, y_orig, bs)
        began, path = time.time(), None if state_path is None else Path(state_path)
        images, labels = x_orig.detach().clone(), y_orig.clone()
        if not len(images):
            return (images, labels) if return_labels else images
        state = self._state(path, x_orig, y_orig)
        classes = self._classify(images, labels, bs)
        self._check_classes(classes)
        robust = torch.tensor(state.robust) if state.robust else (labels == y_orig.to(labels.device)).cpu()
        if not state.robust:
            state.clean_accuracy = _share(robust)
            state.save(path, robust)
        self._log(f"using {self.version} version including {', '.join(self.attacks_to_run)}")
        self._log(f"initial accuracy: {state.clean_accuracy:.2%}")
        signs = self._warn_of_signs(x_orig, y_orig, robust.nonzero()[:bs, 0])
        for number, name in enumerate(self.attacks_to_run):
            if number < len(state.run_attacks):
                self._log(f"{name} has been run")
                continue
            before = int(robust.sum())
            for line in self._attacked(name, classes, x_orig, y_orig, bs, images, labels, robust):
                state.save(path, robust)
                self._log(line)
            state.run_attacks.append(name)
            state.save(path, robust)
            if signs and name == "square" and number:
                signs._warn_of_square(before - int(robust.sum()), len(robust))
            self._log(f"robust accuracy after {name.upper()}: {_share(robust):.2%} (total time {time.time() - began:.1f} s)")
        self._log(f"robust accuracy: {_share(robust):.2%}")
        return (images, labels) if return_labels else images

    def _attacked(
        self, name: str, classes: int, x_orig: Tensor, y_orig: Tensor, bs: int, images: Tensor, labels: Tensor, robust: Tensor
    ) -> Iterator[str]:
        """Run an attack on what is `robust`. What a batch broke goes into `images`, `labels`, `robust`; yields a line on it."""
        batches = robust.nonzero()[:, 0].split(bs) if robust.any() else ()
        for number, rows in enumerate(batches, 1):
            x, y = self._batch(x_orig, y_orig, rows)
            found = attack_what_is_right(self.attack(name, classes, x.device), self.model, x, y)
            said = predictions(self.get_logits(found))
            broken = said != y
            for whole, new in ((images, found), (labels, said), (robust, ~broken)):
                whole[rows[broken.cpu()].to(whole.device)] = new[broken].to(whole)
            yield f"{name} - {number}/{len(batches)} - {int(broken.sum())} out of {len(rows)} successfully perturbed"

    def run_standard_evaluation_individual(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False):
        """Each attack on all images: what `run_standard_evaluation` returns, by the names of the attacks."""
        names, verbose, found = list(self.attacks_to_run), self.verbose, {}
        try:
            for name in names:
                began, self.attacks_to_run, self.verbose = time.time(), [name], False
                found[name] = images, _ = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels=True)
                self.verbose = verbose
                if verbose:
                    accuracy = self._accuracy(images, y_orig, bs)
                    self._log(f"robust accuracy by {name.upper()}: {accuracy:.2%} (time attack: {time.time() - began:.1f} s)")
        finally:
            self.attacks_to_run, self.verbose = names, verbose
        return found if return_labels else {name: images for name, (images, _) in found.items()}

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The share of the images that the model classifies as labelled."""
        accuracy = self._accuracy(x_orig, y_orig, bs)
        self._log(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def get_logits(self, x: Tensor) -> Tensor:
        """What the model answers, [B, K], in its own mode and the caller's arithmetic."""
        with deferred, torch.no_grad(), borrowed(self.model, self.settings["bn_mode"]):
            return self.model(x.clone())

    def _check(self, x: Tensor, y: Tensor, bs: int) -> None:
        check_count("bs", bs, 1)
        check_images(x)
        y = y.to(x.device) if isinstance(y, Tensor) else y
        check_labels(y, x)
        if x.numel():
            Values(x, y, None, (0.0, 1.0)).read()
        for name in self.attacks_to_run:
            check_choice("attacks_to_run", name, NAMES)

    def _check_classes(self, classes: int) -> None:
        for name in self.attacks_to_run:
            if (least := fewest_classes(name)) > classes:
                raise ValueError(f"attacks_to_run: {name} needs {least} classes, the model has {classes}: leave it out")

    def _state(self, path: Path | None, x: Tensor, y: Tensor) -> State:
        """The state to begin with: that in the file, where there is one."""
        data = "" if path is None else digest(x, y)
        state = State(self.norm, float(self.epsilon), self.version, list(self.attacks_to_run), data)
        if path is not None and path.exists():
            self._log(f"going on from {path}: what was broken before comes back as it was, so count by this log")
            return state.restored(path)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"state_path={path}: there is no folder {path.parent}: make it first")
        return state

    def _accuracy(self, x: Tensor, y: Tensor, bs: int) -> float:
        said = y.clone()
        self._classify(x, said, bs)
        return _share(said == y)

    def _classify(self, x: Tensor, said: Tensor, bs: int) -> int:
        """Write what the model says of the images `x` into `said`, int64 [N]; return the number of classes."""
        device, highest = self._device(x), int(said.max())
        for images, classes in zip(x.split(bs), said.split(bs), strict=True):
            with borrowed(self.model, self.settings["bn_mode"]):
                logits = InputGradient(self.model, None, highest).logits(images.to(device))  # which checks them
            classes.copy_(predictions(logits))
        return logits.shape[1]

    def _warn_of_signs(self, x: Tensor, y: Tensor, rows: Tensor) -> OurAutoAttack | None:
        """Warn of what is strange about the images `rows`; return what can warn of more later."""
        if not self.attacks_to_run:
            return None
        version: Any = self.version if self.version == "rand" else tuple(self.attacks_to_run)
        norm: Any = self.norm
        ours = OurAutoAttack(self.epsilon, norm=norm, version=version, **self.settings)
        if len(rows):
            ours._warn_of_signs(self.model, *self._batch(x, y, rows), -1)
        return ours

    def _batch(self, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        device = self._device(x)
        return x[rows.to(x.device)].to(device), y[rows.to(y.device)].to(device)

    def _device(self, x: Tensor) -> torch.device:
        """Where batches go: the device that was given, else that of the model, else that of x."""
        if self.device is not None:
            return torch.device(self.device)
        held = [*self.model.parameters(), *self.model.buffers()] if isinstance(self.model, nn.Module) else []
        return held[0].device if held else x.device

    def _log(self, line: str) -> None:
        if self.verbose:
            print(line)
            if self.log_path:
                with open(self.log_path, "a") as file:
                    file.write(line + "\n")


def _share(flags: Tensor) -> float:
    return float(flags.float().mean())
