"""torchattacks (3.5.1) on fused kernels: `from spat_kernels.compat import torchattacks`, and the script stays as it is.

Here are FGSM, FFGSM, BIM, RFGSM, PGD, PGDL2, TPGD, APGD, APGDT, FAB, Square, MultiAttack, AutoAttack, Attack to derive your own
from, and CWLinf, which torchattacks does not have.

Constructors take the arguments of torchattacks, with its defaults, and those of `spat_kernels` by keyword, such as
precision="bf16". Attributes can be changed afterwards, as in `attack.eps = 4/255`. Where torchattacks is installed, these attacks
are instances of its `Attack`, and `torchattacks.NAME` is its own for every other name that it has.

Not as there: images must lie in [0, 1], but for rounding. They are not clamped in silence. Numbers drawn for a `seed` leave
torch's generator alone, and APGD, FAB, Square and AutoAttack leave misclassified images as they are.
"""

import importlib

from .attack import Attack as Attack
from .attack import Base
from .multi import AutoAttack as AutoAttack
from .multi import MultiAttack as MultiAttack
from .pgd import BIM as BIM
from .pgd import FFGSM as FFGSM
from .pgd import FGSM as FGSM
from .pgd import PGD as PGD
from .pgd import PGDL2 as PGDL2
from .pgd import RFGSM as RFGSM
from .pgd import TPGD as TPGD
from .pgd import CWLinf as CWLinf
from .seeded import APGD as APGD
from .seeded import APGDT as APGDT
from .seeded import FAB as FAB
from .seeded import Square as Square


def __getattr__(name: str):
    if Base is object or (name.startswith("__") and name != "__version__"):
        elsewhere = ": it may be in torchattacks, which is not installed: pip install torchattacks" if Base is object else ""
        raise AttributeError(f"{__name__} has no {name}{elsewhere}")
    return getattr(importlib.import_module("torchattacks"), name)
