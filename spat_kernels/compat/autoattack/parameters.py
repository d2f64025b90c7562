"""The attacks of AutoAttack by name, with the parameters of the reference package."""

import time
from types import SimpleNamespace
from typing import Any

import torch

from ...attacks.apgd import APGD
from ...attacks.autoattack import VERSIONS
from ...attacks.fab import FAB
from ...attacks.square import Square
from ...checks import check_choice

NAMES = VERSIONS["plus"]


class Parameters:
    """The part of `AutoAttack` that holds the parameters of its attacks."""

    norm: str
    epsilon: float
    seed: int | None
    settings: dict[str, Any]

    def __init__(self) -> None:
        self.attacks_to_run: list[str] = []
        many, apgd = {"n_restarts": 5, "n_iter": 100}, {"eot_iter": 1, "rho": 0.75, "use_largereps": False}
        self.apgd = SimpleNamespace(**many, **apgd)
        self.apgd_targeted = SimpleNamespace(**many | {"n_restarts": 1}, **apgd, n_target_classes=9)
        self.fab = SimpleNamespace(**many, n_target_classes=9, alpha_max=0.1, eta=1.05, beta=0.9)
        self.square = SimpleNamespace(n_queries=5000, n_restarts=1, p_init=0.8, rescale_schedule=False)

    def set_version(self, version: str = "standard") -> None:
        """Choose the attacks and parameters of the version "standard", "plus" or "rand"."""
        check_choice("version", version, ("standard", "plus", "rand"))
        self.version = version
        self.attacks_to_run = list(VERSIONS[version])  # type: ignore[index]
        if version == "standard":
            self.apgd.n_restarts = self.fab.n_restarts = 1
            if self.norm == "L1":
                self.apgd.n_restarts, self.apgd_targeted.n_target_classes = 5, 5
                self.apgd.use_largereps = self.apgd_targeted.use_largereps = True
        elif version == "rand":
            self.apgd.n_restarts, self.apgd.eot_iter = 1, 20

    def attack(self, name: str, classes: int, device: torch.device) -> APGD | FAB | Square:
        """The attack of that name, as its parameters are now, for a model of `classes` classes."""
        seed = time.time_ns() % 2**31 if self.seed is None else int(self.seed)
        common: dict[str, Any] = {"norm": self.norm, "generator": torch.Generator(device).manual_seed(seed), **self.settings}
        own = {"square": self.square, "fab": self.fab, "fab-t": self.fab, "apgd-t": self.apgd_targeted}.get(name, self.apgd)
        common["restarts"] = 1 if name == "fab-t" else own.n_restarts
        if name == "square":
            return Square(self.epsilon, queries=own.n_queries, p_init=own.p_init, rescale=own.rescale_schedule, **common)
        targets = min(own.n_target_classes, classes - 1) if name.endswith("-t") else None
        if name.startswith("fab"):
            search = {"alpha_max": own.alpha_max, "eta": own.eta, "beta": own.beta}
            return FAB(self.epsilon, steps=own.n_iter, targets=targets, **search, **common)
        loss, averaged = "ce" if name == "apgd-ce" else "dlr", {"eot": own.eot_iter, "rho": own.rho}
        return APGD(self.epsilon, loss=loss, steps=own.n_iter, targets=targets, multi_eps=own.use_largereps, **averaged, **common)
