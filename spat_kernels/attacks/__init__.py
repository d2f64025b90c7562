"""The attacks. Each file holds one of them, from its settings to its loop."""

from .apgd import APGD
from .autoattack import AutoAttack
from .fab import FAB
from .pgd import PGD, cw_linf, fgsm, pgd, pgd_kl, pgd_ls
from .square import Square

__all__ = ["APGD", "FAB", "PGD", "AutoAttack", "Square", "cw_linf", "fgsm", "pgd", "pgd_kl", "pgd_ls"]
