"""The attacks that AutoAttack consists of."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...attacks.apgd import APGD as OurAPGD
from ...attacks.fab import FAB as OurFAB
from ...attacks.square import Square as OurSquare
from ...checks import as_norm
from ...predictions import model_logits, predictions
from ...settings import ModelSettings
from .._peer import attack_what_is_right
from .attack import Attack


class _Seeded(Attack):
    """Attacks with a `seed`, which each call begins with. None: torch's generator goes on."""

    def __init__(self, model, settings: ModelSettings, norm, eps, n_restarts, seed, verbose, **attributes):
        own = {"norm": norm, "eps": eps, "n_restarts": n_restarts, "seed": seed, "verbose": verbose}
        super().__init__(type(self).__name__, model, settings, **own, **attributes)

    def attack_by(self, kind: Any, images: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
        generator = None if self.seed is None else torch.Generator(images.device).manual_seed(int(self.seed))
        common = {"norm": self.norm, "restarts": self.n_restarts, "generator": generator, "bn_mode": self.bn_mode}
        attack = kind(self.eps, **common | arguments | self.settings)
        adversarial = attack_what_is_right(attack, self.model_of_pixels, images, labels)
        if self.verbose:
            right = predictions(model_logits(self.model_of_pixels, adversarial)).eq(labels)
            print(f"{self.attack}: {int(right.sum())} of {len(right)} images are still classified as labelled")
        return adversarial


class APGD(_Seeded):
    def __init__(
        self, model, norm="Linf", eps=8 / 255, steps=10, n_restarts=1, seed=0, loss="ce", eot_iter=1, rho=0.75, verbose=False,
        **settings: Unpack[ModelSettings],
    ):  # fmt: skip
        super().__init__(
            model, settings, norm, eps, n_restarts, seed, verbose, steps=steps, loss=loss, eot_iter=eot_iter, thr_decr=rho
        )

    def forward(self, images, labels):
        options = {"steps": self.steps, "eot": self.eot_iter, "rho": self.thr_decr}
        return self.attack_by(OurAPGD, images, labels, loss=self.loss, **options)


class APGDT(_Seeded):
    def __init__(
        self, model, norm="Linf", eps=8 / 255, steps=10, n_restarts=1, seed=0, eot_iter=1, rho=0.75, verbose=False, n_classes=10,
        **settings: Unpack[ModelSettings],
    ):  # fmt: skip
        own = {"steps": steps, "eot_iter": eot_iter, "thr_decr": rho, "n_target_classes": n_classes - 1}
        super().__init__(model, settings, norm, eps, n_restarts, seed, verbose, **own)

    def forward(self, images, labels):
        options = {"steps": self.steps, "eot": self.eot_iter, "rho": self.thr_decr}
        return self.attack_by(OurAPGD, images, labels, loss="dlr", targets=self.n_target_classes, **options)


class FAB(_Seeded):
    def __init__(
        self, model, norm="Linf", eps=8 / 255, steps=10, n_restarts=1, alpha_max=0.1, eta=1.05, beta=0.9, verbose=False, seed=0,
        multi_targeted=False, n_classes=10, **settings: Unpack[ModelSettings],
    ):  # fmt: skip
        own = {"alpha_max": alpha_max, "eta": eta, "beta": beta, "multi_targeted": multi_targeted}
        own |= {"steps": steps, "n_target_classes": n_classes - 1}
        eps = {"linf": 0.3, "l2": 1.0, "l1": 5.0}[as_norm(norm)] if eps is None else eps
        super().__init__(model, settings, norm, eps, n_restarts, seed, verbose, **own)

    def forward(self, images, labels):
        options = {"steps": self.steps, "alpha_max": self.alpha_max, "eta": self.eta, "beta": self.beta}
        return self.attack_by(OurFAB, images, labels, targets=self.n_target_classes if self.multi_targeted else None, **options)


class Square(_Seeded):
    def __init__(
        self, model, norm="Linf", eps=8 / 255, n_queries=5000, n_restarts=1, p_init=0.8, loss="margin", resc_schedule=True,
        seed=0, verbose=False, **settings: Unpack[ModelSettings],
    ):  # fmt: skip
        if loss != "margin":
            raise ValueError(f"loss={loss!r}: Square is on the margin here: leave it out, or take torchattacks.Square itself")
        own = {"n_queries": n_queries, "p_init": p_init, "rescale_schedule": resc_schedule}
        super().__init__(model, settings, norm, eps, n_restarts, seed, verbose, **own)

    def forward(self, images, labels):
        options = {"queries": self.n_queries, "p_init": self.p_init, "rescale": self.rescale_schedule}
        return self.attack_by(OurSquare, images, labels, **options)
