"""Every attack by name: the published ones with their settings, others by a small grammar, NAME[xN][:key=value]*.

    pgd-20                             as published: a name of the list
    pgd-40x20                          with 20 restarts
    pgd-40-least-likely                targeted: -least-likely, -random or -all after any PGD
    pgd-20:alpha=0.2:steps=50          with other settings
    pgd:steps=50:step=1/20:loss=margin:restarts=5:eps=16/255

Names may be in capitals (AutoAttack, PGD-20, AA), and so may the values that are names (norm=L2).
Lengths of steps are in units of eps. eps itself is the evaluation's, or given here, in the units of images in [0, 1]. Losses are
those of `spat_kernels.losses`, each with its settings (alpha, kappa).
"""

from .attack import Attack
from .families import APGD, FAB, FAMILIES, NAMED, PGD, AutoAttack, Clean, Square
from .grammar import parse, parse_all, published

__all__ = [
    "APGD", "FAB", "FAMILIES", "NAMED", "PGD", "Attack", "AutoAttack", "Clean", "Square", "parse", "parse_all", "published",
]  # fmt: skip
