"""The PGD inner loop of adversarial training as fused kernels. Start at `pgd_ls` and `PGD`; `config()` says what runs here."""

from . import losses
from ._library import config
from .attacks.adt import ADT
from .attacks.apgd import APGD
from .attacks.autoattack import AutoAttack
from .attacks.fab import FAB
from .attacks.functional import cw_linf, fgsm, pgd, pgd_kl, pgd_ls
from .attacks.pgd import PGD
from .attacks.square import Square
from .cuda_graphs.cache import graphs
from .input_gradient.choose import explain
from .normalize import Normalize

compile_auto: bool = False
"""Whether input_gradient="auto" compiles a module that no plan knows, as "compile" does. Read at each attack."""

__all__ = [
    "ADT",
    "APGD",
    "FAB",
    "AutoAttack",
    "Normalize",
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
