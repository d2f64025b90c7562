"""The choices and keyword arguments of attacks, each defined once: for type checkers, and for the checks at run time."""

from typing import Literal, TypedDict, get_args

import torch

Norm = Literal["linf", "l2", "l1"]
Precision = Literal["fp32", "tf32", "bf16", "fp16", "half"]
GradientPath = Literal["auto", "plan", "compile", "autograd"]
BNMode = Literal["eval", "train", "keep"]
Select = Literal["success", "loss"]
Targeting = Literal["confidence", "malt"]
Version = Literal["standard", "fast", "plus", "rand"]
Graph = Literal["auto"] | bool
Fuse = Literal["auto"] | bool
Stop = Literal["success", "cycle", "exact"]

NORMS: tuple[Norm, ...] = get_args(Norm)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
GRADIENT_PATHS: tuple[GradientPath, ...] = get_args(GradientPath)
BN_MODES: tuple[BNMode, ...] = get_args(BNMode)
SELECT: tuple[Select, ...] = get_args(Select)
STOPS: tuple[Stop, ...] = get_args(Stop)
TARGETINGS: tuple[Targeting, ...] = get_args(Targeting)


class ModelSettings(TypedDict, total=False):
    """Keyword arguments of all attacks that say how the model is run. `PGD` says what they mean."""

    precision: Precision | None
    input_gradient: GradientPath
    fuse: Fuse
    bn_mode: BNMode


class AttackSettings(ModelSettings, total=False):
    """Keyword arguments of all attacks."""

    norm: Norm
    restarts: int
    bounds: tuple[float, float]
    budget: int | torch.Tensor | None
    generator: torch.Generator | None


class AdapterSettings(ModelSettings, total=False):
    """Keyword arguments of `PGD` and `APGD` for which other libraries have no name: `compat` adds them to theirs."""

    generator: torch.Generator | None
    graph: Graph


class PGDExtras(AdapterSettings, total=False):
    """The same, of `PGD` alone."""

    stop: Stop | None


class CommonSettings(AttackSettings, total=False):
    """Keyword arguments that all functions which run `PGD` take."""

    targeted: bool
    select: Select
    stop: Stop | None
    graph: Graph


class PGDSettings(CommonSettings, total=False):
    """Keyword arguments of `pgd`, `pgd_ls` and `pgd_kl`: all of `PGD` but eps and loss."""

    steps: int
    step_size: float | torch.Tensor | None
    random_start: bool
