"""The PGD inner loop of adversarial training as fused kernels. Start at `pgd_ls` and `PGD`; `config()` says what runs here."""

from . import losses
from ._library import config
from .apgd import APGD
from .attacks import PGD, cw_linf, fgsm, pgd, pgd_kl, pgd_ls
from .autoattack import AutoAttack
from .engine import explain
from .fab import FAB
from .graph import graphs
from .square import Square

__all__ = [
    "APGD",
    "FAB",
    "AutoAttack",
    "PGD",
    "Square",
    "config",
    "cw_linf",
    "explain",
    "fgsm",
    "graphs",
    "losses",
    "pgd",
    "pgd_kl",
    "pgd_ls",
]
