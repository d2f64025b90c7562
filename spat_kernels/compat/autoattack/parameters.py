"""The attacks of AutoAttack by name, with the parameters of the reference package."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from ...attacks.apgd import APGD
from ...attacks.autoattack import VERSIONS
from ...attacks.fab import FAB
from ...attacks.square import Square
from ...checks import check_choice

NAMES = VERSIONS["plus"]


@dataclass(slots=True)
class APGDParameters:
    """Those of APGD. `n_target_classes` is for apgd-t, `use_largereps` for L1."""

    n_restarts: int = 5
    n_iter: int = 100
    eot_iter: int = 1
    rho: float = 0.75
    use_largereps: bool = False
    n_target_classes: int = 9


@dataclass(slots=True)
class FABParameters:
    """Those of FAB. `n_target_classes` is for fab-t, which has one start."""

    n_restarts: int = 5
    n_iter: int = 100
    n_target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9


@dataclass(slots=True)
class SquareParameters:
    """Those of Square."""

    n_restarts: int = 1
    n_queries: int = 5000
    p_init: float = 0.8
    rescale_schedule: bool = False


class Parameters:
    """The part of `AutoAttack` that holds the parameters of its attacks."""

    norm: str
    epsilon: float
    seed: int | None
    settings: dict[str, Any]

    def __init__(self) -> None:
        self.attacks_to_run: list[str] = []
        self._set_defaults()

    def _set_defaults(self) -> None:
        self.apgd, self.apgd_targeted = APGDParameters(), APGDParameters(n_restarts=1)
        self.fab, self.square = FABParameters(), SquareParameters()

    def set_version(self, version: str = "standard") -> None:
        """Choose the attacks and parameters of the version "standard", "plus" or "rand"."""
        check_choice("version", version, ("standard", "plus", "rand"))
        self.version = version
        self.attacks_to_run = list(VERSIONS[version])  # type: ignore[index]
        self._set_defaults()
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
        if name == "square":
            square = self.square
            common["restarts"] = square.n_restarts
            rescale = square.rescale_schedule
            return Square(self.epsilon, queries=square.n_queries, p_init=square.p_init, rescale=rescale, **common)
        if name.startswith("fab"):
            fab = self.fab
            common["restarts"] = 1 if name == "fab-t" else fab.n_restarts
            targets = min(fab.n_target_classes, classes - 1) if name == "fab-t" else None
            common |= {"alpha_max": fab.alpha_max, "eta": fab.eta, "beta": fab.beta}
            return FAB(self.epsilon, steps=fab.n_iter, targets=targets, **common)
        own = self.apgd_targeted if name == "apgd-t" else self.apgd
        if own.use_largereps and self.norm != "L1":
            raise ValueError(f"use_largereps=True with norm={self.norm!r}: it is for L1: leave it out")
        common["restarts"] = own.n_restarts
        targets = min(own.n_target_classes, classes - 1) if name == "apgd-t" else None
        common |= {"eot": own.eot_iter, "rho": own.rho, "multi_eps": own.use_largereps}
        return APGD(self.epsilon, loss="ce" if name == "apgd-ce" else "dlr", steps=own.n_iter, targets=targets, **common)
