"""Attacks that are a `spat_kernels.PGD`."""

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ... import losses
from ...attacks.pgd import PGD as OurPGD
from ...rng import draw
from ...settings import AdapterSettings, PGDExtras
from .attack import Attack


class _PGD(Attack):
    """Attacks that are a `spat_kernels.PGD`."""

    extras: type = PGDExtras

    def __init__(self, model, eps: float, settings: AdapterSettings, **attributes: Any):
        super().__init__(type(self).__name__, model, settings, eps=eps, **attributes)
        self.supported_mode = ["default", "targeted"]

    def normal(self, images: Tensor) -> Tensor:
        """Standard normal numbers, like `images`."""
        generator = self.settings.get("generator")
        return draw("normal_", *images.shape, dtype=images.dtype, device=images.device, generator=generator)

    def pgd(self, images: Tensor, labels: Tensor | None, *, start: Tensor | None = None, **arguments: Any) -> Tensor:
        attack = OurPGD(self.eps, targeted=self.targeted, **{"bn_mode": self.bn_mode} | arguments | self.settings)
        y = self.get_target_label(images, labels) if self.targeted else labels
        return attack(self.model_of_pixels, images, y, start=start)


class FGSM(_PGD):
    def __init__(self, model, eps=8 / 255, **settings: Unpack[PGDExtras]):
        super().__init__(model, eps, settings)

    def forward(self, images, labels):
        return self.pgd(images, labels, steps=1, step_size=self.eps, random_start=False)


class FFGSM(_PGD):
    def __init__(self, model, eps=8 / 255, alpha=10 / 255, **settings: Unpack[PGDExtras]):
        super().__init__(model, eps, settings, alpha=alpha)

    def forward(self, images, labels):
        return self.pgd(images, labels, steps=1, step_size=self.alpha)


class PGD(_PGD):
    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=True, **settings: Unpack[PGDExtras]):
        super().__init__(model, eps, settings, alpha=alpha, steps=steps, random_start=random_start)

    def forward(self, images, labels):
        return self.pgd(images, labels, steps=self.steps, step_size=self.alpha, random_start=self.random_start)


class BIM(_PGD):
    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=10, **settings: Unpack[PGDExtras]):
        steps = steps or int(min(eps * 255 + 4, 1.25 * eps * 255))
        super().__init__(model, eps, settings, alpha=alpha, steps=steps)

    def forward(self, images, labels):
        return self.pgd(images, labels, steps=self.steps, step_size=self.alpha, random_start=False)


class RFGSM(_PGD):
    """BIM from x + alpha * sign(randn)."""

    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=10, **settings: Unpack[PGDExtras]):
        super().__init__(model, eps, settings, alpha=alpha, steps=steps)

    def forward(self, images, labels):
        start = (images + self.alpha * self.normal(images).sign()).clamp(0, 1)
        return self.pgd(images, labels, steps=self.steps, step_size=self.alpha, start=start)


class TPGD(_PGD):
    """The inner attack of TRADES, on KL(p(x) || p(x_adv)) from x + 0.001 * randn. It takes no labels."""

    extras = AdapterSettings

    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=10, **settings: Unpack[AdapterSettings]):
        super().__init__(model, eps, settings, alpha=alpha, steps=steps)
        self.supported_mode = ["default"]

    def forward(self, images, labels=None):
        start = (images + 0.001 * self.normal(images)).clamp(0, 1)
        return self.pgd(images, None, loss="kl", steps=self.steps, step_size=self.alpha, start=start)


class PGDL2(PGD):
    """`eps_for_division` is accepted and not needed: gradients are divided by their lengths where these are not 0."""

    def __init__(
        self, model, eps=1.0, alpha=0.2, steps=10, random_start=True, eps_for_division=1e-10, **settings: Unpack[PGDExtras]
    ):
        super().__init__(model, eps, alpha, steps, random_start, **settings)

    def pgd(self, images, labels, **arguments):
        return super().pgd(images, labels, norm="l2", **arguments)


class CWLinf(_PGD):
    """PGD on the margin of Carlini and Wagner (Madry et al., section 5). torchattacks.CW is another attack: it minimises L2."""

    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=30, kappa=50.0, **settings: Unpack[PGDExtras]):
        super().__init__(model, eps, settings, alpha=alpha, steps=steps, kappa=kappa)

    def forward(self, images, labels):
        return self.pgd(images, labels, loss=losses.Margin(self.kappa), steps=self.steps, step_size=self.alpha)
